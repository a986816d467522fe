"""Frozen linear layers in few bits, for adapters to learn beside (QLoRA, arXiv:2305.14314).

N = outputs, K = inputs, T = packed tokens. A weight is quantised once, on loading; each product decodes it to the
dtype of the activations, and the backward pass decodes it again, so that nothing of full size outlives a layer.

nf4     16 values at the quantiles of a normal distribution, one scale for 64 weights; the scales themselves in 8 bits
        ("double quantisation"), 4.13 bits a weight in all: the same numbers as bitsandbytes' nf4 with nested scales
int4    16 even steps between the least and the greatest of 32 weights, 5 bits in all
int8    254 even steps of a row's largest weight, 8 bits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.errors import InvalidInputError
from llmasos.train.codes import DYNAMIC, NF4, SCALES, Code, in_blocks, largest

Kind = Literal["nf4", "int8", "int4"]
KINDS = ("nf4", "int8", "int4")
BLOCK = 64
"""Weights that share a scale in NF4."""
GROUP = 32
"""Weights that share a step and a minimum in int4."""
PIECE = 2**23
"""Weights that are coded or decoded at once, so that what is between takes little."""


class FrozenLinear(nn.Module):
    """y = x Wᵀ + b with W in few bits; gradients reach x only. Made of a full weight [N, K], on whose device it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InvalidInputError(
                f"quantization={kind!r} is not known.", hint=f"Use {', '.join(KINDS)}.", param="quantization"
            )
        self.out_features, self.in_features = weight.shape
        self.kind: Kind = kind
        with torch.no_grad():
            coded = _CODERS[kind](weight)
        self._dtypes = {name: tensor.dtype for name, tensor in coded.items()}
        for name, tensor in coded.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def stored(self) -> list[Tensor]:
        """What the coder made of the weight."""
        return [getattr(self, name).view(dtype) for name, dtype in self._dtypes.items()]

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return sum(tensor.nbytes for tensor in self.stored)

    def as_parameters(self) -> None:
        """They become parameters that nothing changes: of those FSDP gives each rank a part. torch 2.11 takes no
        integers for it: four bytes are called a float, until they are read."""
        for name, tensor in zip(self._dtypes, self.stored, strict=True):
            if tensor.is_floating_point() or tensor.shape[-1] % 4 == 0:
                del self._buffers[name]
                given = tensor if tensor.is_floating_point() else tensor.view(torch.float32)
                setattr(self, name, nn.Parameter(given, requires_grad=False))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, [N, K]."""
        return _decoded(self.kind, (self.out_features, self.in_features), dtype, *self.stored)

    def product(self, x: Tensor) -> Tensor:
        """x [T, K] -> x Wᵀ [T, N], in x's dtype."""
        shape = self.out_features, self.in_features
        # torch gives `apply` no types
        out: Tensor = _Product.apply(x, self.kind, shape, *self.stored)  # type: ignore[no-untyped-call]
        return out

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def frozen_bytes(kind: Kind, rows: int, columns: int) -> int:
    """Of a weight [rows, columns] in a FrozenLinear."""
    count = rows * columns
    if kind == "int8":
        return count + 4 * rows
    if kind == "int4":
        groups = -(-count // GROUP)
        return groups * (GROUP // 2 + 2 + 2)
    blocks = -(-count // BLOCK)
    scales = -(-blocks // SCALES)
    tables = 4 * (2 * 256 + 256)
    return blocks * BLOCK // 2 + scales * (SCALES + 4) + 4 + tables


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.how = kind, shape
        if torch.compiler.is_compiling():
            return F.linear(x, _decoded(kind, shape, x.dtype, *stored))
        # what stays has its place before what goes: a heap with holes of whole weights would grow by them
        out = x.new_empty(len(x), shape[0])
        return torch.mm(x, _decoded(kind, shape, x.dtype, *stored).t(), out=out)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        kind, shape = ctx.how
        stored, [given] = ctx.saved_tensors, outer
        nothing = (None, None, *(None for _ in stored))
        if torch.compiler.is_compiling():
            return given @ _decoded(kind, shape, given.dtype, *stored), *nothing
        out = given.new_empty(len(given), shape[1])
        return torch.mm(given, _decoded(kind, shape, given.dtype, *stored), out=out), *nothing


# Weights to codes. Each coder gives named tensors; its decoder gets them in the same order.


def _nf4(weight: Tensor) -> dict[str, Tensor]:
    blocks = in_blocks(weight.reshape(-1), BLOCK)
    code, signed = (Code.of(values, weight.device) for values in (NF4, DYNAMIC[True]))
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(blocks), device=weight.device)
    for part in _parts(len(blocks), BLOCK):
        values = blocks[part].float()
        scales[part] = values.abs().amax(1)
        index = code.nearest(values / largest(values)[:, None])
        packed[part] = index[:, ::2] << 4 | index[:, 1::2]
    mean = scales.mean()
    outer = in_blocks(scales - mean, SCALES)
    tops = largest(outer)
    return {
        "packed": packed,
        "scales": signed.nearest(outer / tops[:, None]),
        "tops": tops,
        "mean": mean[None],
        # tables are kept beside the weight: made anew for each product, a GPU would wait for them
        "pairs": torch.tensor([[NF4[byte >> 4], NF4[byte & 15]] for byte in range(256)], device=weight.device),
        "signed": signed.values,
    }


def _of_nf4(
    part: slice,
    dtype: torch.dtype,
    packed: Tensor,
    scales: Tensor,
    tops: Tensor,
    mean: Tensor,
    pairs: Tensor,
    signed: Tensor,
) -> Tensor:
    # a part begins with a block of scales: PIECE / BLOCK is a multiple of SCALES
    outer = slice(part.start // SCALES, -(-part.stop // SCALES))
    own = (signed[scales[outer].int()] * tops[outer, None]).view(-1)[: part.stop - part.start] + mean
    index = packed[part].int()
    if torch.compiler.is_compiling():
        return (pairs[index].flatten(1) * own[:, None]).to(dtype)
    # two values as one word: ten times as fast on CPUs
    words = pairs.view(torch.int64).view(-1).index_select(0, index.view(-1))
    return words.view(torch.float32).view(len(index), -1).mul_(own[:, None]).to(dtype)


def _int4(weight: Tensor) -> dict[str, Tensor]:
    flat = weight.reshape(-1)
    groups = torch.cat([flat, flat[-1:].expand(-len(flat) % GROUP)]).view(-1, GROUP)
    packed = torch.empty(len(groups), GROUP // 2, dtype=torch.uint8, device=weight.device)
    steps = torch.empty(len(groups), dtype=torch.float16, device=weight.device)
    lows = torch.empty_like(steps)
    for part in _parts(len(groups), GROUP):
        values = groups[part].float()
        low, high = values.amin(1), values.amax(1)
        steps[part], lows[part] = (high - low) / 15, low
        step = steps[part].float().clamp_min(1e-12)  # as it is stored, so that its rounding costs least
        index = ((values - lows[part].float()[:, None]) / step[:, None]).round_().clamp_(0, 15).to(torch.uint8)
        packed[part] = index[:, ::2] << 4 | index[:, 1::2]
    return {"packed": packed, "steps": steps, "lows": lows}


def _of_int4(part: slice, dtype: torch.dtype, packed: Tensor, steps: Tensor, lows: Tensor) -> Tensor:
    own = packed[part]
    index = torch.stack([own >> 4, own & 15], -1).flatten(1)
    return (index * steps[part].float()[:, None]).add_(lows[part].float()[:, None]).to(dtype)


def _int8(weight: Tensor) -> dict[str, Tensor]:
    scales = largest(weight) / 127
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part in _parts(*weight.shape):
        q[part] = (weight[part].float() / scales[part, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"q": q, "scales": scales}


def _of_int8(part: slice, dtype: torch.dtype, q: Tensor, scales: Tensor) -> Tensor:
    return q[part].float().mul_(scales[part, None]).to(dtype)


_CODERS: dict[Kind, Callable[[Tensor], dict[str, Tensor]]] = {"nf4": _nf4, "int4": _int4, "int8": _int8}
_DECODERS: dict[Kind, Callable[..., Tensor]] = {"nf4": _of_nf4, "int4": _of_int4, "int8": _of_int8}


def _decoded(kind: Kind, shape: tuple[int, int], dtype: torch.dtype, *stored: Tensor) -> Tensor:
    """The weight [N, K] of what a coder gave. A compiler fuses the steps; without one large ones go piece by piece."""
    rows = len(stored[0])
    width = shape[1] if kind == "int8" else 2 * stored[0].shape[1]
    count = math.prod(shape)
    if torch.compiler.is_compiling() or rows * width <= PIECE:
        return _DECODERS[kind](slice(0, rows), dtype, *stored).view(-1)[:count].view(shape)
    out = torch.empty(rows * width, dtype=dtype, device=stored[0].device)
    for part in _parts(rows, width):
        out[part.start * width : part.stop * width] = _DECODERS[kind](part, dtype, *stored).view(-1)
    return out[:count].view(shape)


def _parts(rows: int, width: int) -> list[slice]:
    step = max(1, PIECE // width)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
