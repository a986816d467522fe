"""Writes new keys and values into their pages, rounded to the storage type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What a head's largest number is stored as."""


@triton.jit
def _store(source, target, scales, token, slot, heads, K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LARGEST):
    d = tl.arange(0, WIDTH)
    inside = (heads < K)[:, None] & (d < D)[None, :]
    at = heads[:, None] * D + d[None, :]
    x = tl.load(source + token * (K * D) + at, mask=inside, other=0.0)
    if scales is not None:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 1) / LARGEST
        tl.store(scales + slot * K + heads, scale, mask=heads < K)
        x = x / tl.where(scale == 0.0, 1.0, scale)[:, None]
        if target.dtype.element_ty == tl.int8:
            x = tl.floor(x + 0.5)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    tl.store(target + slot * (K * D) + at, x.to(target.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table", "positions", "sequences", "seq_lens"],
)
def _write_kernel(
    k,
    v,
    keys,
    values,
    k_scales,
    v_scales,
    table,
    positions,
    sequences,
    seq_lens,
    table_stride,
    largest,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    sequence = tl.load(sequences + token).to(tl.int64)
    if tl.load(seq_lens + sequence) == 0:
        return
    position = tl.load(positions + token)
    page = tl.load(table + sequence * table_stride + position // PAGE).to(tl.int64)
    slot = page * PAGE + position % PAGE
    _store(k, keys, k_scales, token, slot, heads, K, D, WIDTH, largest)
    _store(v, values, v_scales, token, slot, heads, K, D, WIDTH, largest)


def write_kv(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
) -> None:
    """Store k and v [T, K, D] at slot table[sequences[t], positions[t] // page_size] * page_size + positions[t] %
    page_size of keys and values [num_slots, K, D]. Tokens of sequences with seq_lens 0 are not stored.

    With scales [num_slots, K] float32 (storage fp8 or int8) each token and head is divided by its largest absolute
    number over the largest that the type holds, and that scale is stored.
    """
    if not (k.is_contiguous() and v.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("k, v, keys and values must be contiguous")
    num_tokens, num_kv_heads, head_dim = k.shape
    columns = max(16, triton.next_power_of_2(head_dim))
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // columns))
    _write_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        k,
        v,
        keys,
        values,
        k_scales,
        v_scales,
        table,
        positions,
        sequences,
        seq_lens,
        table.stride(0),
        LARGEST.get(keys.dtype, 1.0),
        K=num_kv_heads,
        D=head_dim,
        WIDTH=columns,
        HEADS=heads,
        PAGE=page_size,
        num_warps=4,
    )
