"""Divergence of two rows of logits, and its gradient written where the student's logits were.

log p and log q are bent logits / τ less the logarithm of their sum, over the words that both models have; see
`train/divergence.py` for the formulas. Sums first, by reading both rows once. The forward KL's gradient asks for no
more, so its value is summed while the gradient is written; the others read the rows once more for it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmasos.train.kernels.cross_entropy import LOWEST, _bent

BLOCK = 2048
KINDS = ("forward_kl", "reverse_kl", "jsd")
FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)


@triton.jit
def _read(logits, at, size, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Bent logits in float32; LOWEST where there is none."""
    x = tl.load(logits + at, mask=at < size, other=0.0) if MASKED else tl.load(logits + at)
    x = _bent(x.to(tl.float32) * scale, softcap, CAPPED)
    return tl.where(at < size, x, LOWEST) if MASKED else x


@triton.jit
def _more(best, total, x):
    """Each lane's maximum and sum of exponentials, after one more logit."""
    lower = tl.exp(-tl.abs(x - best))
    return tl.maximum(best, x), tl.where(x > best, total * lower + 1.0, total + lower)


@triton.jit
def _log_sum(best, total):
    highest = tl.max(best)
    return highest + tl.log(tl.sum(total * tl.exp(best - highest)))


@triton.jit
def _mixed(log_p, log_q, beta):
    """log (β p + (1 - β) q)."""
    p, q = log_p + tl.log(beta), log_q + tl.log(1 - beta)
    higher = tl.maximum(p, q)
    return higher + tl.log(tl.exp(p - higher) + tl.exp(q - higher))


@triton.jit
def _distances(log_p, log_q, beta, KIND: tl.constexpr):
    """What the teacher's and the student's words add to the divergence."""
    if KIND == FORWARD:
        of_p, of_q = tl.exp(log_p) * (log_p - log_q), tl.zeros_like(log_p)
    elif KIND == REVERSE:
        of_p, of_q = tl.zeros_like(log_p), tl.exp(log_q) * (log_q - log_p)
    else:
        log_m = _mixed(log_p, log_q, beta)
        of_p, of_q = tl.exp(log_p) * (log_p - log_m), tl.exp(log_q) * (log_q - log_m)
    return of_p, of_q


@triton.jit
def _slope(log_p, log_q, of_q, beta, KIND: tl.constexpr):
    """d divergence / d log q, up to what is the same for a whole row."""
    q = tl.exp(log_q)
    if KIND == FORWARD:
        slope = q - tl.exp(log_p)
    elif KIND == REVERSE:
        slope = q * (log_q - log_p - of_q)
    else:
        slope = (1 - beta) * q * (log_q - _mixed(log_p, log_q, beta) - of_q)
    return slope


@triton.jit
def _summed(
    sums, ours, theirs, at, size, shared, our_scale, our_cap, their_scale, their_cap, per_t,
    OURS_CAPPED: tl.constexpr, THEIRS_CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    best, total, our_best, our_total, their_best, their_total = sums
    x = _read(ours, at, size, our_scale, our_cap, OURS_CAPPED, MASKED)
    y = _read(theirs, at, shared, their_scale, their_cap, THEIRS_CAPPED, MASKED) * per_t
    best, total = _more(best, total, x)
    x *= per_t
    if MASKED:
        x, y = tl.where(at < shared, x, LOWEST), tl.where(at < shared, y, LOWEST)
    our_best, our_total = _more(our_best, our_total, x)
    their_best, their_total = _more(their_best, their_total, y)
    return best, total, our_best, our_total, their_best, their_total


@triton.jit
def _divergence(
    ours, our_stride, theirs, their_stride, labels, entropies, divergences, size, shared,
    our_scale, our_cap, their_scale, their_cap, temperature, beta, weight,
    KIND: tl.constexpr, OURS_CAPPED: tl.constexpr, THEIRS_CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ours += row * our_stride
    theirs += row * their_stride
    label = tl.load(labels + row)
    per_t = 1.0 / temperature
    own = _bent(tl.load(ours + label).to(tl.float32) * our_scale, our_cap, OURS_CAPPED)
    low, none = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    best, total, our_best, our_total, their_best, their_total = low, none, low, none, low, none
    # blocks that both rows have whole need no mask: with one, every element is a load of its own
    whole = shared // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best, total, our_best, our_total, their_best, their_total = _summed(
            (best, total, our_best, our_total, their_best, their_total), ours, theirs, at, size, shared,
            our_scale, our_cap, their_scale, their_cap, per_t, OURS_CAPPED, THEIRS_CAPPED, False,
        )  # fmt: skip
    for start in range(whole, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best, total, our_best, our_total, their_best, their_total = _summed(
            (best, total, our_best, our_total, their_best, their_total), ours, theirs, at, size, shared,
            our_scale, our_cap, their_scale, their_cap, per_t, OURS_CAPPED, THEIRS_CAPPED, True,
        )  # fmt: skip
    log_sum = _log_sum(best, total)
    our_sum, their_sum = _log_sum(our_best, our_total), _log_sum(their_best, their_total)
    tl.store(entropies + row, log_sum - own)

    of_p, of_q = none, none
    if KIND != FORWARD or not GRADIENT:
        for start in range(0, shared, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _read(ours, at, shared, our_scale, our_cap, OURS_CAPPED, True)
            y = _read(theirs, at, shared, their_scale, their_cap, THEIRS_CAPPED, True)
            more_p, more_q = _distances(y * per_t - their_sum, x * per_t - our_sum, beta, KIND)
            of_p += tl.where(at < shared, more_p, 0.0)
            of_q += tl.where(at < shared, more_q, 0.0)
    row_of_q = tl.sum(of_q)
    if GRADIENT:
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            of_p += _turned(
                ours, theirs, at, size, shared, label, log_sum, our_sum, their_sum, row_of_q, our_scale, our_cap,
                their_scale, their_cap, temperature, beta, weight, KIND, OURS_CAPPED, THEIRS_CAPPED, False,
            )  # fmt: skip
        for start in range(whole, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            of_p += _turned(
                ours, theirs, at, size, shared, label, log_sum, our_sum, their_sum, row_of_q, our_scale, our_cap,
                their_scale, their_cap, temperature, beta, weight, KIND, OURS_CAPPED, THEIRS_CAPPED, True,
            )  # fmt: skip
    row_of_p = tl.sum(of_p)
    mixed = row_of_p + row_of_q
    if KIND != FORWARD and KIND != REVERSE:
        mixed = beta * row_of_p + (1 - beta) * row_of_q
    tl.store(divergences + row, mixed * temperature * temperature)


@triton.jit
def _turned(
    ours, theirs, at, size, shared, label, log_sum, our_sum, their_sum, of_q, our_scale, our_cap, their_scale,
    their_cap, temperature, beta, weight,
    KIND: tl.constexpr, OURS_CAPPED: tl.constexpr, THEIRS_CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of the student's logits becomes the gradient; returns what it adds to the forward KL."""
    x = _read(ours, at, size, our_scale, our_cap, OURS_CAPPED, MASKED)
    y = _read(theirs, at, shared, their_scale, their_cap, THEIRS_CAPPED, MASKED)
    log_q, log_p = x / temperature - our_sum, y / temperature - their_sum
    slope = weight * temperature * _slope(log_p, log_q, of_q, beta, KIND)  # τ² of the loss, 1 / τ of log q
    of_p = tl.zeros_like(x)
    if KIND == FORWARD:
        of_p = tl.exp(log_p) * (log_p - log_q)
    if MASKED:
        slope, of_p = tl.where(at < shared, slope, 0.0), tl.where(at < shared, of_p, 0.0)
    gradient = (1 - weight) * (tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0)) + slope
    if OURS_CAPPED:
        inner = (tl.where(at < size, x, 0.0) if MASKED else x) / our_cap
        gradient *= 1 - inner * inner
    gradient = (gradient * our_scale).to(ours.dtype.element_ty)
    if MASKED:
        tl.store(ours + at, gradient, mask=at < size)
    else:
        tl.store(ours + at, gradient)
    return of_p


def divergence_(
    ours: Tensor,
    theirs: Tensor,
    labels: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    weight: float,
    scales: tuple[float, float],
    caps: tuple[float, float],
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and divergences [N] float32 of logits [N, V] and the teacher's [N, W]. Where `gradient`, the
    student's place takes d ((1 - weight) cross-entropy + weight divergence) / d logits. scales, caps: of both models,
    the student's first."""
    entropies, divergences = torch.empty(2, len(ours), dtype=torch.float32, device=ours.device).unbind()
    shared = min(ours.shape[1], theirs.shape[1])
    _divergence[(len(ours),)](
        ours, ours.stride(0), theirs, theirs.stride(0), labels, entropies, divergences, ours.shape[1], shared,
        float(scales[0]), float(caps[0]), float(scales[1]), float(caps[1]), float(temperature), float(beta),
        float(weight), KIND=KINDS.index(kind), OURS_CAPPED=caps[0] != 0.0, THEIRS_CAPPED=caps[1] != 0.0,
        GRADIENT=gradient, BLOCK=min(BLOCK, 1 << math.ceil(math.log2(max(2, shared)))), num_warps=8,
    )  # fmt: skip
    return entropies, divergences
