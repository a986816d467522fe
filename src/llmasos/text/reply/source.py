"""Text that arrives in pieces, read as if all of it were there.

A reader is a generator: it yields whenever it needs more text than there is, and goes on when there is more. It
decides by what the text says and never by where a piece ended, so every split of a text is read alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields for more text; returns T."""

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[-+.\w]*")
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_CLOSES = {"{": "}", "[": "]"}
_KEPT = 4096


class Malformed(Exception):
    """The text is not what the format says. `Source.at` is where it stopped fitting."""


class Source:
    """`text[at:]` is what has come and was not read yet. `is_over`: no more will come."""

    __slots__ = ("at", "gap", "is_over", "text")

    def __init__(self) -> None:
        self.text, self.at, self.is_over = "", 0, False
        self.gap = 0

    def add(self, piece: str) -> None:
        self.text += piece

    def forget(self) -> None:
        """Let go of what was read, so that a long reply costs no memory and no copying."""
        if self.at > _KEPT:
            self.text, self.at = self.text[self.at :], 0

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        while self.at >= len(self.text):
            if self.is_over:
                return ""
            yield
        return self.text[self.at]

    def skip_space(self) -> Reading[str]:
        """The next character that is no white space, which is left to be read; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if self.is_over:
                return ""
            yield

    def take(self, *literals: str) -> Reading[str]:
        """The first of `literals` that comes next, which is then read; empty if none does."""
        for literal in literals:
            while not self.text.startswith(literal, self.at):
                left = self.text[self.at :]
                if self.is_over or not literal.startswith(left):
                    break
                yield
            else:
                self.at += len(literal)
                return literal
        return ""

    def close(self, *ends: str) -> Reading[str]:
        """`take` for marks that end something: one that the end of the text cuts is read as well, and gives nothing."""
        found = yield from self.take(*ends)
        left = self.text[self.at :]
        if not found and self.is_over and left and any(end.startswith(left) for end in ends):
            self.at = len(self.text)
        return found

    def expect(self, *literals: str) -> Reading[str]:
        found = yield from self.take(*literals)
        if not found:
            raise Malformed
        return found

    def until(self, *ends: str, limit: int = 200) -> Reading[tuple[str, str]]:
        """The text before the first of `ends`, and that end, both read. Raises Malformed when none comes within
        `limit` characters."""
        start, pattern = self.at, re.compile("|".join(map(re.escape, ends)))
        longest = max(map(len, ends))
        while True:
            # a later end must not win over an earlier one that is still incomplete
            found = pattern.search(self.text, start)
            if found and found.start() - start <= limit:
                self.at = found.end()
                return self.text[start : found.start()], found[0]
            if self.is_over or len(self.text) - start > limit + longest:
                raise Malformed
            yield

    def pass_until(self, ends: Sequence[str], sink: Callable[[str], None], *, trim: bool = False) -> Reading[str]:
        """Give `sink` the text before the first of `ends` as it comes; that end, or nothing when the text ends first.
        The end is read. `trim`: white space before an end is left out; `gap` is where it begins."""
        while True:
            found = marks(ends).search(self.text, self.at) if ends else None
            if found or self.is_over:
                end = found.start() if found else len(self.text)
            else:
                end = open_end(self.text, self.at, ends)
            shown = end
            if trim and (found or not self.is_over):
                shown = self.at + len(self.text[self.at : end].rstrip(" \t\r\n"))
            if shown > self.at:
                sink(self.text[self.at : shown])
                self.at = shown
            if found:
                self.gap, self.at = shown, found.end()
                return found[0]
            if self.is_over:
                return ""
            yield

    def string(self) -> Reading[str]:
        """A JSON string, decoded."""
        text = yield from self.value()
        return _decoded(text)

    def value(self, sink: Callable[[str], None] | None = None) -> Reading[str]:
        """A JSON value as it is written; `sink` gets the pieces of an object or array as they come. Raises Malformed.

        Strings and brackets must be right; what stands between them is not looked at.
        """
        start = sent = self.at
        first = yield from self.peek()
        closes: list[str] = []

        def send(end: int) -> None:
            nonlocal sent
            if sink is not None and end > sent:
                sink(self.text[sent:end])
                sent = end

        if first not in ('"', "{", "["):
            while True:
                end = _SCALAR.match(self.text, start).end()  # type: ignore[union-attr]  # matches nothing, too
                if end < len(self.text) or self.is_over:
                    break
                yield
            if end == start:
                raise Malformed
            self.at = end
            return self.text[start:end]
        in_string = False
        while True:
            found = (_IN_STRING if in_string else _STRUCTURE).search(self.text, self.at)
            if found is None or (found[0] == "\\" and found.end() >= len(self.text)):
                # what is before an escape is safe to give on; the escape waits for its other half
                self.at = found.start() if found else len(self.text)
                send(self.at)
                if self.is_over:
                    self.at = len(self.text)
                    send(self.at)
                    raise Malformed
                yield
                continue
            mark, self.at = found[0], found.end()
            if mark == "\\":
                self.at += 1
            elif mark == '"':
                in_string = not in_string
            elif mark in _CLOSES:
                closes.append(_CLOSES[mark])
            elif not closes or closes.pop() != mark:
                self.at = found.start()
                send(self.at)
                raise Malformed
            if not closes and not in_string:
                send(self.at)
                return self.text[start : self.at]


def _decoded(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise Malformed from None
    if not isinstance(value, str):
        raise Malformed
    return value


_PATTERNS: dict[tuple[str, ...], re.Pattern[str]] = {}


def marks(texts: Sequence[str]) -> re.Pattern[str]:
    """Any of `texts`, none of which may be the beginning of another."""
    key = tuple(texts)
    if key not in _PATTERNS:
        assert not any(a != b and a.startswith(b) for a in key for b in key)
        _PATTERNS[key] = re.compile("|".join(map(re.escape, key)))
    return _PATTERNS[key]


def open_end(text: str, start: int, texts: Sequence[str]) -> int:
    """Where the part of `text` begins that may become one of `texts`; its length if no part can."""
    end = len(text)
    lowest = end
    for mark in texts:
        at = text.find(mark[0], max(start, end - len(mark) + 1))
        while at >= 0:
            if mark.startswith(text[at:]):
                lowest = min(lowest, at)
                break
            at = text.find(mark[0], at + 1)
    return lowest
