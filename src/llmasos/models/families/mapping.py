"""How a family is written down: its config mapping and its weight names, both ways (Hugging Face ⇄ ours).

A `Family` is data. `weights` names, for each of our modules, the Hugging Face modules that hold the same numbers, and the
`Join` that turns theirs into ours and back. `{i}` stands for the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmasos.models.config import ModelConfig

HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Join:
    """`join`: their tensors -> ours; `split`: ours -> theirs. Each is the other's inverse, for weights and biases."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


@dataclass(frozen=True)
class Source:
    """Hugging Face modules behind one of our modules."""

    parts: tuple[str, ...]
    how: Join


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that carry arithmetic; saved over the original config's other keys."""
    weights: Mapping[str, Source]
    prefix: str = ""
    """What checkpoints of the bare model (without head) leave out of every name."""
    ignored: str = r"$^"
    """Regular expression of checkpoint tensors that hold no weights (mask buffers, rotary tables)."""


def qkv_sizes(config: ModelConfig) -> list[int]:
    """Rows of Q, K and V in our fused matrix."""
    kv = config.num_kv_heads * config.head_dim
    return [config.num_heads * config.head_dim, kv, kv]


def _halve(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    return tensor.chunk(2, 0)


SAME = Join(lambda parts, c: parts[0], lambda t, c: [t])
"""One module, same layout."""
TRANSPOSED = Join(lambda parts, c: _conv1d(parts[0]), lambda t, c: [_conv1d(t)])
"""GPT-2's Conv1D keeps [in, out]."""
QKV = Join(lambda parts, c: torch.cat(list(parts)), lambda t, c: t.split(qkv_sizes(c)))
"""Three modules, rows one after the other."""
GATE_UP = Join(lambda parts, c: torch.cat(list(parts)), _halve)
"""Two modules of equal size, rows one after the other."""


def _conv1d(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def same(name: str) -> Source:
    return Source((name,), SAME)


def transposed(name: str) -> Source:
    return Source((name,), TRANSPOSED)


def qkv(*names: str) -> Source:
    return Source(names, QKV)


def gate_up(*names: str) -> Source:
    return Source(names, GATE_UP)


_LAYER = re.compile(r"(?<=layers\.)\d+")


def source_of(family: Family, parameter: str) -> tuple[tuple[str, ...], Join]:
    """Hugging Face tensor names behind one of our parameters, e.g. `layers.3.attn.qkv.weight`, and how they join."""
    module, leaf = parameter.rsplit(".", 1)
    layer = _LAYER.search(module)
    pattern = _LAYER.sub("{i}", module)
    source = family.weights[pattern]
    number = layer.group() if layer else ""
    return tuple(f"{part.replace('{i}', number)}.{leaf}" for part in source.parts), source.how


def to_hf(family: Family, config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names."""
    for parameter, tensor in state.items():
        if parameter.startswith("head.") and config.tie_embeddings and parameter == "head.weight":
            continue
        names, how = source_of(family, parameter)
        for name, part in zip(names, how.split(tensor, config), strict=True):
            yield name, part.contiguous()
