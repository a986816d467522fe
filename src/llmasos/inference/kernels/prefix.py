"""Keys that neighbouring sequences share, read once for all of them (cascade attention).

The queries of a run of sequences lie side by side in the batch, so tiles of them walk over the shared keys together.
The result, one state (acc, peak, total) per query, head and part of the keys, is where decode and prefill begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.inference.batch import SharedPrefix
from llmasos.inference.kernels.tiles import (
    NOTHING,
    Tiling,
    arithmetic,
    check_layout,
    empty_state,
    fit,
    join,
    load_rows,
    num_processors,
    sources,
    store_rows,
    walk,
    width,
)
from llmasos.models.attention import AttentionSpec

TILING = Tiling(block_m=128, block_n=64, warps=8, stages=3)


@dataclass(frozen=True)
class Prefixes:
    """A batch's shared prefixes on the device; under a CUDA graph tensors stay in place while their content changes."""

    tiles: Tensor
    """[C, 4] int32: first query, number of queries (0: unused), a sequence with the pages, number of shared keys."""
    skip: Tensor
    """[B] int32: how many keys of each sequence its tile has seen; 0 for those without."""
    acc: Tensor
    """[S, T, H, D] float32: the state after each of S parts of the shared keys."""
    stats: Tensor
    """[2, S, T, H] float32: peak and total."""
    tiling: Tiling


def new_prefixes(
    num_tiles: int,
    num_sequences: int,
    num_queries: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    device: torch.device,
    *,
    tiling: Tiling = TILING,
) -> Prefixes:
    """Room for `num_tiles` tiles of as many queries as a batch may have; the shared keys are cut into as many parts as
    fill the GPU."""
    parts = max(1, min(8, 2 * num_processors(device) // (num_tiles * num_kv_heads)))
    return Prefixes(
        torch.zeros(num_tiles, 4, dtype=torch.int32, device=device),
        torch.zeros(num_sequences, dtype=torch.int32, device=device),
        torch.empty(parts, num_queries, num_heads, head_dim, device=device),
        torch.empty(2, parts, num_queries, num_heads, device=device),
        tiling,
    )


def queries_of_a_tile(group: int, tiling: Tiling = TILING) -> int:
    """How many queries of `group` heads per key head share a tile."""
    return max(tiling.block_m, triton.next_power_of_2(group)) // group


def prefix_tiles(
    prefixes: Sequence[SharedPrefix], query_start: Sequence[int], *, group: int, num_tiles: int, tiling: Tiling = TILING
) -> tuple[np.ndarray, np.ndarray]:
    """The content of `Prefixes.tiles` [num_tiles, 4] and `.skip` [B] for a batch's runs.

    Runs that save the most reading come first; those for which no tile is left are read by every sequence for itself.
    """
    tiles = np.zeros((num_tiles, 4), np.int32)
    skip = np.zeros(len(query_start) - 1, np.int32)
    size, used = queries_of_a_tile(group, tiling), 0
    for run in sorted(prefixes, key=lambda run: (run.end - run.start - 1) * run.length, reverse=True):
        first, last = query_start[run.start], query_start[run.end]
        starts = range(first, last, size)
        if used + len(starts) > num_tiles:
            continue
        for start in starts:
            tiles[used] = start, min(size, last - start), run.start, run.length
            used += 1
        skip[run.start : run.end] = run.length
    return tiles, skip


@triton.jit(do_not_specialize=["num_queries", "parts", "table_stride"], do_not_specialize_on_alignment=["table"])
def _prefix_kernel(
    q,
    keys,
    values,
    k_scales,
    v_scales,
    table,
    tiles,
    acc_out,
    stats,
    table_stride,
    num_queries,
    parts,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    part = tl.program_id(2)
    first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    table += tl.load(tile + 2).to(tl.int64) * table_stride
    length = tl.load(tile + 3)
    if count == 0:
        return
    blocks = tl.cdiv(length, BLOCK_N)
    begin = part * blocks // parts * BLOCK_N
    end = tl.minimum((part + 1) * blocks // parts * BLOCK_N, length)
    full = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    valid = row < count * G
    rows = load_rows(q + first * (K * G * D), row, head, valid, K, G, D, WIDTH)
    acc, peak, total = empty_state(BLOCK_M, WIDTH)
    # fmt: off
    acc, peak, total = walk(
        acc, peak, total, rows, row, row, keys, values, k_scales, v_scales, table, begin, full, begin, end, head,
        factor, softcap, window, K, D, PAGE, BLOCK_N, False, False, False, SOFTCAP, ALIBI, SCALED, BULK,
    )
    acc, peak, total = walk(
        acc, peak, total, rows, row, row, keys, values, k_scales, v_scales, table, full, end, begin, end, head,
        factor, softcap, window, K, D, PAGE, BLOCK_N, True, False, False, SOFTCAP, ALIBI, SCALED, BULK,
    )
    # fmt: on
    base = part * num_queries.to(tl.int64) + first
    store_rows(acc_out + base * (K * G * D), acc, row, head, valid, K, G, D, WIDTH)
    at = base * (K * G) + (row // G) * (K * G) + head * G + row % G
    tl.store(stats + at, peak, mask=valid)
    tl.store(stats + parts * num_queries.to(tl.int64) * (K * G) + at, total, mask=valid)


@triton.jit
def seen_before(
    acc,
    peak,
    total,
    prefix_acc,
    prefix_stats,
    first,
    num_queries,
    parts,
    row,
    head,
    valid,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The state of queries from `first` on after their shared keys, all parts joined in order."""
    for part in range(parts):
        base = part * num_queries.to(tl.int64) + first
        at = base * (K * G) + (row // G) * (K * G) + head * G + row % G
        acc_part = load_rows(prefix_acc + base * (K * G * D), row, head, valid, K, G, D, WIDTH)
        peak_part = tl.load(prefix_stats + at, mask=valid, other=NOTHING)
        total_part = tl.load(prefix_stats + parts * num_queries.to(tl.int64) * (K * G) + at, mask=valid, other=0.0)
        acc, peak, total = join(acc, peak, total, acc_part, peak_part, total_part)
    return acc, peak, total


def attend_prefixes(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    prefixes: Prefixes,
    *,
    page_size: int,
    spec: AttentionSpec,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Fill `prefixes.acc` and `.stats` for queries q [T, H, D]; layout as in `paged_decode`.

    Raises ValueError for layers with a window or ALiBi: there, what a query sees of the prefix depends on its position.
    """
    if spec.window or spec.slopes:
        raise ValueError("shared prefixes need layers without a sliding window and without ALiBi")
    check_layout(q, keys, values, table, spec)
    num_kv_heads, group, tiling = keys.shape[1], q.shape[1] // keys.shape[1], fit(prefixes.tiling, q, keys, page_size)
    numbers, switches = arithmetic(spec, k_scales, None)
    parts, num_queries = prefixes.acc.shape[:2]
    if num_queries < q.shape[0]:
        raise ValueError(f"room for the shared prefixes of {num_queries} queries, {q.shape[0]} given")
    _prefix_kernel[(num_kv_heads, prefixes.tiles.shape[0], parts)](
        q,
        *sources(keys, values, tiling),
        k_scales,
        v_scales,
        table,
        prefixes.tiles,
        prefixes.acc,
        prefixes.stats,
        table.stride(0),
        num_queries,
        parts,
        **numbers,
        **switches,
        K=num_kv_heads,
        G=group,
        D=q.shape[2],
        WIDTH=width(q.shape[2]),
        PAGE=page_size,
        BLOCK_M=max(tiling.block_m, triton.next_power_of_2(group)),
        BLOCK_N=tiling.block_n,
        BULK=tiling.bulk,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
