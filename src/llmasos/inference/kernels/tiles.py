"""One walk over tiles of keys in pages: the inner loop that decode, prefill and shared prefixes have in common.

B = sequences, T = packed queries, H = query heads, K = key heads, G = H / K, D = head width, P = page-table columns.
Keys and values of one layer lie in [num_slots, K, D]; the key at position n of sequence b is in slot
table[b, n // page_size] * page_size + n % page_size. Storage may be fp8 (e4m3) or int8: a stored number times its
scale, one per slot and head, [num_slots, K] float32.

Rows of a tile are queries times the G heads that share a key head (row r: query r // G, head r % G), so that a key is
read once for all of them. Softmax is the online one (arXiv:1805.02867) in base 2: a row's state is acc [D], the sum of
weighted values, peak, the largest exponent so far, and total, the sum of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmasos.models.attention import AttentionSpec

LOG2E = 1.4426950408889634
NOTHING = tl.constexpr(-1e30)
"""The peak of a row that has seen no key; finite, so that the difference of two of them is a number."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: rows and keys of a tile, warps of a program, depth of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    bulk: bool = False
    """Keys come by the bulk copy engine (Hopper), where a tile lies inside a page and a head fills its columns."""


@triton.jit
def find_slots(table, n0, high, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of keys n0 .. n0 + BLOCK_N - 1; those from `high` on are never used."""
    offsets = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + n0 // PAGE, mask=n0 < high, other=0).to(tl.int64)
        return page * PAGE + n0 % PAGE + offsets
    else:
        n = n0 + offsets
        pages = tl.load(table + n // PAGE, mask=n < high, other=0).to(tl.int64)
        return pages * PAGE + n % PAGE


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    return acc, tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def load_rows(pointer, row, head, valid, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """G heads of the queries from `pointer` ([.., K * G, D]) on, as rows: [BLOCK_M, WIDTH], zero where not valid."""
    d = tl.arange(0, WIDTH)
    at = (row // G) * (K * G * D) + (head * G + row % G) * D
    return tl.load(pointer + at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    pointer, value, row, head, valid, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    d = tl.arange(0, WIDTH)
    at = (row // G) * (K * G * D) + (head * G + row % G) * D
    tl.store(pointer + at[:, None] + d[None, :], value, mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def walk(
    acc,
    peak,
    total,
    q,
    position,
    slope,
    keys,
    values,
    k_scales,
    v_scales,
    table,
    begin,
    end,
    low,
    high,
    head,
    factor,
    softcap,
    window,
    K: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SCALED: tl.constexpr,
    BULK: tl.constexpr,
):
    """The state after keys begin .. end - 1, BLOCK_N at a time. Rows q [BLOCK_M, WIDTH] sit at `position` [BLOCK_M].

    MASKED: only keys low .. high - 1 exist, and CAUSAL and WINDOW hide pairs; else every row sees every key.
    Pages of keys that do not exist are not read: they may hold anything, a NaN times weight 0 too.
    """
    WIDTH: tl.constexpr = q.shape[1]
    d = tl.arange(0, WIDTH)
    slots = find_slots(table, begin, high, PAGE, BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        at = slots[:, None] * (K * D) + (head * D + d)[None, :]
        cell = slots * K + head
        # the next tile's slots are read before this tile's keys arrive
        slots = find_slots(table, n0 + BLOCK_N, high, PAGE, BLOCK_N)
        exists = (n >= low) & (n < high)
        if BULK:
            first = tl.load(table + n0 // PAGE) * PAGE + n0 % PAGE
            k = keys.load([first, head * D])
            v = values.load([first, head * D])
            if MASKED:
                v = tl.where(exists[:, None], v, 0.0)
        elif MASKED:
            k = tl.load(keys + at, mask=exists[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load(values + at, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        elif D < WIDTH:
            k = tl.load(keys + at, mask=(d < D)[None, :], other=0.0)
            v = tl.load(values + at, mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if SCALED:
            s *= tl.load(k_scales + cell, mask=exists, other=0.0)[None, :]
        if SOFTCAP:
            # softcap · tanh(x): the factor holds 2 log2(e) / softcap
            s = softcap * (1.0 - 2.0 / (tl.exp2(s * factor) + 1.0))
        elif ALIBI:
            s = s * factor
        if ALIBI:
            s -= slope[:, None] * (position[:, None] - n[None, :]).to(tl.float32)
        if MASKED:
            seen = exists[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
                if not CAUSAL:
                    seen = seen & (n[None, :] < position[:, None] + window)
            s = tl.where(seen, s, float("-inf"))
        if SOFTCAP or ALIBI:
            peak_new = tl.maximum(peak, tl.max(s, 1))
            p = tl.exp2(s - peak_new[:, None])
        else:
            peak_new = tl.maximum(peak, tl.max(s, 1) * factor)
            p = tl.exp2(s * factor - peak_new[:, None])
        shrink = tl.exp2(peak - peak_new)
        total = total * shrink + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(v_scales + cell, mask=exists, other=0.0)[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = peak_new
    return acc, peak, total


@triton.jit
def join(acc, peak, total, acc_other, peak_other, total_other):
    """The state after the keys of both."""
    peak_new = tl.maximum(peak, peak_other)
    old, new = tl.exp2(peak - peak_new), tl.exp2(peak_other - peak_new)
    return acc * old[:, None] + acc_other * new[:, None], peak_new, total * old + total_other * new


@triton.jit
def finish(acc, peak, total, sinks, head, row, valid, G: tl.constexpr, SINKS: tl.constexpr):
    """The rows' results. A sink is one more logit of its head, with no value behind it."""
    if SINKS:
        total += tl.exp2(tl.load(sinks + head * G + row % G, mask=valid, other=0.0) * 1.4426950408889634 - peak)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


def check_layout(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, spec: AttentionSpec) -> None:
    """Raises ValueError for what these kernels do not compute."""
    if spec.alibi_bf16:
        raise ValueError("ALiBi rounded to bfloat16 is not computed by the kernels: take the torch path")
    if not (q.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and table.stride(1) == 1):
        raise ValueError("q, keys and values must be contiguous, and so must be the rows of the page table")
    if q.shape[1] % keys.shape[1] or q.shape[2] != keys.shape[2] or keys.shape != values.shape:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(keys.shape)}, values {tuple(values.shape)}")


def arithmetic(
    spec: AttentionSpec, k_scales: Tensor | None, slopes: Tensor | None
) -> tuple[dict[str, float | int], dict[str, bool]]:
    """The kernels' numbers and switches for one layer's arithmetic."""
    if bool(spec.slopes) != (slopes is not None):
        raise ValueError("a layer with ALiBi needs its slopes (times alibi_scale) as a tensor, others none")
    if spec.softcap:
        numbers = {"factor": 2 * LOG2E * spec.scale / spec.softcap, "softcap": spec.softcap * LOG2E}
    else:
        numbers = {"factor": spec.scale * LOG2E, "softcap": 0.0}
    switches = {"SOFTCAP": bool(spec.softcap), "ALIBI": slopes is not None, "SCALED": k_scales is not None}
    return numbers | {"window": spec.window}, switches


def fit(tiling: Tiling, q: Tensor, keys: Tensor, page_size: int) -> Tiling:
    """The tiling with as many stages, then keys, as there is shared memory for."""
    if q.element_size() > 2:
        # products in full float32 are made without tensor cores: large tiles only take registers
        tiling = replace(tiling, block_n=min(32, tiling.block_n), stages=2)
    limit = shared_memory(q.device) - 4096
    row = width(q.shape[2])
    queries, key = tiling.block_m * row * q.element_size(), 2 * row * max(keys.element_size(), 2)
    stages, block_n = tiling.stages, tiling.block_n
    while stages > 2 and queries + stages * block_n * key > limit:
        stages -= 1
    while block_n > 16 and queries + stages * block_n * key > limit:
        block_n //= 2
    bulk = tiling.bulk and page_size % block_n == 0 and row == q.shape[2]
    return replace(tiling, stages=stages, block_n=block_n, bulk=bulk)


def sources(keys: Tensor, values: Tensor, tiling: Tiling) -> tuple[Any, Any]:
    """What the kernels read keys and values through."""
    if not tiling.bulk:
        return keys, values
    shape = [keys.shape[0], keys.shape[1] * keys.shape[2]]
    block = [tiling.block_n, keys.shape[2]]
    return tuple(TensorDescriptor(x, shape, [shape[1], 1], block) for x in (keys, values))


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may use; off the GPU a Hopper's."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return properties.shared_memory_per_block_optin if properties else 232448


def width(head_dim: int) -> int:
    """Columns of a tile for a head of this width."""
    return max(16, triton.next_power_of_2(head_dim))


def sequence_block(num_sequences: int) -> int:
    """Length of the vectors over all sequences; few sizes, since each is a kernel to compile."""
    return 16 if num_sequences <= 16 else max(256, triton.next_power_of_2(num_sequences))


def num_processors(device: torch.device) -> int:
    """Multiprocessors to fill; off the GPU (Triton's interpreter) a small number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
