"""Cross-entropy of rows of logits and its gradient, written where the logits were: two readings, one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bent(x, softcap, CAPPED: tl.constexpr):
    """softcap · tanh(x / softcap). By exp: the libraries' tanh differ between devices, and the interpreter has none."""
    if CAPPED:
        e = tl.exp(-2 * tl.abs(x) / softcap)
        x = tl.where(x < 0, -1.0, 1.0) * softcap * (1 - e) / (1 + e)
    return x


@triton.jit
def _seen(best, total, logits, at, inside, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """The running maximum and sum of a softmax after another block of logits."""
    x = tl.load(logits + at, mask=inside, other=0.0) if MASKED else tl.load(logits + at)
    x = _bent(x.to(tl.float32) * scale, softcap, CAPPED)
    if MASKED:
        x = tl.where(inside, x, float("-inf"))
    higher = tl.maximum(best, tl.max(x))
    return higher, total * tl.exp2((best - higher) * LOG2E) + tl.sum(tl.exp2((x - higher) * LOG2E))


@triton.jit
def _turned(
    logits, at, inside, label, start, log_sum, scale, softcap,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of logits becomes its gradient."""
    x = tl.load(logits + at, mask=inside, other=0.0) if MASKED else tl.load(logits + at)
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
        tl.store(logits + at, gradient)


@triton.jit
def _cross_entropy(
    logits, stride, labels, losses, size, scale, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    own = _bent(tl.load(logits + label).to(tl.float32) * scale, softcap, CAPPED)
    best, total = float("-inf"), 0.0
    # only the last block has a mask: with one, every element is a load of its own
    whole = size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best, total = _seen(best, total, logits, at, at < size, scale, softcap, CAPPED, False)
    at = whole + tl.arange(0, BLOCK)
    if whole < size:
        best, total = _seen(best, total, logits, at, at < size, scale, softcap, CAPPED, True)
    log_sum = best + tl.log(total)
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
        num_warps=8,
    )  # fmt: skip
    return losses
