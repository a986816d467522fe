"""Token ids -> text, all at once or one id at a time, with the same result.

A token is a piece of bytes that depends on nothing but whether it comes first; text is the pieces put together and
read as UTF-8, with U+FFFD for bytes that are not. That makes streaming exact and O(1) per token. The pieces come from
the tokenizer's own decoder (`tokenizers` library). One difference to that library, on purpose: where byte tokens do
not form valid UTF-8, it gives up the whole run of byte tokens, we only the bytes that are wrong; a stream could not
wait for the end of such a run.

Not done: transformers' `clean_up_tokenization_spaces`, which rewrites "do n't" and so the model's own words.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Backend

from llmasos.errors import UnsupportedError


@cache
def byte_of_char() -> dict[str, int]:
    """GPT-2's bijection of printable characters and bytes, in the direction of decoding."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Detokenizer:
    """The pieces of one tokenizer; `StreamDecoder` keeps the state of one text.

    Raises UnsupportedError when the tokenizer's decoder is of a kind that is not known here.
    """

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self.special_ids = special_ids
        self.strip_char, self.strip_count = "", 0  # characters dropped at the very start of a text
        self.end_of_text: Callable[[str], str] | None = None  # how a token reads when it comes last, if differently
        self._text: Callable[[str, bool], str] = lambda token, first: token if first else f" {token}"
        self._bytes: Callable[[str], bytes] = str.encode
        decoder = backend.decoder
        if decoder is not None:
            self._compile(_flatten(json.loads(decoder.__getstate__())))
        self._pieces: tuple[dict[int, bytes | None], dict[int, bytes | None]] = ({}, {})

    def piece(self, id: int, *, first: bool) -> bytes | None:
        """The bytes that token `id` stands for; None for an id that is not in the vocabulary."""
        known = self._pieces[first]
        try:
            return known[id]
        except KeyError:
            token = self._backend.id_to_token(id) if 0 <= id < 1 << 32 else None
            known[id] = piece = None if token is None else self._bytes(self._text(token, first))
            return piece

    def token(self, id: int) -> str:
        """The token as the vocabulary writes it; empty for an id that is not there."""
        return self._backend.id_to_token(id) or ""

    def _compile(self, steps: list[dict[str, Any]]) -> None:
        before: list[Callable[[str, bool], str]] = []
        for at, step in enumerate(steps):
            kind, left = step["type"], steps[at + 1 :]
            if kind == "Replace":
                before.append(_alone(decoders.Replace(_pattern(step["pattern"]), step["content"])))
            elif kind == "Metaspace":
                scheme = step.get("prepend_scheme", "always")
                before.append(_placed(decoders.Metaspace(step["replacement"], scheme, step.get("split", True))))
            elif kind == "WordPiece":
                before.append(_placed(decoders.WordPiece(step["prefix"], step["cleanup"])))
            elif kind == "BPEDecoder" and len(steps) == 1:
                before.append(partial(_with_suffix, decoders.BPEDecoder(step["suffix"])))
                self.end_of_text = partial(_last_with_suffix, decoders.BPEDecoder(step["suffix"]))
            elif kind == "ByteLevel":
                self._bytes = _from_byte_level
            elif kind == "ByteFallback":
                self._bytes = _from_byte_fallback
            elif kind == "Strip" and not step["stop"] and all(s["type"] == "Fuse" for s in left):
                self.strip_char, self.strip_count = step["content"], step["start"]
            elif kind != "Fuse":
                raise UnsupportedError(
                    f"The tokenizer's decoder has a step {kind!r} at place {at + 1} that is not supported.",
                    hint="Supported: ByteLevel, WordPiece, Metaspace, BPEDecoder, Replace, ByteFallback, Fuse, Strip.",
                )
        self._text = _chain(before)


class StreamDecoder:
    """Text of one growing sequence of ids: `push` returns what an id adds, `flush` what was still held back.

    Everything returned, put together, equals `Tokenizer.decode` of all ids. A character comes when its last byte is
    there.
    """

    def __init__(
        self, detokenizer: Detokenizer, *, skip_special_tokens: bool = True, shown: Iterable[int] = ()
    ) -> None:
        self._detokenizer = detokenizer
        self._skipped = detokenizer.special_ids if skip_special_tokens else frozenset()
        if shown := frozenset(shown):
            self._skipped -= shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first, self._strip = True, detokenizer.strip_count
        self._held: bytes = b""
        self._held_id: int | None = None

    def push(self, id: int) -> str:
        """The characters that became complete with this id: often one word, sometimes none."""
        id = int(id)
        if id in self._skipped or (piece := self._detokenizer.piece(id, first=self._first)) is None:
            return ""
        self._first = False
        if self._detokenizer.end_of_text:  # only at the next token is it known that this one was not the last
            piece, self._held, self._held_id = self._held, piece, id
        return self._emit(piece)

    def flush(self) -> str:
        """End of text: what is left, with U+FFFD for a character whose bytes never came. Ready for a new text then."""
        piece = b""
        if self._held_id is not None and self._detokenizer.end_of_text:
            piece = self._detokenizer.end_of_text(self._detokenizer.token(self._held_id)).encode()
        text = self._emit(piece, final=True)
        self._utf8.reset()
        self._first, self._strip = True, self._detokenizer.strip_count
        self._held, self._held_id = b"", None
        return text

    def _emit(self, piece: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(piece, final)
        while self._strip and text:
            if text[0] != self._detokenizer.strip_char:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state["decoders"] for step in _flatten(inner)]


def _pattern(state: dict[str, str]) -> str | Regex:
    return Regex(state["Regex"]) if "Regex" in state else state["String"]


def _alone(decoder: decoders.Decoder) -> Callable[[str, bool], str]:
    """A step that treats every token alike."""
    return lambda token, first: decoder.decode([token])


def _placed(decoder: decoders.Decoder) -> Callable[[str, bool], str]:
    """A step that treats the first token of a text in its own way."""
    return lambda token, first: decoder.decode([token] if first else ["", token])


def _with_suffix(decoder: decoders.Decoder, token: str, first: bool) -> str:
    text: str = decoder.decode([token, ""])
    return text


def _last_with_suffix(decoder: decoders.Decoder, token: str) -> str:
    text: str = decoder.decode([token])
    return text


def _chain(steps: list[Callable[[str, bool], str]]) -> Callable[[str, bool], str]:
    def text(token: str, first: bool) -> str:
        for step in steps:
            token = step(token, first)
        return token

    return text


def _from_byte_level(token: str) -> bytes:
    table = byte_of_char()
    try:
        return bytes([table[c] for c in token])
    except KeyError:  # an added token, written as plain text
        return token.encode()


def _from_byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()
