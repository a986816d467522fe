"""Batch invariance on a CPU: no bit of a token's result depends on what else is in its pass.

A kernel's result may depend on the number of rows it is given: matrix products choose another algorithm for few rows,
and vectorised functions (silu, tanh, cos) compute the last elements of what a thread gets by other means. So rows are
computed in calls whose shape never changes. PyTorch's low-bit kernels treat every row alike, and so do packed heads,
which are narrow; only the switch to another path for many tokens is taken away. Attention is
`Pages(batch_invariant=True)`. Equality holds for one number of threads on one machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmasos.models.decoder import Decoder
from llmasos.models.layers import LENGTH_DEPENDENT, MLP, Norm, Rope
from llmasos.models.lowbit import Int4Linear, Int8Linear

TILE = 16
"""Rows of a product: few, since one token costs as much as TILE, but enough for the matrix kernels."""


def make_invariant(decoder: Decoder) -> None:
    """Change a decoder's modules in place so that each row of their results depends on that row alone."""
    for module in decoder.modules():
        if isinstance(module, Int4Linear | Int8Linear):
            module.many_tokens = 1 << 62
        elif isinstance(module, Norm):
            module.few_tokens = 0
            vars(module)["forward"] = in_tiles(module.forward, TILE)
        elif isinstance(module, nn.Linear):
            vars(module)["forward"] = in_tiles(module.forward, TILE)
        elif isinstance(module, MLP):
            vars(module)["activated"] = in_tiles(module.activated, 1)
    if decoder.config.final_softcap:
        vars(decoder)["logits"] = in_tiles(decoder.logits, 1)
    for rope in {id(rope): rope for rope in decoder.ropes.values()}.values():
        if rope.scaling is not None and rope.scaling.kind in LENGTH_DEPENDENT:
            vars(rope)["tables"] = _each_alone(rope)


def in_tiles(function: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """`function` of x [T, ...] by calls on exactly `size` rows, the last ones padded with zeros."""

    def tiled(x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if missing := -num_rows % size:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        # a copy, so that all tiles are aligned alike
        return torch.cat([function(tile.clone()) for tile in x.split(size)])[:num_rows]

    return tiled


def _each_alone(rope: Rope) -> Callable[..., tuple[Tensor, Tensor]]:
    tables = rope.tables

    def alone(positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert lengths is not None, "positions alone do not tell sequences apart"
        parts = [tables(p, dtype, n) for p, n in zip(positions.split(1), lengths.split(1), strict=True)]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    return alone
