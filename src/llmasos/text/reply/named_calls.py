"""Calls as a name and then JSON, with marks between: DeepSeek V3 and R1, DeepSeek V3.1, Kimi K2, Llama's
`<function=name>`.
"""

from __future__ import annotations

from llmasos.text.reply.calls import CallForm, Calls, Tools, arguments_of, named
from llmasos.text.reply.layout import CallLayout, Literal, OneOf, Piece, Schema, function_of, parameters_of
from llmasos.text.reply.source import Malformed, Reading, Source

_NUMBERS = OneOf(tuple(map(str, range(32))))


class NamedCalls(CallForm):
    """Each call is `begin` name `before` {...} `after`; all of them stand between the two texts of `section`. White
    space in `before` and `after` may be missing. `numbered`: names are written `functions.name:0`, which is also the
    call's id (Kimi K2)."""

    def __init__(
        self, begin: str, before: str, after: str, *, section: tuple[str, str] = ("", ""), numbered: bool = False
    ) -> None:
        self.begin, self.before, self.after, self.section = begin, before, after, section
        self.numbered = numbered
        self.begins = (section[0], begin) if section[0] else (begin,)
        self.tokens = tuple(part for text in (begin, before, after, section[1]) for part in _tags(text))

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        if in_section := begin == self.section[0] != "":
            yield from source.skip_space()
            yield from source.expect(self.begin)
        while True:
            yield from self._call(source, calls)
            calls.end(source)
            if not in_section:
                return
            yield from source.skip_space()
            if not (yield from source.take(self.begin)):
                break
        yield from source.close(self.section[1])
        calls.end(source)

    def _call(self, source: Source, calls: Calls) -> Reading[None]:
        stop, *fence = self.before.split("\n")
        name, _ = yield from source.until(stop or "\n")
        for line in fence:
            yield from source.skip_space()
            if line:
                yield from source.take(line)
        if (yield from source.skip_space()) != "{":
            raise Malformed
        written = named(name)
        if self.numbered:
            calls.begin(written.split(":")[0].removeprefix("functions."), written)
        else:
            calls.begin(written)
        if not (yield from arguments_of(source, calls, (self.after.split("\n")[-1],))):
            return
        for line in self.after.split("\n"):
            yield from source.skip_space()
            if line:
                yield from source.close(line)

    def layout(self, tools: Tools) -> CallLayout:
        calls = []
        for tool in tools:
            name = function_of(tool)["name"]
            head: list[Piece] = [Literal(self.begin + name + self.before)]
            if self.numbered:
                head = [Literal(f"{self.begin}functions.{name}:"), _NUMBERS, Literal(self.before)]
            calls.append((*head, Schema(parameters_of(tool)), Literal(self.after)))
        return CallLayout(self.section[0], tuple(calls), "", self.section[1])


def _tags(text: str) -> list[str]:
    """The marks in a text of marks, words and lines: each may be a special token."""
    found, rest = [], text
    while "<" in rest:
        rest = rest[rest.index("<") :]
        tag, closed, rest = rest.partition(">")
        if closed:
            found.append(tag + ">")
    return found
