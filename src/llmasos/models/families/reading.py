"""What most config.json files have in common: sizes, activations, rotary positions, token ids; read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmasos.errors import FormatError
from llmasos.models.config import Activation, ModelConfig, RopeScaling

HFConfig = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}
_ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "gelu_quick": "quick_gelu"}


def activation(name: str) -> Activation:
    """Hugging Face's name of an activation -> ours. Raises FormatError for one that no family here uses."""
    if name not in _ACTIVATIONS:
        raise FormatError(
            f"config.json asks for the activation {name!r}, which is not known.",
            hint=f"Known: {', '.join(sorted(_ACTIVATIONS))}.",
        )
    return _ACTIVATIONS[name]


def activation_name(kind: Activation) -> str:
    return _ACTIVATION_NAMES.get(kind, kind)


def need(hf: HFConfig, key: str) -> Any:
    """A key that has no default. Raises FormatError that names it."""
    if hf.get(key) is None:
        raise FormatError(
            f"config.json has no {key!r}, which a {hf.get('model_type', 'model')} needs.",
            hint="The file is damaged or not a model's config; fetch it again.",
        )
    return hf[key]


def base(hf: HFConfig, family: str, default_architecture: str) -> dict[str, Any]:
    """Identity and the untouched rest of the config."""
    names = hf.get("architectures") or [default_architecture]
    return {"architecture": names[0], "family": family, "extra": dict(hf)}


def sizes(hf: HFConfig) -> dict[str, Any]:
    """The size keys that LLaMA-like configs share."""
    hidden, heads = int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))
    return {
        "vocab_size": int(need(hf, "vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(need(hf, "intermediate_size")),
        "num_layers": int(need(hf, "num_hidden_layers")),
        "num_heads": heads,
        "num_kv_heads": int(hf.get("num_key_value_heads") or heads),
        "head_dim": int(hf.get("head_dim") or hidden // heads),
        "context_length": int(hf.get("max_position_embeddings") or 2048),
    }


def rope_keys(hf: HFConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of a config, from either spelling: transformers 5's `rope_parameters` (possibly one table
    per layer type) or the older `rope_theta` + `rope_scaling`."""
    table = dict(hf.get("rope_parameters") or {})
    if layer_type in table:
        table = dict(table[layer_type] or {})
    older = dict(hf.get("rope_scaling") or {})
    keys = {**older, **table}
    keys.setdefault("rope_theta", hf.get("rope_theta"))
    keys.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor"))
    keys["kind"] = keys.get("rope_type") or keys.get("type") or "default"
    return keys


def rope(
    hf: HFConfig, *, theta: float = 10000.0, layer_type: str = "full_attention", partial: float = 1.0
) -> dict[str, Any]:
    """Config fields of rotary positions. Raises FormatError for a scaling that is not known."""
    keys = rope_keys(hf, layer_type)
    hidden, heads = int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))
    head_dim = int(hf.get("head_dim") or hidden // heads)
    fraction = keys.get("partial_rotary_factor") or partial
    rotary = int(head_dim * fraction)
    return {
        "rope_theta": float(keys.get("rope_theta") or theta),
        "rotary_dim": 0 if rotary == head_dim else rotary,
        "rope_scaling": _scaling(keys, hf),
    }


def _scaling(keys: Mapping[str, Any], hf: HFConfig) -> RopeScaling | None:
    kind = {"su": "longrope"}.get(keys["kind"], keys["kind"])
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope"):
        raise FormatError(
            f"config.json asks for the rotary scaling {kind!r}, which is not known.",
            hint="Known: linear, dynamic, llama3, yarn, longrope.",
        )
    original = keys.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or 0
    context = int(hf.get("max_position_embeddings") or 0)
    factor = keys.get("factor")
    if factor is None:
        factor = context / original if original else 1.0
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        original_context=int(original),
        low_freq_factor=float(keys.get("low_freq_factor") or 1.0),
        high_freq_factor=float(keys.get("high_freq_factor") or 4.0),
        beta_fast=float(keys.get("beta_fast") or 32.0),
        beta_slow=float(keys.get("beta_slow") or 1.0),
        mscale=float(keys.get("mscale") or 0.0),
        mscale_all_dim=float(keys.get("mscale_all_dim") or 0.0),
        truncate=bool(keys.get("truncate", True)),
        attention_factor=keys.get("attention_factor"),
        short_factor=tuple(keys.get("short_factor") or ()),
        long_factor=tuple(keys.get("long_factor") or ()),
    )


def write_base(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "hidden_act": activation_name(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Both spellings' common ground: `rope_theta` and `rope_scaling`, which every transformers version reads."""
    keys: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None, "rope_parameters": None}
    if config.rotary_dim:
        keys["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    scaling = config.rope_scaling
    if scaling is None:
        return keys
    out: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "longrope":
        out["factor"] = scaling.factor
    if scaling.original_context:
        out["original_max_position_embeddings"] = scaling.original_context
    match scaling.kind:
        case "llama3":
            out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        case "yarn":
            out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            if scaling.mscale:
                out |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
        case "longrope":
            out |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
            if scaling.original_context:
                keys["original_max_position_embeddings"] = scaling.original_context
    if scaling.attention_factor is not None:
        out["attention_factor"] = scaling.attention_factor
    return keys | {"rope_scaling": out}
