"""Code books: numbers as the nearest of a few values, a block of them with one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E)."""
SCALES = 256
"""Values that share a scale in 8 bits: scales of NF4, states of an optimizer."""


def _dynamic_map(signed: bool) -> tuple[float, ...]:
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return tuple(sorted(values))


DYNAMIC = {signed: _dynamic_map(signed) for signed in (True, False)}
"""256 values from -1 (True) or 0 (False) to 1 whose steps are fine near 0: seven decades, each with twice as many as
the smaller one before it (dynamic tree quantisation, arXiv:2110.02861; bitsandbytes' map)."""


@dataclass(frozen=True)
class Code:
    """Ascending values from -1 or 0 to 1, no two nearer to each other than 0.8 % of the larger one."""

    values: Tensor
    middles: Tensor
    """Between each value and the next, the last one infinite."""
    first: Tensor
    """[65536] uint8: the index of the nearest value for the least float32 that begins with these 16 bits."""

    @classmethod
    def of(cls, values: Sequence[float], device: torch.device) -> Code:
        code = torch.tensor(values)
        middles = torch.cat([(code[:-1] + code[1:]) / 2, torch.tensor([torch.inf])])
        words = torch.arange(2**16, dtype=torch.int32) << 16
        words |= torch.where(words < 0, 0xFFFF, 0)  # of two negative numbers that with the larger word is less
        first = torch.bucketize(words.view(torch.float32).nan_to_num(), middles, out_int32=True)
        return cls(code.to(device), middles.to(device), first.to(device, torch.uint8))

    def nearest(self, x: Tensor) -> Tensor:
        """The index of the nearest value to each x, float32 from -1 to 1, as uint8; the lower one in the middle of two.
        Numbers that begin with the same 16 bits differ by less than two values do: a table and one comparison are a
        search."""
        flat = x.reshape(-1)
        index = self.first.index_select(0, (flat.view(torch.int32) >> 16) & 0xFFFF)
        return (index + (flat > self.middles.index_select(0, index.int()))).view(x.shape)


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block [B, n], float32 [B]; never 0, so that it can divide."""
    return blocks.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny)


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [n / size, size], filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)
