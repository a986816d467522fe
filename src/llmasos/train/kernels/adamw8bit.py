"""A step of AdamW whose states are in 8 bits: weights, gradient and codes are read once and written once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.train.codes import DYNAMIC, SCALES, Code

ROWS = 4
"""Blocks of SCALES weights that a program takes."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _coded(values, first, middles):
    """As `Code.nearest`, whose table is a few kB where values are; a search of 256 would be eight loads, each of which
    waits for the one before."""
    index = tl.load(first + ((values.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)).to(tl.int32)
    return index + (values > tl.load(middles + index))


@triton.jit
def _adamw8bit(
    weights, gradients, mean_codes, mean_scales, root_codes, root_scales, signed, signed_middles, signed_first,
    unsigned, unsigned_middles, unsigned_first, count, num_blocks, rate, shrink, beta1, beta2, eps, bias1, bias2,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_blocks
    at = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside, coded = at < count, there[:, None]
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    mean_code = tl.load(mean_codes + at, mask=coded, other=0).to(tl.int32)
    root_code = tl.load(root_codes + at, mask=coded, other=0).to(tl.int32)
    mean = tl.load(signed + mean_code) * tl.load(mean_scales + row, mask=there, other=0.0)[:, None]
    root = tl.load(unsigned + root_code) * tl.load(root_scales + row, mask=there, other=0.0)[:, None]
    mean += (1 - beta1) * (gradient - mean)
    root = tl.sqrt_rn(beta2 * root * root + (1 - beta2) * gradient * gradient)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    weight = weight * shrink - rate * (mean / bias1) / (root / bias2 + eps)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)
    mean_scale, root_scale = tl.maximum(tl.max(tl.abs(mean), 1), TINY), tl.maximum(tl.max(root, 1), TINY)
    root /= root_scale[:, None]
    index = _coded(root, unsigned_first, unsigned_middles)
    index = tl.where(root > 0, tl.maximum(index, 1), index)  # what is divided by never becomes 0
    tl.store(root_codes + at, index.to(tl.uint8), mask=coded)
    index_of_mean = _coded(mean / mean_scale[:, None], signed_first, signed_middles)
    tl.store(mean_codes + at, index_of_mean.to(tl.uint8), mask=coded)
    tl.store(mean_scales + row, mean_scale, mask=there)
    tl.store(root_scales + row, root_scale, mask=there)


@cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Both codes, each with what `Code.nearest` looks up."""
    codes = [Code.of(DYNAMIC[signed], device) for signed in (True, False)]
    return tuple(part for code in codes for part in (code.values, code.middles, code.first))


def step_(
    weights: Tensor,
    gradients: Tensor,
    state: dict[str, Tensor],
    *,
    rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    biases: tuple[float, float],
) -> None:
    """Of weights [n] with gradients [n]. state: mean_code and root_code [B, 256] uint8, mean_scale and root_scale [B].
    biases: what both states are divided by; they correct for having begun at 0."""
    blocks = len(state["mean_scale"])
    _adamw8bit[(triton.cdiv(blocks, ROWS),)](
        weights, gradients, state["mean_code"], state["mean_scale"], state["root_code"], state["root_scale"],
        *_tables(weights.device), len(weights), blocks, rate, 1 - rate * weight_decay, *betas, eps, *biases,
        ROWS=ROWS, SIZE=SCALES,
    )  # fmt: skip
