"""Triton kernels of the sampler: the draw, the search for what top-k and top-p keep without a sort, grammar masks.

R = rows, V = vocabulary. Every row is computed by the same operations in the same order whatever R is, or by sums of
integers, which have no order: its token does not depend on its neighbours. NaN counts as -inf.

A draw reads the logits once, BLOCK columns per program: maximum, first argmax and sum of exp((x - maximum) / T) of each
block. A second program per row picks the block by the cumulated sums, and in it the token.

The search, four steps: the same numbers per block, and the maxima of runs of RUN columns; a floor per row under which
nothing can be kept (for top-k the k-th largest of the maxima of runs, for top-p the logit whose probability times V is
below 1 - p); the few logits above it, gathered; bisection among them over the bits of a float. Mass is counted in
multiples of 2^-40 of the likeliest token's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
RUN = 64
CANDIDATES = 16384
"""Logits that are gathered per row; a row with more above its floor is searched where it lies."""


def fused_sample(
    logits: Tensor,
    temperature: Tensor | None,
    uniform: Tensor | None,
    out: Tensor,
    floor: Tensor | None = None,
) -> None:
    """out[r] int64: the first token whose cumulated probability at temperature[r] exceeds uniform[r], in vocabulary
    order; the lowest of the likeliest where the temperature is 0, or None. Logits [R, V] below floor[r] are out.
    Nothing depends on values on the CPU: a CUDA graph may hold it."""
    num_rows, size = logits.shape
    num_blocks = triton.cdiv(size, BLOCK)
    assert logits.stride(1) == 1
    maxima = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    sums, places = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    flags = {"DRAWS": temperature is not None, "FLOORED": floor is not None, "BLOCK": BLOCK}
    _summarise[(num_rows, num_blocks)](
        logits, logits.stride(0), size, temperature, floor, maxima, sums, places, None, num_blocks, RUN=0, **flags
    )
    _pick[(num_rows,)](
        logits,
        logits.stride(0),
        size,
        temperature,
        uniform,
        floor,
        maxima,
        sums,
        places,
        out,
        num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks),
        **flags,
    )


def find_floor(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[R] float32: the smallest logit of each row that top-k, then top-p among those, then min-p keep (each [R]; 0, 1
    and 0 keep all). -inf where all stay and where the temperature is 0. Ties with the last token kept stay."""
    num_rows, size = logits.shape
    num_blocks = triton.cdiv(size, BLOCK)
    assert logits.stride(1) == 1
    device = logits.device
    maxima = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    sums, places = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    runs = torch.empty(num_rows, num_blocks * (BLOCK // RUN), dtype=torch.float32, device=device)
    room = min(CANDIDATES, size)
    found = torch.empty(num_rows, room, dtype=torch.float32, device=device)
    floor, best, total = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    count = torch.empty(num_rows, dtype=torch.int32, device=device)
    row = (logits, logits.stride(0), size)
    _summarise[(num_rows, num_blocks)](
        *row, temperature, None, maxima, sums, places, runs, num_blocks, DRAWS=True, FLOORED=False, BLOCK=BLOCK, RUN=RUN
    )
    _bound[(num_rows,)](
        size,
        temperature,
        top_k,
        top_p,
        maxima,
        sums,
        runs,
        floor,
        best,
        total,
        count,
        num_blocks,
        runs.shape[1],
        BLOCKS=triton.next_power_of_2(num_blocks),
        RUNS=triton.next_power_of_2(runs.shape[1]),
        num_warps=8,
    )
    _gather[(num_rows, num_blocks)](*row, floor, found, count, room, BLOCK=BLOCK)
    _search[(num_rows,)](
        *row, temperature, top_k, top_p, min_p, found, count, room, best, total, floor, BLOCK=BLOCK, num_warps=8
    )
    return floor


def apply_bitmask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Sets logits[rows[c], i] to -inf where bit i % 32 of masks[c, i // 32] is 0, and where there is no such word.
    Logits [R, V] float32, rows [C] and masks [C, words] int32."""
    num_blocks = triton.cdiv(logits.shape[1], BLOCK)
    _apply_bitmask[(len(rows), num_blocks)](
        logits, logits.stride(0), logits.shape[1], rows, masks, masks.shape[1], BLOCK=BLOCK
    )


@triton.jit
def _load(row, columns, size):
    x = tl.load(row + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _exp(x, best, temperature):
    """exp((x - best) / T), 0 for a removed token whatever `best` is."""
    out = x == float("-inf")
    gap = tl.where(out, 0.0, x) - tl.where(out, 0.0, best)
    return tl.where(out, 0.0, tl.exp(gap / temperature))


@triton.jit
def _summarise(
    logits,
    stride,
    size,
    temperatures,
    floors,
    maxima,
    sums,
    places,
    runs,
    num_blocks,
    DRAWS: tl.constexpr,
    FLOORED: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    r, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = b * BLOCK + tl.arange(0, BLOCK)
    x = _load(logits + r * stride, columns, size)
    if FLOORED:
        x = tl.where(x >= tl.load(floors + r), x, float("-inf"))
    best = tl.max(x)
    at = r * num_blocks + b
    tl.store(maxima + at, best)
    tl.store(places + at, tl.min(tl.where(x == best, columns, size - 1)))
    if DRAWS:
        temperature = tl.load(temperatures + r)
        if temperature > 0:
            tl.store(sums + at, tl.sum(_exp(x, best, temperature)))
    if RUN > 0:
        found = tl.max(tl.reshape(x, [BLOCK // RUN, RUN]), axis=1)
        tl.store(runs + at * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN), found)


@triton.jit
def _pick(
    logits,
    stride,
    size,
    temperatures,
    uniforms,
    floors,
    maxima,
    sums,
    places,
    out,
    num_blocks,
    DRAWS: tl.constexpr,
    FLOORED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    at = r * num_blocks + blocks
    highs = tl.load(maxima + at, mask=inside, other=float("-inf"))
    best = tl.max(highs)
    first = tl.min(tl.where(inside & (highs == best), blocks, num_blocks - 1))
    token = tl.load(places + r * num_blocks + first)
    if DRAWS:
        temperature = tl.load(temperatures + r)
        if temperature > 0:
            scales = _exp(highs, best, temperature)
            weights = scales * tl.load(sums + at, mask=inside, other=0.0)
            below = tl.cumsum(weights, 0)
            # the largest of the sums, not the last, and none behind the last block with weight: rounding may make a
            # parallel sum fall and rise
            goal = tl.load(uniforms + r) * tl.max(tl.where(weights > 0, below, 0.0))
            b = tl.min(tl.where((below > goal) & (weights > 0), blocks, BLOCKS))
            if b < BLOCKS:  # else the row is empty: keep the argmax
                before = tl.sum(tl.where(blocks < b, weights, 0.0))
                scale = tl.sum(tl.where(blocks == b, scales, 0.0))
                high = tl.sum(tl.where(blocks == b, highs, 0.0))
                columns = b * BLOCK + tl.arange(0, BLOCK)
                x = _load(logits + r * stride, columns, size)
                if FLOORED:
                    x = tl.where(x >= tl.load(floors + r), x, float("-inf"))
                weight = _exp(x, high, temperature)
                passed = (tl.cumsum(weight, 0) > (goal - before) / scale) & (weight > 0)
                last = tl.max(tl.where(weight > 0, columns, 0))
                # rounding may put the goal behind the block's last token
                token = tl.minimum(tl.min(tl.where(passed, columns, size)), last)
    tl.store(out + r, token.to(tl.int64))


@triton.jit
def _key(x):
    """A whole number that orders as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bound(
    size,
    temperatures,
    top_k,
    top_p,
    maxima,
    sums,
    runs,
    floors,
    bests,
    totals,
    counts,
    num_blocks,
    num_runs,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The floor: nothing below it can be kept by top-k, or by top-p if there is no top-k. +inf: nothing to look for."""
    r = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    at, inside = r * num_blocks + blocks, blocks < num_blocks
    highs = tl.load(maxima + at, mask=inside, other=float("-inf"))
    best = tl.max(highs)
    tl.store(bests + r, best)
    tl.store(counts + r, 0)
    temperature, k, p = tl.load(temperatures + r), tl.load(top_k + r), tl.load(top_p + r)
    floor = float("inf")
    if (temperature > 0) & (best > float("-inf")):
        total = tl.sum(_exp(highs, best, temperature) * tl.load(sums + at, mask=inside, other=0.0))
        tl.store(totals + r, total)
        if (k > 0) & (k < size):
            floor = -3.4028234e38  # all but removed tokens
            if k <= num_runs:
                each = tl.arange(0, RUNS)
                x = tl.load(runs + r * num_runs + each, mask=each < num_runs, other=float("-inf"))
                keys = _key(x)
                low, high = _key(tl.min(tl.where(each < num_runs, x, float("inf")))), _key(best)
                while low < high:
                    middle = low + (high - low + 1) // 2
                    if tl.sum((keys >= middle).to(tl.int32)) >= k:
                        low = middle
                    else:
                        high = middle - 1
                floor = tl.maximum(floor, _value(low))
        elif p < 1:
            floor = best + temperature * tl.log((1 - p) * total / (2 * size))
    tl.store(floors + r, floor)


@triton.jit
def _gather(logits, stride, size, floors, found, counts, room, BLOCK: tl.constexpr):
    """The logits of a row that reach its floor, in any order; their number may exceed the room."""
    r, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    floor = tl.load(floors + r)
    columns = b * BLOCK + tl.arange(0, BLOCK)
    x = _load(logits + r * stride, columns, size)
    kept = x >= floor
    num = tl.sum(kept.to(tl.int32))
    if num > 0:
        places = tl.atomic_add(counts + r, num) + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(found + r * room + places, x, mask=kept & (places < room))


@triton.jit
def _count(values, num, key, BLOCK: tl.constexpr):
    """How many values are not below `key`."""
    each = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < num:
        total += (_key(_load(values, start + each, num)) >= key).to(tl.int32)
        start += BLOCK
    return tl.sum(total)


@triton.jit
def _mass(values, num, key, best, temperature, BLOCK: tl.constexpr):
    """What the values above `key` weigh, in 2^-40 of the best."""
    each = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    start = 0
    while start < num:
        x = _load(values, start + each, num)
        weight = (_exp(x, best, temperature) * 1099511627776.0).to(tl.int64)
        total += tl.where(_key(x) > key, weight, 0)
        start += BLOCK
    return tl.sum(total)


@triton.jit
def _search_in(values, num, low, best, total, temperature, k, p, BLOCK: tl.constexpr):
    """The smallest key that top-k and then top-p keep; no key below `low` is. k = 0: no top-k."""
    whole = (total * p * 1099511627776.0).to(tl.int64)
    top = _key(best)
    if k > 0:
        high = top
        while low < high:
            middle = low + (high - low + 1) // 2
            if _count(values, num, middle, BLOCK) >= k:
                low = middle
            else:
                high = middle - 1
        if p < 1:
            whole = (_mass(values, num, low - 1, best, temperature, BLOCK).to(tl.float32) * p).to(tl.int64)
    if p < 1:
        high = top
        while low < high:
            middle = low + (high - low) // 2
            if _mass(values, num, middle, best, temperature, BLOCK) < whole:
                high = middle
            else:
                low = middle + 1
    return low


@triton.jit
def _search(
    logits,
    stride,
    size,
    temperatures,
    top_k,
    top_p,
    min_p,
    found,
    counts,
    room,
    bests,
    totals,
    floors,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    num, best, floor = tl.load(counts + r), tl.load(bests + r), tl.load(floors + r)
    temperature, k, p, share = tl.load(temperatures + r), tl.load(top_k + r), tl.load(top_p + r), tl.load(min_p + r)
    result = float("-inf")
    if (temperature > 0) & (best > float("-inf")):
        if floor < float("inf"):
            if k >= size:
                k = 0
            total, low = tl.load(totals + r), _key(floor)
            if num <= room:
                low = _search_in(found + r * room, num, low, best, total, temperature, k, p, BLOCK)
            else:
                low = _search_in(logits + r * stride, size, low, best, total, temperature, k, p, BLOCK)
            result = _value(low)
        if share > 0:
            result = tl.maximum(result, tl.minimum(best + temperature * tl.log(share), best))
    tl.store(floors + r, result)


@triton.jit
def _apply_bitmask(logits, stride, size, rows, masks, num_words, BLOCK: tl.constexpr):
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = b * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(masks + c * num_words + columns // 32, mask=columns // 32 < num_words, other=0)
    removed = ((words >> (columns % 32)) & 1) == 0
    row = logits + tl.load(rows + c).to(tl.int64) * stride
    tl.store(row + columns, float("-inf"), mask=removed & (columns < size))
