"""What the GPUs of a tensor-parallel model tell each other in a step of few tokens: sums, and shares of the logits.

Each process writes its part into the mailboxes of its peers (`models.parallel.Mailbox`): 32 bits of data and the number
of the exchange are one word of 64 bits, which arrives whole, so a peer that sees the number has the data. No flag, no
fence, no answer: an exchange lasts as long as one write to the other GPU (the LL protocol of NCCL). While a program
waits, the next kernel can already fetch its weights.

A box may be written again when its reader has read it: between two exchanges through one box there is always one
through another, and whoever has a peer's part of that one knows that the peer had ended the exchange before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmasos.inference.kernels.fused import launch, norm_kind, normed
from llmasos.models.layers import Norm
from llmasos.models.parallel import Mailbox, words_per_row

GATHER_BLOCK = 1024
"""Words of a program that gathers."""


@triton.jit
def _box(boxes, process):
    return tl.load(boxes + process).to(tl.pointer_type(tl.int64))


@triton.jit
def _send(boxes, rank, word, at, inside, count, W: tl.constexpr, SIZE):
    """Words [BLOCK] int32 into the place of process `rank` in all other boxes."""
    whole = (word.to(tl.int64) & 0xFFFFFFFF) | (count.to(tl.int64) << 32)
    for r in tl.static_range(W):
        if r != rank:
            tl.store(_box(boxes, r) + rank * SIZE + at, whole, mask=inside, cache_modifier=".wt")


@triton.jit
def _receive(box, at, inside, count):
    """Words [BLOCK] int32 that a peer has sent in exchange `count`, when all of them are there."""
    whole = tl.load(box + at, mask=inside, other=0, volatile=True)
    while tl.sum((inside & ((whole >> 32).to(tl.int32) != count)).to(tl.int32)) > 0:
        whole = tl.load(box + at, mask=inside, other=0, volatile=True)
    return whole.to(tl.int32)


@triton.jit
def _values(word, DTYPE: tl.constexpr):
    """Words [BLOCK] int32 as DTYPE: [BLOCK, 2], or [BLOCK, 1] where a value fills a word."""
    if DTYPE.primitive_bitwidth == 32:
        return word.to(DTYPE, bitcast=True)[:, None]
    else:
        low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(low, high)


@triton.jit
def _sum_add_norm(
    boxes, counts, rank, part, residual, weight, out, eps, scale,
    W: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    words = tl.arange(0, BLOCK)
    inside = words < WORDS
    dtype: tl.constexpr = out.dtype.element_ty
    per_word: tl.constexpr = 32 // dtype.primitive_bitwidth
    cols = words[:, None] * per_word + tl.arange(0, per_word)[None, :]
    at = row.to(tl.int64) * (WORDS * per_word) + cols
    if PDL:
        gdc_launch_dependents()
    # all that the kernel just before does not write is read while that one ends
    w = tl.load(weight + cols, mask=inside[:, None], other=0.0).to(tl.float32)
    count = tl.load(counts + row) + 1
    value = tl.load(residual + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    place = row * WORDS + words
    own = tl.load(part.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
    _send(boxes, rank, own, place, inside, count, W, ROWS * WORDS)
    tl.store(counts + row, count)
    mine = _box(boxes, rank)
    total = tl.zeros([BLOCK, per_word], tl.float32)
    for r in tl.static_range(W):  # in the order of ranks: every process gets the same bits
        if r == rank:
            total += _values(own, dtype).to(tl.float32)
        else:
            total += _values(_receive(mine + r * ROWS * WORDS, place, inside, count), dtype).to(tl.float32)
    delta = total.to(dtype).to(tl.float32)
    if SCALED:
        delta = (delta * scale).to(dtype).to(tl.float32)
    value = (value + delta).to(dtype).to(tl.float32)
    tl.store(residual + at, value.to(dtype), mask=inside[:, None])
    squares = tl.sum(tl.sum(value * value, 1), 0)
    value = normed(value, tl.rsqrt(squares / (WORDS * per_word) + eps), w, KIND, dtype)
    tl.store(out + at, value.to(dtype), mask=inside[:, None])


def sum_add_rms_norm(
    mailbox: Mailbox, part: Tensor, residual: Tensor, norm: Norm, *, scale: float = 1.0, pdl: bool = False
) -> Tensor:
    """residual [T, D] += scale · the sum of all processes' `part` [T, D], in place; returns norm(residual).

    Every process of the group must call it, with as many rows, in the same order."""
    num_tokens, width = residual.shape
    out = torch.empty_like(residual)
    words = words_per_row(width, residual.dtype)
    _sum_add_norm[(num_tokens,)](
        mailbox.boxes, mailbox.counts, mailbox.rank, part, residual, norm.weight, out, norm.eps, scale,
        W=len(mailbox.boxes), ROWS=mailbox.rows, WORDS=words, BLOCK=triton.next_power_of_2(words),
        KIND=norm_kind(norm), SCALED=scale != 1.0, num_warps=8 if width >= 2048 else 4, **launch(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _gather(
    boxes, counts, rank, part, starts, skips, out, V,
    W: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    words = block * BLOCK + tl.arange(0, BLOCK)
    inside = words < WORDS
    dtype: tl.constexpr = out.dtype.element_ty
    per_word: tl.constexpr = 32 // dtype.primitive_bitwidth
    cols = words[:, None] * per_word + tl.arange(0, per_word)[None, :]
    count = tl.load(counts + row * tl.num_programs(1) + block) + 1
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = row * WORDS + words
    own = tl.load(part.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
    _send(boxes, rank, own, place, inside, count, W, ROWS * WORDS)
    tl.store(counts + row * tl.num_programs(1) + block, count)
    mine = _box(boxes, rank)
    for r in tl.static_range(W):
        word = own
        if r != rank:
            word = _receive(mine + r * ROWS * WORDS, place, inside, count)
        at = out + row.to(tl.int64) * V + tl.load(starts + r) + cols
        tl.store(at, _values(word, dtype), mask=inside[:, None] & (cols >= tl.load(skips + r)))


def gather_columns(
    mailbox: Mailbox, part: Tensor, starts: Tensor, skips: Tensor, width: int, *, pdl: bool = False
) -> Tensor:
    """[R, width]: columns starts[r] and on are the part [R, N] of process r, without its first skips[r] columns."""
    num_rows, share = part.shape
    out = part.new_empty(num_rows, width)
    words = words_per_row(share, part.dtype)
    _gather[(num_rows, triton.cdiv(words, GATHER_BLOCK))](
        mailbox.boxes, mailbox.counts, mailbox.rank, part, starts, skips, out, width,
        W=len(mailbox.boxes), ROWS=mailbox.rows, WORDS=words, BLOCK=GATHER_BLOCK, num_warps=4, **launch(pdl),
    )  # fmt: skip
    return out
