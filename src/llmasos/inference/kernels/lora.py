"""LoRA of many adapters at once: each packed token takes the adapter of its slot.

T = packed tokens, K = inputs, N = outputs, P = modules behind a fused layer, R = rank. Tokens are sorted by adapter on
the CPU and cut into tiles of one adapter each, so that a program reads one A or B. Two kernels: `shrink`, h = x Aᵀ,
whose sum over K is shared out to several programs where tokens are few, and `expand`, y += h Bᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[Any]
FEW_TOKENS = 512
"""Up to here a pass reads weights rather than computes: small tiles, and K is shared out."""
SPLIT = 512
"""Inputs that one program of `shrink` sums where tokens are few."""
BLOCK_N = 64
"""Outputs of one program of `expand`."""


@dataclass(frozen=True)
class Routes:
    """Tokens by adapter. `table` int32: num_tiles × (slot, first, end), then the T tokens in the order of their slots;
    a tile is first .. end - 1 of that order, unused tiles are empty. Tokens without adapter are in no tile."""

    table: Tensor
    num_tiles: int
    num_tokens: int
    block: int

    @classmethod
    def empty(cls, num_tokens: int, num_slots: int, device: torch.device) -> Routes:
        """Of a fixed size: for a CUDA graph, filled before each replay with what `sort` gives."""
        num_tiles, block = _num_tiles(num_tokens, num_slots), _block(num_tokens)
        return cls(
            torch.zeros(3 * num_tiles + num_tokens, dtype=torch.int32, device=device), num_tiles, num_tokens, block
        )


def _block(num_tokens: int) -> int:
    return 16 if num_tokens <= FEW_TOKENS else 64


def _num_tiles(num_tokens: int, num_slots: int) -> int:
    """The most that there can be."""
    return -(-num_tokens // _block(num_tokens)) + min(num_slots, num_tokens)


def sort(token_slots: Ints, num_tokens: int, num_slots: int) -> Ints:
    """The table of Routes for slots [T] (-1: none) in a pass that is padded to num_tokens."""
    block, num_tiles = _block(num_tokens), _num_tiles(num_tokens, num_slots)
    order = np.argsort(token_slots, kind="stable")
    bounds = np.searchsorted(token_slots[order], np.arange(num_slots + 1)).tolist()
    tiles = [
        (slot, first, min(first + block, end))
        for slot, (start, end) in enumerate(pairwise(bounds))
        for first in range(start, end, block)
    ]
    table = np.zeros(3 * num_tiles + num_tokens, np.int32)
    table[: 3 * len(tiles)] = np.array(tiles, np.int32).reshape(-1)
    table[3 * num_tiles :][: len(order)] = order
    return table


@triton.jit
def _tile(table, num_tiles, BLOCK_T: tl.constexpr):
    """Slot, places in the order, which of them are used, and the tokens there."""
    tile = table + 3 * tl.program_id(0)
    t = tl.load(tile + 1) + tl.arange(0, BLOCK_T)
    used = t < tl.load(tile + 2)
    tokens = tl.load(table + 3 * num_tiles + t, mask=used, other=0)
    return tl.load(tile).to(tl.int64), t, used, tokens.to(tl.int64)


@triton.jit(do_not_specialize=["num_tiles", "T"])  # they change from pass to pass: one kernel for all
def _shrink(
    x, a, h, table, num_tiles, K, T, stride_x,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [splits, T, ROWS], by place in the order: split s is the sum over inputs s * CHUNK .. (s + 1) * CHUNK - 1."""
    if tl.load(table + 3 * tl.program_id(0) + 1) < tl.load(table + 3 * tl.program_id(0) + 2):
        slot, t, used, tokens = _tile(table, num_tiles, BLOCK_T)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        split = tl.program_id(2)
        acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for start in range(0, CHUNK, BLOCK_K):
            k = split * CHUNK + start + tl.arange(0, BLOCK_K)
            xs = tl.load(x + tokens[:, None] * stride_x + k[None, :], mask=used[:, None] & (k < K)[None, :], other=0.0)
            rows = a + (slot * ROWS + r)[:, None] * K + k[None, :]
            weights = tl.load(rows, mask=(r < ROWS)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(xs.to(weights.dtype), tl.trans(weights), acc, input_precision="ieee")
        out = h + (split * T + t).to(tl.int64)[:, None] * ROWS + r[None, :]
        tl.store(out, acc, mask=used[:, None] & (r < ROWS)[None, :])


@triton.jit(do_not_specialize=["num_tiles", "T"])
def _expand(
    h, b, y, cuts, table, num_tiles, T, N, stride_y,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += h Bᵀ for outputs cuts[i, 0] .. cuts[i, 1] - 1, which belong to module cuts[i, 2]."""
    if tl.load(table + 3 * tl.program_id(0) + 1) < tl.load(table + 3 * tl.program_id(0) + 2):
        slot, t, used, tokens = _tile(table, num_tiles, BLOCK_T)
        cut = cuts + 3 * tl.program_id(1)
        n = tl.load(cut) + tl.arange(0, BLOCK_N)
        inside = n < tl.load(cut + 1)
        first = tl.load(cut + 2) * R
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in tl.static_range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for split in tl.static_range(SPLITS):
                place = (split * T + t).to(tl.int64)[:, None] * ROWS + (first + r)[None, :]
                low += tl.load(h + place, mask=used[:, None], other=0.0)
            weights = tl.load(b + (slot * N + n)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
            acc = tl.dot(low.to(weights.dtype), tl.trans(weights), acc, input_precision="ieee")
        out = y + tokens[:, None] * stride_y + n[None, :]
        mask = used[:, None] & inside[None, :]
        tl.store(out, (tl.load(out, mask=mask, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


def cuts_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Outputs of a fused layer cut into blocks that lie within one module each: [num_blocks, (first, end, module)]."""
    cuts, start = [], 0
    for part, size in enumerate(sizes):
        cuts += [(n, min(n + BLOCK_N, start + size), part) for n in range(start, start + size, BLOCK_N)]
        start += size
    return torch.tensor(cuts, dtype=torch.int32, device=device)


def add_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, cuts: Tensor, routes: Routes) -> None:
    """y [T, N] += LoRA of x [T, K], in place: a [slots, P, R, K], b [slots, N, R], R a multiple of 16.

    Products in the adapters' dtype, sums in float32. No wait for the device; can be captured.
    """
    (_, num_parts, rank, width), num_tokens = a.shape, x.shape[0]
    rows = num_parts * rank
    few = routes.block == 16
    chunk = SPLIT if few else triton.cdiv(width, 64) * 64
    splits = triton.cdiv(width, chunk)
    h = torch.empty(splits, num_tokens, rows, dtype=torch.float32, device=x.device)
    block_r = min(triton.next_power_of_2(rows), 32 if few else 64)
    _shrink[(routes.num_tiles, triton.cdiv(rows, block_r), splits)](
        x, a, h, routes.table, routes.num_tiles, width, num_tokens, x.stride(0),
        ROWS=rows, CHUNK=chunk, BLOCK_T=routes.block, BLOCK_R=block_r, BLOCK_K=128 if few else 64,
    )  # fmt: skip
    _expand[(routes.num_tiles, len(cuts))](
        h, b, y, cuts, routes.table, routes.num_tiles, num_tokens, b.shape[1], y.stride(0),
        SPLITS=splits, ROWS=rows, R=rank, BLOCK_T=routes.block, BLOCK_N=BLOCK_N, BLOCK_R=next(
            n for n in (64, 32, 16) if rank % n == 0
        ),
    )  # fmt: skip
