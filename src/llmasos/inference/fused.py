"""The same decoder in few kernels: what stands between and around its matrix products is fused, on GPUs.

T = packed tokens, D = model width, R = rows whose logits are wanted, V = vocabulary. `FusedDecoder` computes with the
parameters of a `Decoder` as they lie and rounds where it rounds. With few tokens a step is as long as reading the
weights, and everything else happens inside the matrix products; with many, cuBLAS multiplies and single passes do the
rest. Modules that are no plain linear layer (low-bit, adapters, the sums of tensor parallelism) are called as they are.
Nothing waits for the device: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.inference.batch import Batch
from llmasos.inference.kernels.exchange import gather_columns, sum_add_rms_norm
from llmasos.inference.kernels.fused import KVTarget, add_rms_norm, gated_activation, rope_write
from llmasos.inference.kernels.linear import invariant_linear, is_skinny, skinny_linear
from llmasos.models.layers import LENGTH_DEPENDENT, Norm
from llmasos.models.lora import LoraLinear
from llmasos.models.parallel import GATHER_ROWS, SUM_ROWS, Mailbox, RowParallel, VocabParallelHead, words_per_row

if TYPE_CHECKING:
    from llmasos.models.config import Activation, ModelConfig
    from llmasos.models.decoder import Attention, Block, Decoder


class PagesOfLayers(Protocol):
    """What `inference.pages.Pages` is to this module."""

    @property
    def keys(self) -> Sequence[Tensor]:
        """One [num_slots, K, W] per layer."""

    @property
    def values(self) -> Sequence[Tensor]: ...
    @property
    def key_scales(self) -> Sequence[Tensor | None]: ...
    @property
    def value_scales(self) -> Sequence[Tensor | None]: ...
    @property
    def layer_group(self) -> Sequence[int]: ...
    def read(self, layer: int, q: Tensor) -> Tensor: ...


@dataclass
class _Stream:
    """The residual stream, [T, D], and what is still to be added to it (normalised by `post` first, where given), or,
    where `is_part`, this process's part of it."""

    residual: Tensor
    pending: Tensor | None = None
    post: Norm | None = None
    is_part: bool = False
    num_sums: int = 0
    """Sums through mailboxes so far; the two take turns."""


class FusedDecoder:
    """`Decoder.forward` with pages for attention, and `Decoder.logits`, for the configs that `supports` names. Rotary
    tables have been prepared for all positions that will come (`Rope.prepare`).

    pdl: launch kernels while the ones before them still run (None: where the GPU can). invariant: a token's result
    depends on its own sequence only, bit for bit, whatever else is in the pass."""

    def __init__(
        self, decoder: Decoder, pages: PagesOfLayers, *, pdl: bool | None = None, invariant: bool = False
    ) -> None:
        config, device = decoder.config, decoder.device
        self.decoder, self.pages, self.invariant = decoder, pages, invariant
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) if pdl is None else pdl
        dtype = torch.float32 if config.rope_float32 else decoder.dtype
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=decoder.dtype))
        ropes = (decoder.ropes[config.is_sliding(layer)] for layer in range(config.num_layers))
        self._tables = [rope.whole(device, dtype) for rope in ropes]
        self._mail = _Mail.of(decoder) if device.type == "cuda" and not invariant else None

    @staticmethod
    def supports(config: ModelConfig) -> bool:
        """Whether a config's decoder can run fused."""
        scaling = config.rope_scaling
        return (
            config.block in ("pre", "sandwich")
            and config.norm == "rmsnorm"
            and config.qk_norm in ("none", "head")
            and config.position == "rope"
            and (scaling is None or scaling.kind not in LENGTH_DEPENDENT)
            and config.gated
            and config.causal
            and config.final_norm
            and not config.clip_qkv
            and not config.embedding_norm
            and config.embedding_size in (0, config.hidden_size)
        )

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, D]. `pages.plan(batch)` has been called."""
        residual = self.decoder.embed(batch.tokens)
        if self._embedding_scale != 1.0:
            residual = residual * self._embedding_scale
        stream = _Stream(residual)
        sandwich = self.decoder.config.block == "sandwich"
        for block in cast("list[Block]", self.decoder.layers):
            qkv = self._project(stream, block.attn_norm, block.attn.qkv)
            seen = self._attend(block.attn, qkv, batch)
            self._add(stream, block.attn.out, seen, block.attn_out_norm if sandwich else None)
            wide = self._project(stream, block.mlp_norm, block.mlp.up, block.mlp.activation)
            self._add(stream, block.mlp.down, wide, block.mlp_out_norm if sandwich else None)
        return self._normed(stream, self.decoder.final_norm)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [R, V]: in the model's dtype, or float32 where the config scales them."""
        config = self.decoder.config
        if config.logit_scale != 1.0 or config.final_softcap:
            return self.decoder.logits(hidden)
        return self._linear(self.decoder.head, hidden)

    def _project(self, stream: _Stream, norm: Norm, module: nn.Linear, activation: Activation | None = None) -> Tensor:
        """module(norm(stream)), and the gated activation of it."""
        module = _bare(module)
        if not self._skinny(module, stream.residual.shape[0]):
            wide = self._linear(module, self._normed(stream, norm))
            return wide if activation is None else gated_activation(wide, activation, pdl=self.pdl)
        inside = stream.pending is None
        x = stream.residual if inside else self._normed(stream, norm)
        return skinny_linear(
            x, module.weight, module.bias, norm=norm if inside else None, activation=activation, pdl=self.pdl
        )

    def _add(self, stream: _Stream, module: nn.Linear, x: Tensor, post: Norm | None) -> None:
        """Add module(x) to the stream: at once, or where the next norm reads it."""
        module = _bare(module)
        scale = self.decoder.config.residual_scale
        if post is None and self._skinny(module, x.shape[0]):
            skinny_linear(x, module.weight, module.bias, residual=stream.residual, scale=scale, pdl=self.pdl)
        elif isinstance(module, RowParallel) and self._mail is not None and post is None and len(x) <= SUM_ROWS:
            stream.pending, stream.is_part = self._product(cast(nn.Linear, module.base), x), True
        else:
            stream.pending, stream.post = self._linear(module, x), post

    def _normed(self, stream: _Stream, norm: Norm) -> Tensor:
        scale = self.decoder.config.residual_scale
        if stream.is_part:
            assert self._mail is not None and stream.pending is not None
            box = self._mail.sums[stream.num_sums % 2]
            part, stream.pending, stream.is_part = stream.pending, None, False
            stream.num_sums += 1
            return sum_add_rms_norm(box, part, stream.residual, norm, scale=scale, pdl=self.pdl)
        out = add_rms_norm(stream.pending, stream.residual, norm, post=stream.post, scale=scale, pdl=self.pdl)
        stream.pending = stream.post = None
        return out

    def _attend(self, attn: Attention, qkv: Tensor, batch: Batch) -> Tensor:
        layer, pages = attn.layer, self.pages
        target = KVTarget(
            pages.keys[layer],
            pages.values[layer],
            pages.key_scales[layer],
            pages.value_scales[layer],
            batch.tables[pages.layer_group[layer]],
            batch.page_size,
        )
        q = rope_write(
            qkv,
            target,
            self._tables[layer] if attn.rotary else None,
            batch.positions,
            batch.sequences,
            batch.seq_lens,
            num_heads=attn.num_heads,
            norms=(attn.q_norm, attn.k_norm) if attn.qk_norm == "head" else None,
            interleaved=self.decoder.config.rope_interleaved,
            pdl=self.pdl,
        )
        return pages.read(layer, q).reshape(qkv.shape[0], -1)

    def _skinny(self, module: nn.Linear, num_tokens: int) -> bool:
        plain = type(module) is nn.Linear and not self.invariant
        return plain and is_skinny(num_tokens, *module.weight.shape)

    def _linear(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, RowParallel):
            return module.group.all_reduce(self._linear(module.base, x))
        if isinstance(module, VocabParallelHead):
            own = self._linear(module.base, x)
            if self._mail is None or len(own) > GATHER_ROWS:
                return module.join(own)
            return self._mail.gather(own, pdl=self.pdl)
        if type(module) is not nn.Linear:
            return module(x)
        if self.invariant:
            return invariant_linear(x, module.weight, module.bias)
        return self._product(module, x)

    def _product(self, module: nn.Linear, x: Tensor) -> Tensor:
        if self._skinny(module, x.shape[0]):
            return skinny_linear(x, module.weight, module.bias, pdl=self.pdl)
        return F.linear(x, module.weight, module.bias)


@dataclass(frozen=True)
class _Mail:
    """Where the processes of a tensor-parallel decoder exchange sums of few tokens, and logits of few rows."""

    sums: list[Mailbox]
    logits: Mailbox
    starts: Tensor
    """[W] int32: the first column of each process's share of the vocabulary."""
    skips: Tensor
    """[W] int32: columns of it that another one's share ends with."""
    vocab_size: int

    @classmethod
    def of(cls, decoder: Decoder) -> _Mail | None:
        head = decoder.head
        if not isinstance(head, VocabParallelHead):
            return None
        width, dtype = decoder.config.hidden_size, decoder.dtype
        share = head.shares[0]
        if any(n * dtype.itemsize % 4 for n in (width, len(share))):
            return None  # a row is no whole number of words
        each = (SUM_ROWS, words_per_row(width, dtype))
        boxes = head.group.mailboxes(each, each, (GATHER_ROWS, words_per_row(len(share), dtype)))
        if boxes is None:
            return None
        starts = torch.tensor([rows.start for rows in head.shares], dtype=torch.int32, device=decoder.device)
        skips = torch.tensor(head.overlaps, dtype=torch.int32, device=decoder.device)
        return cls(boxes[:2], boxes[2], starts, skips, head.vocab_size)

    def gather(self, own: Tensor, *, pdl: bool) -> Tensor:
        """This process's scores [R, V / W], and those of the others -> [R, V]."""
        return gather_columns(self.logits, own.contiguous(), self.starts, self.skips, self.vocab_size, pdl=pdl)


def _bare(module: nn.Linear) -> nn.Linear:
    """A layer with adapters that no token of the pass has is its base."""
    return module.base if isinstance(module, LoraLinear) and not module.state.active else module
