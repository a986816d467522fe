"""Cross-entropy of rows of logits and its gradient, written where the logits were: two readings, one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""With 16 warps a processor has 4 rows at once, of which the second reading finds most in the L2 cache."""
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e18)
"""Below any logit that counts, and finite, as its square is: the difference of two is 0."""


@triton.jit
def _bent(x, softcap, CAPPED: tl.constexpr):
    """softcap · tanh(x / softcap). By exp: the libraries' tanh differ between devices, and the interpreter has none."""
    if CAPPED:
        e = tl.exp(-2 * tl.abs(x) / softcap)
        x = tl.where(x < 0, -1.0, 1.0) * softcap * (1 - e) / (1 + e)
    return x


@triton.jit
def _read(logits, at, size, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr):
    """Bent logits times log₂ e, LOWEST behind the row's end: what exp2 takes."""
    if MASKED:
        x = tl.load(logits + at, mask=at < size, other=0.0)
    else:
        x = tl.load(logits + at, eviction_policy="evict_first" if LAST else "")
    x = x.to(tl.float32)
    x = _bent(x * scale, softcap, CAPPED) * LOG2E if CAPPED else x * (scale * LOG2E)
    return tl.where(at < size, x, LOWEST) if MASKED else x


@triton.jit
def _sum_beside_label(logits, size, own, scale, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Σ exp2(x - own). The label's own 1 is in it, so it is never too small; it is infinite where another logit is 88
    nats above."""
    total = tl.zeros((BLOCK,), tl.float32)
    # only the last block has a mask: with one, every element is a load of its own
    whole = size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        total += tl.exp2(_read(logits, start + tl.arange(0, BLOCK), size, scale, softcap, CAPPED, False, False) - own)
    if whole < size:
        total += tl.exp2(_read(logits, whole + tl.arange(0, BLOCK), size, scale, softcap, CAPPED, True, False) - own)
    return tl.sum(total)


@triton.jit
def _log_sum_beside_best(logits, size, scale, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """log₂ Σ exp2(x), whatever the logits are. Each lane has its own maximum and sum; lanes meet at the end."""
    best, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        x = _read(logits, start + tl.arange(0, BLOCK), size, scale, softcap, CAPPED, True, False)
        # of the two exponents of an online softmax one is always 0
        lower = tl.exp2(-tl.abs(x - best))
        total = tl.where(x > best, total * lower + 1.0, total + lower)
        best = tl.maximum(best, x)
    highest = tl.max(best)
    # a lane without a logit counted its LOWEST, which is 0 beside any other
    return highest + tl.log2(tl.sum(total * tl.exp2(best - highest)))


@triton.jit
def _turn(
    logits, at, size, label, start, log_sum, scale, softcap,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of logits becomes its gradient."""
    x = _read(logits, at, size, scale, softcap, CAPPED, MASKED, True)
    gradient = tl.exp2(x - log_sum)
    if (label >= start) & (label < start + BLOCK):
        gradient -= tl.where(at == label, 1.0, 0.0)
    if CAPPED:
        inner = x / (softcap * LOG2E)
        gradient *= 1 - inner * inner
    gradient = (gradient * scale).to(logits.dtype.element_ty)
    if MASKED:
        tl.store(logits + at, gradient, mask=at < size)
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
    own = tl.sum(_read(logits, label + tl.arange(0, 1), size, scale, softcap, CAPPED, False, False))
    total = _sum_beside_label(logits, size, own, scale, softcap, CAPPED, BLOCK)
    log_sum = own + tl.log2(total)
    if not total < float("inf"):  # nor a number where the label's logit is -inf
        log_sum = _log_sum_beside_best(logits, size, scale, softcap, CAPPED, BLOCK)
    tl.store(losses + row, (log_sum - own) / LOG2E)
    if GRADIENT:
        whole = size // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _turn(logits, at, size, label, start, log_sum, scale, softcap, CAPPED, False, BLOCK)
        if whole < size:
            at = whole + tl.arange(0, BLOCK)
            _turn(logits, at, size, label, whole, log_sum, scale, softcap, CAPPED, True, BLOCK)


def cross_entropy_(logits: Tensor, labels: Tensor, *, scale: float, softcap: float, gradient: bool) -> Tensor:
    """Losses [N] float32 of logits [N, V], whose place takes d loss / d logits where `gradient`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), labels, losses, logits.shape[1], scale, softcap,
        CAPPED=softcap != 0.0, GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
        num_warps=16,
    )  # fmt: skip
    return losses
