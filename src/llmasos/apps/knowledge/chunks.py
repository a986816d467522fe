"""Documents -> chunks: runs of sentences of one section, up to a number of the encoder's own tokens.

A chunk is embedded with its title and headings before it, which count, too. Chunks of a section overlap by whole
sentences. What is longer than a chunk is cut at lines, sentences, words and, last, between characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llmasos.apps.knowledge.readers import Document, Section

Count = Callable[[str], int]
"""How many tokens the encoder sees of a text, with those that it adds itself."""
CONTEXT_SHARE = 4
"""At most this part of a chunk's tokens are title and headings."""
MOST_PER_TOKEN = 50
"""Characters of one token; a tokenizer may make one of a whole endless word, which says nothing about it."""
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[。！？；])")
_WORD = re.compile(r"\s+")


@dataclass(frozen=True)
class Chunk:
    """`text` is the document's text from `start` to `end`. `context`: title and headings, as it is embedded with."""

    start: int
    end: int
    text: str
    context: str
    headings: tuple[str, ...] = ()
    page: int | None = None

    @property
    def embedded(self) -> str:
        return embedded(self.context, self.text)


@dataclass(frozen=True)
class _Unit:
    """What is not cut: a sentence or less. `ends`: a paragraph does with it."""

    start: int
    end: int
    tokens: int
    ends: bool


def embedded(context: str, text: str) -> str:
    """What the encoder reads of a chunk."""
    return f"{context}\n{text}" if context else text


def chunks(document: Document, count: Count, *, max_tokens: int, overlap: int) -> list[Chunk]:
    """Every character of the text that is not white space lies in a chunk, and no chunk has more than `max_tokens`
    tokens. `overlap`: tokens at most that two neighbours in a section share.

    `max_tokens` must leave room for one character and what the encoder adds.
    """
    found: list[Chunk] = []
    for section in document.sections:
        context = _context(document.title, section, count, max_tokens // CONTEXT_SHARE)
        found += _Cutter(document.text, section, context, count, max_tokens, overlap).chunks()
    return found


def _context(title: str, section: Section, count: Count, most: int) -> str:
    """As many of title and headings as fit, the innermost first."""
    names = list(dict.fromkeys(filter(None, (title, *section.headings))))
    for i in range(len(names)):
        if count(context := " > ".join(names[i:])) <= most:
            return context
    return ""


class _Cutter:
    """The chunks of one section."""

    def __init__(self, text: str, section: Section, context: str, count: Count, max_tokens: int, overlap: int) -> None:
        self._text, self._section, self._context = text, section, context
        self._count, self._most, self._overlap = count, max_tokens, overlap
        self._room = max_tokens - count(embedded(context, ""))

    def chunks(self) -> list[Chunk]:
        units = self._units()
        found: list[Chunk] = []
        first = 0
        while first < len(units):
            last = self._last(units, first)
            found.append(self._chunk(units[first].start, units[last].end))
            if last + 1 == len(units):
                break
            first = self._next(units, first, last)
        return found

    def _chunk(self, start: int, end: int) -> Chunk:
        section = self._section
        return Chunk(start, end, self._text[start:end], self._context, section.headings, section.page)

    def _size(self, start: int, end: int) -> int:
        return self._count(embedded(self._context, self._text[start:end]))

    def _last(self, units: list[_Unit], first: int) -> int:
        """The last unit of the chunk that begins with `first`: at a paragraph's end, if that is not too early."""
        last, tokens = first, units[first].tokens
        while last + 1 < len(units) and tokens + units[last + 1].tokens <= self._room:
            last += 1
            tokens += units[last].tokens
        while last > first and self._size(units[first].start, units[last].end) > self._most:
            last -= 1  # tokens of the whole may be more than those of its parts
        if last + 1 < len(units):
            for end in range(last, first - 1, -1):
                if units[end].ends and 2 * sum(unit.tokens for unit in units[first : end + 1]) >= self._room:
                    return end
        return last

    def _next(self, units: list[_Unit], first: int, last: int) -> int:
        """Where the next chunk begins: so far back that both share what may be shared, and it still goes on."""
        start, shared = last + 1, 0
        while start - 1 > first and shared + units[start - 1].tokens <= self._overlap:
            start -= 1
            shared += units[start].tokens
        while start <= last and self._last(units, start) <= last:
            start += 1
        return start

    def _units(self) -> list[_Unit]:
        found: list[_Unit] = []
        for start, end in self._parts(self._section.start, self._section.end, _PARAGRAPH):
            parts = [piece for one in self._parts(start, end, _SENTENCE) for piece in self._fitting(*one)]
            own = self._count("")
            for i, (a, b) in enumerate(parts, 1):
                found.append(_Unit(a, b, max(1, self._count(self._text[a:b]) - own), i == len(parts)))
        return found

    def _fitting(self, start: int, end: int) -> list[tuple[int, int]]:
        """The piece, cut into such as fit into a chunk."""
        may_fit = end - start <= self._most * MOST_PER_TOKEN  # else it is long enough to cut without a count
        if (may_fit and self._size(start, end) <= self._most) or end - start == 1:
            return [(start, end)]
        middle = (start + end) // 2
        spaces = _WORD.finditer(self._text, start + 1, end - 1)
        if (space := min(spaces, key=lambda found: abs(found.start() - middle), default=None)) is not None:
            return self._fitting(start, space.start()) + self._fitting(space.end(), end)
        return self._fitting(start, middle) + self._fitting(middle, end)

    def _parts(self, start: int, end: int, between: re.Pattern[str]) -> list[tuple[int, int]]:
        """What stands between the separators, without white space around it."""
        found = []
        for separator in between.finditer(self._text, start, end):
            found.append((start, separator.start()))
            start = separator.end()
        found.append((start, end))
        return [part for part in map(self._stripped, found) if part[0] < part[1]]

    def _stripped(self, part: tuple[int, int]) -> tuple[int, int]:
        start, end = part
        while start < end and self._text[start].isspace():
            start += 1
        while end > start and self._text[end - 1].isspace():
            end -= 1
        return start, end
