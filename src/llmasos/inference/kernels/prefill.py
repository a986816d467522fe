"""Paged prefill: any number of queries per sequence, each tile of them walking over the keys that it can see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.inference.kernels.prefix import Prefixes, attend_prefixes, seen_before
from llmasos.inference.kernels.tiles import (
    Tiling,
    arithmetic,
    check_layout,
    empty_state,
    finish,
    fit,
    load_rows,
    sequence_block,
    sources,
    store_rows,
    walk,
    width,
)
from llmasos.models.attention import AttentionSpec

TILINGS = {
    32: Tiling(block_m=32, block_n=64, warps=4, stages=3),
    64: Tiling(block_m=64, block_n=64, warps=4, stages=3),
    128: Tiling(block_m=128, block_n=64, warps=8, stages=3),
}
"""By rows: queries × heads of a key head."""
INVARIANT = Tiling(block_m=64, block_n=64, warps=4, stages=2)
VARYING = "num_sequences", "table_stride", "prefix_queries", "prefix_parts", "window"
VARYING_TENSORS = "table", "seq_lens", "query_start", "skip"
"""What differs from batch to batch and must not have a kernel compiled again."""


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING_TENSORS)
def _prefill_kernel(
    q,
    keys,
    values,
    k_scales,
    v_scales,
    table,
    query_start,
    seq_lens,
    slopes,
    sinks,
    skip,
    prefix_acc,
    prefix_stats,
    out,
    num_sequences,
    table_stride,
    prefix_queries,
    prefix_parts,
    factor,
    softcap,
    window,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SCALED: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PREFIX: tl.constexpr,
    INVARIANT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // G
    # the last queries see the most keys: they go first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % K
    item = program // K

    # sequence b has the tiles from query_start[b] // QUERIES + b on, more than it can need
    sequences = tl.arange(0, BLOCK_B)
    starts = tl.load(query_start + sequences, mask=sequences < num_sequences, other=2**30)
    b = tl.sum((starts // QUERIES + sequences <= item).to(tl.int32)) - 1
    first = tl.load(query_start + b)
    num_fresh = tl.load(query_start + b + 1) - first
    at = (item - first // QUERIES - b) * QUERIES
    length = tl.load(seq_lens + b)
    if (at >= num_fresh) | (length == 0):
        return

    row = tl.arange(0, BLOCK_M)
    valid = (row < QUERIES * G) & (at + row // G < num_fresh)
    earliest = length - num_fresh + at
    latest = tl.minimum(earliest + QUERIES, length) - 1
    # rows that hold no query sit where the last one does, so that no tile of keys is needed for them
    position = tl.minimum(earliest + row // G, latest)
    offset = (first + at).to(tl.int64) * (K * G * D)
    rows = load_rows(q + offset, row, head, valid, K, G, D, WIDTH)
    slope = position
    if ALIBI:
        slope = tl.load(slopes + head * G + row % G) * 1.4426950408889634

    # keys low .. high - 1 are seen by some row, those of tiles full .. partial - 1 by all of them
    low = 0
    high = length
    partial = length
    if CAUSAL:
        high = latest + 1
        partial = earliest + 1
    if WINDOW:
        low = tl.maximum(earliest - window + 1, 0)
        if not CAUSAL:
            high = tl.minimum(latest + window, length)
            partial = tl.minimum(earliest + window, length)
    acc, peak, total = empty_state(BLOCK_M, WIDTH)
    if PREFIX:
        low = tl.load(skip + b)
        if low > 0:
            acc, peak, total = seen_before(
                acc, peak, total, prefix_acc, prefix_stats, (first + at).to(tl.int64), prefix_queries, prefix_parts,
                row, head, valid, K, G, D, WIDTH,
            )  # fmt: skip
    begin = low // BLOCK_N * BLOCK_N
    full = tl.cdiv(low, BLOCK_N) * BLOCK_N
    if WINDOW:
        full = tl.maximum(full, tl.cdiv(tl.maximum(latest - window + 1, 0), BLOCK_N) * BLOCK_N)
    full = tl.minimum(full, tl.cdiv(high, BLOCK_N) * BLOCK_N)
    partial = tl.maximum(partial // BLOCK_N * BLOCK_N, full)
    table += b.to(tl.int64) * table_stride
    # fmt: off
    if INVARIANT:
        full = begin
        partial = begin
    if WINDOW or PREFIX:
        acc, peak, total = walk(
            acc, peak, total, rows, position, slope, keys, values, k_scales, v_scales,
        table, begin, full, low, high, head,
            factor, softcap, window, K, D, PAGE, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, SCALED, BULK,
        )
    if not INVARIANT:
        acc, peak, total = walk(
            acc, peak, total, rows, position, slope, keys, values, k_scales, v_scales,
        table, full, partial, low, high, head,
            factor, softcap, window, K, D, PAGE, BLOCK_N, False, False, False, SOFTCAP, ALIBI, SCALED, BULK,
        )
    acc, peak, total = walk(
        acc, peak, total, rows, position, slope, keys, values, k_scales, v_scales,
        table, partial, high, low, high, head,
        factor, softcap, window, K, D, PAGE, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, SCALED, BULK,
    )
    # fmt: on
    result = finish(acc, peak, total, sinks, head, row, valid, G, SINKS).to(out.dtype.element_ty)
    store_rows(out + offset, result, row, head, valid, K, G, D, WIDTH)


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    max_query: int,
    page_size: int,
    spec: AttentionSpec,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    prefixes: Prefixes | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attention of packed queries, the last positions of their sequences, to the keys of those sequences.

    q [T, H, D]; query_start [B + 1] and seq_lens [B] int32; max_query, the most queries of one sequence, chooses the
    tile; the rest as in `paged_decode`. With `batch_invariant` a row's bits depend on its query, its keys and its
    position alone: one tile for every call, keys always cut at the same places. Returns `out` [T, H, D]; rows of
    sequences of length 0 are left as they are. Raises ValueError for what the kernel does not compute.
    """
    check_layout(q, keys, values, table, spec)
    num_sequences, num_kv_heads, head_dim = table.shape[0], keys.shape[1], q.shape[2]
    group = q.shape[1] // num_kv_heads
    if group > 128:
        raise ValueError(f"at most 128 query heads share a key head, not {group}")
    if batch_invariant and prefixes is not None:
        raise ValueError("shared prefixes change how a row's keys are cut: not with batch_invariant")
    if tiling is None:
        rows = max_query * group
        tiling = INVARIANT if batch_invariant else TILINGS[32 if rows <= 32 else 64 if rows <= 64 else 128]
    if prefixes is not None:
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        attend_prefixes(q, keys, values, table, prefixes, page_size=page_size, spec=spec, **scales)
    tiling = fit(tiling, q, keys, page_size)
    out = torch.empty_like(q) if out is None else out
    numbers, switches = arithmetic(spec, k_scales, slopes)
    block_m = max(tiling.block_m, triton.next_power_of_2(group))
    num_tiles = q.shape[0] // (block_m // group) + num_sequences
    _prefill_kernel[(num_tiles * num_kv_heads,)](
        q,
        *sources(keys, values, tiling),
        k_scales,
        v_scales,
        table,
        query_start,
        seq_lens,
        slopes,
        sinks,
        prefixes.skip if prefixes else None,
        prefixes.acc if prefixes else None,
        prefixes.stats if prefixes else None,
        out,
        num_sequences,
        table.stride(0),
        prefixes.acc.shape[1] if prefixes else 0,
        prefixes.acc.shape[0] if prefixes else 0,
        **numbers,
        **switches,
        K=num_kv_heads,
        G=group,
        D=head_dim,
        WIDTH=width(head_dim),
        PAGE=page_size,
        CAUSAL=spec.causal,
        WINDOW=spec.window > 0,
        SINKS=sinks is not None,
        PREFIX=prefixes is not None,
        INVARIANT=batch_invariant,
        BLOCK_B=sequence_block(num_sequences),
        BLOCK_M=block_m,
        BLOCK_N=tiling.block_n,
        BULK=tiling.bulk,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out
