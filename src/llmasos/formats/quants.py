"""Dequantisation of GGML block types, vectorised in torch; runs on the device where the blocks lie.

N = number of blocks. Every decoder takes uint8 [N, type_size] and gives float32 [N, block_size]. Layouts are those of
the block structs in ggml-common.h; the order of float operations is ggml's, so results are bit-equal to its reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmasos.errors import FormatError, UnsupportedError
from llmasos.formats.types import GGML_TYPES

# Temporaries of a few bytes per element stay in the processor's caches when this many elements are decoded at once.
_ELEMENTS_AT_ONCE = 1 << 18


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Splits bytes into `bits`-wide fields, lowest first: uint8 [..., k] -> uint8 [..., 8 / bits, k]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts[:, None]) & ((1 << bits) - 1)


def _nibbles(packed: Tensor) -> Tensor:
    """32 four-bit values per 16 bytes, all low halves before all high halves: uint8 [N, 16] -> uint8 [N, 32]."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bit j of a little-endian uint32 belongs to element j; moved to place 4: uint8 [N, 4] -> uint8 [N, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 1) << 4).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).to(torch.int8) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return (_half(b, 0) * _nibbles(b[:, 4:])).add_(_half(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).to(torch.int8) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return (_half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]))).add_(_half(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8) * _half(b, 0)


def _q2_k(b: Tensor) -> Tensor:
    n = len(b)
    scales, qs = b[:, :16], b[:, 16:80]
    q = _fields(qs.reshape(n, 2, 32), 2).view(n, 16, 16)
    scale = _half(b, 80) * (scales & 15)
    minimum = _half(b, 82) * (scales >> 4)
    return (scale.unsqueeze(-1) * q).sub_(minimum.unsqueeze(-1)).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    n = len(b)
    high, qs, scales, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b, 108)
    # 16 scales of 6 bits: low nibbles in bytes 0-7, pairs of high bits in bytes 8-11.
    low_bits, high_bits = _fields(scales[:, :8], 4).flatten(1), _fields(scales[:, 8:], 2).flatten(1)
    scale = d * ((low_bits | (high_bits << 4)).to(torch.int8) - 32)
    low = _fields(qs.reshape(n, 2, 32), 2).view(n, 16, 16)
    missing = (_fields(high, 1).view(n, 16, 16) ^ 1) << 2  # a bit that is not set subtracts 4
    return (scale.unsqueeze(-1) * (low.to(torch.int8) - missing.to(torch.int8))).flatten(1)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minimums of Q4_K and Q5_K: uint8 [N, 12] -> two uint8 [N, 8]."""
    low, middle, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([low & 63, (mixed & 15) | ((low >> 2) & 48)], dim=-1)
    minimum = torch.cat([middle & 63, (mixed >> 4) | ((middle >> 2) & 48)], dim=-1)
    return scale, minimum


def _q4_k(b: Tensor) -> Tensor:
    n = len(b)
    scale, minimum = _k_scales(b[:, 4:16])
    q = _fields(b[:, 16:].reshape(n, 4, 32), 4).view(n, 8, 32)
    return _scale_and_shift(b, scale, minimum, q)


def _q5_k(b: Tensor) -> Tensor:
    n = len(b)
    scale, minimum = _k_scales(b[:, 4:16])
    q = _fields(b[:, 48:].reshape(n, 4, 32), 4).view(n, 8, 32)
    return _scale_and_shift(b, scale, minimum, q | (_fields(b[:, 16:48], 1) << 4))


def _scale_and_shift(b: Tensor, scale: Tensor, minimum: Tensor, q: Tensor) -> Tensor:
    scaled = (_half(b, 0) * scale).unsqueeze(-1) * q
    return scaled.sub_((_half(b, 2) * minimum).unsqueeze(-1)).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    n = len(b)
    low = _fields(b[:, :128].reshape(n, 2, 64), 4).view(n, 16, 16)
    high = _fields(b[:, 128:192].reshape(n, 2, 32), 2).view(n, 16, 16)
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)
    return (scale.unsqueeze(-1) * ((low | (high << 4)).to(torch.int8) - 32)).flatten(1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

#: name -> (elements per block, bytes per block), for every block type that `dequantize` knows
BLOCK: dict[str, tuple[int, int]] = {
    t.name: (t.block_size, t.type_size) for t in GGML_TYPES.values() if t.name in _DECODERS
}


FOUR_BIT = ("Q4_0", "Q4_1", "Q4_K")
"""Types that `unpack_q4` takes."""


def _as_blocks(dtype: str, blocks: Tensor) -> Tensor:
    """uint8 [..., bytes] -> uint8 [N, type_size], checked."""
    if dtype not in BLOCK:
        raise UnsupportedError(
            f"Tensors of type {dtype} can't be decoded by this build.",
            hint=f"Take a file quantised as one of {', '.join(BLOCK)}.",
        )
    assert blocks.dtype == torch.uint8, f"blocks must be uint8, not {blocks.dtype}"
    size = BLOCK[dtype][1]
    if blocks.shape[-1] % size:
        raise FormatError(f"A row of {blocks.shape[-1]} bytes does not divide into {dtype} blocks of {size} bytes.")
    return blocks.reshape(-1, size)


def dequantize(dtype: str, blocks: Tensor, *, out: torch.dtype = torch.float32) -> Tensor:
    """Decodes rows of blocks: uint8 [..., bytes] -> `out` [..., elements].

    Arithmetic is in float32 and rounded once to `out`. Raises UnsupportedError for a type outside `BLOCK`.
    """
    flat = _as_blocks(dtype, blocks)
    block_size, type_size = BLOCK[dtype]
    decoded = torch.empty((len(flat), block_size), dtype=out, device=blocks.device)
    step = _ELEMENTS_AT_ONCE // block_size
    for start in range(0, len(flat), step):
        decoded[start : start + step] = _DECODERS[dtype](flat[start : start + step])
    return decoded.view(*blocks.shape[:-1], blocks.shape[-1] // type_size * block_size)


def unpack_q4(dtype: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and minimums of rows in a 4-bit type, so that `weight = q * d + m`, exactly as `dequantize` has
    it.

    uint8 [..., bytes] -> q uint8 [..., n] in 0..15, d float32 [..., n / 32], m float32 [..., n / 32].
    Q4_0 stores no minimum; its offset of 8 becomes m = -8 d, which float32 holds exactly.
    """
    assert dtype in FOUR_BIT, f"{dtype} is not a 4-bit type with scales of 32 elements"
    flat = _as_blocks(dtype, blocks)
    d = _half(flat, 0)
    if dtype == "Q4_0":
        q, m = _nibbles(flat[:, 2:]), -8 * d
    elif dtype == "Q4_1":
        q, m = _nibbles(flat[:, 4:]), _half(flat, 2)
    else:
        scale, minimum = _k_scales(flat[:, 4:16])
        q, d, m = _fields(flat[:, 16:].reshape(-1, 4, 32), 4), d * scale, -(_half(flat, 2) * minimum)
    lead = blocks.shape[:-1]
    return q.view(*lead, -1), d.view(*lead, -1), m.view(*lead, -1)
