"""A step of AdamW whose states are in 8 bits: weights, gradient and codes are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.train.codes import SCALES

ROWS = 4
"""Blocks of SCALES weights that a program takes."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LOG2_10 = tl.constexpr(3.321928094887362)
SIGNED = tl.constexpr(6)
UNSIGNED = tl.constexpr(7)
"""The exponent of the largest decade, which has 2^e values: 64 of each sign, or 128."""
ZERO = tl.constexpr(127)
"""The signed code of 0."""


@triton.jit
def _value(place, TOP: tl.constexpr):
    """Of `codes.DYNAMIC`'s magnitudes the one at a place 2^e + j: 10^(e - TOP) (0.1 + 0.9 (j + 1/2) / 2^e), and 1 after
    all of these. Arithmetic: lanes that look up a table wait for one another."""
    bits = place.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    share = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # j / 2^e
    half = ((126 - exponent) << 23).to(tl.float32, bitcast=True)
    value = tl.exp2((exponent - TOP).to(tl.float32) * LOG2_10) * (0.1 + 0.9 * (share + half))
    return tl.where(exponent > TOP, 1.0, value)


@triton.jit
def _place(x, TOP: tl.constexpr, LEAST: tl.constexpr):
    """Of the magnitude that is nearest to x, from 0 to 1. LEAST: the smallest decade's exponent; 2^LEAST - 1 stands for
    0. A decade's first value is nearer than the one below where a fifth of a step is passed: steps below are as many
    times finer as decades are apart."""
    exponent = tl.floor(tl.log2(tl.maximum(x, 1e-30)) * (1 / LOG2_10)) + TOP + 1
    exponent = tl.minimum(tl.maximum(exponent, LEAST), TOP)
    count = tl.exp2(exponent)
    steps = tl.maximum(x * tl.exp2((exponent - TOP) * -LOG2_10) - 0.1, 0.0) * (count / 0.9)
    place = count + tl.minimum(tl.floor(steps), count - 1)
    # of the smallest decade the one below is 0, of the largest the one above is 1
    least: tl.constexpr = 0.175 / 0.9 if LEAST == 0 else 0.125 / 0.9
    place -= tl.where(steps < tl.where(exponent == LEAST, least, 0.2), 1.0, 0.0)
    place += tl.where((exponent == TOP) & (steps > count - 0.25), 1.0, 0.0)
    return place.to(tl.int32)


@triton.jit
def _adamw8bit(
    weights, gradients, mean_codes, mean_scales, root_codes, root_scales,
    count, num_blocks, rate, shrink, beta1, beta2, eps, bias1, bias2,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_blocks
    at = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside, coded = at < count, there[:, None]
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    # indices of ascending values: negative ones, 0 and positive ones; or 0 and positive ones
    mean_place = tl.load(mean_codes + at, mask=coded, other=0).to(tl.int32) - ZERO
    root_place = tl.load(root_codes + at, mask=coded, other=0).to(tl.int32) + 1
    mean = tl.where(mean_place == 0, 0.0, _value(tl.abs(mean_place), SIGNED))
    mean = tl.where(mean_place < 0, -mean, mean) * tl.load(mean_scales + row, mask=there, other=0.0)[:, None]
    root = tl.where(root_place == 1, 0.0, _value(root_place, UNSIGNED))
    root *= tl.load(root_scales + row, mask=there, other=0.0)[:, None]
    mean += (1 - beta1) * (gradient - mean)
    root = tl.sqrt_rn(beta2 * root * root + (1 - beta2) * gradient * gradient)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    weight = weight * shrink - rate * (mean / bias1) / (root / bias2 + eps)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)
    mean_scale, root_scale = tl.maximum(tl.max(tl.abs(mean), 1), TINY), tl.maximum(tl.max(root, 1), TINY)
    root /= root_scale[:, None]
    index = _place(root, UNSIGNED, 1) - 1
    index = tl.where(root > 0, tl.maximum(index, 1), index)  # what is divided by never becomes 0
    tl.store(root_codes + at, index.to(tl.uint8), mask=coded)
    mean /= mean_scale[:, None]
    place = _place(tl.abs(mean), SIGNED, 0)
    index = ZERO + tl.where(mean < 0, -tl.minimum(place, ZERO), place)  # there is a 1 and no -1
    tl.store(mean_codes + at, index.to(tl.uint8), mask=coded)
    tl.store(mean_scales + row, mean_scale, mask=there)
    tl.store(root_scales + row, root_scale, mask=there)


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
        len(weights), blocks, rate, 1 - rate * weight_decay, *betas, eps, *biases,
        ROWS=ROWS, SIZE=SCALES,
    )  # fmt: skip
