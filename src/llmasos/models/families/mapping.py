"""How a family is written down: its config mapping and its weight names, both ways (Hugging Face ⇄ ours).

A `Family` is data. `weights` names, for each of our modules, the Hugging Face modules that hold the same numbers, and
the `Join` that turns theirs into ours and back. `{i}` stands for the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmasos.models.config import ModelConfig

if TYPE_CHECKING:  # configurations are read where no torch is needed
    from torch import Tensor

HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Join:
    """`join`: their tensors -> ours; `split`: ours -> theirs. Each is the other's inverse, for weights and biases."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    heads: Callable[[ModelConfig], int] | None = None
    """Number of modules where each head has its own (StableLM's query-key norms)."""


@dataclass(frozen=True)
class Source:
    """Hugging Face modules behind one of our modules."""

    parts: tuple[str, ...]
    """`{i}` stands for the layer; a part with `{h}` (and the only one) for as many modules as `how.heads` says."""
    how: Join


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that carry arithmetic; saved over the original config's other keys."""
    weights: Mapping[str, Source]
    variant: Callable[[ModelConfig], Mapping[str, Source]] = lambda config: {}
    """Rows over those of `weights`, for models of this family that name a module differently (Falcon-40B's norms)."""
    prefix: str = ""
    """What checkpoints of the bare model (without head) leave out of every name."""
    bare: tuple[str, ...] = ()
    """Those of the architectures that are bare models: saved without the prefix."""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """Ends of tensor names -> how older checkpoints spell them (BERT's LayerNorm.gamma)."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other beginnings of names: (ours, theirs), e.g. of a text model inside a multimodal one."""
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
QKV = Join(lambda parts, c: rows(parts), lambda t, c: t.split(qkv_sizes(c)))
"""Three modules, rows one after the other."""
GATE_UP = Join(lambda parts, c: rows(parts), _halve)
"""Two modules of equal size, rows one after the other."""
QUERY_HEADS = Join(lambda parts, c: _stacked(parts), lambda t, c: t.unbind(), lambda c: c.num_heads)
KEY_HEADS = Join(lambda parts, c: _stacked(parts), lambda t, c: t.unbind(), lambda c: c.num_kv_heads)
"""One module per head."""


def rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of one after the rows of the other."""
    import torch

    return torch.cat(list(parts))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(parts))


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


def source_of(family: Family, config: ModelConfig, parameter: str) -> tuple[tuple[str, ...], Join]:
    """Hugging Face tensor names behind one of our parameters, e.g. `layers.3.attn.qkv.weight`, and how they join."""
    module, leaf = parameter.rsplit(".", 1)
    layer = _LAYER.search(module)
    pattern = _LAYER.sub("{i}", module)
    source = family.variant(config).get(pattern) or family.weights[pattern]
    number = layer.group() if layer else ""
    parts = [part.replace("{i}", number) for part in source.parts]
    if source.how.heads is not None:
        parts = [parts[0].replace("{h}", str(head)) for head in range(source.how.heads(config))]
    return tuple(f"{part}.{leaf}" for part in parts), source.how


def spellings(family: Family, name: str) -> Iterator[str]:
    """The ways in which checkpoints write one tensor name, the usual one first."""
    starts = [name, name.removeprefix(family.prefix), family.prefix + name]
    starts += [theirs + name.removeprefix(ours) for ours, theirs in family.aliases if name.startswith(ours)]
    for spelled in starts:
        yield spelled
        for end, older in family.older_names.items():
            if spelled.endswith(end):
                yield spelled.removesuffix(end) + older


def to_hf(family: Family, config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names."""
    bare = config.architecture in family.bare
    for parameter, tensor in state.items():
        if parameter.startswith("head.") and config.tie_embeddings and parameter == "head.weight":
            continue
        names, how = source_of(family, config, parameter)
        for name, part in zip(names, how.split(tensor, config), strict=True):
            yield name.removeprefix(family.prefix) if bare else name, part.contiguous()
