"""Cutting texts where they may be cut, and counting their words. No model here."""

from __future__ import annotations

import re
from collections.abc import Callable

from llmasos.errors import InvalidInputError

_LEVELS = (
    re.compile(r"\n[ \t]*\n\s*"),
    re.compile(r"\n+"),
    re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])"),
    re.compile(r"\s+"),
)
"""Where a text is cut rather: between paragraphs, lines, sentences, words."""
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+(?:['’-][^\W_]+)*"
)

_MARKS = re.compile(r"\n|(?<=[.!?,;:])\s+|[。！？，、；：（）()\"“”]")


def split(text: str, fits: Callable[[str], bool], count: Callable[[str], int], room: int) -> list[str]:
    """Pieces that fit, as long as they can be; together they are the text, character by character.

    `count` says what a piece costs; `room` is what they may cost as far as one can tell, `fits` has the last word.
    Raises InvalidInputError where not even one character fits.
    """
    if not text or (count(text) <= room and fits(text)):
        return [text] if text else []
    found = []
    parts = units(text)
    for piece in parts if room < 1 else _packed(parts, fits, count, room):
        # what joins two units may cost more than both: then with less in each
        found += [piece] if fits(piece) else _smaller(piece, fits, count, room * 3 // 4)
    return found


def _smaller(text: str, fits: Callable[[str], bool], count: Callable[[str], int], room: int) -> list[str]:
    if len(text) == 1:
        raise InvalidInputError(
            "The model's context has no room for a piece of the text beside the instructions.",
            hint="Take a model with a longer context, or shorten the instructions.",
            param="model",
        )
    return split(text, fits, count, room)


def _packed(parts: list[str], fits: Callable[[str], bool], count: Callable[[str], int], room: int) -> list[str]:
    packed: list[str] = []
    current, used = "", 0
    for part in parts:
        cost = count(part)
        if used + cost <= room:
            current, used = current + part, used + cost
            continue
        if current:
            packed.append(current)
        current, used = part, cost
        if cost > room:
            packed += [part] if len(part) == 1 else split(part, fits, count, room)
            current, used = "", 0
    return [*packed, current] if current else packed


def units(text: str) -> list[str]:
    """The text cut at the coarsest place where it can be, each unit with what stands behind it; at worst in halves."""
    for level in _LEVELS:
        if len(parts := _cut(text, level)) > 1:
            return parts
    middle = len(text) // 2
    return [text[:middle], text[middle:]] if middle else [text]


def num_words(text: str) -> int:
    """A Chinese, Japanese or Korean character counts as a word."""
    return len(_WORD.findall(text))


def words(text: str) -> set[str]:
    """Those of `num_words`, whatever their case."""
    return {word.casefold() for word in _WORD.findall(text)}


def shortened(text: str, words: int) -> str:
    """As many whole sentences as have no more than `words` words, the first one in any case."""
    kept = ""
    for sentence in sentences(text):
        if kept and num_words(kept + sentence) > words:
            break
        kept += sentence
    return kept.strip()


def paragraphs(text: str) -> list[str]:
    """With the empty lines behind each; together they are the text."""
    return _cut(text, _LEVELS[0])


def sentences(text: str) -> list[str]:
    """With the white space behind each; together they are the text."""
    return _cut(text, _LEVELS[2])


def _cut(text: str, level: re.Pattern[str]) -> list[str]:
    ends = [m.end() for m in level.finditer(text) if 0 < m.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def whole_sentences(text: str) -> str:
    """Without the last sentence if something cut it short, as long as there is another, and without repetitions, which
    small models like to end in."""
    parts = list({part.strip(): part for part in reversed(sentences(text.strip()))}.values())[::-1]
    unfinished = parts and not re.search(r"[.!?…。！？][\"'”’)\]]*$", parts[-1].strip())
    return "".join(parts[:-1]).strip() if unfinished and len(parts) > 1 else text.strip()


def spans(text: str, words: int) -> list[str]:
    """Every run of up to `words` words that no mark parts, as it stands in the text, without repetition; of a script
    without spaces, of two to four characters."""
    found: dict[str, None] = {}
    for part in _MARKS.split(text):
        places = [(m.start(), m.end()) for m in _WORD.finditer(part)]
        for i, (start, end) in enumerate(places):
            unspaced = is_unspaced(part[start])
            for _, last in places[i : i + (4 if unspaced else words)]:
                if last > end or not unspaced:
                    found.setdefault(part[start:last])
    return list(found)


def is_unspaced(character: str) -> bool:
    """Is it of a script that puts no spaces between words?"""
    return bool(re.match(r"[\u3040-\u30ff\u3400-\u9fff]", character))
