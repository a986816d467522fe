"""The one model definition, in training: packed tokens in, the summed loss out.

T = packed tokens, D = model width, V = vocabulary. Weights that are trained are kept in float32 and computed with in
`dtype`: for each pass the decoder sees casts of them, so what is trained is the module that is served, and gradients
arrive in float32. Weights that are frozen stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from llmasos.data import IGNORED
from llmasos.models.attention import Attend, layer_specs
from llmasos.models.decoder import Decoder
from llmasos.train.attention import packed_attention
from llmasos.train.losses import linear_cross_entropy, missing_rows


class Packed(Protocol):
    """What training needs of `data.Batch`, on the CPU."""

    @property
    def tokens(self) -> Tensor:
        """[T] int64."""

    @property
    def labels(self) -> Tensor:
        """[T] int64: the token that follows, IGNORED where it is not trained."""

    @property
    def positions(self) -> Tensor:
        """[T] int64, from 0 in every sequence."""

    @property
    def lengths(self) -> list[int]: ...


@dataclass(frozen=True)
class Placed:
    """A batch on the device that trains. Which rows are trained was found on the CPU, so that nothing waits for the
    device."""

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    """[N] int64: where a label is trained."""
    labels: Tensor
    """[N] int64: of those rows."""
    lengths: list[int]

    @classmethod
    def of(cls, batch: Packed, device: torch.device) -> Placed:
        rows = (batch.labels != IGNORED).nonzero()[:, 0]

        def put(part: Tensor) -> Tensor:
            return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)

        return cls(put(batch.tokens), put(batch.positions), put(rows), put(batch.labels[rows]), batch.lengths)

    def __len__(self) -> int:
        """Trained tokens."""
        return len(self.labels)


class Trainee:
    """A decoder under training. dtype: of the computation. recompute: blocks keep their input only and are computed
    again for the backward pass. compiled: each block is compiled (GPUs)."""

    def __init__(
        self, decoder: Decoder, *, dtype: torch.dtype, recompute: bool = False, compiled: bool = False
    ) -> None:
        self.decoder, self.dtype = decoder, dtype
        self.casts_itself = True
        """False: FSDP casts what it gathers."""
        self.specs = layer_specs(decoder.config)
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._names = {id(parameter): name for name, parameter in decoder.named_parameters()}
        self._prepare_rope()
        if compiled:
            # blocks share their code: where attention differs between them, each is a case of its own
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(decoder.layers))
        for block in decoder.layers:
            if recompute:
                # what is compiled is a block's own pass: compiled with the checkpoint around it, each block would be
                # another function, and compilers give up after a few
                forward = torch.compile(block.forward) if compiled else block.forward
                block.forward = partial(_again, block, forward)
            elif compiled:
                block.compile()

    def _prepare_rope(self) -> None:
        config = self.decoder.config
        if config.position == "rope":
            dtype = torch.float32 if config.rope_float32 else self.dtype
            for rope in self.decoder.ropes.values():
                rope.prepare(config.context_length, self.decoder.device, dtype)

    def casts(self, within: str = "") -> dict[str, Tensor]:
        """What stands in for the weights during a pass; for those alone whose names begin with `within`."""
        if not self.casts_itself:
            return {}
        rooms: dict[str, list[str]] = {}
        weights = {
            name: parameter
            for name, parameter in self.decoder.named_parameters()
            if parameter.dtype != self.dtype and not name.endswith((".a", ".b", ".length")) and name.startswith(within)
        }
        for name, parameter in weights.items():
            if parameter.requires_grad:
                rooms.setdefault(_room(name), []).append(name)
        found = {name: weight.to(self.dtype) for name, weight in weights.items() if not weight.requires_grad}
        for names in rooms.values():
            casts = _Cast.apply(self.dtype, *(weights[name] for name in names))  # type: ignore[no-untyped-call]
            found.update(zip(names, casts, strict=True))
        return found

    def hidden(self, batch: Placed, casts: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm, [T, D]."""
        tokens, positions, lengths, num = batch.tokens, batch.positions, batch.lengths, len(batch.tokens)
        if missing := missing_rows(num, tokens.device, self.dtype):  # behind all others, and looked at by nobody
            tokens, positions = F.pad(tokens, (0, missing)), F.pad(positions, (0, missing))
            lengths = [*lengths, missing]
        attend = packed_attention(self.specs, lengths, tokens.device, self.dtype)
        return self.forward(tokens, positions, attend, self.casts() if casts is None else casts)[:num]

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, casts: Mapping[str, Tensor]) -> Tensor:
        """The same with any attention, e.g. one that keeps keys and values."""
        out: Tensor = functional_call(self.decoder, dict(casts), (tokens, positions, attend))
        return out

    def loss(self, batch: Placed) -> Tensor:
        """The sum of -log p(label) over the trained tokens, a float32 scalar."""
        casts = self.casts()
        return linear_cross_entropy(
            *self.scored(self.hidden(batch, casts)[batch.rows], casts), labels=batch.labels, **self.head(casts)
        )

    def scored(self, hidden: Tensor, casts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is multiplied to logits: rows [N, E] and the head's weight [V, E]."""
        config, decoder = self.decoder.config, self.decoder
        if config.embedding_size not in (0, config.hidden_size):
            hidden = F.linear(hidden, self._cast(decoder.project_out.weight, casts))
        return hidden, self._cast(decoder.head.weight, casts)

    def head(self, casts: Mapping[str, Tensor]) -> dict[str, Any]:
        """What else makes the model's logits of that product: the options of losses over the vocabulary."""
        config, bias = self.decoder.config, self.decoder.head.bias
        cast = None if bias is None else self._cast(bias, casts)
        return {"bias": cast, "scale": config.logit_scale, "softcap": config.final_softcap}

    def _cast(self, parameter: Tensor, casts: Mapping[str, Tensor]) -> Tensor:
        return casts[self._names[id(parameter)]] if casts and self._names[id(parameter)] in casts else parameter


def _room(name: str) -> str:
    """A block, whose gradients are there at the same time, or what is outside of blocks."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""


class _Cast(torch.autograd.Function):
    """Weights in another dtype, by one kernel for all of them: GPT-2's 148, one by one, are 300 launches a step."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _copies(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [g for g in gradients if g is not None]
        found = iter(_copies(there, torch.float32))
        return None, *(None if g is None else next(found) for g in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def _again(block: nn.Module, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """A block's pass that keeps its inputs only, and is made again with the weights that stand in now: on the way back
    the module has its own again."""
    own = {
        (f"{prefix}." if prefix else "") + name: weight
        for prefix, module in block.named_modules()
        for name, weight in module._parameters.items()
        if weight is not None
    }

    def run(*given: Any) -> Tensor:
        with _reparametrize_module(block, own):
            return forward(*given)

    out: Tensor = checkpoint(run, *inputs, use_reentrant=False)
    return out
