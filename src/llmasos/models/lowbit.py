"""Linear layers and embeddings whose weights stay low-bit in memory, for CPUs, where bytes per weight set the speed.

N = outputs, K = inputs, G = 32 weights that share a scale. The products come from PyTorch's own kernels
(`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`), which take bfloat16 activations on any CPU and are made for few
tokens: from `MANY_TOKENS` on, a weight is decoded for the call to the activations' dtype (float32 where the CPU has no
bfloat16) and multiplied by oneDNN, which is compute-bound there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.formats.quants import FOUR_BIT as FOUR_BIT
from llmasos.formats.quants import dequantize, unpack_q4

MANY_TOKENS = 160
GROUP = 32
PACKED_ROWS = 4096
"""Rows that are packed at a time; a multiple of the 64 that the kernel keeps together."""
Blocks = tuple[str, Tensor]
"""A GGML block type and the rows as stored, uint8 [N, bytes]."""
_int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Int4Linear(nn.Module):
    """y = x Wᵀ + b with W = q · scale + minimum per group of 32, exactly GGUF's Q4_0, Q4_1 and Q4_K up to bfloat16
    scales.

    The mapped file's blocks serve the many-token path, so only the packed copy takes memory of its own.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, blocks: Sequence[Blocks], bias: Tensor | None) -> None:
        super().__init__()
        parts = [unpack_q4(dtype, rows) for dtype, rows in blocks]
        q, d, m = (torch.cat([part[i] for part in parts]) for i in range(3))
        self.out_features, self.in_features = q.shape
        self.many_tokens = MANY_TOKENS
        self._blocks = tuple(blocks)
        # the kernel computes (q - 8) * scale + zero
        scales = torch.stack([d, m + 8 * d], -1).transpose(0, 1).contiguous().bfloat16()
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = torch.cat([pack(rows.to(torch.int32), 1) for rows in q.split(PACKED_ROWS)])
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def fits(out_features: int, in_features: int) -> bool:
        """Shapes that the kernel takes."""
        return out_features % 16 == 0 and in_features % GROUP == 0

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight, [N, K]."""
        return torch.cat([dequantize(kind, rows, out=dtype) for kind, rows in self._blocks])

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if x.shape[0] >= self.many_tokens:
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        out: Tensor = _int4_product(x.bfloat16(), self.packed, GROUP, self.scales).to(x.dtype)
        return out if self.bias is None else out + self.bias


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W = q · scale per output row; symmetric, rounded to nearest."""

    q: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        assert self.fits(weight.shape[1]), "the kernel would read beyond the rows"
        self.out_features, self.in_features = weight.shape
        self.many_tokens = MANY_TOKENS
        # rounded to the kernel's dtype before it divides, so that it costs no gain
        scale = (weight.abs().amax(-1).float().clamp_min(1e-12) / 127).bfloat16().float()
        q = torch.empty(weight.shape, dtype=torch.int8)
        for rows in range(0, weight.shape[0], 4096):  # no float copy of a whole vocabulary
            part = slice(rows, rows + 4096)
            q[part] = (weight[part].float() / scale[part, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scale", scale.bfloat16(), persistent=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def fits(in_features: int) -> bool:
        """Widths that the kernel takes."""
        return in_features % GROUP == 0

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight, [N, K]."""
        return self.q.to(dtype) * self.scale.to(dtype)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if x.shape[0] >= self.many_tokens:
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        out = torch._weight_int8pack_mm(x.bfloat16(), self.q, self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


def _packs_bfloat16() -> bool:
    """oneDNN needs AVX-512, AVX-NE-CONVERT or Arm's bfloat16 for it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W in bfloat16 as oneDNN lays it out: twice the memory of int8, nothing more to round, as fast
    for one token and several times as fast for a few. Narrow enough that a sum is made in one go, so a row of the
    result does not depend on how many there are."""

    WIDEST = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def fits(cls, in_features: int, dtype: torch.dtype) -> bool:
        return in_features <= cls.WIDEST and dtype == torch.bfloat16 and _packs_bfloat16()

    @property
    def nbytes(self) -> int:
        return 2 * self.out_features * self.in_features

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight, [N, K]."""
        return self._packed.to_dense().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self._packed, self.bias, "none", [], "")
        return out.to(x.dtype)


class BlockEmbedding(nn.Module):
    """Token embeddings decoded from GGML blocks row by row: a table of any size costs no memory of its own."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self._kind, self._rows = blocks
        self._dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return dequantize(self._kind, self._rows[tokens], out=self._dtype)

    def dequantize(self) -> Tensor:
        return dequantize(self._kind, self._rows, out=self._dtype)
