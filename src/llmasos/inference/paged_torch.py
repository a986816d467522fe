"""Attention over pages in torch operations: the CPU's path, and what the kernels must equal.

T = packed tokens, B = sequences, H = query heads, K = key/value heads, G = H / K, D = head width, S = keys.
Indices and masks of a pass are made once (`Plan`) and serve all layers of a page group. A sequence whose pages lie side
by side is read in place; other pages are gathered. Sequences that decode are read together, padded to the longest of
them: what a padded key holds is masked, and finite, because a page is cleared when its first token is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmasos.inference.batch import Batch
from llmasos.models.attention import AttentionSpec, alibi_bias, prefill
from llmasos.models.layers import FEW_TOKENS

Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Keys and values of a layer, head by head: [1, K, num_slots, D]; fp8 and int8 with scales [1, K, num_slots, 1]."""
Ints = NDArray[np.int64]

MOST_PADDING = 512
"""Keys that may be read for nothing rather than split a batch of decodes: about what one more call costs."""
MOST_GATHERED = 1 << 16
"""Keys that are gathered at once: what bounds the memory of a layer's pass."""


def plain(memory: Tensor) -> Tensor:
    """fp8 as bytes, since torch cannot index it."""
    return memory.view(torch.uint8) if memory.dtype == torch.float8_e4m3fn else memory


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, K, D] -> fp8 or int8 and the scales [T, K, 1] by which the largest of a token and head is 448 or 127."""
    values = x.float()
    largest = 448.0 if dtype == torch.float8_e4m3fn else 127.0
    scales = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    values = values / scales
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


@dataclass(slots=True)
class Span:
    """Where the keys of some sequences lie: neighbouring slots of one, or pages of several to gather."""

    num: int
    """Sequences, B."""
    length: int
    """Keys of each, S."""
    slot: int = -1
    """The first of S neighbouring slots."""
    rows: Tensor | None = None
    """[B · K · pages]: rows of the memory seen as [K · num_pages, page_size · D]."""
    skipped: int = 0
    """Keys of the first page that nobody reads."""


@dataclass(slots=True)
class Decodes:
    """Sequences with one new token each that are read together."""

    tokens: slice | Tensor
    """Which of the packed tokens."""
    span: Span
    distance: Tensor
    """[B, S]: from each key to the query."""
    visible: Tensor | None
    """[B, S]; None: all."""
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, [B, 1, 1, S]."""
        if self.visible is None:
            return None
        if dtype not in self.masks:
            zeros = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self.masks[dtype] = zeros.masked_fill_(~self.visible, float("-inf"))[:, None, None]
        return self.masks[dtype]


@dataclass(slots=True)
class Chunk:
    """New tokens of one sequence, and its keys from the first that any of them sees."""

    tokens: slice
    span: Span
    start: int
    """The first new token, counted from the first key."""


class Plan:
    """One pass over the pages of one group."""

    def __init__(
        self, batch: Batch, group: int, window: int, num_heads: int, num_pages: int, invariant: bool = False
    ) -> None:
        self.page_size, self.window = batch.page_size, window
        self.num_heads, self.num_pages = num_heads, num_pages
        self.device = batch.positions.device
        self.invariant = invariant
        self._table: Ints = batch.tables[group].cpu().numpy()
        lengths = batch.seq_lens.cpu().numpy().astype(np.int64)
        starts = batch.query_start.cpu().numpy().astype(np.int64)
        new = np.diff(starts)
        self._find_slots(batch)
        self._find_fresh(lengths, new)
        # the first key that a sequence's first query sees
        lows = np.maximum(lengths - new - window + 1, 0) if window else np.zeros_like(lengths)
        self.masks: dict[object, Tensor] = {}
        self.parts: list[Decodes | Chunk] = []
        # a few tokens of one sequence are drafts, most often: each is read, bit for bit, as it would be without them
        few = len(new) == 1 and 1 < new[0] <= FEW_TOKENS and new[0] < lengths[0]
        if invariant or few:
            self.parts += self._plan_tokens(batch)
            return
        self.parts += self._plan_decodes(np.flatnonzero(new == 1), starts, lows, lengths)
        for b in np.flatnonzero(new > 1).tolist():
            self.parts.append(self._plan_chunk(b, int(starts[b]), int(new[b]), int(lows[b]), int(lengths[b])))

    # where new tokens go

    def _find_slots(self, batch: Batch) -> None:
        positions = batch.positions.cpu().numpy()
        pages = self._table[batch.sequences.cpu().numpy(), positions // self.page_size]
        slots = pages.astype(np.int64) * self.page_size + positions % self.page_size
        self.num_tokens = len(slots)
        self.first_slot = int(slots[0]) if _neighbours(slots) else -1
        self.slots = torch.from_numpy(slots).to(self.device)

    def _find_fresh(self, lengths: Ints, new: Ints) -> None:
        """Pages that begin in this pass and do not fill: what is behind their tokens is cleared."""
        tails = lengths % self.page_size
        began = np.flatnonzero((tails > 0) & (tails <= new))
        self.fresh: Tensor | None = None
        if len(began):
            pages = self._table[began, lengths[began] // self.page_size]
            self.fresh = torch.from_numpy(pages.astype(np.int64)).to(self.device)

    def write(self, stored: Stored, k: Tensor, v: Tensor) -> None:
        """Keep k and v [T, K, D] in the slots of their tokens."""
        for memory, scales, x in ((stored[0], stored[2], k), (stored[1], stored[3], v)):
            if scales is not None:
                x, scale = quantize(x, memory.dtype)
                self._put(scales, scale)
            self._put(memory, x)

    def _put(self, memory: Tensor, x: Tensor) -> None:
        memory, x = plain(memory), plain(x)
        if self.fresh is not None:
            memory.unflatten(2, (-1, self.page_size)).index_fill_(2, self.fresh, 0)
        if self.first_slot < 0:
            memory.index_copy_(2, self.slots, x.transpose(0, 1)[None].to(memory.dtype))
        elif self.num_tokens == 1:
            memory.select(2, self.first_slot).copy_(x)
        else:
            memory.narrow(2, self.first_slot, self.num_tokens).copy_(x.transpose(0, 1))

    # which keys are read

    def _plan_tokens(self, batch: Batch) -> list[Decodes]:
        """Every token for itself, with its own keys: the same shapes in whatever pass it is computed."""
        sequences = batch.sequences.cpu().numpy().astype(np.int64)
        highs = batch.positions.cpu().numpy().astype(np.int64) + 1
        lows = np.maximum(highs - self.window, 0) if self.window else np.zeros_like(highs)
        return [
            self._block(np.array([t]), sequences[t : t + 1], lows[t : t + 1], highs[t : t + 1])
            for t in range(len(highs))
        ]

    def _plan_decodes(self, sequences: Ints, starts: Ints, lows: Ints, lengths: Ints) -> list[Decodes]:
        """Sequences of about the same length together: MOST_PADDING keys at most are read for nothing."""
        if len(sequences) == 1:
            return [self._block(starts[sequences], sequences, lows[sequences], lengths[sequences])]
        num_keys = lengths - lows
        blocks: list[list[int]] = []
        longest = padding = 0
        for b in sequences[np.argsort(-num_keys[sequences], kind="stable")].tolist():
            padding += longest - int(num_keys[b])
            if not blocks or padding > MOST_PADDING or (len(blocks[-1]) + 1) * longest > MOST_GATHERED:
                blocks.append([])
                longest, padding = int(num_keys[b]), 0
            blocks[-1].append(b)
        every = [np.sort(np.array(block)) for block in blocks]
        return [self._block(starts[b], b, lows[b], lengths[b]) for b in every]

    def _block(self, tokens: Ints, sequences: Ints, low: Ints, high: Ints) -> Decodes:
        """One query of each sequence, at position high - 1, to its keys low .. high - 1."""
        span, base = self._span(sequences, low, high)
        k_pos = base[:, None] + np.arange(span.length)
        distance = high[:, None] - 1 - k_pos
        visible = (distance >= 0) & (k_pos >= low[:, None])
        return Decodes(
            tokens=_as_slice(tokens, self.device),
            span=span,
            distance=torch.from_numpy(distance).to(self.device),
            visible=None if visible.all() else torch.from_numpy(visible).to(self.device),
        )

    def _plan_chunk(self, b: int, at: int, num_new: int, low: int, length: int) -> Chunk:
        span, base = self._span(np.array([b]), np.array([low]), np.array([length]))
        return Chunk(slice(at, at + num_new), span, length - num_new - int(base[0]))

    def _span(self, sequences: Ints, lows: Ints, highs: Ints) -> tuple[Span, Ints]:
        """Where keys low .. high - 1 of each sequence lie, and the position of the first key of the span."""
        size = self.page_size
        first, last = lows // size, (highs - 1) // size
        if len(sequences) == 1:
            pages = self._table[sequences[0], first[0] : last[0] + 1].astype(np.int64)
            low, length = int(lows[0]), int(highs[0] - lows[0])
            skipped = low % size
            if _neighbours(pages):
                return Span(1, length, slot=int(pages[0]) * size + skipped), lows
            return Span(1, length, rows=self._rows(pages[None]), skipped=skipped), lows
        columns = first[:, None] + np.arange(int((last - first).max()) + 1)
        # behind its last page a sequence reads that page again, masked
        pages = self._table[sequences[:, None], np.minimum(columns, last[:, None])].astype(np.int64)
        base = first * size
        return Span(len(sequences), int((highs - base).max()), rows=self._rows(pages)), base

    def _rows(self, pages: Ints) -> Tensor:
        heads = np.arange(self.num_heads)[None, :, None] * self.num_pages
        return torch.from_numpy((heads + pages[:, None]).reshape(-1)).to(self.device)

    # attention

    def read(self, stored: Stored, q: Tensor, spec: AttentionSpec) -> Tensor:
        """Queries [T, H, D] -> what they saw, [T, H, D]."""
        if len(self.parts) == 1:
            return self._part(self.parts[0], stored, q, spec)
        out = torch.empty_like(q)
        for part in self.parts:
            out[part.tokens] = self._part(part, stored, q[part.tokens], spec)
        return out

    def _part(self, part: Decodes | Chunk, stored: Stored, q: Tensor, spec: AttentionSpec) -> Tensor:
        keys = self._keys(stored[0], stored[2], part.span, q.dtype)
        values = self._keys(stored[1], stored[3], part.span, q.dtype)
        if self.invariant:  # the same strides and alignment as well
            q, keys, values = q.clone(), keys.clone(), values.clone()
        if isinstance(part, Decodes):
            return decode(q, keys, values, spec, part)
        return prefill(q, keys[0].transpose(0, 1), values[0].transpose(0, 1), spec, part.start, self.masks)

    def _keys(self, memory: Tensor, scales: Tensor | None, span: Span, dtype: torch.dtype) -> Tensor:
        """The keys or values of a span, [B, K, S, D]."""
        found = self._found(memory, span)
        if scales is None:
            return found if found.dtype == dtype else found.to(dtype)
        factors = self._found(scales, span)
        return (found.float() * factors).to(dtype)

    def _found(self, memory: Tensor, span: Span) -> Tensor:
        """memory [1, K, num_slots, D] -> [B, K, S, D], in place where the slots are neighbours."""
        if span.rows is None:
            return memory.narrow(2, span.slot, span.length)
        width = memory.shape[-1]
        found = plain(memory).view(-1, self.page_size * width).index_select(0, span.rows).view(memory.dtype)
        return found.view(span.num, self.num_heads, -1, width).narrow(2, span.skipped, span.length)


def decode(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, block: Decodes) -> Tensor:
    """One query per sequence: q [B, H, D], k and v [B, K, S, D]. Queries that share a key head form one small matrix,
    so that keys are never repeated."""
    queries = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
    if spec.plain:
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=block.mask(q.dtype), scale=spec.scale)
        return out.reshape(q.shape)
    scores = (queries @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if spec.slopes:
        # [B or none, H, 1, S] beside scores [B, K, G, S]
        k_pos = torch.arange(k.shape[2], device=k.device)
        scores = scores + alibi_bias(spec, block.distance[:, None], k_pos).squeeze(-2).unflatten(-2, (k.shape[1], -1))
    if block.visible is not None:
        scores = scores.masked_fill(~block.visible[:, None, None], float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(q.shape)


def _neighbours(numbers: Ints) -> bool:
    """Each is one more than the one before."""
    return bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all())


def _as_slice(tokens: Ints, device: torch.device) -> slice | Tensor:
    if _neighbours(tokens):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.from_numpy(tokens).to(device)
