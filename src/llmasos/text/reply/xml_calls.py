"""Calls whose arguments are tags, one per argument: Qwen3-Coder, Seed-OSS, MiniMax-M2, DeepSeek V3.2, GLM-4.5.

The text of a tag says nothing about its type: the tool's schema does. What becomes of it is the JSON of an object,
piece by piece: a text as it comes, anything else when its tag is closed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

from llmasos.text.reply.calls import CallForm, Calls, Tools, named
from llmasos.text.reply.layout import (
    CallLayout,
    Free,
    Literal,
    Matching,
    OneOf,
    Optional,
    Piece,
    Schema,
    definitions_of,
    function_of,
    parameters_of,
)
from llmasos.text.reply.source import Malformed, Reading, Source

_MOST_COUNTED = 2000
"""Longer texts are not counted: each character costs a grammar memory."""
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class _Arguments:
    """The JSON text of one call's arguments, as far as they are known."""

    def __init__(self, calls: Calls, name: str) -> None:
        self.calls = calls
        self.properties: Mapping[str, Any] = calls.parameters.get(name, {}).get("properties") or {}
        self.count = 0

    def key(self, key: str) -> None:
        self.calls.add(("{" if self.count == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self.count += 1

    def close(self) -> None:
        self.calls.add("{}" if self.count == 0 else "}")

    def value(self, source: Source, key: str, ends: tuple[str, ...], as_text: bool | None = None) -> Reading[bool]:
        """The text before one of `ends`, as a value; whether one of them came. `as_text`: what the model says of it."""
        kinds = _kinds(self.properties.get(key))
        self.key(key)
        if as_text or (as_text is None and kinds == {"string"}):
            self.calls.add('"')
            found = yield from source.pass_until(ends, lambda piece: self.calls.add(_quoted(piece)))
            if found:
                self.calls.add('"')
            return bool(found)
        pieces: list[str] = []
        found = yield from source.pass_until(ends, pieces.append)
        text = "".join(pieces)
        self.calls.add(_json_of(text, kinds) if found else _quoted(text))
        return bool(found)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _kinds(schema: Any) -> set[str]:
    """The types that a value may have; empty if the schema doesn't say."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {k for k in kind if isinstance(k, str)}
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices and all(isinstance(choice, str) for choice in choices):
        return {"string"}
    several = schema.get("anyOf") or schema.get("oneOf") or ()
    return {kind for one in several if isinstance(one, Mapping) for kind in _kinds(one)}


def _json_of(text: str, kinds: set[str]) -> str:
    plain = text.strip()
    if "string" in kinds and not (plain == "null" and "null" in kinds):
        return json.dumps(text, ensure_ascii=False)
    if plain.lower() in _WORDS:
        return _WORDS[plain.lower()]
    try:
        if isinstance(json.loads(plain, strict=False), str) and "string" not in kinds and kinds:
            return json.dumps(text, ensure_ascii=False)
        return plain
    except (ValueError, RecursionError):
        pass
    try:
        return json.dumps(ast.literal_eval(plain), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return json.dumps(text, ensure_ascii=False)


class XmlCalls(CallForm):
    """Calls between the two texts of a `wrapper`: `call` name `call_end`, then for each argument `argument` key
    `key_end` value `argument_end`, then `close`. `lines`: a line break stands on both sides of a value. `typed`: behind
    a key stands string="true" or "false"."""

    def __init__(
        self,
        wrappers: tuple[tuple[str, str], ...],
        *,
        call: tuple[str, str, str],
        argument: tuple[str, str, str],
        lines: bool = False,
        typed: bool = False,
    ) -> None:
        self.wrappers = dict(wrappers)
        self.call, self.call_end, self.close = call
        self.argument, self.key_end, self.argument_end = argument
        self.lines, self.typed = lines, typed
        self.begins = (*self.wrappers, self.call)  # models leave the wrapper out now and then
        self.tokens = tuple(self.wrappers.values())

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        end = self.wrappers.get(begin, "")
        if begin != self.call:
            yield from source.skip_space()
            yield from source.expect(self.call)
        while True:
            closed = yield from self._call(source, calls, end)
            calls.end(source)
            if not closed:
                return
            yield from source.skip_space()
            if end and (yield from source.close(end)):
                calls.end(source)
                return
            if not (yield from source.take(self.call)):
                return

    def _call(self, source: Source, calls: Calls, end: str) -> Reading[bool]:
        """Whether the call was closed, so that another can follow."""
        name, _ = yield from source.until(self.call_end)
        name = named(name)
        yield from source.skip_space()
        stops = (self.argument, self.close, *((end,) if end else ()))
        found = yield from source.close(*stops)
        if not found:
            raise Malformed
        calls.begin(name)
        arguments = _Arguments(calls, name)
        while found == self.argument:
            if not (yield from self._argument(source, arguments)):
                return False
            yield from source.skip_space()
            found = yield from source.close(*stops)
        if found or not source.is_over:
            arguments.close()
        return found == self.close

    def _argument(self, source: Source, arguments: _Arguments) -> Reading[bool]:
        try:
            key, _ = yield from source.until(self.key_end)
            as_text = None
            if self.typed:
                attribute, _ = yield from source.until(">")
                as_text = 'string="true"' in attribute if "string=" in attribute else None
        except Malformed:
            if not source.is_over:
                arguments.close()
            return False
        ends: tuple[str, ...] = (self.argument_end,)
        if self.lines:
            yield from source.take("\n")
            ends = ("\n" + self.argument_end, self.argument_end)
        return (yield from arguments.value(source, key.strip(), ends, as_text))

    def layout(self, tools: Tools) -> CallLayout:
        begin, end = next(iter(self.wrappers.items()))
        calls: list[tuple[Piece, ...]] = []
        for tool in tools:
            head = f"{self.call}{function_of(tool)['name']}{self.call_end}\n"
            calls.append((Literal(head), *_tagged(tool, self._argument_pieces), Literal(self.close + "\n")))
        return CallLayout(f"{begin}\n", tuple(calls), f"{end}\n{begin}\n" if self.lines else "", end)

    def _argument_pieces(self, key: str, schema: Any) -> tuple[Piece, ...]:
        line = "\n" if self.lines else ""
        text = _kinds(schema) == {"string"}
        attribute = f' string="{"true" if text else "false"}">' if self.typed else ""
        begin = f"{self.argument}{key}{self.key_end}{attribute}{line}"
        return (Literal(begin), *_value_pieces(schema, line + self.argument_end), Literal("\n"))


class TaggedCalls(CallForm):
    """GLM-4.5's: `<tool_call>` name, then `<arg_key>` key `</arg_key>` `<arg_value>` value `</arg_value>` for each
    argument, then `</tool_call>`."""

    begins = ("<tool_call>",)
    tokens = ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        yield from source.skip_space()
        name, end = yield from source.until("\n", "<arg_key>", "</tool_call>")
        name = named(name)
        if end == "\n":
            yield from source.skip_space()
            end = yield from source.close("<arg_key>", "</tool_call>")
        if not end:
            raise Malformed
        calls.begin(name)
        arguments = _Arguments(calls, name)
        while end == "<arg_key>":
            try:
                key, _ = yield from source.until("</arg_key>")
                yield from source.skip_space()
                yield from source.expect("<arg_value>")
            except Malformed:
                end = ""
                break
            if not (yield from arguments.value(source, key.strip(), ("</arg_value>",))):
                break
            yield from source.skip_space()
            end = yield from source.close("<arg_key>", "</tool_call>")
        if end == "</tool_call>" or not source.is_over:
            arguments.close()
        calls.end(source)

    def layout(self, tools: Tools) -> CallLayout:
        calls = []
        for tool in tools:
            head = Literal(f"<tool_call>{function_of(tool)['name']}\n")
            calls.append((head, *_tagged(tool, _tag_pieces), Literal("</tool_call>")))
        return CallLayout("", tuple(calls), "\n", "")


def _tag_pieces(key: str, schema: Any) -> tuple[Piece, ...]:
    begin = f"<arg_key>{key}</arg_key>\n<arg_value>"
    return (Literal(begin), *_value_pieces(schema, "</arg_value>"), Literal("\n"))


def _tagged(tool: Any, pieces: Callable[[str, Any], tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """All arguments in the schema's order; those that are not required may be left out."""
    schema = parameters_of(tool)
    definitions = definitions_of(tool)
    found: list[Piece] = []
    for key, one in (schema.get("properties") or {}).items():
        argument = pieces(key, {**one, **definitions} if isinstance(one, Mapping) else one)
        found += argument if key in (schema.get("required") or ()) else (Optional(argument),)
    return tuple(found)


def _value_pieces(schema: Any, end: str) -> tuple[Piece, ...]:
    if _kinds(schema) != {"string"}:
        return (Schema(schema), Literal(end))
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices:
        return (OneOf(tuple(choices)), Literal(end))
    if regex := _regex(schema):
        return (Matching(regex), Literal(end))
    return (Free(end),)


def _regex(schema: Mapping[str, Any]) -> str:
    """What a text's schema says of it, as far as a grammar can hold it; empty if it says nothing. Texts of a given
    length are written without `<`, which could be taken for the end of their tag."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        free = "[^<]*"
        return ("" if pattern.startswith("^") else free) + pattern.strip("^$") + ("" if pattern.endswith("$") else free)
    low, high = schema.get("minLength") or 0, schema.get("maxLength")
    if high is not None and high <= _MOST_COUNTED:
        return f"[^<]{{{low},{high}}}"
    return f"[^<]{{{low},}}" if 0 < low <= _MOST_COUNTED else ""
