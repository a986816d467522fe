"""Tools for a model: typed functions, their JSON schemas, and the loop that runs what the model calls. No I/O here.

A function's parameters are checked and converted by pydantic, so it gets the types that it names.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_type_hints

import pydantic
import pydantic_core

from llmasos.client.types import ChatCompletion, ToolCall
from llmasos.errors import InvalidInputError, ToolError, ToolLimitError

MAX_PARALLEL = 8
"""Tools of one answer that run at once."""
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True)
class Tool:
    """What a model may call. `run` gets the arguments by name; `arguments` makes them of the JSON that the model wrote
    (default: any object). What it returns goes back as text, or as JSON where it is none."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any]
    arguments: Callable[[str], Mapping[str, Any]] | None = None

    @property
    def definition(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tool(function: Callable[..., Any]) -> Tool:
    """A typed function as a tool: its name, its docstring (Google style), the types and defaults of its parameters.

    Raises InvalidInputError for a parameter without a type, and for types that JSON can't carry.
    """
    name = getattr(function, "__name__", type(function).__name__)
    description, described = _documented(inspect.getdoc(function) or "")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidInputError(
                f"The tool {name} takes {parameter}; a model gives arguments by name.", param="tools"
            )
        if parameter.name not in hints:
            raise InvalidInputError(f"The parameter {parameter.name} of the tool {name} has no type.", param="tools")
        default = ... if parameter.default is parameter.empty else parameter.default
        told = pydantic.Field(default, description=described.get(parameter.name), alias=parameter.name)
        fields[f"field_{parameter.name}"] = (hints[parameter.name], told)  # pydantic keeps some names for itself
    try:
        model = pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
        schema = model.model_json_schema()
    except pydantic.errors.PydanticUserError as e:
        raise InvalidInputError(f"The tool {name} can't be described: {e}", param="tools") from e
    return Tool(name, description, _plain(schema), function, lambda text: _given(model, text))


def _given(model: type[pydantic.BaseModel], text: str) -> dict[str, Any]:
    given = model.model_validate_json(text)
    return {str(model.model_fields[name].alias): getattr(given, name) for name in model.model_fields}


def _plain(schema: Any) -> Any:
    """A schema without pydantic's titles, which say nothing and cost tokens."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _plain(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The description of a docstring, and what its `Args:` say of each parameter."""
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(sections.get("Args", sections.get("Arguments", ""))).splitlines():
        if (start := _ARGUMENT.match(line)) is not None:
            name = start[1]
            found[name] = start[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return parts[0].strip(), found


@dataclass(frozen=True)
class ToolRun:
    """How a tool loop ended. `messages`: the whole conversation, with calls and results; `steps`: answers it took."""

    text: str
    completion: ChatCompletion
    messages: list[dict[str, Any]]
    steps: int


class ToolLoop:
    """The conversation with its tools. Ask the model for an answer to `messages`; `calls` are what is to be run."""

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool | Callable[..., Any]], max_steps: int
    ) -> None:
        given = [one if isinstance(one, Tool) else tool(one) for one in tools]
        self._tools = {one.name: one for one in given}
        if len(self._tools) < len(given):
            raise InvalidInputError("Two tools have the same name.", param="tools")
        if max_steps < 1:
            raise InvalidInputError(f"max_steps is {max_steps}; at least one answer is needed.", param="max_steps")
        self.messages = [dict(message) for message in messages]
        self.max_steps, self.steps = max_steps, 0

    @property
    def definitions(self) -> list[dict[str, Any]]:
        return [one.definition for one in self._tools.values()]

    def calls(self, completion: ChatCompletion) -> list[ToolCall]:
        """Take in the model's answer; none: it is the last one. Raises ToolLimitError."""
        message = completion.choices[0].message
        self.messages.append(message.model_dump(exclude_none=True))
        self.steps += 1
        calls = message.tool_calls or []
        if calls and self.steps >= self.max_steps:
            raise ToolLimitError(
                f"The model still called tools after {self.steps} answers.",
                hint="Raise max_steps, or ask for less.",
                messages=self.messages,
            )
        return calls

    def done(self, completion: ChatCompletion) -> ToolRun:
        return ToolRun(completion.choices[0].message.content or "", completion, self.messages, self.steps)

    def run(self, calls: Sequence[ToolCall]) -> None:
        """Run the tools, several at once in threads, and take in their results. Raises ToolError."""
        if len(calls) == 1:
            self._add(calls, [self._run(calls[0])])
            return
        with ThreadPoolExecutor(max_workers=min(MAX_PARALLEL, len(calls))) as pool:
            futures = [pool.submit(contextvars.copy_context().run, self._run, call) for call in calls]
        self._add(calls, [future.result() for future in futures])

    async def arun(self, calls: Sequence[ToolCall]) -> None:
        """The same: coroutines run in this event loop, plain functions in threads. A failure cancels the others."""
        limit = asyncio.Semaphore(MAX_PARALLEL)

        async def one(call: ToolCall) -> str:
            async with limit:
                return await self._arun(call)

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            self._add(calls, list(await asyncio.gather(*tasks)))
        finally:
            for task in tasks:
                task.cancel()

    def _add(self, calls: Sequence[ToolCall], results: Sequence[str]) -> None:
        for call, result in zip(calls, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def _run(self, call: ToolCall) -> str:
        found, arguments = self._prepare(call)
        if found is None:
            return str(arguments)
        try:
            result = found.run(**arguments)
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError("it is a coroutine function; use AsyncClient")
            return _text(result)
        except Exception as e:
            raise self._failed(call, e) from e

    async def _arun(self, call: ToolCall) -> str:
        found, arguments = self._prepare(call)
        if found is None:
            return str(arguments)
        try:
            if inspect.iscoroutinefunction(found.run):
                return _text(await found.run(**arguments))
            return _text(await asyncio.to_thread(found.run, **arguments))
        except Exception as e:
            raise self._failed(call, e) from e

    def _prepare(self, call: ToolCall) -> tuple[Tool | None, Any]:
        """The tool and its arguments; None and a text for the model where it got something wrong."""
        found = self._tools.get(call.function.name)
        if found is None:
            return None, f"Error: there is no tool {call.function.name!r}; there are: {', '.join(self._tools)}."
        try:
            return found, (found.arguments or _object)(call.function.arguments or "{}")
        except pydantic.ValidationError as e:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in e.errors())
            return None, f"Error: the arguments are wrong: {wrong}."
        except ValueError as e:
            return None, f"Error: the arguments are wrong: {e}."

    def _failed(self, call: ToolCall, e: Exception) -> ToolError:
        message = f"The tool {call.function.name} failed: {e or type(e).__name__}"
        return ToolError(message, hint="Let it return a text that the model can go on from.", messages=self.messages)


def _object(text: str) -> dict[str, Any]:
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError("they are not a JSON object")
    return given


def _text(result: Any) -> str:
    return result if isinstance(result, str) else pydantic_core.to_json(result).decode()
