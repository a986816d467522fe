"""A plan of the scheduler -> the arrays of one pass.

T = packed tokens, B = sequences, P = columns of a page table, R = rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmasos.inference.batch import SharedPrefix
from llmasos.inference.runner import Scored, Step
from llmasos.inference.scheduler import Item, Plan, Sequence

Ints = NDArray[Any]


@dataclass(slots=True)
class Packed:
    """A step, and which of its rows belong to which item."""

    step: Step
    sampled: list[tuple[Item, int, int]] = field(default_factory=list)
    """(item, first row, rows): one row, and one more for each speculative token to verify."""
    pool_rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    """[R]: where the pool keeps each row's token; -1: nowhere."""
    scored: list[Item] = field(default_factory=list)
    """The items of `step.scored`."""


class Packer:
    """Packs plans. Page tables are made anew only when other sequences run than in the step before."""

    def __init__(self, num_groups: int, page_size: int) -> None:
        self.num_groups, self.page_size = num_groups, page_size
        self._last: list[Sequence] = []
        self._decodes: Step | None = None
        self._rows: Ints = np.empty(0, np.int64)

    def pack(self, plan: Plan, *, score: bool, lengths: Callable[[Item], Ints] | None = None) -> Packed:
        """`score`: some sequence wants the log-probabilities of its prompt; `lengths`: how many tokens
        an item's sequence has at each of its tokens, where the model's rotary frequencies depend on that."""
        if not score and not lengths and plan.num_decodes == len(plan.items):
            return self._decode(plan)
        self._last = []
        return self._mixed(plan, lengths)

    def _decode(self, plan: Plan) -> Packed:
        items = plan.items
        sequences = [item.seq for item in items]
        num = len(items)
        positions = np.fromiter((item.start for item in items), np.int64, num)
        if self._decodes is not None and not plan.copies and sequences == self._last:
            tables = self._longer(self._decodes.tables, sequences, positions)
        else:
            tables = [self._table([s.pages[g] for s in sequences]) for g in range(self.num_groups)]
            self._rows = np.fromiter((s.slot for s in sequences), np.int64, num)
        every = np.arange(num, dtype=np.int32)
        step = Step(
            tokens=np.fromiter(
                (_token(s, p) for s, p in zip(sequences, positions.tolist(), strict=True)), np.int64, num
            ),
            positions=positions,
            sequences=every,
            query_start=np.arange(num + 1, dtype=np.int32),
            seq_lens=(positions + 1).astype(np.int32),
            tables=tables,
            max_query=1,
            max_seq_len=int(positions.max()) + 1,
            rows=every,
            prefixes=[SharedPrefix(*p) for p in plan.prefixes],
            copies=plan.copies,
        )
        self._last, self._decodes = sequences, step
        return Packed(step, [(item, r, 1) for r, item in enumerate(items)], self._rows)

    def _table(self, pages: Seq[list[int]]) -> Ints:
        table = np.zeros((len(pages), max(map(len, pages), default=1) or 1), np.int32)
        for row, own in zip(table, pages, strict=True):
            row[: len(own)] = own
        return table

    def _longer(self, tables: list[Ints], sequences: list[Sequence], positions: Ints) -> list[Ints]:
        """The tables of the step before with the pages that began since, and without those that a window freed."""
        began = np.flatnonzero(positions % self.page_size == 0).tolist()
        if not began:
            return tables
        out = []
        for g, table in enumerate(tables):
            columns = max(len(sequences[b].pages[g]) for b in began)
            if columns > table.shape[1]:
                table = np.pad(table, ((0, 0), (0, columns + 7 - table.shape[1])))
            else:
                table = table.copy()  # a pass in flight may still be read from the old one
            for b in began:
                own = sequences[b].pages[g]
                table[b, : len(own)] = own
            out.append(table)
        return out

    def _mixed(self, plan: Plan, lengths: Callable[[Item], Ints] | None) -> Packed:
        items = plan.items
        num_new = [item.num_new for item in items]
        starts = [0, *np.cumsum(num_new).tolist()]
        rows: list[int] = []
        packed_rows: list[tuple[Item, int, int]] = []
        pool_rows: list[int] = []
        tokens: list[int] = []
        scored: list[tuple[Item, Scored]] = []
        for item, end in zip(items, starts[1:], strict=True):
            seq = item.seq
            tokens += _tokens(item)
            if seq.owner.score_from is not None and (wanted := _scored(item, end - item.num_new)):
                scored.append((item, wanted))
            if item.samples:
                count = 1 + len(item.drafts)
                packed_rows.append((item, len(rows), count))
                rows += range(end - count, end)
                pool_rows += [-1] * (count - 1) + [seq.slot if count == 1 else -1]
        step = Step(
            tokens=np.array(tokens, np.int64),
            positions=np.concatenate([np.arange(i.start, i.start + i.num_new) for i in items]),
            sequences=np.repeat(np.arange(len(items), dtype=np.int32), num_new),
            query_start=np.array(starts, np.int32),
            seq_lens=np.array([i.start + i.num_new for i in items], np.int32),
            tables=[self._table([i.seq.pages[g] for i in items]) for g in range(self.num_groups)],
            max_query=max(num_new),
            max_seq_len=max(i.start + i.num_new for i in items),
            rows=np.array(rows, np.int64),
            copies=plan.copies,
            lengths=np.concatenate([lengths(item) for item in items]) if lengths else None,
            scored=[wanted for _, wanted in scored],
        )
        return Packed(step, packed_rows, np.array(pool_rows, np.int64), [item for item, _ in scored])


def _token(seq: Sequence, position: int) -> int:
    """The token at a position, or where the pool holds it if a pass in flight makes it."""
    return seq.token_ids[position] if position < len(seq.token_ids) else -1 - seq.slot


def _tokens(item: Item) -> list[int]:
    seq, start, end = item.seq, item.start, item.start + item.num_new - len(item.drafts)
    known = seq.token_ids[start:end]
    if len(known) < end - start:
        known = [*known, -1 - seq.slot]
    return [*known, *item.drafts]


def _scored(item: Item, at: int) -> Scored | None:
    """The prompt tokens that this item's positions predict, from the owner's `score_from` on; `at` is where the item
    begins in the packed tokens."""
    seq = item.seq
    first = max(item.start, seq.owner.score_from - 1)
    last = min(item.start + item.num_new, seq.num_prompt - 1)
    if first >= last:
        return None
    return Scored(at + first - item.start, first + 1, seq.token_ids[first + 1 : last + 1], seq.owner.num_top)
