"""The sum over the GPUs of a tensor-parallel model, the residual stream and the norm behind it, in one kernel.

Each process writes its part into a window of memory that all peers read (`models.parallel.Windows`). A program per row
tells its peers that the part is there, waits for theirs, and adds all parts in the order of ranks, so that every
process gets the same bits. Two windows take turns: whoever writes one again has heard, by the sum in between, that its
peers have read it. While a program waits, the next kernel can already fetch its weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmasos.inference.kernels.fused import launch, norm_kind, normed
from llmasos.models.layers import Norm
from llmasos.models.parallel import Windows


@triton.jit
def _sum_add_norm(
    buffers, flags, counts, rank, residual, weight, out, eps, scale,
    W: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    dtype: tl.constexpr = out.dtype.element_ty
    at = row.to(tl.int64) * D + cols
    if PDL:
        gdc_launch_dependents()
    # all that the kernel just before does not write is read while that one ends
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts + row) + 1
    heard = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + row * W
    value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    for r in tl.static_range(W):
        if r != rank:
            told = tl.load(flags + r).to(tl.pointer_type(tl.int32)) + row * W + rank
            tl.atomic_add(told, 1, sem="release", scope="sys")  # nobody waits for its answer
    for r in tl.static_range(W):
        if r != rank:
            seen = tl.atomic_add(heard + r, 0, sem="acquire", scope="sys")
            while seen < count:
                seen = tl.atomic_add(heard + r, 0, sem="acquire", scope="sys")
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(W):
        part = tl.load(buffers + r).to(tl.pointer_type(dtype)) + row * D
        total += tl.load(part + cols, mask=inside, other=0.0, cache_modifier=".cv").to(tl.float32)
    tl.store(counts + row, count)
    delta = total.to(dtype).to(tl.float32)
    if SCALED:
        delta = (delta * scale).to(dtype).to(tl.float32)
    value = (value + delta).to(dtype).to(tl.float32)
    tl.store(residual + at, value.to(dtype), mask=inside)
    value = normed(value, tl.rsqrt(tl.sum(value * value) / D + eps), w, KIND, dtype)
    tl.store(out + at, value.to(dtype), mask=inside)


def sum_add_rms_norm(
    windows: Windows, which: int, residual: Tensor, norm: Norm, *, scale: float = 1.0, pdl: bool = False
) -> Tensor:
    """residual [T, D] += scale · the sum of all processes' parts in window `which`, in place; returns norm(residual).

    Every process of the group must call it, with as many rows, in the same order."""
    num_tokens, width = residual.shape
    out = torch.empty_like(residual)
    _sum_add_norm[(num_tokens,)](
        windows.buffers[which], windows.flags[which], windows.counts[which], windows.rank,
        residual, norm.weight, out, norm.eps, scale,
        W=len(windows.buffers[which]), D=width, BLOCK=triton.next_power_of_2(width), KIND=norm_kind(norm),
        SCALED=scale != 1.0, num_warps=8 if width >= 2048 else 4, **launch(pdl),
    )  # fmt: skip
    return out
