"""Tensor parallelism (arXiv:1909.08053) of the one decoder: heads and the MLP's inner width are split over ranks.

qkv and up lose rows, out and down columns. What goes into the first is the same on all ranks, so its gradients are
added up; so is what comes out of the second. Embeddings, head and norms are whole everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.train.lora import TrainedLora
from llmasos.train.parallel.ranks import Ranks


@dataclass(frozen=True)
class Cut:
    """This rank has the slices `of[rank]` of dimension `dim`."""

    dim: int
    of: list[Tensor]


class _Same(torch.autograd.Function):
    """Ranks have the same input; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        total = outer[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum of what ranks have; its gradient goes to each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0], None


def _same(x: Tensor, group: Any) -> Tensor:
    out: Tensor = _Same.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def _sum(x: Tensor, group: Any) -> Tensor:
    out: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def check_heads(config: ModelConfig, size: int) -> None:
    """Raises InvalidInputError, UnsupportedError for a model that cannot be split so."""
    for what, number in (
        ("heads", config.num_heads),
        ("heads of keys", config.num_kv_heads),
        ("inner units of the MLP", config.intermediate_size),
    ):
        if number % size:
            raise InvalidInputError(
                f"The model has {number} {what}, which {size} processes cannot share.",
                hint=f"Choose a tensor_parallel_size that divides {number}.",
                param="tensor_parallel_size",
            )
    if config.qk_norm in ("full", "per_head") or config.position == "alibi":
        raise UnsupportedError(
            f"Heads of {config.architecture} depend on one another or on their number; tensor parallelism splits them.",
            hint='Use parallel="fsdp".',
        )


def cut_block(block: Any, config: ModelConfig, ranks: Ranks) -> None:
    """Leave this rank's part of a block. Raises UnsupportedError for layers that cannot be cut."""
    size, group = ranks.tensor, ranks.group("tensor")
    attn, mlp = block.attn, block.mlp
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    _cut_rows(attn, "qkv", [q, kv, kv], ranks, group)
    _cut_columns(attn, "out", q, ranks, group)
    _cut_rows(mlp, "up", [inner, inner] if config.gated else [inner], ranks, group)
    _cut_columns(mlp, "down", inner, ranks, group)
    attn.num_heads, attn.num_kv_heads = config.num_heads // size, config.num_kv_heads // size
    for name in ("q_norm", "k_norm"):
        for parameter in getattr(attn, name, nn.Module()).parameters():
            parameter.partial = True  # type: ignore[union-attr]  # a tensor keeps what it is told


def _cut_rows(owner: nn.Module, name: str, sections: list[int], ranks: Ranks, group: Any) -> None:
    rows = _parts(sections, ranks.tensor)
    layer = getattr(owner, name)
    base = _base(layer, name)
    for parameter in (base.weight, base.bias):
        if parameter is not None:
            _cut(parameter, Cut(0, rows), ranks)
    base.out_features //= ranks.tensor
    if isinstance(layer, TrainedLora):
        _cut(layer.b, Cut(0, rows), ranks)
        layer.a.partial = True  # type: ignore[attr-defined]
        layer.own = layer.own[rows[_own(ranks)].to(layer.own.device)]
        layer.out_features = base.out_features
    layer.register_forward_pre_hook(lambda module, args: (_same(args[0], group),))


def _cut_columns(owner: nn.Module, name: str, width: int, ranks: Ranks, group: Any) -> None:
    columns = _parts([width], ranks.tensor)
    layer = getattr(owner, name)
    base = _base(layer, name)
    _cut(base.weight, Cut(1, columns), ranks)
    base.in_features //= ranks.tensor
    if isinstance(layer, TrainedLora):
        _cut(layer.a, Cut(2, columns), ranks)
        layer.b.partial = True  # type: ignore[attr-defined]
        layer.in_features = base.in_features
        if base.bias is not None and _own(ranks):
            base.bias.data = torch.zeros_like(base.bias)  # frozen, and added once
        layer.register_forward_hook(lambda module, args, out: _sum(out, group))
    else:
        layer.forward = partial(_summed, layer, group)


def _summed(layer: nn.Linear, group: Any, x: Tensor) -> Tensor:
    out = _sum(F.linear(x, layer.weight), group)
    return out if layer.bias is None else out + layer.bias


def _base(layer: nn.Module, name: str) -> nn.Linear:
    base = layer.base if isinstance(layer, TrainedLora) else layer
    if type(base) is not nn.Linear or (isinstance(layer, TrainedLora) and layer.options.dora):
        raise UnsupportedError(
            f"{name} has weights in few bits or lengths of whole rows (DoRA), which tensor parallelism cannot split.",
            hint='Use parallel="ddp" or tuning="lora" without dora.',
        )
    return base


def _parts(sections: list[int], size: int) -> list[Tensor]:
    """Indices of each rank: its share of every section."""
    begins = [sum(sections[:i]) for i in range(len(sections))]
    return [
        torch.cat(
            [torch.arange(b + r * n // size, b + (r + 1) * n // size) for b, n in zip(begins, sections, strict=True)]
        )
        for r in range(size)
    ]


def _own(ranks: Ranks) -> int:
    return ranks.rank % ranks.tensor


def _cut(parameter: Any, cut: Cut, ranks: Ranks) -> None:
    parameter.data = cut_of(parameter.data, cut, ranks)
    parameter.cut = cut


def cut_of(tensor: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """This rank's part of the whole."""
    return tensor.index_select(cut.dim, cut.of[_own(ranks)].to(tensor.device)).contiguous()


def uncut(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """The whole of which this rank has `tensor`, cut as the parameter `like`."""
    cut: Cut | None = getattr(like, "cut", None)
    if cut is None or not tensor.dim():
        return tensor
    parts = [torch.empty_like(tensor) for _ in cut.of]
    dist.all_gather(parts, tensor.contiguous(), group=ranks.group("tensor"))
    joined = torch.cat(parts, cut.dim)
    return joined.index_select(cut.dim, torch.cat(cut.of).argsort().to(joined.device))
