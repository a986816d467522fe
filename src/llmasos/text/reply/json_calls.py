"""Calls as JSON objects: {"name": ..., "arguments": {...}}, alone, in a row or in a list, with or without marks.

Hermes 2 and 3, Qwen 2.5 and 3 (`<tool_call>`), Mistral (`[TOOL_CALLS]`), Granite 3, Phi-4-mini (`<|tool_call|>`),
Command R7B (`<|START_ACTION|>`), Nemotron (`<TOOLCALL>`), Llama 3.x (no mark, or `<|python_tag|>`).
"""

from __future__ import annotations

from collections.abc import Mapping

from llmasos.text.reply.calls import CallForm, Calls, Tools, arguments_of, named, object_text, random_id
from llmasos.text.reply.layout import CallLayout, Literal, Piece, Schema, definitions_of, function_of, parameters_of
from llmasos.text.reply.pythonic import read_arguments
from llmasos.text.reply.source import Malformed, Reading, Source

_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")


class JsonCalls(CallForm):
    """`pairs`: what begins calls, and what ends them (empty: nothing does). `listed`, `name` and `arguments` say how
    the model itself writes: in a list, and under which keys. Everything that others write is read, too."""

    def __init__(
        self,
        pairs: Mapping[str, str],
        *,
        listed: bool = False,
        space: str = "",
        name: str = "name",
        arguments: str = "arguments",
        at_start: str = "",
    ) -> None:
        self.pairs, self.listed, self.space = dict(pairs), listed, space
        self.name, self.arguments = name, arguments
        self.begins = tuple(pairs)
        self.tokens = tuple(end for end in pairs.values() if end)
        self.at_start = at_start

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        end, before = self.pairs.get(begin, ""), calls.count
        first = yield from source.skip_space()
        if listed := first == "[":
            source.at += 1
        while (yield from source.skip_space()) == "{":
            right = yield from self._call(source, calls, end, known_only=not begin)
            calls.end(source)
            if not right:
                return
            yield from source.skip_space()
            yield from source.take(",", ";")
        if calls.count == before:
            raise Malformed
        if listed:
            yield from source.take("]")
        if end:
            yield from source.skip_space()
            yield from source.close(end)
        calls.end(source)

    def _call(self, source: Source, calls: Calls, end: str, *, known_only: bool) -> Reading[bool]:
        name = id = held = None
        begun = False
        source.at += 1

        def begin(name: str) -> None:
            if known_only and name not in calls.parameters:
                raise Malformed  # an answer in JSON, not a call
            calls.begin(name, id)

        while True:
            mark = yield from source.skip_space()
            if mark in ("}", ""):
                break
            if mark == ",":
                source.at += 1
                continue
            if mark != '"':
                if begun:
                    return True  # the outer bracket was forgotten: what ends the call follows
                raise Malformed
            key = yield from source.string()
            yield from source.skip_space()
            yield from source.expect(":")
            value = yield from source.skip_space()
            if key in _NAMES and name is None and value == '"':
                name = yield from source.string()
                if not name:
                    raise Malformed
            elif key in _ARGUMENTS and not begun:
                if name is not None and value == "{":
                    begin(name)
                    begun = True
                    if not (yield from arguments_of(source, calls, (end,) if end else ())):
                        return False
                    continue
                held = object_text((yield from source.value()))
                if held is None:
                    raise Malformed
            elif key == "id" and value == '"':
                id = (yield from source.string()) or None
            else:
                yield from source.value()
        if mark == "}":
            source.at += 1
        if not begun:
            if name is None or not mark:
                raise Malformed
            begin(name)
            calls.add(held or "{}")
        return True

    def layout(self, tools: Tools) -> CallLayout:
        begin, end = next(iter(self.pairs.items()), ("", ""))
        calls = tuple((Schema(self._schema(tool)),) for tool in tools)
        if self.listed:
            return CallLayout(f"{begin}[", calls, ", ", f"]{end}", self.at_start)
        begin, end = begin + self.space, self.space + end
        wrapped: tuple[tuple[Piece, ...], ...] = tuple((*_text(begin), *call, *_text(end)) for call in calls)
        return CallLayout("", wrapped, "; " if not end else "\n" if self.space else "", "", self.at_start)

    def _schema(self, tool: Mapping[str, object]) -> dict[str, object]:
        function, definitions = function_of(tool), definitions_of(tool)
        parameters = {key: value for key, value in parameters_of(tool).items() if key not in definitions}
        return {
            "type": "object",
            "properties": {self.name: {"const": function["name"]}, self.arguments: parameters},
            "required": [self.name, self.arguments],
            "additionalProperties": False,
            **definitions,
        }


def _text(text: str) -> tuple[Piece, ...]:
    return (Literal(text),) if text else ()


class LlamaCalls(JsonCalls):
    """Llama 3.x: JSON without a mark at the start of the reply, JSON behind `<|python_tag|>`, or behind it
    `name.call(a=1)`, as the built-in tools are called."""

    def __init__(self) -> None:
        super().__init__({"<|python_tag|>": ""}, arguments="parameters", at_start="{")

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        if (yield from source.skip_space()) in ("{", "["):
            yield from super().read(source, calls, begin)
            return
        name, _ = yield from source.until(".call(")
        name = named(name)
        arguments = yield from read_arguments(source)
        calls.begin(name)
        calls.add(arguments)
        calls.end(source)

    def layout(self, tools: Tools) -> CallLayout:
        calls = tuple((Schema(self._schema(tool)),) for tool in tools)
        return CallLayout("", calls, "; ", "", self.at_start)


class MistralCalls(JsonCalls):
    """`[TOOL_CALLS]` and a list of JSON objects, or (since 2025) `[TOOL_CALLS]name[ARGS]{...}` for each call. Mistral's
    templates take ids of nine letters and digits only."""

    def __init__(self, *, named: bool) -> None:
        super().__init__({"[TOOL_CALLS]": ""}, listed=True)
        self.tokens = ("[ARGS]", "[CALL_ID]")
        self.named = named

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        if (yield from source.skip_space()) in ("{", "["):
            yield from super().read(source, calls, begin)
            return
        name, mark = yield from source.until("[ARGS]", "[CALL_ID]", "{")
        id = None
        if mark == "[CALL_ID]":
            id, mark = yield from source.until("[ARGS]", "{")
        if mark == "{":
            source.at -= 1
        elif (yield from source.skip_space()) != "{":
            raise Malformed
        calls.begin(named(name), id.strip() if id else None)
        yield from arguments_of(source, calls, self.begins)
        calls.end(source)

    def layout(self, tools: Tools) -> CallLayout:
        if not self.named:
            return super().layout(tools)
        calls = tuple(
            (Literal(f"[TOOL_CALLS]{function_of(tool)['name']}[ARGS]"), Schema(parameters_of(tool))) for tool in tools
        )
        return CallLayout("", calls, "", "")

    def new_id(self) -> str:
        return random_id(9, "")
