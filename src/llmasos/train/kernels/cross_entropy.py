"""Cross-entropy of rows of logits and its gradient, written where the logits were: two readings, one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _bent(logits, at, inside, scale, softcap, CAPPED: tl.constexpr):
    """Scores in float32 as the model defines them, -inf outside."""
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32) * scale
    if CAPPED:
        # tanh by exp: the libraries' differ between devices, and the interpreter has none
        e = tl.exp(-2 * tl.abs(x) / softcap)
        x = tl.where(inside, tl.where(x < 0, -1.0, 1.0) * softcap * (1 - e) / (1 + e), float("-inf"))
    return x


@triton.jit
def _cross_entropy(
    logits, stride, labels, losses, size, scale, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    best, total, own = float("-inf"), 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _bent(logits, at, at < size, scale, softcap, CAPPED)
        higher = tl.maximum(best, tl.max(x))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher))
        best = higher
        own += tl.sum(tl.where(at == label, x, 0.0))
    tl.store(losses + row, best + tl.log(total) - own)
    if GRADIENT:
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _bent(logits, at, at < size, scale, softcap, CAPPED)
            gradient = tl.exp(x - best) / total - tl.where(at == label, 1.0, 0.0)
            if CAPPED:
                inner = tl.where(at < size, x / softcap, 0.0)
                gradient *= 1 - inner * inner
            tl.store(logits + at, (gradient * scale).to(logits.dtype.element_ty), mask=at < size)


def cross_entropy_(logits: Tensor, labels: Tensor, *, scale: float, softcap: float, gradient: bool) -> Tensor:
    """Losses [N] float32 of logits [N, V], whose place takes d loss / d logits where `gradient`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), labels, losses, logits.shape[1], scale, softcap,
        CAPPED=softcap != 0.0, GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
        num_warps=16,
    )  # fmt: skip
    return losses
