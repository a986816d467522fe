"""Which sample comes next: the rows of a source in a shuffled order, and several sources by their weights.

A source is shuffled within windows of WINDOW pieces (some 256 MB of text, so most are shuffled as a whole), its files
among each other; thus training can begin before the rest is tokenised, and the order is the same however fast that is.
Weights are shares of tokens: the next sample is of the source that is furthest behind its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from llmasos.data.order import is_validation, permutation, seed_of
from llmasos.data.pieces import Piece
from llmasos.data.tokens import TokenCache
from llmasos.errors import FormatError, InvalidInputError

WINDOW = 256
Split: TypeAlias = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """`weight`: its share of the tokens, relative to the others; all or none of a mix have one."""

    ref: str | Path
    weight: float | None = None


@dataclass(frozen=True)
class Ref:
    """One sample of the stream."""

    cache: TokenCache
    at: int
    """Its piece."""
    row: int
    length: int
    first: int
    """The first token that is trained."""
    line: int

    @property
    def piece(self) -> Piece:
        found = self.cache.piece(self.at)
        assert found
        return found

    @property
    def where(self) -> str:
        return f"{self.cache.file.name}:{self.line}"


def parse_sources(words: Iterable[str | Path | Source]) -> list[Source]:
    """`chats.jsonl=0.7` has a weight. Raises InvalidInputError for a weight that is none, or for some without one."""
    sources = [word if isinstance(word, Source) else _source(word) for word in words]
    if not sources:
        raise InvalidInputError("No data is named.", hint="Name a file, a folder or hf:OWNER/NAME.", param="data")
    weighted = [one for one in sources if one.weight is not None]
    if weighted and len(weighted) < len(sources):
        [without, *_] = [one for one in sources if one.weight is None]
        raise InvalidInputError(
            f"{without.ref} has no weight and others have.", hint=f"Write {without.ref}=1, or none.", param="data"
        )
    for one in weighted:
        if not (one.weight and 0 < one.weight < float("inf")):
            raise InvalidInputError(
                f"The weight {one.weight} of {one.ref} is not above 0.", hint="Leave the source out.", param="data"
            )
    return sources


def _source(word: str | Path) -> Source:
    ref, mark, weight = str(word).rpartition("=")
    if not mark or Path(word).exists():
        return Source(word)
    try:
        return Source(ref, float(weight))
    except ValueError:
        raise InvalidInputError(
            f"{str(word)!r}: {weight!r} is no weight.", hint="Example: chats.jsonl=0.7.", param="data"
        ) from None


class Stream:
    """One source without end, epoch after epoch. `next` gives None once between two epochs."""

    def __init__(
        self, caches: Sequence[TokenCache], *, seed: int, split: Split, validation: float, shuffle: bool
    ) -> None:
        self.caches, self.seed, self.split, self.validation, self.shuffle = caches, seed, split, validation, shuffle
        self._epoch = self._file = self._piece = self._row = 0  # where the window begins, and the place in it
        self._window: np.ndarray[Any, np.dtype[np.void]] | None = None
        self._behind = (0, 0)  # file and piece after the window

    def next(self) -> Ref | None:
        while True:
            if self._window is None:
                self._window = self._load()
            if self._row < len(self._window):
                file, at, row, length, first, line = self._window[self._row].item()
                self._row += 1
                return Ref(self.caches[file], at, row, length, first, line)
            self._window, self._row = None, 0
            self._file, self._piece = self._behind
            if self._file == len(self.caches):
                self._epoch, self._file, self._piece = self._epoch + 1, 0, 0
                return None

    def state_dict(self) -> list[int]:
        return [self._epoch, self._file, self._piece, self._row]

    def load_state_dict(self, state: Sequence[int]) -> None:
        self._epoch, self._file, self._piece, self._row = state
        self._window = None

    def _load(self) -> np.ndarray[Any, np.dtype[np.void]]:
        kind = np.dtype([(name, "<i8") for name in ("file", "at", "row", "length", "first", "line")])
        files = range(len(self.caches))
        if self.shuffle:
            files = permutation(len(self.caches), seed_of(self.seed, self._epoch, "files")).tolist()
        file, at, found = self._file, self._piece, [np.zeros(0, kind)]
        while file < len(files) and len(found) <= WINDOW:
            if not (piece := self.caches[files[file]].piece(at)):
                file, at = file + 1, 0
                continue
            [rows] = np.nonzero(self.chosen(piece))
            part = np.zeros(len(rows), kind)
            part["file"], part["at"], part["row"] = files[file], at, rows
            for name in ("length", "first", "line"):
                part[name] = piece.rows[name][rows]
            found.append(part)
            at += 1
        window = np.concatenate(found)
        if self.shuffle:
            window = window[permutation(len(window), seed_of(self.seed, self._epoch, self._file, self._piece))]
        self._behind = file, at
        return window

    def chosen(self, piece: Piece) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [rows]: those of the split."""
        if self.split == "all" or (self.split == "train" and not self.validation):
            return np.ones(len(piece.rows), np.bool_)
        held_out = is_validation(piece.rows["key"], self.validation)
        return held_out if self.split == "validation" else ~held_out


class Mix:
    """Streams by weights of their tokens. An epoch is over when each has been read to its end; the others go on from
    their beginning until then."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float]) -> None:
        self.streams, self.weights = streams, weights
        self._tokens = [0] * len(streams)
        self._is_done = [False] * len(streams)

    def next(self) -> Ref | None:
        while not all(self._is_done):
            at = min(range(len(self.streams)), key=lambda i: (self._tokens[i] / self.weights[i], i))
            ref = self.streams[at].next()
            if not ref:
                self._is_done[at] = True
                ref = None if all(self._is_done) else self._again(self.streams[at])
            if ref:
                self._tokens[at] += ref.length
                return ref
        self._is_done = [False] * len(self.streams)
        return None

    def _again(self, stream: Stream) -> Ref:
        if ref := stream.next():
            return ref
        names = ", ".join(cache.file.name for cache in stream.caches)
        raise FormatError(f"{names} has no samples for the mix.", hint="Leave it out, or use more data.")

    def state_dict(self) -> dict[str, Any]:
        streams = [one.state_dict() for one in self.streams]
        return {"streams": streams, "tokens": list(self._tokens), "done": list(self._is_done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tokens, self._is_done = list(state["tokens"]), list(state["done"])
        for one, its in zip(self.streams, state["streams"], strict=True):
            one.load_state_dict(its)
