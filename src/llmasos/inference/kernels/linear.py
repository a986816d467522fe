"""Matrix products of few tokens with whole weight matrices: as fast as the weights can be read.

M = tokens, N = outputs, K = inputs; weights [N, K] as nn.Linear keeps them. What stands before and behind a product in
a transformer block happens inside it: RMSNorm of the input, which every program computes for itself, and bias,
activation of gate and up halves, or the sum with the residual stream. `invariant_linear` is for any number of tokens:
what a row gives never depends on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from llmasos.inference.kernels.fused import activated, follow, launch, norm_kind, normed
from llmasos.models.config import Activation
from llmasos.models.layers import Norm

MAX_TOKENS = 16
SMALL_WEIGHT = 8 << 20
"""Elements of a weight so small that launching counts more than reading."""


@dataclass(frozen=True)
class Tiling:
    """How a skinny product is cut."""

    rows: int
    """Outputs of a program (of each half where gate and up are computed together)."""
    block: int
    """Inputs of a step."""
    warps: int = 4
    stages: int = 1
    """Steps whose weights are on their way at once, through shared memory; 1: through registers."""
    dot: bool = False
    """On the tensor cores."""
    prefetch: bool = False
    """Ask for all weights of the program to come to L2 before the kernel in front has ended."""


@triton.jit
def _prefetch(weight, rows, stride, K: tl.constexpr, BYTES: tl.constexpr, LINES: tl.constexpr):
    """Rows of the weights are called to L2, 128 bytes at a time."""
    step: tl.constexpr = 128 // BYTES
    for start in tl.range(0, K, LINES * step):
        cols = start + tl.arange(0, LINES) * step
        lines = weight + rows[:, None] * stride + tl.minimum(cols, K - step)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _outputs(ROWS: tl.constexpr, N, GATED: tl.constexpr):
    """Weight rows of a program. Gate and up rows of one output stand side by side, for tl.split."""
    if GATED:
        i = tl.arange(0, 2 * ROWS)
        return (tl.minimum(tl.program_id(0) * ROWS + i // 2, N - 1) + (i % 2) * N).to(tl.int64)
    else:
        return tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), N - 1).to(tl.int64)


@triton.jit
def _finish(
    y, bias, residual, out, rows, M, N, scale,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """What follows the product y [TOKENS, ROWS] (or twice the rows where gated), rounding where the plain path does."""
    dtype: tl.constexpr = out.dtype.element_ty
    if BIAS:
        y += tl.load(bias + rows)[None, :].to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    if ACT != "":
        gate, up = tl.split(tl.reshape(y, [TOKENS, ROWS, 2]))
        y = activated(gate, ACT, dtype) * up
    tokens = tl.arange(0, TOKENS)
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (tokens < M)[:, None] & (outputs < N)[None, :]
    at = tokens[:, None].to(tl.int64) * N + outputs[None, :]
    if ADD:
        if SCALED:
            y = (y * scale).to(dtype).to(tl.float32)
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(dtype), mask=mask)


@triton.jit
def _multiply_add(
    x, weight, bias, norm, residual, out, M, N, stride, eps, scale,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    KIND: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Without tensor cores: weights go from memory to registers once and meet every token there.

    Tiles are [BLOCK / VEC, TOKENS, ROWS, VEC]: a thread loads VEC neighbours (16 bytes) and sums them by itself; the
    other inputs come first, so that threads are laid along them and weights, inputs and sums are cut alike."""
    dtype: tl.constexpr = x.dtype.element_ty
    rows = _outputs(ROWS, N, ACT != "")
    num_rows: tl.constexpr = rows.shape[0]
    parts: tl.constexpr = BLOCK // VEC
    cols = tl.arange(0, parts)[:, None, None, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
    tokens = tl.minimum(tl.arange(0, TOKENS), M - 1)[None, :, None, None]
    weights = weight + rows[None, None, :, None] * stride + cols
    inputs = x + tokens * K + cols
    even: tl.constexpr = K % BLOCK == 0
    if STAGES == 1:
        w = tl.load(weights) if even else tl.load(weights, mask=cols < K, other=0.0)
    if PREFETCH:
        _prefetch(weight, rows, stride, K, weight.dtype.element_ty.primitive_bitwidth // 8, 32)
    follow(PDL)
    rms = tl.zeros([1, TOKENS, 1, 1], tl.float32)
    if KIND > 0:
        squares = tl.zeros([parts, TOKENS, 1], tl.float32)
        for k in tl.static_range(0, K, BLOCK):
            v = tl.load(inputs + k) if even else tl.load(inputs + k, mask=cols + k < K, other=0.0)
            v = v.to(tl.float32)
            squares += tl.sum(v * v, 3)
        rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :, :, None]
    acc = tl.zeros([parts, TOKENS, num_rows], tl.float32)
    for k in tl.range(0, K, BLOCK, num_stages=STAGES):
        if STAGES > 1:
            w = tl.load(weights + k) if even else tl.load(weights + k, mask=cols + k < K, other=0.0)
        v = tl.load(inputs + k) if even else tl.load(inputs + k, mask=cols + k < K, other=0.0)
        v = v.to(tl.float32)
        if KIND > 0:
            g = tl.load(norm + cols + k) if even else tl.load(norm + cols + k, mask=cols + k < K, other=0.0)
            v = normed(v, rms, g.to(tl.float32), KIND, dtype)
        this = w.to(tl.float32)
        if STAGES == 1:
            # the next weights are on their way while these are multiplied
            w = tl.load(weights + k + BLOCK, mask=cols + k + BLOCK < K, other=0.0)
        acc += tl.sum(this * v, 3)
    y = tl.sum(acc, 0)
    _finish(y, bias, residual, out, rows, M, N, scale, TOKENS, ROWS, ACT, BIAS, ADD, SCALED)


@triton.jit
def _dot(
    x, weight, bias, norm, residual, out, M, N, stride, eps, scale,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    KIND: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """On the tensor cores: [rows, BLOCK] of the weights times [BLOCK, TOKENS] of the inputs."""
    dtype: tl.constexpr = x.dtype.element_ty
    rows = _outputs(ROWS, N, ACT != "")
    num_rows: tl.constexpr = rows.shape[0]
    cols = tl.arange(0, BLOCK)
    tokens = tl.arange(0, TOKENS)
    live = (tokens < M)[:, None]
    weights = weight + rows[:, None] * stride + cols[None, :]
    inputs = x + tokens[:, None] * K + cols[None, :]
    if PREFETCH:
        _prefetch(weight, rows, stride, K, weight.dtype.element_ty.primitive_bitwidth // 8, 32)
    follow(PDL)
    rms = tl.zeros([TOKENS, 1], tl.float32)
    if KIND > 0:
        squares = tl.zeros([TOKENS, BLOCK], tl.float32)
        for k in tl.range(0, K, BLOCK):
            v = tl.load(inputs + k, mask=live & (cols + k < K)[None, :], other=0.0).to(tl.float32)
            squares += v * v
        rms = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    acc = tl.zeros([num_rows, TOKENS], tl.float32)
    for k in tl.range(0, K, BLOCK, num_stages=STAGES):
        inside = (cols + k < K)[None, :]
        w = tl.load(weights + k) if K % BLOCK == 0 else tl.load(weights + k, mask=inside, other=0.0)
        v = tl.load(inputs + k, mask=live & inside, other=0.0)
        if KIND > 0:
            g = tl.load(norm + cols + k, mask=cols + k < K, other=0.0).to(tl.float32)[None, :]
            v = normed(v.to(tl.float32), rms, g, KIND, dtype).to(dtype)
        acc = tl.dot(w, tl.trans(v), acc, input_precision="ieee")
    _finish(tl.trans(acc), bias, residual, out, rows, M, N, scale, TOKENS, ROWS, ACT, BIAS, ADD, SCALED)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """x [M ≤ 16, K] times weight [N, K]: [M, N], products summed in float32.

    norm: an RMSNorm that x passes first. activation: weight holds gate over up, the result is activation(gate) · up,
    [M, N / 2]. residual [M, N]: the result times scale is added to it in place and the sum returned. out: where the
    result goes."""
    num_tokens, width = x.shape
    outputs = weight.shape[0] // (2 if activation else 1)
    cut = tiling or tiling_for(num_tokens, weight.shape[0], width, gated=activation is not None)
    # few shapes, so that few kernels are compiled
    tokens = MAX_TOKENS if cut.dot else triton.next_power_of_2(num_tokens)
    if out is None:
        out = x.new_empty(num_tokens, outputs) if residual is None else residual
    kernel = _dot if cut.dot else _multiply_add
    kernel[(triton.cdiv(outputs, cut.rows),)](
        x, weight, x if bias is None else bias, x if norm is None else norm.weight, out, out,
        num_tokens, outputs, weight.stride(0), 0.0 if norm is None else norm.eps, scale,
        K=width, TOKENS=tokens, ROWS=cut.rows, BLOCK=cut.block,
        VEC=16 // x.element_size(), KIND=0 if norm is None else norm_kind(norm), ACT=activation or "",
        BIAS=bias is not None, ADD=residual is not None, SCALED=scale != 1.0,
        STAGES=cut.stages, PREFETCH=cut.prefetch and pdl, num_warps=cut.warps, **launch(pdl),
    )  # fmt: skip
    return out


def is_skinny(num_tokens: int, num_rows: int, width: int) -> bool:
    """Whether `skinny_linear` is the fastest way for weights [num_rows, width]: from two tokens on cuBLAS reads large
    ones as fast."""
    most = MAX_TOKENS if num_rows * width <= SMALL_WEIGHT else 1
    return num_tokens <= most and num_rows >= 16 and width >= 16


def tiling_for(num_tokens: int, num_rows: int, width: int, *, gated: bool) -> Tiling:
    """The tiling of a shape: measured on an H200 (bench/gpu_linear.py)."""
    block = min(triton.next_power_of_2(width), 1024)
    if num_tokens <= 2:
        if gated:
            return Tiling(4 if width <= 2048 else 2, block)
        return Tiling(8 if width <= 1024 < num_rows else 4, block)
    if gated:
        return Tiling(16, min(block, 256), stages=4, dot=True)
    return Tiling(16 if num_rows <= 2048 else 32, min(block, 256), stages=4, dot=True, prefetch=True)


@triton.jit
def _invariant(
    x, weight, bias, out, M, N, x_stride, stride,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    # programs next to each other share weights, which are larger than what they meet
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    k = tl.arange(0, BLOCK)
    inputs = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    weights = weight + tl.minimum(cols, N - 1).to(tl.int64)[None, :] * stride + k[:, None]
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        a = tl.load(inputs + start, mask=inside[None, :], other=0.0)
        b = tl.load(weights + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + tl.minimum(cols, N - 1)).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K]: [M, N]. One tile for every M and no splitting of K, so that a row's result is the
    same, bit for bit, alone, anywhere in a batch and in any batch."""
    num_tokens, width = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(num_tokens, outputs)
    half = x.element_size() == 2
    rows, cols, block = (64, 128, 64) if half else (32, 32, 32)
    _invariant[(triton.cdiv(num_tokens, rows), triton.cdiv(outputs, cols))](
        x, weight, x if bias is None else bias, out, num_tokens, outputs, x.stride(0), weight.stride(0),
        K=width, ROWS=rows, COLS=cols, BLOCK=block, BIAS=bias is not None, num_warps=4, num_stages=4 if half else 2,
    )  # fmt: skip
    return out
