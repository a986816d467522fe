"""BLOOM and Falcon, which took over BLOOM's names: one fused query-key-value module, ALiBi or rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmasos.errors import UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.families.gpt import MASKS, first, grouped_qkv, head_sizes, identity
from llmasos.models.families.mapping import Family, HFConfig, Source, same
from llmasos.models.families.reading import activation, activation_name, need, rope, write_rope


def read_bloom(hf: HFConfig) -> ModelConfig:
    if hf.get("apply_residual_connection_post_layernorm"):
        raise UnsupportedError(
            "config.json asks for apply_residual_connection_post_layernorm, which this build can't compute.",
            hint="Released BLOOM models don't use it; use one of them.",
        )
    hidden = int(first(hf, "hidden_size", "n_embed"))
    return ModelConfig(
        **identity(hf, "bloom", "BloomForCausalLM"),
        **head_sizes(hidden, int(first(hf, "n_head", "num_attention_heads"))),
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=4 * hidden,
        num_layers=int(first(hf, "n_layer", "num_hidden_layers")),
        # nothing in the model ends at this length: it is what BLOOM was trained with
        context_length=int(hf.get("seq_length") or 2048),
        position="alibi",
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        embedding_norm=True,
        qkv_bias=True,
        out_bias=True,
        gated=False,
        mlp_bias=True,
        activation="gelu_tanh",
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_bloom(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


_BLOCK_H = {
    "embed": same("transformer.word_embeddings"),
    "final_norm": same("transformer.ln_f"),
    "head": same("lm_head"),
    "layers.{i}.attn_norm": same("transformer.h.{i}.input_layernorm"),
    "layers.{i}.attn.qkv": grouped_qkv("transformer.h.{i}.self_attention.query_key_value"),
    "layers.{i}.attn.out": same("transformer.h.{i}.self_attention.dense"),
    "layers.{i}.mlp_norm": same("transformer.h.{i}.post_attention_layernorm"),
    "layers.{i}.mlp.up": same("transformer.h.{i}.mlp.dense_h_to_4h"),
    "layers.{i}.mlp.down": same("transformer.h.{i}.mlp.dense_4h_to_h"),
}
"""Names that BLOOM gave and Falcon took over."""

BLOOM = Family(
    "bloom",
    ("BloomForCausalLM", "BloomModel"),
    read_bloom,
    write_bloom,
    {**_BLOCK_H, "embed_norm": same("transformer.word_embeddings_layernorm")},
    prefix="transformer.",
)

# Falcon: 7B (one key head, parallel, one norm), RW (ALiBi, sequential), 40B and 11B (groups, parallel, 1 or 2 norms)


def _falcon_kv_heads(hf: HFConfig, heads: int) -> int:
    if hf.get("new_decoder_architecture", False):
        return int(hf.get("num_kv_heads") or heads)
    return 1 if hf.get("multi_query", True) else heads


def read_falcon(hf: HFConfig) -> ModelConfig:
    sizes = head_sizes(int(first(hf, "hidden_size", "n_embed")), int(need(hf, "num_attention_heads")))
    grouped, alibi, bias = (bool(hf.get(k, False)) for k in ("new_decoder_architecture", "alibi", "bias"))
    parallel = grouped or bool(hf.get("parallel_attn", True))
    num_norms = hf.get("num_ln_in_parallel_attn") or 2
    fields: dict[str, Any] = {"position": "alibi", "alibi_scale": sizes["head_dim"] ** -0.5, "alibi_bf16": True}
    return ModelConfig(
        **identity(hf, "falcon", "FalconForCausalLM"),
        **(sizes | {"num_kv_heads": _falcon_kv_heads(hf, sizes["num_heads"])}),
        **(fields if alibi else rope({**hf, "head_dim": sizes["head_dim"], "partial_rotary_factor": 1.0})),
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=int(hf.get("ffn_hidden_size") or 4 * sizes["hidden_size"]),
        num_layers=int(need(hf, "num_hidden_layers")),
        context_length=int(hf.get("max_position_embeddings") or 2048),
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        block="parallel" if parallel else "pre",
        shared_norm=parallel and not (grouped and num_norms == 2),
        qkv_bias=bias,
        out_bias=bias,
        gated=False,
        mlp_bias=bias,
        activation=activation(hf.get("activation") or "gelu"),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_falcon(config: ModelConfig) -> dict[str, Any]:
    parallel = config.block == "parallel"
    two_norms = parallel and not config.shared_norm
    # one key head or as many as heads also exist in the new architecture, whose blocks are always parallel
    grouped = two_norms or config.num_kv_heads not in (1, config.num_heads)
    keys = {} if config.position == "alibi" else write_rope(config)
    return keys | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "max_position_embeddings": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation": activation_name(config.activation, config.extra.get("activation")),
        "alibi": config.position == "alibi",
        "bias": config.mlp_bias,
        "new_decoder_architecture": grouped,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _falcon_norms(config: ModelConfig) -> Mapping[str, Source]:
    if config.block != "parallel" or config.shared_norm:
        return {}
    return {
        "layers.{i}.attn_norm": same("transformer.h.{i}.ln_attn"),
        "layers.{i}.mlp_norm": same("transformer.h.{i}.ln_mlp"),
    }


FALCON = Family(
    "falcon",
    ("FalconForCausalLM", "FalconModel"),
    read_falcon,
    write_falcon,
    _BLOCK_H,
    variant=_falcon_norms,
    prefix="transformer.",
    ignored=MASKS,
)

FAMILIES = (BLOOM, FALCON)
