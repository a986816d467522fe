"""Tools that come with LLMasOS: Python in the sandbox, knowledge bases, tasks; and those of a Python file."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.client.tools import Tool, plain_schema, tool
from llmasos.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from llmasos.apps.knowledge import KnowledgeBase, Passage

PYTHON_SECONDS = 30.0
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


def tool_name(*parts: str) -> str:
    """A name that every API takes: letters, digits, `_` and `-`, 64 at most."""
    return _NOT_A_NAME.sub("_", "_".join(parts)).strip("_")[:64] or "tool"


def python_tool(*, timeout: float = PYTHON_SECONDS, memory: int = 512 * 2**20) -> Tool:
    """`run_python`: a program in the sandbox, without a network and without files. `timeout`: seconds; `memory`: bytes.
    Where the system can't hold it to that, it runs nothing and says so."""
    from llmasos.apps import sandbox

    @tool(timeout=timeout + 10)
    def run_python(code: str) -> str:
        """Run a Python program and get what it prints. Use it to calculate, count, sort, or check something. It has no
        network and no files, and every run starts anew.

        Args:
            code: The whole program. It must print what you want to know.
        """
        result = sandbox.run_python(code, timeout=timeout, memory=memory)
        parts = [result.stdout.rstrip("\n")]
        if result.stderr.strip():
            parts.append(f"[stderr]\n{result.stderr.strip()}")
        if result.truncated:
            parts.append("[It printed more than is shown.]")
        if result.reason != "exited":
            parts.append(f"[It was ended: {result.reason}.]")
        elif result.exit_code:
            parts.append(f"[It ended with the exit code {result.exit_code}.]")
        return "\n".join(part for part in parts if part) or "[It printed nothing.]"

    return run_python


def knowledge_tool(
    base: KnowledgeBase | str, *, k: int = 5, about: str = "", search: Callable[[str, int], Any] | None = None
) -> Tool:
    """`search_NAME`: passages of a knowledge base with where they stand. `about`: what is in it, for the model.
    `search`: another way to search it, maybe a coroutine function (the server has one)."""
    from llmasos.apps.knowledge import KnowledgeBase

    name = base if isinstance(base, str) else base.name
    found = KnowledgeBase.open(base, create=False) if isinstance(base, str) and search is None else base

    async def run(query: str, number: int) -> str:
        if search is not None:
            passages = await search(query, number)
        else:
            assert isinstance(found, KnowledgeBase)
            passages = await asyncio.to_thread(found.search, query, number)
        return _shown(passages)

    async def search_base(query: str, number: int = k) -> str:
        """Search documents.

        Args:
            query: What to look for, in words.
            number: How many passages, 1 to 20.
        """
        return await run(query, max(1, min(number, 20)))

    described = f"Search the documents of {name!r} and get the passages that fit best, with where they stand."
    made = tool(name=tool_name("search", name), read_only=True)(search_base)
    return Tool(made.name, f"{described} {about}".strip(), made.parameters, made.run, made.arguments, read_only=True)


def _shown(passages: list[Passage]) -> str:
    if not passages:
        return "Nothing was found."
    return "\n\n".join(f"[{i}] {one.short_citation}\n{one.text}" for i, one in enumerate(passages, 1))


def task_tool(name: str, *, model: Any = None) -> Tool:
    """A task of `llmasos.tasks`, by its name, done by `model` (default: the task's own)."""
    from llmasos.tasks import find_task

    found = find_task(name)

    async def run(**inputs: Any) -> Any:
        return await found.arun(model=model, **inputs)

    def arguments(text: str) -> dict[str, Any]:
        given = found.inputs.model_validate_json(text)
        return {key: getattr(given, key) for key in given.model_fields_set}

    schema = plain_schema(found.inputs.model_json_schema())
    return Tool(found.name, f"{found.summary}. {found.__doc__ or ''}".strip(), schema, run, arguments, read_only=True)


def tools_of_file(path: str | Path) -> list[Tool]:
    """What a Python file made with `@tool`. The file is run. Raises NotFoundError, and InvalidInputError for a file
    without tools or one that fails."""
    import runpy

    place = Path(path).expanduser()
    if not place.is_file():
        raise NotFoundError(f"There is no file {str(path)!r}.", hint="Check the path.")
    try:
        names = runpy.run_path(str(place), run_name=place.stem)
    except (Exception, SystemExit) as e:
        raise InvalidInputError(f"{path} failed: {type(e).__name__}: {e}", param="tools") from e
    found = {one.name: one for one in names.values() if isinstance(one, Tool)}
    if not found:
        raise InvalidInputError(
            f"{path} has no tools.", hint="Write @tool (of llmasos.client) above a typed function.", param="tools"
        )
    return list(found.values())


def named_tools(word: str, *, model: Any = None) -> list[Tool]:
    """What a word of the command line means: `python`, `knowledge:NAME`, `task:NAME`, a Python file with tools. The
    word is their source: a run that waits finds its tools again by it."""
    kind, _, rest = word.partition(":")
    source = word
    if word == "python":
        found = [python_tool()]
    elif kind == "knowledge" and rest:
        found = [knowledge_tool(rest)]
    elif kind == "task" and rest:
        found = [task_tool(rest, model=model)]
    elif word.endswith(".py"):
        found, source = tools_of_file(word), str(Path(word).expanduser().absolute())
    else:
        raise unknown_tool(word)
    return [replace(one, source=source) for one in found]


def unknown_tool(word: str) -> InvalidInputError:
    return InvalidInputError(
        f"There is no tool {word!r}.", hint="python, knowledge:NAME, task:NAME, mcp:NAME, or a file.py.", param="tools"
    )
