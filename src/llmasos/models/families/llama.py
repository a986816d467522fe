"""Families with LLaMA's parts: RMSNorm, rotary positions, gated MLP. See `mapping` for what a row means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmasos.models.config import ModelConfig
from llmasos.models.families.mapping import Family, HFConfig, Join, Source, gate_up, qkv_sizes, same
from llmasos.models.families.reading import activation, base, rope, sizes, write_base, write_rope


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves to neighbouring pairs (GGUF's layout)."""
    width = tensor.shape[0] // heads
    return tensor.view(heads, 2, width // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    width = tensor.shape[0] // heads
    return tensor.view(heads, width // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _join_qkv(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    q, k, v = parts
    if config.rope_interleaved:
        q, k = _interleave(q, config.num_heads), _interleave(k, config.num_kv_heads)
    return torch.cat([q, k, v])


def _split_qkv(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    q, k, v = tensor.split(qkv_sizes(config))
    if config.rope_interleaved:
        q, k = _halves(q, config.num_heads), _halves(k, config.num_kv_heads)
    return q, k, v


HALVES_QKV = Join(_join_qkv, _split_qkv)
"""Hugging Face keeps rotary halves; a config born from GGUF keeps neighbouring pairs."""

LLAMA_WEIGHTS = {
    "embed": same("model.embed_tokens"),
    "final_norm": same("model.norm"),
    "head": same("lm_head"),
    "layers.{i}.attn_norm": same("model.layers.{i}.input_layernorm"),
    "layers.{i}.attn.qkv": Source(tuple(f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"), HALVES_QKV),
    "layers.{i}.attn.out": same("model.layers.{i}.self_attn.o_proj"),
    "layers.{i}.mlp_norm": same("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp.up": gate_up("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": same("model.layers.{i}.mlp.down_proj"),
}


def read_llama(hf: HFConfig, **changes: Any) -> ModelConfig:
    """LLaMA 1-3.3 and the many checkpoints that use its class."""
    fields: dict[str, Any] = dict(
        **base(hf, "llama", "LlamaForCausalLM"),
        **sizes(hf),
        **rope(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        activation=activation(hf.get("hidden_act", "silu")),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )
    return ModelConfig(**(fields | changes))


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_base(config),
        **write_rope(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    read_llama,
    write_llama,
    LLAMA_WEIGHTS,
    prefix="model.",
    ignored=r".*rotary_emb\.inv_freq",
)

FAMILIES = (LLAMA,)
