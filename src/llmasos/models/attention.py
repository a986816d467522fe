"""Attention over packed tokens, and the protocol through which a model meets a KV cache.

T = packed tokens of any number of sequences, H = query heads, K = key/value heads (H a multiple of K), D = head width.
A model calls `attend(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]` once per layer and knows nothing else:
what is kept, and which keys a query may see, is the business of the object behind it. Two of them live here: `Varlen`
(keeps nothing: training, scoring, encoders) and `ContiguousCache` (the plain path that every faster one must equal).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmasos.models.config import ModelConfig

QUERY_ROWS = 512
"""Queries whose mask, or whose scores where the formula is computed as written, exists at once."""


@dataclass(frozen=True)
class AttentionSpec:
    """What the arithmetic of one layer needs to know."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    slopes: tuple[float, ...] = ()
    """ALiBi slope of each query head (arXiv:2108.12409)."""
    alibi_scale: float = 1.0
    alibi_bf16: bool = False

    @property
    def plain(self) -> bool:
        """No term that needs the scores themselves or a bias."""
        return not self.softcap and not self.slopes


class Attend(Protocol):
    """Takes one layer's queries, keys and values of all packed tokens and returns what each query saw."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def layer_specs(config: ModelConfig) -> list[AttentionSpec]:
    """The attention arithmetic of every layer."""
    slopes = alibi_slopes(config.num_heads) if config.position == "alibi" else ()
    return [
        AttentionSpec(
            scale=config.scale / (i + 1 if config.scale_by_layer else 1),
            window=config.window(i),
            softcap=config.attention_softcap,
            causal=config.causal,
            slopes=slopes,
            alibi_scale=config.alibi_scale,
            alibi_bf16=config.alibi_bf16,
        )
        for i in range(config.num_layers)
    ]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Geometric slopes of ALiBi; head counts that are no power of two take every other slope of the next power."""
    base = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / base) for i in range(base)]
    slopes += [2 ** (-4 * (2 * i + 1) / base) for i in range(num_heads - base)]
    return tuple(slopes)


def alibi_bias(spec: AttentionSpec, distance: Tensor, k_pos: Tensor) -> Tensor:
    """What ALiBi adds to the scores: `distance` [.., T, S] and k_pos [S] -> [.., H, T or 1, S] in float32."""
    slopes = torch.tensor(spec.slopes, device=k_pos.device)[:, None, None]
    if spec.alibi_bf16:
        # counted from the first key instead of from the query: the same to a softmax but for what rounding makes of it
        return (slopes.bfloat16() * k_pos).float() * spec.alibi_scale
    return slopes * distance.unsqueeze(-3) * -spec.alibi_scale


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """One sequence by the definition: softmax(scale · q kᵀ + bias) v; products in the given dtype, the
    rest in float32.

    q [T, H, D], k and v [S, K, D], q_pos [T] and k_pos [S] are positions in the sequence. Returns [T, H, D].
    """
    num_tokens, num_heads, width = q.shape
    groups = num_heads // k.shape[1]
    queries = q.view(num_tokens, k.shape[1], groups, width).permute(1, 2, 0, 3)
    scores = (queries @ k.permute(1, 2, 0)[:, None]).float() * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = q_pos[:, None] - k_pos[None, :]
    if spec.slopes:
        scores = scores + alibi_bias(spec, distance, k_pos).unflatten(0, (k.shape[1], groups))
    if hidden := _hidden(distance, spec):
        scores = scores.masked_fill(hidden[0], float("-inf"))
    out = scores.softmax(-1).to(v.dtype) @ v.permute(1, 0, 2)[:, None]
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, width)


def _hidden(distance: Tensor, spec: AttentionSpec) -> list[Tensor]:
    """The mask of pairs that may not see each other: none, or one tensor shaped like `distance`."""
    masks = []
    if spec.causal:
        masks.append(distance < 0)
    if spec.window:
        masks.append(distance >= spec.window)
        if not spec.causal:
            masks.append(distance <= -spec.window)
    return [torch.stack(masks).any(0)] if masks else []


def prefill(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, start: int, masks: dict[object, Tensor] | None = None
) -> Tensor:
    """Queries at positions start.. against keys at 0..; one sequence. The fused kernel where the case allows it; where
    a mask or the scores themselves are needed, QUERY_ROWS queries at a time against the keys that they can see. `masks`
    keeps what was made for the layers that follow."""
    num_tokens, num_keys = q.shape[0], k.shape[0]
    causal = spec.causal and num_tokens > 1
    masked = (spec.window and num_keys > spec.window) or (start and causal)
    if not masked and spec.plain:
        return _fused(q, k, v, spec, causal=causal)
    parts = []
    for at in range(0, num_tokens, QUERY_ROWS):
        queries = q[at : at + QUERY_ROWS]
        first, last = start + at, start + at + queries.shape[0] - 1
        low = max(0, first - spec.window + 1) if spec.window else 0
        high = last + 1 if spec.causal else min(num_keys, last + spec.window) if spec.window else num_keys
        q_pos = torch.arange(first, last + 1, device=q.device)
        k_pos = torch.arange(low, high, device=q.device)
        seen = queries, k[low:high], v[low:high], spec
        if spec.plain:
            key = (first, last, low, high, spec.window, q.dtype)
            mask = None if masks is None else masks.get(key)
            if mask is None:
                hidden = _hidden(q_pos[:, None] - k_pos, spec)[0]
                mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
                if masks is not None:
                    masks[key] = mask
            parts.append(_fused(*seen, mask=mask))
        else:
            parts.append(attention(*seen, q_pos, k_pos))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=spec.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


class Varlen:
    """Attention inside each of several packed sequences; nothing is kept."""

    def __init__(self, specs: Sequence[AttentionSpec], lengths: Sequence[int]) -> None:
        self.specs, self.lengths = specs, list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = self.specs[layer]
        if len(self.lengths) == 1:
            return prefill(q, k, v, spec, 0)
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([prefill(*part, spec, 0) for part in parts])

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each packed token in its own sequence, [T]."""
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])


class ContiguousCache:
    """Keys and values of B sequences, each in its own row of one tensor per layer: [B, K, S, D].

    A step is announced with `plan(rows, num_new)`; the forward pass then calls the object once per layer, and
    `advance()` makes the new tokens part of the past. Rows grow by doubling up to the context. Nothing is padded on the
    left: a row's length is its own.
    """

    def __init__(
        self, config: ModelConfig, num_rows: int, *, device: torch.device, dtype: torch.dtype, capacity: int = 256
    ) -> None:
        self.specs = layer_specs(config)
        self.lengths = [0] * num_rows
        self._shape = (config.num_kv_heads, config.head_dim)
        self._limit = config.context_length
        self._device, self._dtype = device, dtype
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows: list[int] = []
        self._decodes = False
        self._new: list[int] = []
        self._capacity = min(capacity, self._limit)
        for _ in range(config.num_layers):
            self._keys.append(self._empty(num_rows))
            self._values.append(self._empty(num_rows))

    def _empty(self, num_rows: int) -> Tensor:
        heads, width = self._shape
        return torch.zeros(num_rows, heads, self._capacity, width, device=self._device, dtype=self._dtype)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def plan(self, rows: Sequence[int], num_new: Sequence[int]) -> Tensor:
        """Announce which rows the packed tokens belong to. Returns the positions of the new tokens, [T]."""
        self._rows, self._new = list(rows), list(num_new)
        needed = max(self.lengths[r] + n for r, n in zip(rows, num_new, strict=True))
        assert needed <= self._limit, "the caller checks the context length"
        if needed > self._capacity:
            self._grow(needed)
        self._decodes = all(n == 1 for n in num_new)
        if self._decodes:
            positions = torch.tensor([self.lengths[r] for r in rows])
            self._decode_plan(positions)
            return positions.to(self._device)
        starts = [self.lengths[r] for r in rows]
        return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, num_new, strict=True)]).to(self._device)

    def _decode_plan(self, positions: Tensor) -> None:
        self._index = torch.tensor(self._rows, device=self._device)
        self._length = int(positions.max()) + 1
        self._positions = positions.to(self._device)
        self._all_rows = self._rows == list(range(len(self.lengths)))
        self._masks: dict[int, Tensor] = {}

    def _grow(self, needed: int) -> None:
        old, self._capacity = self._capacity, min(max(needed, 2 * self._capacity), self._limit)
        for store in (self._keys, self._values):
            for i, tensor in enumerate(store):
                store[i] = self._empty(tensor.shape[0])
                store[i][:, :, :old] = tensor

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._decodes:
            return self._decode(layer, q, k, v)
        out, at = [], 0
        for row, n in zip(self._rows, self._new, strict=True):
            out.append(self._extend(layer, row, q[at : at + n], k[at : at + n], v[at : at + n]))
            at += n
        return out[0] if len(out) == 1 else torch.cat(out)

    def _extend(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = self.lengths[row]
        end = start + q.shape[0]
        keys, values = self._keys[layer][row], self._values[layer][row]
        keys[:, start:end] = k.transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        if start == 0:
            return prefill(q, k, v, self.specs[layer], 0)
        return prefill(q, keys[:, :end].transpose(0, 1), values[:, :end].transpose(0, 1), self.specs[layer], start)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token per row. Queries that share a key head form one small matrix, so keys are never repeated."""
        keys, values, spec = self._keys[layer], self._values[layer], self.specs[layer]
        batch, num_heads, width = q.shape
        if batch == 1:
            if len(self.lengths) > 1:
                row = self._rows[0]
                keys, values = keys[row : row + 1], values[row : row + 1]
            keys.select(2, self._length - 1).copy_(k)
            values.select(2, self._length - 1).copy_(v)
            low = max(0, self._length - spec.window) if spec.window else 0
            seen = self._length - low
            past_k, past_v = keys.narrow(2, low, seen), values.narrow(2, low, seen)
        else:
            keys[self._index, :, self._positions] = k
            values[self._index, :, self._positions] = v
            low = 0
            past_k, past_v = keys[:, :, : self._length], values[:, :, : self._length]
            if not self._all_rows:
                past_k, past_v = past_k[self._index], past_v[self._index]
        queries = q.view(batch, past_k.shape[1], -1, width)
        if spec.plain:
            visible = None if batch == 1 else self._visible(spec)
            out = F.scaled_dot_product_attention(queries, past_k, past_v, attn_mask=visible, scale=spec.scale)
            return out.reshape(batch, num_heads, width)
        scores = (queries @ past_k.transpose(-1, -2)).float() * spec.scale
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        k_pos = torch.arange(low, self._length, device=q.device)
        distance = self._positions[:, None] - k_pos
        if spec.slopes:
            # [B or none, H, 1, S] beside scores [B, K, H / K, S]
            bias = alibi_bias(spec, distance[:, None], k_pos).squeeze(-2)
            scores = scores + bias.unflatten(-2, (past_k.shape[1], -1))
        if batch > 1 and (hidden := _hidden(distance, spec)):
            scores = scores.masked_fill(hidden[0][:, None, None], float("-inf"))
        return (scores.softmax(-1).to(past_v.dtype) @ past_v).reshape(batch, num_heads, width)

    def _visible(self, spec: AttentionSpec) -> Tensor:
        """Which of the keys up to the longest row each row sees, [B, 1, 1, S]; made once per step and window."""
        if spec.window not in self._masks:
            distance = self._positions[:, None] - torch.arange(self._length, device=self._positions.device)
            self._masks[spec.window] = ~_hidden(distance, spec)[0][:, None, None]
        return self._masks[spec.window]

    def advance(self) -> None:
        """The tokens of the announced step are past now."""
        for row, n in zip(self._rows, self._new, strict=True):
            self.lengths[row] += n
