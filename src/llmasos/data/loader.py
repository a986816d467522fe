"""Batches for training: packed, in an order that depends on seed and epoch alone, and resumable at any of them.

Every rank plans the same sequence of batches, which is cheap, and makes only its own of them; so a run goes on with
another number of ranks where it stopped, as if nothing had been.

T = tokens of a batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llmasos.data.mix import Mix, Ref, Source, Split, Stream, parse_sources
from llmasos.data.order import permutation, seed_of
from llmasos.data.pack import Overlong, pack, windows
from llmasos.data.pieces import Totals
from llmasos.data.readers import Columns, open_dataset
from llmasos.data.schemas import SCHEMAS
from llmasos.data.tokens import TokenCache
from llmasos.errors import FormatError, InvalidInputError
from llmasos.text import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token after which nothing is learnt."""
BUFFER = 64
"""Batches that are packed together."""
_MOST_SAMPLES = 1 << 16
_VERSION = 2

Window = tuple[Ref, int, int]
"""A sample, or the tokens from one to another of it."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side, without padding."""

    tokens: Tensor
    """int64 [T]."""
    labels: Tensor
    """int64 [T]: the next token of the same sample, IGNORED where that is not trained or there is none."""
    positions: Tensor
    """int64 [T]: from 0 in every sample."""
    lengths: list[int]
    """Of the samples; their sum is T."""
    num_samples: int
    """0 in a batch that only keeps a rank busy while others have the last ones."""
    num_trained: int
    where: tuple[str, ...] = ()
    """FILE:LINE of each sample."""


@dataclass(frozen=True)
class Stats:
    """Of the split that is read: samples as they were found, before any is cut or left out."""

    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    longest: int = 0
    longest_where: str = ""
    num_overlong: int = 0
    """Longer than `max_length`."""


class Batches:
    """Iterate over it; `state_dict` is then the place after the last batch given.

    data: files, folders, `hf:` names, each with `=WEIGHT` or none. max_length: tokens of the longest sample.
    batch_tokens: T at most (default: max_length). overlong: what becomes of longer samples; default "split" for texts,
    "refuse" for chats. validation: the share of rows that the split "validation" has and "train" lacks. epochs: None is
    without end. rank, world_size: of the processes that share the batches.

    Raises what opening the files raises; while iterating, FormatError with file and line for a row that is wrong.
    """

    def __init__(
        self,
        data: str | Path | Source | Iterable[str | Path | Source],
        tokenizer: Tokenizer,
        *,
        max_length: int = 2048,
        batch_tokens: int | None = None,
        overlong: Overlong | None = None,
        split: Split = "train",
        validation: float = 0.0,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
        schema: str | None = None,
        columns: Columns = None,
        template: str | None = None,
        num_processes: int = 0,
        prefetch: int = 4,
    ) -> None:
        sources = parse_sources([data] if isinstance(data, str | Path | Source) else data)
        self.max_length, self.batch_tokens = max_length, batch_tokens or max_length
        if max_length < 2:
            raise InvalidInputError(f"max_length={max_length}.", hint="Use at least 2.", param="max_length")
        if self.batch_tokens < max_length:
            raise InvalidInputError(
                f"Batches of {self.batch_tokens} tokens cannot hold samples of {max_length}.",
                hint="batch_tokens must be at least max_length.",
                param="batch_tokens",
            )
        if not 0 <= validation < 1 or (split == "validation" and not validation):
            raise InvalidInputError(
                f"A share of {validation} for validation is not possible.",
                hint="Use a share above 0 and below 1, e.g. validation=0.02.",
                param="validation",
            )
        if not 0 <= rank < world_size:
            raise InvalidInputError(f"There is no rank {rank} of {world_size}.", param="rank")
        self.sources = [
            [
                TokenCache(file, tokenizer, schema=schema, template=template, num_processes=num_processes)
                for file in open_dataset(source.ref, columns=columns)
            ]
            for source in sources
        ]
        self.weights = [source.weight for source in sources if source.weight is not None]
        kinds = {SCHEMAS[cache.schema].kind for cache in self.caches}
        self.overlong: Overlong = overlong or ("split" if kinds == {"text"} else "refuse")
        self.split, self.validation, self.seed, self.shuffle = split, validation, seed, shuffle
        self.epochs, self.rank, self.world_size, self.prefetch = epochs, rank, world_size, prefetch
        self.reset()

    @property
    def caches(self) -> list[TokenCache]:
        return [cache for source in self.sources for cache in source]

    # --- place

    def reset(self) -> None:
        """Back to the beginning."""
        self._state: dict[str, Any] = {"mix": self._mix().state_dict(), "epoch": 0, "given": 0}

    def state_dict(self) -> dict[str, Any]:
        """Plain data: JSON can hold it."""
        return {"version": _VERSION, "of": self._identity(), **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InvalidInputError where the data or the options are not those that the place is of."""
        mine, its = self._identity(), state.get("of", {})
        if state.get("version") != _VERSION:
            raise InvalidInputError("The place in the data is of another version.", hint="Begin the epoch anew.")
        if changed := [name for name in mine if mine[name] != its.get(name)]:
            [name, *_] = changed
            what = "other data or another tokenizer" if name == "data" else f"{name}={its.get(name)}"
            now = "" if name == "data" else f", and this is {name}={mine[name]}"
            raise InvalidInputError(
                f"The place in the data was saved with {what}{now}.",
                hint="Go on with the same data and options, or begin anew.",
                param=name,
            )
        self._state = {name: state[name] for name in ("mix", "epoch", "given")}

    def _identity(self) -> dict[str, Any]:
        names = ("max_length", "batch_tokens", "overlong", "split", "validation", "seed", "shuffle")
        return {
            "data": [[cache.key for cache in source] for source in self.sources],
            "weights": self.weights,
            **{name: getattr(self, name) for name in names},
        }

    # --- what there is

    def prepare(self, on_progress: Callable[[str, Totals], None] | None = None) -> Stats:
        """Tokenise all of it, if that was not done before, and count. `on_progress` gets the file and how far it is."""
        found = Stats()
        stream = self._stream(self.caches)
        for cache in self.caches:
            cache.build(partial(on_progress, cache.file.name) if on_progress else None)
            for piece in cache.pieces():
                rows = piece.rows[stream.chosen(piece)]
                lengths = rows["length"]
                if not len(rows):
                    continue
                top = int(lengths.argmax())
                if int(lengths[top]) > found.longest:
                    place = f"{cache.file.name}:{rows['line'][top]}"
                    found = replace(found, longest=int(lengths[top]), longest_where=place)
                found = replace(
                    found,
                    num_samples=found.num_samples + len(rows),
                    num_tokens=found.num_tokens + int(lengths.sum(dtype=np.int64)),
                    num_trained=found.num_trained + int(rows["trained"].sum(dtype=np.int64)),
                    num_overlong=found.num_overlong + int((lengths > self.max_length).sum()),
                )
        if not found.num_samples:
            raise FormatError(
                f"The split {self.split!r} of {', '.join(cache.file.name for cache in self.caches)} has no samples.",
                hint="Use more data, or another share for validation.",
            )
        if found.num_overlong and self.overlong == "refuse":
            raise self._too_long(found)
        return found

    def count(self) -> int:
        """Batches of one rank from the beginning to the end. Plans all of them; raises InvalidInputError for no end."""
        if self.epochs is None:
            raise InvalidInputError("Batches without end cannot be counted.", hint="Set epochs.", param="epochs")
        beginning = {"mix": self._mix().state_dict(), "epoch": 0, "given": 0}
        return -(-sum(1 for _ in self._planned(beginning)) // self.world_size)

    def _too_long(self, found: Stats) -> InvalidInputError:
        return InvalidInputError(
            f"{found.num_overlong:,} of {found.num_samples:,} samples are longer than {self.max_length:,} tokens; the "
            f"longest has {found.longest:,} ({found.longest_where}).",
            hint=f'Set max_length={found.longest}, or overlong="truncate", "drop" or "split".',
            param="max_length",
        )

    # --- batches

    def __iter__(self) -> Iterator[Batch]:
        made = self._made()
        if self.prefetch:
            with _ahead(made, self.prefetch) as ready:
                yield from self._given(ready)
        else:
            yield from self._given(made)

    def _given(self, made: Iterator[tuple[Batch, dict[str, Any]]]) -> Iterator[Batch]:
        for batch, state in made:
            self._state = state
            yield batch

    def _made(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Of every `world_size` batches, the one of this rank, and the place after them all."""
        group: list[list[Window]] = []
        place = self._state
        for plan, place in self._planned(self._state):
            group.append(plan)
            if len(group) == self.world_size:
                yield make_batch(group[self.rank]), place
                group = []
        if group:
            is_mine = self.rank < len(group)
            yield make_batch(group[self.rank] if is_mine else group[-1][:1], is_filler=not is_mine), place

    def _planned(self, state: dict[str, Any]) -> Iterator[tuple[list[Window], dict[str, Any]]]:
        mix = self._mix()
        mix.load_state_dict(state["mix"])
        epoch, given = state["epoch"], state["given"]
        was_over = not epoch and not given and state["mix"] == self._mix().state_dict()
        while self.epochs is None or epoch < self.epochs:
            start = mix.state_dict()
            taken, is_over = self._buffer(mix)
            if is_over and was_over and not taken:
                raise FormatError(
                    f"The split {self.split!r} has no samples of at most {self.max_length:,} tokens.",
                    hint="Use more data, another share for validation, or a greater max_length.",
                )
            was_over = is_over
            lengths = [end - begin for _, begin, end in taken]
            bins = pack(lengths, self.batch_tokens)
            # packing begins with the longest samples, and training should not
            order = permutation(len(bins), seed_of(self.seed, epoch, repr(start))) if self.shuffle else range(len(bins))
            for at in range(given, len(bins)):
                yield [taken[i] for i in bins[order[at]]], {"mix": start, "epoch": epoch, "given": at + 1}
            epoch, given = epoch + is_over, 0

    def _buffer(self, mix: Mix | Stream) -> tuple[list[Window], bool]:
        """The next windows, and whether the epoch ends with them."""
        taken: list[Window] = []
        num_tokens = num_rows = 0
        while num_tokens < BUFFER * self.batch_tokens and len(taken) < _MOST_SAMPLES:
            if not (ref := mix.next()):
                return taken, True
            num_rows += 1
            if ref.length > self.max_length and self.overlong == "refuse":
                raise self._too_long(Stats(num_samples=num_rows, longest=ref.length, longest_where=ref.where,
                                           num_overlong=1))  # fmt: skip
            for begin, end in windows(ref.length, self.max_length, self.overlong):
                if ref.first < end or self.overlong != "truncate":
                    taken.append((ref, begin, end))
                    num_tokens += end - begin
        return taken, False

    def _mix(self) -> Any:
        if self.weights and self.split == "train":
            return Mix([self._stream(caches) for caches in self.sources], self.weights)
        return self._stream(self.caches)

    def _stream(self, caches: list[TokenCache]) -> Stream:
        return Stream(caches, seed=self.seed, split=self.split, validation=self.validation, shuffle=self.shuffle)


def make_batch(plan: list[Window], *, is_filler: bool = False) -> Batch:
    import torch

    tokens, labels = [], []
    for ref, begin, end in plan:
        ids, trained = ref.piece.tokens(ref.row)
        following = np.full(end - begin, IGNORED, np.int64)
        if not is_filler:
            behind, learnt = ids[begin + 1 : end + 1], trained[begin + 1 : end + 1]
            following[: len(behind)] = np.where(learnt, behind, IGNORED)
        tokens.append(ids[begin:end].astype(np.int64))
        labels.append(following)
    joined = np.concatenate(labels)
    lengths = [end - begin for _, begin, end in plan]
    return Batch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        labels=torch.from_numpy(joined),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        lengths=lengths,
        num_samples=0 if is_filler else len(plan),
        num_trained=int((joined != IGNORED).sum()),
        where=tuple(ref.where for ref, _, _ in plan),
    )


@contextmanager
def _ahead(made: Iterator[Any], num: int) -> Iterator[Iterator[Any]]:
    """The same, made in a thread and at most `num` ahead."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=num)
    is_left = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not is_left.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in made:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as e:
            put(("error", e))

    def taken() -> Iterator[Any]:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise cast(BaseException, value)
            yield value

    thread = threading.Thread(target=run, name="batches", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        is_left.set()
        thread.join()
