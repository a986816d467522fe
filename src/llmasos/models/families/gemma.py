"""Gemma 1, 2 and 3 (text): LLaMA's parts with scaled embeddings, norms of 1 + weight, norms around each branch (2, 3),
soft caps (2), norms on the heads of Q and K and two rotary bases (3)."""

from __future__ import annotations

from typing import Any

from llmasos.errors import UnsupportedError
from llmasos.models.config import LayerType, ModelConfig
from llmasos.models.families.llama import LLAMA_WEIGHTS, QK_NORM_WEIGHTS, read_decoder, write_decoder
from llmasos.models.families.mapping import Family, HFConfig, same
from llmasos.models.families.reading import (
    activation,
    activation_name,
    attention_windows,
    need,
    rope,
    rope_keys,
    write_layer_types,
)

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}
SANDWICH_WEIGHTS = LLAMA_WEIGHTS | {
    "layers.{i}.attn_out_norm": same("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp_norm": same("model.layers.{i}.pre_feedforward_layernorm"),
    "layers.{i}.mlp_out_norm": same("model.layers.{i}.post_feedforward_layernorm"),
}


def _read(hf: HFConfig, family: str, architecture: str, **changes: Any) -> ModelConfig:
    if hf.get("use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json asks for attention in both directions (use_bidirectional_attention), which is not supported.",
            hint="Use the causal checkpoint of this family.",
        )
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
    fields: dict[str, Any] = {
        "norm_unit_offset": True,
        "embedding_scale": float(need(hf, "hidden_size")) ** 0.5,
        "mlp_bias": False,
        # the first checkpoints say gelu and mean its tanh form
        "activation": "gelu_tanh" if name == "gelu" else activation(name),
    }
    return read_decoder(hf, family, architecture, **(fields | changes))


def _write(config: ModelConfig, **keys: Any) -> dict[str, Any]:
    name = activation_name(config.activation)
    return write_decoder(config, attention_bias=config.qkv_bias, hidden_activation=name, **keys)


def read_gemma(hf: HFConfig) -> ModelConfig:
    return _read(DEFAULTS | dict(hf), "gemma", "GemmaForCausalLM")


GEMMA = Family("gemma", ("GemmaForCausalLM",), read_gemma, _write, LLAMA_WEIGHTS, prefix="model.")


def _sandwich(hf: HFConfig, full_every: int) -> dict[str, Any]:
    """Fields of Gemma 2 and 3: `full_every`-th layers see everything, the others a window."""
    kinds: list[LayerType] = [
        "sliding" if (i + 1) % full_every else "full" for i in range(int(need(hf, "num_hidden_layers")))
    ]
    return {
        "block": "sandwich",
        "attention_scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        **attention_windows(hf, hf.get("sliding_window", 4096), kinds),
    }


def _write_sandwich(config: ModelConfig, **keys: Any) -> dict[str, Any]:
    return _write(
        config,
        # 15 digits undo the rounding of x ** -0.5
        query_pre_attn_scalar=_whole(float(f"{config.scale**-2:.14g}")),
        sliding_window=config.sliding_window or None,
        layer_types=write_layer_types(config),
        final_logit_softcapping=config.final_softcap or None,
        **keys,
    )


def _whole(x: float) -> float | int:
    """transformers declares some numbers as int."""
    return int(x) if x == int(x) else x


def read_gemma2(hf: HFConfig) -> ModelConfig:
    hf = DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | dict(hf)
    return _read(
        hf,
        "gemma2",
        "Gemma2ForCausalLM",
        **_sandwich(hf, 2),
        attention_softcap=float(hf["attn_logit_softcapping"] or 0.0),
        final_softcap=float(hf["final_logit_softcapping"] or 0.0),
    )


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    return _write_sandwich(config, attn_logit_softcapping=config.attention_softcap or None)


GEMMA2 = Family("gemma2", ("Gemma2ForCausalLM",), read_gemma2, write_gemma2, SANDWICH_WEIGHTS, prefix="model.")

GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def read_gemma3(hf: HFConfig) -> ModelConfig:
    """A text model's config, or the text part of a multimodal one; the latter is read as the former."""
    if isinstance(text := hf.get("text_config"), dict):
        outer = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in hf}
        hf = {**outer, **text, "architectures": None}
    hf = GEMMA3_DEFAULTS | dict(hf)
    theta = hf.get("rope_local_base_freq")
    if hf.get("rope_parameters"):
        local = rope_keys(hf | {"rope_scaling": None}, "sliding_attention")
        theta = local["rope_theta"]
        if local["kind"] != "default":
            raise UnsupportedError(
                f"config.json asks for the rotary scaling {local['kind']!r} in sliding-window layers.",
                hint="Only full-attention layers of a Gemma 3 are scaled.",
            )
    return _read(
        hf,
        "gemma3_text",
        "Gemma3ForCausalLM",
        **_sandwich(hf, int(hf.get("sliding_window_pattern") or 6)),
        **rope(hf, theta=1000000.0),
        rope_local_theta=float(theta or 10000.0),
        qk_norm="head",
        final_softcap=float(hf.get("final_logit_softcapping") or 0.0),
    )


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    return _write_sandwich(config, rope_local_base_freq=config.rope_local_theta)


GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_gemma3,
    write_gemma3,
    SANDWICH_WEIGHTS | QK_NORM_WEIGHTS,
    prefix="model.",
    # transformers 4 and 5 put the text model of a multimodal checkpoint in different places
    aliases=(
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    ignored=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3)
