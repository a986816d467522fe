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
from dataclasses import dataclass, replace
from typing import Any, get_type_hints, overload

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
    (default: any object). What it returns goes back as text, or as JSON where it is none.

    What follows is for agents. `read_only`: it changes nothing; `destructive`: what it changes can't be undone.
    `approval`: whether somebody must agree to a call, or a function that says so of the arguments; None: if it is
    destructive. `timeout`: seconds. `source`: where a tool that is none of the program's comes from.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any]
    arguments: Callable[[str], Mapping[str, Any]] | None = None
    read_only: bool = False
    destructive: bool = False
    approval: bool | Callable[[Mapping[str, Any]], bool] | None = None
    timeout: float | None = None
    source: str = ""

    @property
    def definition(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself: a decorated one can still be called and tested as Python."""
        return self.run(*args, **kwargs)

    def needs_approval(self, arguments: Mapping[str, Any]) -> bool:
        if callable(self.approval):
            return bool(self.approval(arguments))
        return self.destructive if self.approval is None else self.approval


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    read_only: bool = False,
    destructive: bool = False,
    approval: bool | Callable[[Mapping[str, Any]], bool] | None = None,
    timeout: float | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    read_only: bool = False,
    destructive: bool = False,
    approval: bool | Callable[[Mapping[str, Any]], bool] | None = None,
    timeout: float | None = None,
) -> Any:
    """A typed function as a tool: its name, its docstring (Google style), the types and defaults of its parameters.

    Decorates with or without options, which are the fields of `Tool`. Raises InvalidInputError for a parameter without
    a type, for types that JSON can't carry, and for a tool that is both read_only and destructive.
    """
    if read_only and destructive:
        raise InvalidInputError("A tool that only reads destroys nothing.", hint="Leave out one of the two.")

    def made(given: Callable[..., Any]) -> Tool:
        options: dict[str, Any] = {"approval": approval, "timeout": timeout}
        return replace(_described(given, name), read_only=read_only, destructive=destructive, **options)

    return made if function is None else made(function)


def _described(function: Callable[..., Any], given_name: str | None) -> Tool:
    name = str(given_name or getattr(function, "__name__", type(function).__name__))
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
    return Tool(name, description, plain_schema(schema), function, lambda text: _given(model, text))


def _given(model: type[pydantic.BaseModel], text: str) -> dict[str, Any]:
    given = model.model_validate_json(text)
    return {str(model.model_fields[name].alias): getattr(given, name) for name in model.model_fields}


def plain_schema(schema: Any) -> Any:
    """A schema without pydantic's titles, which say nothing and cost tokens."""
    if isinstance(schema, list):
        return [plain_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: plain_schema(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}


def by_name(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by their names. Raises InvalidInputError for two of one name."""
    given = [one if isinstance(one, Tool) else tool(one) for one in tools]
    found = {one.name: one for one in given}
    if len(found) < len(given):
        raise InvalidInputError("Two tools have the same name.", param="tools")
    return found


def prepare(tools: Mapping[str, Tool], name: str, arguments: str) -> tuple[Tool | None, Any]:
    """The tool of a call and its arguments; None and a text for the model where it got something wrong."""
    found = tools.get(name)
    if found is None:
        return None, f"Error: there is no tool {name!r}; there are: {', '.join(tools)}."
    try:
        return found, (found.arguments or _object)(arguments or "{}")
    except pydantic.ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in e.errors())
        return None, f"Error: the arguments are wrong: {wrong}."
    except (ValueError, RecursionError) as e:
        return None, f"Error: the arguments are wrong: {e}."


def as_text(result: Any) -> str:
    """What a tool returned, as the model reads it. Raises ValueError for what JSON can't carry."""
    return result if isinstance(result, str) else pydantic_core.to_json(result).decode()


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
        self._tools = by_name(tools)
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
            return as_text(result)
        except Exception as e:
            raise self._failed(call, e) from e

    async def _arun(self, call: ToolCall) -> str:
        found, arguments = self._prepare(call)
        if found is None:
            return str(arguments)
        try:
            if inspect.iscoroutinefunction(found.run):
                return as_text(await found.run(**arguments))
            return as_text(await asyncio.to_thread(found.run, **arguments))
        except Exception as e:
            raise self._failed(call, e) from e

    def _prepare(self, call: ToolCall) -> tuple[Tool | None, Any]:
        return prepare(self._tools, call.function.name, call.function.arguments)

    def _failed(self, call: ToolCall, e: Exception) -> ToolError:
        message = f"The tool {call.function.name} failed: {e or type(e).__name__}"
        return ToolError(message, hint="Let it return a text that the model can go on from.", messages=self.messages)


def _object(text: str) -> dict[str, Any]:
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError("they are not a JSON object")
    return given
