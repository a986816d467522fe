"""The one decoder: every dense decoder-only family is a ModelConfig of it.

T = packed tokens of any number of sequences, D = model width, V = vocabulary.
`forward(tokens [T], positions [T], attend) -> hidden [T, D]`; `logits(hidden [.., D]) -> [.., V]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from llmasos.models.attention import Attend
from llmasos.models.config import ModelConfig
from llmasos.models.layers import MLP, Norm, Rope, embedding

RopeTables = dict[bool, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Projections, query-key norms and rotary positions around `attend`. Q, K and V are stored as one matrix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.rotary = config.position == "rope" and layer not in config.nope_layers
        self.clip, self.qk_norm = config.clip_qkv, config.qk_norm
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, q_width + 2 * kv_width, bias=config.qkv_bias)
        self.out = nn.Linear(q_width, config.hidden_size, bias=config.out_bias)
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = Norm(config, self.head_dim), Norm(config, self.head_dim)
        elif config.qk_norm == "full":
            self.q_norm, self.k_norm = Norm(config, q_width), Norm(config, kv_width)
        elif config.qk_norm == "per_head":
            self.q_norm = Norm(config, self.head_dim, heads=self.num_heads)
            self.k_norm = Norm(config, self.head_dim, heads=self.num_kv_heads)

    def forward(self, x: Tensor, rope: Rope, tables: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        num_tokens = x.shape[0]
        qkv: Tensor = self.qkv(x)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        num_rotated = self.num_heads + self.num_kv_heads
        if self.qk_norm == "none":
            heads = qkv.view(num_tokens, -1, self.head_dim)
            qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        else:
            q, k, v = self._normed(qkv)
            qk = torch.cat([q, k], 1)
        if self.rotary and tables is not None:
            qk = rope.rotate(qk, tables)
        out = attend(self.layer, qk[:, : self.num_heads], qk[:, self.num_heads :], v)
        projected: Tensor = self.out(out.reshape(num_tokens, -1))
        return projected

    def _normed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (qkv.shape[0], -1, self.head_dim)
        kv_width = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([self.num_heads * self.head_dim, kv_width, kv_width], -1)
        if self.qk_norm == "full":
            return self.q_norm(q).view(shape), self.k_norm(k).view(shape), v.view(shape)
        return self.q_norm(q.view(shape)), self.k_norm(k.view(shape)), v.view(shape)


class Block(nn.Module):
    """Attention and MLP around the residual stream; the wiring is `config.block`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.wiring, self.residual_scale = config.block, config.residual_scale
        self.shared_norm = config.shared_norm
        width = config.hidden_size
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        if self.wiring != "post_branch":
            self.attn_norm = Norm(config, width)
            if not (self.wiring == "parallel" and config.shared_norm):
                self.mlp_norm = Norm(config, width)
        if self.wiring in ("post_branch", "sandwich"):
            self.attn_out_norm, self.mlp_out_norm = Norm(config, width), Norm(config, width)

    def forward(self, x: Tensor, rope: Rope, tables: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        match self.wiring:
            case "pre":
                if self.residual_scale != 1.0:
                    x = x + self.attn(self.attn_norm(x), rope, tables, attend) * self.residual_scale
                    return x + self.mlp(self.mlp_norm(x)) * self.residual_scale
                x = x + self.attn(self.attn_norm(x), rope, tables, attend)
                return x + self.mlp(self.mlp_norm(x))
            case "parallel":
                normed = self.attn_norm(x)
                attn = self.attn(normed, rope, tables, attend)
                return x + attn + self.mlp(normed if self.shared_norm else self.mlp_norm(x))
            case "sandwich":
                x = x + self.attn_out_norm(self.attn(self.attn_norm(x), rope, tables, attend))
                return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
            case "post_branch":
                x = x + self.attn_out_norm(self.attn(x, rope, tables, attend))
                return x + self.mlp_out_norm(self.mlp(x))
            case "post_residual":
                x = self.attn_norm(x + self.attn(x, rope, tables, attend))
                out: Tensor = self.mlp_norm(x + self.mlp(x))
                return out


def make_ropes(config: ModelConfig) -> dict[bool, Rope]:
    """Rotary tables by "is this a sliding layer": one for both, unless the family gives sliding layers their own."""
    shape = (config.rope_dim, config.rope_theta, config.rope_interleaved)
    main = Rope(*shape, config.rope_scaling, config.context_length)
    if not config.rope_local_theta:
        return {False: main, True: main}
    local = Rope(config.rope_dim, config.rope_local_theta, config.rope_interleaved, None, config.context_length)
    return {False: main, True: local}


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embedding_size = config.embedding_size or config.hidden_size
        self.embed = embedding(config.vocab_size, embedding_size)
        if config.position == "learned":
            self.position = embedding(config.context_length + config.position_offset, config.hidden_size)
        if embedding_size != config.hidden_size:
            self.project_in = nn.Linear(embedding_size, config.hidden_size, bias=False)
            self.project_out = nn.Linear(config.hidden_size, embedding_size, bias=False)
        if config.embedding_norm:
            self.embed_norm = Norm(config, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        if config.final_norm:
            self.final_norm = Norm(config, config.hidden_size)
        self.head = nn.Linear(embedding_size, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.ropes = make_ropes(config)
        self._sliding = [config.is_sliding(i) for i in range(config.num_layers)]

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before the first block, [T, D]."""
        config = self.config
        x: Tensor = self.embed(tokens)
        if config.embedding_scale != 1.0:
            # rounded to the stream's dtype first, as the models were trained
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype, device=x.device)
        if config.embedding_size not in (0, config.hidden_size):
            x = self.project_in(x)
        if config.position == "learned":
            x = x + self.position(positions + config.position_offset)
        if config.embedding_norm:
            x = self.embed_norm(x)
        return x

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, lengths: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [T, D], for tokens [T] at positions [T] of their own sequences.

        `lengths` [T] are the tokens that each token's sequence has (a prompt in pieces: the whole prompt's), for rotary
        frequencies that depend on it."""
        x = self.embed_tokens(tokens, positions)
        tables: RopeTables = {}
        if self.config.position == "rope":
            dtype = torch.float32 if self.config.rope_float32 else x.dtype
            for sliding in set(self._sliding):
                tables[sliding] = self.ropes[sliding].tables(positions, dtype, lengths)
        for layer, sliding in zip(self.layers, self._sliding, strict=True):
            x = layer(x, self.ropes[sliding], tables.get(sliding), attend)
        return self.final_norm(x) if self.config.final_norm else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token in float32, [.., V]."""
        config = self.config
        if config.embedding_size not in (0, config.hidden_size):
            hidden = self.project_out(hidden)
        scores = self.head(hidden).float()
        if config.logit_scale != 1.0:
            scores = scores * config.logit_scale
        if config.final_softcap:
            scores = torch.tanh(scores / config.final_softcap) * config.final_softcap
        return scores

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream (low-bit weights compute in it)."""
        return next(tensor.dtype for tensor in self._tensors() if tensor.is_floating_point())

    def _tensors(self) -> Iterator[Tensor]:
        # a low-bit OLMo has no parameters: its norms have no weights
        return chain(self.parameters(), self.buffers())
