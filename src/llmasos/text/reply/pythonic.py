"""Calls as Python writes them: `[f(a=1, b="x"), g()]` (Llama 4, ToolACE), LFM2's between two marks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from llmasos.text.reply.calls import CallForm, Calls, Tools, named
from llmasos.text.reply.layout import (
    CallLayout,
    Literal,
    Optional,
    Piece,
    Schema,
    definitions_of,
    function_of,
    parameters_of,
)
from llmasos.text.reply.source import Malformed, Reading, Source

_MARKS = re.compile(r"""["'()\[\]{}]""")
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_JSON_WORDS = {"true": True, "false": False, "null": None}


class PythonicCalls(CallForm):
    """`begin` and `end` stand around the list, where the model has marks for it; without, only a reply that begins with
    a list of calls of known functions is one."""

    def __init__(self, begin: str = "", end: str = "") -> None:
        self.begins = (begin,) if begin else ()
        self.tokens = (end,) if end else ()
        self.at_start, self.stop = ("" if begin else "["), end

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        yield from source.skip_space()
        yield from source.expect("[")
        while True:
            yield from source.skip_space()
            name, _ = yield from source.until("(")
            name = named(name)
            if not begin and name not in calls.parameters:
                raise Malformed
            arguments = yield from read_arguments(source)
            calls.begin(name)
            calls.add(arguments)
            calls.end(source)
            yield from source.skip_space()
            if not (yield from source.take(",")):
                break
        yield from source.take("]")
        if self.stop:
            yield from source.skip_space()
            yield from source.close(self.stop)
        calls.end(source)

    def layout(self, tools: Tools) -> CallLayout:
        begin = (self.begins[0] if self.begins else "") + "["
        return CallLayout(begin, tuple(map(_call, tools)), ", ", "]" + self.stop, self.at_start)


def _call(tool: Any) -> tuple[Piece, ...]:
    """Required arguments first, so that the others can follow a comma each."""
    schema = parameters_of(tool)
    definitions, required = definitions_of(tool), list(schema.get("required") or ())
    given = (schema.get("properties") or {}).items()
    properties = {key: {**one, **definitions} if isinstance(one, Mapping) else {} for key, one in given}
    first = [key for key in properties if key in required]
    pieces: list[Piece] = [Literal(f"{function_of(tool)['name']}(")]
    for at, key in enumerate(first):
        pieces += [Literal(f"{', ' if at else ''}{key}="), Schema(properties[key])]
    for key in properties:
        if key not in required and first:
            pieces.append(Optional((Literal(f", {key}="), Schema(properties[key]))))
    if not first and properties:  # any of them, alone
        pieces.append(Optional((Literal(f"{next(iter(properties))}="), Schema(next(iter(properties.values()))))))
    return (*pieces, Literal(")"))


def read_arguments(source: Source) -> Reading[str]:
    """Keyword arguments up to the `)` that ends them, which is read; as the text of a JSON object."""
    start = source.at
    closes = [")"]
    quote = ""
    while closes:
        if quote:
            found = re.compile(r"\\|" + quote).search(source.text, source.at)
        else:
            found = _MARKS.search(source.text, source.at)
        if found is None or (found[0] == "\\" and found.end() >= len(source.text)):
            source.at = found.start() if found else len(source.text)
            if source.is_over:
                source.at = len(source.text)
                raise Malformed
            yield
            continue
        mark, source.at = found[0], found.end()
        if mark == "\\":
            source.at += 1
        elif quote:
            quote = ""
        elif mark in "\"'":
            quote = mark
        elif mark in _CLOSES:
            closes.append(_CLOSES[mark])
        elif closes.pop() != mark:
            raise Malformed
    return _as_json(source.text[start : source.at])


def _as_json(arguments: str) -> str:
    try:
        call = ast.parse(f"f({arguments}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise Malformed
        found = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, AssertionError):
        raise Malformed from None


def _value(node: ast.expr) -> Any:
    """A literal; JSON's words are taken for Python's."""
    if isinstance(node, ast.Name) and node.id in _JSON_WORDS:
        return _JSON_WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _value(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)
