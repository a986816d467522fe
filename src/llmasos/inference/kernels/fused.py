"""The passes between the matrix products of a step, each reading and writing its tensors once.

T = packed tokens, D = model width, H / K = query / key heads, W = head width, I = MLP width, B = sequences. Every
function rounds where `models.layers` rounds. `pdl` launches a kernel while the one before it still runs (programmatic
dependent launch, Hopper and later): what does not depend on the other is done by the time the other ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmasos.inference.kernels.write import LARGEST
from llmasos.models.config import Activation
from llmasos.models.layers import Norm

PLAIN, LATE, UNIT = 1, 2, 3
"""RMSNorm rounds before its weight; after it; after 1 + weight."""


def norm_kind(norm: Norm) -> int:
    """How an RMSNorm rounds, for the kernels."""
    return UNIT if norm.unit_offset else LATE if norm.late_rounding else PLAIN


def launch(pdl: bool) -> dict[str, bool]:
    """Kernel options of a programmatic dependent launch."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait for what the kernels before have written, and let the next kernel begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def normed(x, scale, weight, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """float32 x times 1 / rms, times weight; float32 with the values that `models.layers.Norm` has in DTYPE."""
    if KIND == 1:
        return ((x * scale).to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)
    elif KIND == 2:
        return (x * scale * weight).to(DTYPE).to(tl.float32)
    else:
        return (x * scale * (1.0 + weight)).to(DTYPE).to(tl.float32)


@triton.jit
def activated(x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Activation of float32 x, rounded to DTYPE (and on the way where torch's separate operations round)."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * inner))
    elif KIND == "gelu_quick":
        inner = (1.702 * x).to(DTYPE).to(tl.float32)
        y = x * (1.0 / (1.0 + tl.exp(-inner))).to(DTYPE).to(tl.float32)
    else:
        y = tl.maximum(x, 0.0)
        if KIND == "relu2":
            y = y * y
    return y.to(DTYPE).to(tl.float32)


def _warps(width: int) -> int:
    return min(max(width // 512, 1), 16)


@triton.jit
def _add_rms_norm(
    x, residual, weight, post, out, eps, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    ADD: tl.constexpr, POST: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    dtype: tl.constexpr = out.dtype.element_ty
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    follow(PDL)
    value = tl.load(residual + row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(x + row + cols, mask=inside, other=0.0).to(tl.float32)
        if POST:
            p = tl.load(post + cols, mask=inside, other=0.0).to(tl.float32)
            delta = normed(delta, tl.rsqrt(tl.sum(delta * delta) / D + eps), p, KIND, dtype)
        if SCALED:
            delta = (delta * scale).to(dtype).to(tl.float32)
        value = (value + delta).to(dtype).to(tl.float32)
        tl.store(residual + row + cols, value.to(dtype), mask=inside)
    value = normed(value, tl.rsqrt(tl.sum(value * value) / D + eps), w, KIND, dtype)
    tl.store(out + row + cols, value.to(dtype), mask=inside)


def add_rms_norm(
    x: Tensor | None, residual: Tensor, norm: Norm, *, post: Norm | None = None, scale: float = 1.0, pdl: bool = False
) -> Tensor:
    """residual += x · scale in place (x normalised by `post` first, where given), then norm(residual).

    x and residual [T, D], rows next to each other; without x the residual stays as it is. Returns [T, D]."""
    num_tokens, width = residual.shape
    out = torch.empty_like(residual)
    added = residual if x is None else x
    weight = norm.weight
    _add_rms_norm[(num_tokens,)](
        added, residual, weight, weight if post is None else post.weight, out, norm.eps, scale,
        D=width, BLOCK=triton.next_power_of_2(width), KIND=norm_kind(norm),
        ADD=x is not None, POST=post is not None, SCALED=scale != 1.0,
        num_warps=_warps(width), **launch(pdl),
    )  # fmt: skip
    return out


@triton.jit
def _gated(wide, out, I: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr):  # noqa: E741  # I as in the formula: the MLP's width
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < I
    dtype: tl.constexpr = out.dtype.element_ty
    follow(PDL)
    gate = tl.load(wide + row * 2 * I + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * 2 * I + I + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * I + cols, (activated(gate, KIND, dtype) * up).to(dtype), mask=inside)


def gated_activation(wide: Tensor, kind: Activation, *, pdl: bool = False) -> Tensor:
    """activation(gate) · up for wide = [gate | up], [T, 2I] -> [T, I]."""
    num_tokens, both = wide.shape
    width = both // 2
    out = wide.new_empty(num_tokens, width)
    block = min(triton.next_power_of_2(width), 2048)
    grid = (num_tokens, triton.cdiv(width, block))
    _gated[grid](wide, out, I=width, BLOCK=block, KIND=kind, num_warps=_warps(block), **launch(pdl))
    return out


@dataclass(frozen=True)
class KVTarget:
    """Where one layer's keys and values go."""

    keys: Tensor
    """[num_slots, K, W] of any float dtype, float8_e4m3fn or int8."""
    values: Tensor
    key_scales: Tensor | None
    """[num_slots, K] float32 for float8 and int8: absmax / 448 or / 127 of each token and head."""
    value_scales: Tensor | None
    table: Tensor
    """[B, P] int32 page numbers."""
    page_size: int


@triton.jit
def _keep(x, pages, scales, slot, head, cols, inside, largest, K: tl.constexpr, W: tl.constexpr, mask):
    """Rows of x [heads, W] into a slot of the pages, as `write_kv` stores them."""
    if scales is not None:
        scale = tl.max(tl.abs(x), 1) / largest
        tl.store(scales + slot * K + head, scale, mask=mask)
        x = x / tl.where(scale == 0.0, 1.0, scale)[:, None]
        if pages.dtype.element_ty == tl.int8:
            x = tl.floor(x + 0.5)
        x = tl.minimum(tl.maximum(x, -largest), largest)
    at = (slot * K + head)[:, None] * W + cols[None, :]
    tl.store(pages + at, x.to(pages.dtype.element_ty), mask=mask[:, None] & inside[None, :])


@triton.jit
def _rope_write(
    qkv, out, cos, sin, q_weight, k_weight, keys, values, key_scales, value_scales,
    positions, sequences, seq_lens, table, table_stride, largest, eps,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    KIND: tl.constexpr, NEIGHBOURS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, BLOCK)
    inside = cols < W
    dtype: tl.constexpr = out.dtype.element_ty
    position = tl.load(positions + token).to(tl.int64)
    sequence = tl.load(sequences + token)
    length = tl.load(seq_lens + sequence)
    page = tl.load(table + sequence.to(tl.int64) * table_stride + position // PAGE, mask=length > 0, other=0)
    slot = page.to(tl.int64) * PAGE + position % PAGE

    is_q = heads < H
    rotated = heads < H + K
    row = qkv + (token * (H + 2 * K) + heads)[:, None] * W
    live = (heads < H + 2 * K)[:, None] & inside[None, :]
    if R > 0:
        turns = cols < R
        partner = tl.where(turns, cols ^ 1 if NEIGHBOURS else (cols + R // 2) % R, cols)
        c = tl.load(cos + position * R + cols, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + position * R + cols, mask=turns, other=0.0).to(tl.float32)
    follow(PDL)
    x = tl.load(row + cols[None, :], mask=live, other=0.0).to(tl.float32)
    if R > 0:
        other = tl.load(row + partner[None, :], mask=live, other=0.0).to(tl.float32)
    if KIND > 0:
        norms = tl.where(is_q[:, None], q_weight, k_weight)
        scale = tl.rsqrt(tl.sum(x * x, 1) / W + eps)[:, None]
        weight = tl.load(norms + cols[None, :], mask=live, other=0.0).to(tl.float32)
        x = tl.where(rotated[:, None], normed(x, scale, weight, KIND, dtype), x)
        if R > 0:
            weight = tl.load(norms + partner[None, :], mask=live, other=0.0).to(tl.float32)
            other = normed(other, scale, weight, KIND, dtype)
    if R > 0:
        # products are rounded to the tables' dtype, as torch's separate operations do
        between: tl.constexpr = cos.dtype.element_ty
        turned = (x * c[None, :]).to(between).to(tl.float32) + (other * s[None, :]).to(between).to(tl.float32)
        x = tl.where(rotated[:, None] & turns[None, :], turned.to(dtype).to(tl.float32), x)
    tl.store(out + (token * H + heads)[:, None] * W + cols[None, :], x.to(dtype), mask=is_q[:, None] & live)
    written = length + 0 * heads > 0  # as a block: Triton 3.9's interpreter makes no mask of a scalar
    is_k = (heads >= H) & rotated & written
    is_v = (heads >= H + K) & (heads < H + 2 * K) & written
    _keep(x, keys, key_scales, slot, heads - H, cols, inside, largest, K, W, is_k)
    _keep(x, values, value_scales, slot, heads - H - K, cols, inside, largest, K, W, is_v)


def rope_write(
    qkv: Tensor,
    target: KVTarget,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    sequences: Tensor,
    seq_lens: Tensor,
    *,
    num_heads: int,
    norms: tuple[Norm, Norm] | None = None,
    interleaved: bool = False,
    pdl: bool = False,
) -> Tensor:
    """Queries with norm and rotation, [T, H, W]; keys, treated alike, and values go into the pages.

    qkv [T, (H + 2K)W]; tables are cosines and signed sines by position, [positions, R] each, or None for no rotation;
    tokens of sequences with seq_lens 0 are written nowhere."""
    num_tokens = qkv.shape[0]
    num_kv, width = target.keys.shape[1:]
    cos, sin = tables or (None, None)
    q_norm, k_norm = norms or (None, None)
    total = num_heads + 2 * num_kv
    heads = 8 if num_tokens < 64 else min(triton.next_power_of_2(total), 16)
    out = qkv.new_empty(num_tokens, num_heads, width)
    _rope_write[(num_tokens, triton.cdiv(total, heads))](
        qkv, out, cos, sin, None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
        target.keys, target.values, target.key_scales, target.value_scales,
        positions, sequences, seq_lens, target.table, target.table.stride(0), LARGEST.get(target.keys.dtype, 1.0),
        0.0 if q_norm is None else q_norm.eps,
        H=num_heads, K=num_kv, W=width, R=0 if cos is None else cos.shape[-1], PAGE=target.page_size,
        KIND=0 if q_norm is None else norm_kind(q_norm), NEIGHBOURS=interleaved,
        HEADS=heads, BLOCK=triton.next_power_of_2(width), num_warps=4, **launch(pdl),
    )  # fmt: skip
    return out
