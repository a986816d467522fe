"""One grammar for a whole reply: reasoning, then text in the form that was asked for, or calls of tools, or either.

Written in llguidance's Lark. What stands in a model's own marks must be meant as its special tokens, where they are
such; and a text that is free must end where a call begins, or the grammar would let the model write anything in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmasos.errors import UnsupportedError
from llmasos.inference.request import StructuredOutput
from llmasos.text.reply.layout import CallLayout, Free, Literal, Matching, OneOf, Optional, Piece, Schema

JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write an object, as json.dumps does: a small model can't run on in white space, and more is forced."""


@dataclass(frozen=True)
class Calls:
    """Calls that a reply may have, or must (`required`); one at most without `parallel`. `mark`: what begins a call in
    the midst of text; empty where calls stand alone. `strict`: what can't be enforced of a schema is an error, not
    left out."""

    layout: CallLayout
    mark: str
    required: bool = False
    parallel: bool = True
    strict: bool = False


@dataclass(frozen=True)
class Reasoning:
    """What begins and ends reasoning. `begun`: the prompt has begun it."""

    begin: str
    end: str
    begun: bool


def reply_grammar(
    *,
    calls: Calls | None = None,
    form: StructuredOutput | None = None,
    reasoning: Reasoning | None = None,
    special: Mapping[str, int] | None = None,
) -> StructuredOutput:
    """`special`: ids of the tokenizer's special tokens by their text. Raises UnsupportedError for a grammar as `form`
    beside anything else: two grammars don't join."""
    if calls is None and reasoning is None and form is not None:
        return form
    writer = _Writer(special or {})
    body = writer.body(calls, form)
    if reasoning is not None:
        body = f"{writer.reasoning(reasoning)} ({body})"
    rules = [f"start: {body}", *writer.rules, "TEXT: /(.|\\n)*/", "SPACE: /[ \\n]{1,4}/"]
    return StructuredOutput(grammar="%llguidance {}\n" + "\n".join(rules))


class _Writer:
    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special
        self.rules: list[str] = []
        self._free: dict[str, str] = {}

    def body(self, calls: Calls | None, form: StructuredOutput | None) -> str:
        if calls is None:
            return self.form(form)
        if calls.required:
            return self.calls(calls)
        if form is not None:
            return f"{self.calls(calls)} | {self.form(form)}"
        if not calls.mark:
            not_a_call = "".join(re.escape(c) for c in calls.layout.at_start)
            self.rules.append(f"FREE: /[ \\t\\r\\n]*([^ \\t\\r\\n{not_a_call}](.|\\n)*)?/")
            return f"{self.calls(calls)} | FREE"
        self.rules.append(f"block: {self.until(calls.mark)} {self.calls(calls, without=calls.mark)}")
        # without parallel: nothing behind the call
        return "block* TEXT" if calls.parallel else "block | TEXT"

    def form(self, form: StructuredOutput | None) -> str:
        if form is None:
            return "TEXT"
        if form.regex is not None:
            return _regex(form.regex)
        if form.choice is not None:
            return "(" + " | ".join(map(_quoted, form.choice)) + ")"
        if form.grammar is not None:
            raise UnsupportedError(
                "A grammar for the output can't be combined with tools.",
                hint="Leave out one of them, or give a JSON Schema.",
                param="structured_outputs",
            )
        return _json(json.loads(form.json) if isinstance(form.json, str) else {"type": "object"}, strict=True)

    def reasoning(self, reasoning: Reasoning) -> str:
        rest = self.until(reasoning.end)
        written = rest if reasoning.begun else f"({self.text(reasoning.begin)} {rest})?"
        return f"{written} SPACE?"

    def calls(self, calls: Calls, without: str = "") -> str:
        """All calls, but for a text at their beginning that is written already."""
        layout = calls.layout
        first = [self.call(call, calls.strict, without if not layout.begin else "") for call in layout.calls]
        later = [self.call(call, calls.strict) for call in layout.calls]
        parts = [self.text(layout.begin.removeprefix(without)), f"({' | '.join(first)})"]
        # behind a mark in free text the next call finds its way through that text, but in a list only here
        if calls.parallel and (not without or layout.begin):
            parts.append(f"({self.text(layout.between)} ({' | '.join(later)}))*")
        return " ".join(part for part in (*parts, self.text(layout.end)) if part)

    def call(self, pieces: Sequence[Piece], strict: bool, without: str = "") -> str:
        if without:
            first = pieces[0]
            assert isinstance(first, Literal) and first.text.startswith(without)
            pieces = (Literal(first.text.removeprefix(without)), *pieces[1:])
        return " ".join(written for piece in pieces if (written := self.piece(piece, strict)))

    def piece(self, piece: Piece, strict: bool) -> str:
        match piece:
            case Literal(text):
                return self.text(text)
            case Schema(schema):
                return _json(schema, strict)
            case Free(end):
                return self.until(end)
            case Matching(regex):
                return _regex(regex)
            case OneOf(texts):
                return "(" + " | ".join(map(_quoted, texts)) + ")"
            case Optional(pieces):
                return f"({self.call(pieces, strict)})?"

    def text(self, text: str) -> str:
        """Special tokens by id, the rest quoted."""
        return " ".join(f"<[{self.special[p]}]>" if p in self.special else _quoted(p) for p in self.cut(text))

    def until(self, end: str) -> str:
        """Any text and `end`."""
        first, *rest = self.cut(end)
        if first in self.special:
            return f"TEXT {self.text(end)}"  # no text holds a special token
        if first not in self._free:
            self._free[first] = f"until_{len(self._free)}"
            self.rules.append(f"{self._free[first]}[lazy]: TEXT {_quoted(first)}")
        return " ".join([self._free[first], *(self.text(piece) for piece in rest)])

    def cut(self, text: str) -> list[str]:
        if not self.special:
            return [text] if text else []
        pattern = "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True))
        return [piece for piece in re.split(f"({pattern})", text) if piece]


def _json(schema: Any, strict: bool) -> str:
    schema = dict(schema) if isinstance(schema, Mapping) else {}
    return f"%json {json.dumps({**schema, 'x-guidance': {**JSON_LAYOUT, 'lenient': not strict}}, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(regex: str) -> str:
    return "/" + re.sub(r"(\\.)|/", lambda m: m[1] or "\\/", regex, flags=re.S).replace("\n", "\\n") + "/"
