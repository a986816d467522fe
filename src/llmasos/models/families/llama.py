"""LLaMA and its relatives: rotary positions, weights named as LLaMA's are. See `mapping` for what a row means. Every
reader merges the defaults of its family first: config.json may leave out what its class assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmasos.errors import FormatError
from llmasos.models.config import LayerType, ModelConfig
from llmasos.models.families.mapping import (
    KEY_HEADS,
    QUERY_HEADS,
    Family,
    HFConfig,
    Join,
    Source,
    gate_up,
    qkv_sizes,
    rows,
    same,
)
from llmasos.models.families.reading import (
    activation,
    attention_windows,
    base,
    need,
    rope,
    rotary_fraction,
    sizes,
    write_base,
    write_layer_types,
    write_rope,
)

if TYPE_CHECKING:
    from torch import Tensor


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
    return rows([q, k, v])


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
QK_NORM_WEIGHTS = {
    "layers.{i}.attn.q_norm": same("model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.attn.k_norm": same("model.layers.{i}.self_attn.k_norm"),
}
IGNORED = r".*rotary_emb\.inv_freq"


def read_decoder(hf: HFConfig, family: str, architecture: str, **changes: Any) -> ModelConfig:
    """What all families of this file share; `changes` are the fields in which one differs."""
    bias = hf.get("attention_bias", False)
    fields: dict[str, Any] = dict(
        **base(hf, family, architecture),
        **sizes(hf),
        **rope(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        activation=activation(hf.get("hidden_act", "silu")),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )
    return ModelConfig(**(fields | changes))


def write_decoder(config: ModelConfig, **keys: Any) -> dict[str, Any]:
    return {**write_base(config), **write_rope(config), "rms_norm_eps": config.norm_eps, **keys}


# LLaMA 1-3.3, SmolLM 1 and 2, and the many checkpoints that use LLaMA's class


def read_llama(hf: HFConfig) -> ModelConfig:
    return read_decoder(hf, "llama", "LlamaForCausalLM")


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


LLAMA = Family("llama", ("LlamaForCausalLM",), read_llama, write_llama, LLAMA_WEIGHTS, prefix="model.", ignored=IGNORED)


# Mistral: every layer slides, or none


def read_mistral(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8} | dict(hf)
    window = attention_windows(hf | {"layer_types": None}, hf["sliding_window"])
    return read_decoder(hf, "mistral", "MistralForCausalLM", qkv_bias=False, out_bias=False, mlp_bias=False, **window)


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config, sliding_window=config.sliding_window or None)


MISTRAL = Family(
    "mistral", ("MistralForCausalLM",), read_mistral, write_mistral, LLAMA_WEIGHTS, prefix="model.", ignored=IGNORED
)


# Qwen 2 and 2.5: biases on Q, K and V; upper layers may slide. Qwen 3: a norm on every head of Q and K instead


def _qwen_window(hf: HFConfig) -> dict[str, Any]:
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    kinds: list[LayerType] = ["sliding" if i >= first else "full" for i in range(int(need(hf, "num_hidden_layers")))]
    return attention_windows(hf, window, kinds)


def _write_qwen_window(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"use_sliding_window": config.sliding_window > 0, "layer_types": write_layer_types(config)}
    return keys | ({"sliding_window": config.sliding_window} if config.sliding_window else {})


def read_qwen2(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 32768} | dict(hf)
    bias = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return read_decoder(hf, "qwen2", "Qwen2ForCausalLM", **bias, **_qwen_window(hf))


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config, **_write_qwen_window(config))


def read_qwen3(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 32768, "head_dim": 128} | dict(hf)
    return read_decoder(hf, "qwen3", "Qwen3ForCausalLM", mlp_bias=False, qk_norm="head", **_qwen_window(hf))


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config, attention_bias=config.qkv_bias, **_write_qwen_window(config))


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), read_qwen2, write_qwen2, LLAMA_WEIGHTS, prefix="model.", ignored=IGNORED)
QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    read_qwen3,
    write_qwen3,
    LLAMA_WEIGHTS | QK_NORM_WEIGHTS,
    prefix="model.",
    ignored=IGNORED,
)


# SmolLM 3: some layers without rotary positions


def read_smollm3(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True} | dict(hf)
    num_layers = int(need(hf, "num_hidden_layers"))
    interval = int(hf.get("no_rope_layer_interval") or 4)
    # 1 at a layer's index: it does rotate
    rotates = hf.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(rotates) < num_layers:
        raise FormatError(
            f"config.json names {len(rotates)} no_rope_layers for {num_layers} layers.",
            hint="The file is damaged; fetch it again.",
        )
    rotates = rotates[:num_layers]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return read_decoder(
        hf,
        "smollm3",
        "SmolLM3ForCausalLM",
        **rope(hf, theta=2000000.0),
        **attention_windows(hf, window, ["full" if turns else "sliding" for turns in rotates]),
        nope_layers=tuple(i for i, turns in enumerate(rotates) if not turns),
    )


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    return write_llama(config) | {
        **_write_qwen_window(config),
        "no_rope_layers": [int(i not in config.nope_layers) for i in range(config.num_layers)],
    }


SMOLLM3 = Family("smollm3", ("SmolLM3ForCausalLM",), read_smollm3, write_smollm3, LLAMA_WEIGHTS, prefix="model.")


# Granite: four multipliers


def read_granite(hf: HFConfig) -> ModelConfig:
    return read_decoder(
        hf,
        "granite",
        "GraniteForCausalLM",
        attention_scale=float(hf.get("attention_multiplier", 1.0)),
        embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(hf.get("logits_scaling", 1.0)),
    )


def write_granite(config: ModelConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "attention_multiplier": config.scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        # 15 digits undo the rounding of 1 / x
        "logits_scaling": float(f"{1.0 / config.logit_scale:.15g}"),
    }


GRANITE = Family("granite", ("GraniteForCausalLM",), read_granite, write_granite, LLAMA_WEIGHTS, prefix="model.")


# Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, longrope


def read_phi3(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": None} | dict(hf)
    for key in ("rope_scaling", "rope_parameters"):
        table = dict(hf.get(key) or {})
        if "yarn" in (table.get("rope_type"), table.get("type")):  # the first checkpoints called longrope so
            hf[key] = table | {"rope_type": "longrope"}
    return read_decoder(
        hf,
        "phi3",
        "Phi3ForCausalLM",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        **attention_windows(hf | {"layer_types": None}, hf["sliding_window"]),
    )


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    keys = write_decoder(config, sliding_window=config.sliding_window or None)
    if keys["rope_scaling"] is not None:  # transformers 4 insists on `type` and on no key more than it needs
        table = dict(keys["rope_scaling"])
        del table["original_max_position_embeddings"]
        keys["rope_scaling"] = {"type": table.pop("rope_type"), **table}
    return keys


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    read_phi3,
    write_phi3,
    LLAMA_WEIGHTS
    | {
        "layers.{i}.attn.qkv": same("model.layers.{i}.self_attn.qkv_proj"),
        "layers.{i}.mlp.up": same("model.layers.{i}.mlp.gate_up_proj"),
    },
    prefix="model.",
)


# OLMo 1: norms without weights, clipped Q, K and V. OLMo 2: norms after each branch, and over all heads of Q and of K


def read_olmo(hf: HFConfig) -> ModelConfig:
    return read_decoder(
        hf,
        "olmo",
        "OlmoForCausalLM",
        norm="nonparametric",
        norm_eps=1e-5,
        clip_qkv=float(hf.get("clip_qkv") or 0.0),
        rope_float32=True,
        mlp_bias=False,
    )


def write_olmo(config: ModelConfig) -> dict[str, Any]:
    keys = write_decoder(config, attention_bias=config.qkv_bias, clip_qkv=config.clip_qkv or None)
    del keys["rms_norm_eps"]
    return keys


def read_olmo2(hf: HFConfig) -> ModelConfig:
    return read_decoder(
        hf,
        "olmo2",
        "Olmo2ForCausalLM",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_late_rounding=True,
        rope_float32=True,
        block="post_branch",
        qk_norm="full",
        mlp_bias=False,
    )


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(config, attention_bias=config.qkv_bias)


OLMO = Family("olmo", ("OlmoForCausalLM",), read_olmo, write_olmo, LLAMA_WEIGHTS, prefix="model.")
OLMO2 = Family(
    "olmo2",
    ("Olmo2ForCausalLM",),
    read_olmo2,
    write_olmo2,
    LLAMA_WEIGHTS
    | QK_NORM_WEIGHTS
    | {
        "layers.{i}.attn_out_norm": same("model.layers.{i}.post_attention_layernorm"),
        "layers.{i}.mlp_out_norm": same("model.layers.{i}.post_feedforward_layernorm"),
    },
    prefix="model.",
)


# StableLM: LayerNorm, a quarter of each head rotates, one norm per head of Q and K in the largest


def read_stablelm(hf: HFConfig) -> ModelConfig:
    hf = {"max_position_embeddings": 4096} | dict(hf)
    parallel = bool(hf.get("use_parallel_residual", False))
    return read_decoder(
        hf,
        "stablelm",
        "StableLmForCausalLM",
        **rope(hf, partial=0.25),
        norm="layernorm",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        qkv_bias=hf.get("use_qkv_bias", False),
        out_bias=False,
        mlp_bias=False,
        qk_norm="per_head" if hf.get("qk_layernorm", False) else "none",
        block="parallel" if parallel else "pre",
        shared_norm=parallel,
    )


def write_stablelm(config: ModelConfig) -> dict[str, Any]:
    keys = write_base(config) | write_rope(config)
    del keys["head_dim"]
    return keys | {
        "partial_rotary_factor": rotary_fraction(config),
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm == "per_head",
        "use_parallel_residual": config.block == "parallel",
    }


STABLELM = Family(
    "stablelm",
    ("StableLmForCausalLM",),
    read_stablelm,
    write_stablelm,
    LLAMA_WEIGHTS
    | {
        "layers.{i}.attn.q_norm": Source(("model.layers.{i}.self_attn.q_layernorm.norms.{h}",), QUERY_HEADS),
        "layers.{i}.attn.k_norm": Source(("model.layers.{i}.self_attn.k_layernorm.norms.{h}",), KEY_HEADS),
    },
    prefix="model.",
    ignored=IGNORED,
)


# StarCoder 2: LayerNorm, an MLP without gate, biases everywhere


def read_starcoder2(hf: HFConfig) -> ModelConfig:
    defaults = {"max_position_embeddings": 4096, "num_key_value_heads": 2, "tie_word_embeddings": True}
    hf = defaults | {"hidden_act": "gelu_pytorch_tanh"} | dict(hf)
    bias = hf.get("use_bias", True)
    return read_decoder(
        hf,
        "starcoder2",
        "Starcoder2ForCausalLM",
        norm="layernorm",
        norm_eps=hf.get("norm_epsilon", 1e-5),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        **attention_windows(hf | {"layer_types": None}, hf.get("sliding_window")),
    )


def write_starcoder2(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_base(config),
        **write_rope(config),
        "norm_epsilon": config.norm_eps,
        "use_bias": config.qkv_bias,
        "sliding_window": config.sliding_window or None,
    }


STARCODER2 = Family(
    "starcoder2",
    ("Starcoder2ForCausalLM",),
    read_starcoder2,
    write_starcoder2,
    LLAMA_WEIGHTS
    | {
        "layers.{i}.mlp.up": same("model.layers.{i}.mlp.c_fc"),
        "layers.{i}.mlp.down": same("model.layers.{i}.mlp.c_proj"),
    },
    prefix="model.",
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, PHI3, OLMO, OLMO2, STABLELM, STARCODER2)
