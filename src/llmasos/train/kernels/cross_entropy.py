"""Cross-entropy of rows of logits and its gradient, written where the logits were: two readings, one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""With 16 warps a processor has 4 rows at once, of which the second reading finds most in the L2 cache."""
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Below any logit, and finite: the difference of two is 0."""


@triton.jit
def _bent(x, softcap, CAPPED: tl.constexpr):
    """softcap · tanh(x / softcap). By exp: the libraries' tanh differ between devices, and the interpreter has none."""
    if CAPPED:
        e = tl.exp(-2 * tl.abs(x) / softcap)
        x = tl.where(x < 0, -1.0, 1.0) * softcap * (1 - e) / (1 + e)
    return x


@triton.jit
def _seen(best, total, logits, at, inside, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Each lane's maximum and sum of a softmax after another block of logits: lanes meet at the end of the row only."""
    x = tl.load(logits + at, mask=inside, other=0.0) if MASKED else tl.load(logits + at)
    x = _bent(x.to(tl.float32) * scale, softcap, CAPPED)
    if MASKED:
        x = tl.where(inside, x, LOWEST)
    # of the two exponents of an online softmax one is always 0
    lower = tl.exp2(-tl.abs(x - best) * LOG2E)
    total = tl.where(x > best, total * lower + 1.0, total + lower)
    return tl.maximum(best, x), total


@triton.jit
def _turned(
    logits, at, inside, label, start, log_sum, scale, softcap,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of logits becomes its gradient."""
    x = tl.load(logits + at, mask=inside, other=0.0) if MASKED else tl.load(logits + at, eviction_policy="evict_first")
    x = _bent(x.to(tl.float32) * scale, softcap, CAPPED)
    gradient = tl.exp2((x - log_sum) * LOG2E)
    if (label >= start) & (label < start + BLOCK):
        gradient -= tl.where(at == label, 1.0, 0.0)
    if CAPPED:
        inner = x / softcap
        gradient *= 1 - inner * inner
    gradient = (gradient * scale).to(logits.dtype.element_ty)
    if MASKED:
        tl.store(logits + at, gradient, mask=inside)
    else:
        tl.store(logits + at, gradient, cache_modifier=".cs")


@triton.jit
def _cross_entropy(
    logits, stride, labels, losses, size, scale, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    own = _bent(tl.load(logits + label).to(tl.float32) * scale, softcap, CAPPED)
    best, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    # only the last block has a mask: with one, every element is a load of its own
    whole = size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best, total = _seen(best, total, logits, at, at < size, scale, softcap, CAPPED, False)
    at = whole + tl.arange(0, BLOCK)
    if whole < size:
        best, total = _seen(best, total, logits, at, at < size, scale, softcap, CAPPED, True)
    highest = tl.max(best)
    # a lane without a logit counted its LOWEST, which is 0 beside any other
    log_sum = highest + tl.log(tl.sum(total * tl.exp2((best - highest) * LOG2E)))
    tl.store(losses + row, log_sum - own)
    if GRADIENT:
        for start in range(0, whole, BLOCK):
            there = start + tl.arange(0, BLOCK)
            _turned(logits, there, there < size, label, start, log_sum, scale, softcap, CAPPED, False, BLOCK)
        if whole < size:
            _turned(logits, at, at < size, label, whole, log_sum, scale, softcap, CAPPED, True, BLOCK)


def cross_entropy_(logits: Tensor, labels: Tensor, *, scale: float, softcap: float, gradient: bool) -> Tensor:
    """Losses [N] float32 of logits [N, V], whose place takes d loss / d logits where `gradient`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), labels, losses, logits.shape[1], scale, softcap,
        CAPPED=softcap != 0.0, GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
        num_warps=16,
    )  # fmt: skip
    return losses
