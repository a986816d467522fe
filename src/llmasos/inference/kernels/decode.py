"""Paged decode: one or a few queries per sequence, the keys of all sequences cut into pieces of about equal length.

How they are cut is decided by the programs themselves from the lengths (every program does the same small sum), so one
CUDA graph serves all lengths: its grid has a program for every piece that there can be, and those without one end at
once. The last piece of a sequence and head to be done joins all of them, in the order of their keys: results do not
depend on who came last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.inference.kernels.prefix import Prefixes, attend_prefixes, seen_before
from llmasos.inference.kernels.tiles import (
    NOTHING,
    Tiling,
    arithmetic,
    check_layout,
    empty_state,
    finish,
    fit,
    load_rows,
    num_processors,
    sequence_block,
    sources,
    store_rows,
    walk,
    width,
)
from llmasos.models.attention import AttentionSpec

TILING = Tiling(block_m=16, block_n=64, warps=4, stages=3)
MAX_ROWS = 128
"""Most queries × heads of a key head that one tile holds."""
JOIN_NUMBERS = 4096
"""How many numbers of pieces are joined at once."""

VARYING = "num_sequences", "table_stride", "splits", "shortest", "num_rows", "prefix_queries", "prefix_parts", "window"
VARYING_TENSORS = "table", "seq_lens", "query_start", "skip"
"""What differs from batch to batch and must not have a kernel compiled again."""


@dataclass(frozen=True)
class Workspace:
    """What the pieces of one launch tell each other; launches on one stream share one."""

    acc: Tensor
    """[pieces, K, rows, D] float32."""
    stats: Tensor
    """[2, pieces, K, rows] float32: peak and total."""
    done: Tensor
    """[B, K] int32: pieces that are done; 0 between launches."""


def num_pieces(num_sequences: int, num_kv_heads: int, device: torch.device) -> int:
    """Into how many pieces the keys of all sequences are cut, beside one more per sequence at most."""
    return max(num_sequences, triton.cdiv(2 * num_processors(device), num_kv_heads))


def shortest_piece(num_sequences: int) -> int:
    """Keys; a shorter piece takes less time than joining it. Measured on an H200 (bench/gpu_attention.py)."""
    return 64 if num_sequences == 1 else 512 if 4 < num_sequences <= 16 else 256


def new_workspace(
    num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, *, max_query: int = 1
) -> Workspace:
    """Enough for any batch of up to `num_sequences` sequences with up to `max_query` queries each."""
    pieces = num_sequences + num_pieces(num_sequences, num_kv_heads, device)
    rows = max_query * (num_heads // num_kv_heads)
    return Workspace(
        torch.empty(pieces, num_kv_heads, rows, head_dim, device=device),
        torch.empty(2, pieces, num_kv_heads, rows, device=device),
        torch.zeros(num_sequences, num_kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING_TENSORS)
def _decode_kernel(
    q,
    keys,
    values,
    k_scales,
    v_scales,
    table,
    seq_lens,
    query_start,
    slopes,
    sinks,
    skip,
    prefix_acc,
    prefix_stats,
    part_acc,
    part_stats,
    done,
    out,
    num_sequences,
    table_stride,
    splits,
    shortest,
    num_rows,
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
    SINGLE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
    JOIN_ROWS: tl.constexpr,
    JOIN_PARTS: tl.constexpr,
):
    head = tl.program_id(0) % K
    item = tl.program_id(0) // K

    # which piece: every sequence b is cut into counts[b] pieces of at most `longest` tiles
    sequences = tl.arange(0, BLOCK_B)
    real = sequences < num_sequences
    lengths = tl.load(seq_lens + sequences, mask=real, other=0)
    if SINGLE:
        fresh = tl.full([BLOCK_B], 1, tl.int32)
    else:
        fresh = tl.load(query_start + sequences + 1, mask=real, other=0) - tl.load(
            query_start + sequences, mask=real, other=0
        )
    lows = tl.zeros([BLOCK_B], tl.int32)
    if WINDOW:
        lows = tl.maximum(lengths - fresh - window + 1, 0)
    if PREFIX:
        lows = tl.load(skip + sequences, mask=real, other=0)
    starts = lows // BLOCK_N * BLOCK_N
    tiles = tl.where((lengths > 0) & (fresh > 0), tl.cdiv(lengths - starts, BLOCK_N), 0)
    longest = tl.maximum(tl.cdiv(tl.sum(tiles), splits), tl.cdiv(shortest, BLOCK_N))
    counts = tl.cdiv(tiles, longest)
    b = tl.sum((tl.cumsum(counts) <= item).to(tl.int32))
    if b >= num_sequences:
        return
    index = item - tl.sum(tl.where(sequences < b, counts, 0))
    mine = sequences == b
    count = tl.sum(tl.where(mine, counts, 0))
    blocks = tl.sum(tl.where(mine, tiles, 0))
    length = tl.sum(tl.where(mine, lengths, 0))
    low = tl.sum(tl.where(mine, lows, 0))
    start = tl.sum(tl.where(mine, starts, 0))

    begin = start + index * blocks // count * BLOCK_N
    end = tl.minimum(start + (index + 1) * blocks // count * BLOCK_N, length)
    if SINGLE:
        first = b.to(tl.int64)
        num_fresh = 1
    else:
        first = tl.load(query_start + b).to(tl.int64)
        num_fresh = tl.sum(tl.where(mine, fresh, 0))
    row = tl.arange(0, BLOCK_M)
    valid = row < num_fresh * G
    position = length - num_fresh + row // G
    rows = load_rows(q + first * (K * G * D), row, head, valid, K, G, D, WIDTH)
    slope = position
    if ALIBI:
        slope = tl.load(slopes + head * G + row % G) * 1.4426950408889634
    acc, peak, total = empty_state(BLOCK_M, WIDTH)
    if PREFIX:  # noqa: SIM102  # one is of the compiler, the other of the run
        if (low > 0) & (index == 0):
            acc, peak, total = seen_before(
                acc,
                peak,
                total,
                prefix_acc,
                prefix_stats,
                first,
                prefix_queries,
                prefix_parts,
                row,
                head,
                valid,
                K,
                G,
                D,
                WIDTH,
            )
    # fmt: off
    acc, peak, total = walk(
        acc, peak, total, rows, position, slope, keys, values, k_scales, v_scales,
        table + b.to(tl.int64) * table_stride,
        begin, end, low, end, head,
        factor, softcap, window, K, D, PAGE, BLOCK_N,
        True, not SINGLE, WINDOW and not SINGLE, SOFTCAP, ALIBI, SCALED, BULK,
    )
    # fmt: on
    target = out + first * (K * G * D)
    if count == 1:
        result = finish(acc, peak, total, sinks, head, row, valid, G, SINKS)
        store_rows(target, result.to(out.dtype.element_ty), row, head, valid, K, G, D, WIDTH)
        return

    part_totals = part_stats + tl.num_programs(0).to(tl.int64) * num_rows
    cell = tl.program_id(0).to(tl.int64) * num_rows
    d = tl.arange(0, WIDTH)
    tl.store(part_acc + (cell + row)[:, None] * D + d[None, :], acc, mask=valid[:, None] & (d < D)[None, :])
    tl.store(part_stats + cell + row, peak, mask=valid)
    tl.store(part_totals + cell + row, total, mask=valid)
    # all threads have stored before the one thread that counts says so
    tl.debug_barrier()
    counter = done + b * K + head
    if tl.atomic_add(counter, 1, sem="acq_rel") != count - 1:
        return
    tl.store(counter, 0)
    for block in range(0, num_fresh * G, JOIN_ROWS):
        rows_here = block + tl.arange(0, JOIN_ROWS)
        valid_here = rows_here < num_fresh * G
        joined, highest, weight = empty_state(JOIN_ROWS, WIDTH)
        for piece in range(0, count, JOIN_PARTS):
            part = piece + tl.arange(0, JOIN_PARTS)
            live = (part < count)[:, None] & valid_here[None, :]
            place = ((item - index + part) * K + head)[:, None] * num_rows + rows_here[None, :]
            peaks = tl.load(part_stats + place, mask=live, other=NOTHING, cache_modifier=".cg")
            totals = tl.load(part_totals + place, mask=live, other=0.0, cache_modifier=".cg")
            inside = live[:, :, None] & (d < D)[None, None, :]
            at = place[:, :, None] * D + d[None, None, :]
            accs = tl.load(part_acc + at, mask=inside, other=0.0, cache_modifier=".cg")
            highest_new = tl.maximum(highest, tl.max(peaks, 0))
            shrink, weights = tl.exp2(highest - highest_new), tl.exp2(peaks - highest_new[None, :])
            joined = joined * shrink[:, None] + tl.sum(accs * weights[:, :, None], 0)
            weight = weight * shrink + tl.sum(totals * weights, 0)
            highest = highest_new
        outcome = finish(joined, highest, weight, sinks, head, rows_here, valid_here, G, SINKS)
        store_rows(target, outcome.to(out.dtype.element_ty), rows_here, head, valid_here, K, G, D, WIDTH)


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    workspace: Workspace,
    *,
    page_size: int,
    spec: AttentionSpec,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_start: Tensor | None = None,
    max_query: int = 1,
    prefixes: Prefixes | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
    shortest: int | None = None,
    tiling: Tiling = TILING,
) -> Tensor:
    """Attention of the last queries of each sequence to all of its keys: causal, softmax in float32.

    q [T, H, D]; keys, values [num_slots, K, D]; table [B, P] int32; seq_lens [B] int32, the queries' own keys included
    (0: nothing is read and the row is left as it is). Query b is sequence b's only one, or with query_start [B + 1]
    int32 it has up to `max_query` (max_query · H / K at most 128). Scales [num_slots, K] float32 for fp8 and int8
    storage; slopes [H] float32, times spec.alibi_scale; sinks [H] float32, logits that only take weight away.
    `splits`: about how many pieces the keys of the whole batch make per key head, none shorter than `shortest` keys
    (None: as measured).
    Returns `out` [T, H, D]. Raises ValueError for what the kernel does not compute.
    """
    check_layout(q, keys, values, table, spec)
    num_sequences, num_kv_heads, head_dim = table.shape[0], keys.shape[1], q.shape[2]
    group = q.shape[1] // num_kv_heads
    num_rows = max_query * group
    if not spec.causal or num_rows > MAX_ROWS:
        raise ValueError(f"decode is causal, with at most {MAX_ROWS} query heads per key head ({num_rows} given)")
    if (max_query > 1) != (query_start is not None):
        raise ValueError("several queries of a sequence need query_start; without it there is one of each")
    shortest = shortest or shortest_piece(num_sequences)
    splits = splits or num_pieces(num_sequences, num_kv_heads, q.device)
    room, pieces = workspace.acc.shape, num_sequences + splits
    if pieces > room[0] or num_rows > room[2] or num_sequences > workspace.done.shape[0] or head_dim != room[3]:
        raise ValueError(f"the workspace {tuple(room)} is too small for {pieces} pieces of {num_rows} rows")
    if prefixes is not None:
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        attend_prefixes(q, keys, values, table, prefixes, page_size=page_size, spec=spec, **scales)
    out = torch.empty_like(q) if out is None else out
    numbers, switches = arithmetic(spec, k_scales, slopes)
    tiling = fit(tiling, q, keys, page_size)
    join_rows = min(16, triton.next_power_of_2(num_rows))
    _decode_kernel[(pieces * num_kv_heads,)](
        q,
        *sources(keys, values, tiling),
        k_scales,
        v_scales,
        table,
        seq_lens,
        query_start,
        slopes,
        sinks,
        prefixes.skip if prefixes else None,
        prefixes.acc if prefixes else None,
        prefixes.stats if prefixes else None,
        workspace.acc,
        workspace.stats,
        workspace.done,
        out,
        num_sequences,
        table.stride(0),
        splits,
        shortest,
        num_rows,
        prefixes.acc.shape[1] if prefixes else 0,
        prefixes.acc.shape[0] if prefixes else 0,
        **numbers,
        **switches,
        K=num_kv_heads,
        G=group,
        D=head_dim,
        WIDTH=width(head_dim),
        PAGE=page_size,
        SINGLE=max_query == 1,
        WINDOW=spec.window > 0,
        SINKS=sinks is not None,
        PREFIX=prefixes is not None,
        BLOCK_B=sequence_block(num_sequences),
        BLOCK_M=max(tiling.block_m, triton.next_power_of_2(num_rows)),
        BLOCK_N=tiling.block_n,
        BULK=tiling.bulk,
        JOIN_ROWS=join_rows,
        JOIN_PARTS=max(1, JOIN_NUMBERS // (join_rows * width(head_dim))),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out
