"""What most config.json files have in common: sizes, activations, rotary positions, token ids; read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmasos.errors import FormatError
from llmasos.models.config import Activation, LayerType, ModelConfig, RopeScaling

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


def activation_name(kind: Activation, written: object = None) -> str:
    """Hugging Face's name: the one `written` in the original config while it still means this (gelu_new and
    gelu_pytorch_tanh are one function that transformers rounds in two ways), else the usual one."""
    if isinstance(written, str) and _ACTIVATIONS.get(written) == kind:
        return written
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


def sizes(hf: HFConfig, *, context: int = 2048) -> dict[str, Any]:
    """The size keys that LLaMA-like configs share; `context` is what the family means where the config is silent."""
    hidden, heads = int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))
    kv_heads = int(hf.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise FormatError(
            f"config.json has {heads} attention heads, which {kv_heads} key/value heads can't share equally.",
            hint="The file is damaged; fetch it again.",
        )
    return {
        "vocab_size": int(need(hf, "vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(need(hf, "intermediate_size")),
        "num_layers": int(need(hf, "num_hidden_layers")),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": int(hf.get("head_dim") or hidden // heads),
        "context_length": context_length(hf, context),
    }


def context_length(hf: HFConfig, default: int = 2048) -> int:
    """Tokens that the model reads, scaling included: for dynamic and yarn, `max_position_embeddings` may still be the
    length before scaling."""
    trained = int(hf.get("max_position_embeddings") or default)
    keys = rope_keys(hf)
    factor, original = float(keys.get("factor") or 1.0), int(keys.get("original_max_position_embeddings") or trained)
    match keys["kind"]:
        case "dynamic":
            return int(trained * factor)
        case "yarn":
            return max(trained, int(original * factor))
    return trained


LAYER_TYPES: dict[str, LayerType] = {"full_attention": "full", "sliding_attention": "sliding"}


def attention_windows(hf: HFConfig, window: int | None, default: Sequence[LayerType] = ()) -> dict[str, Any]:
    """Config fields of sliding windows. `layer_types` of the config wins over the family's `default` pattern (empty:
    all layers slide). Raises FormatError for a kind of layer that is not known."""
    num_layers = int(need(hf, "num_hidden_layers"))
    names = hf.get("layer_types")
    types = tuple(default) if names is None else tuple(_layer_type(name) for name in names[:num_layers])
    if types and len(types) != num_layers:
        raise FormatError(
            f"config.json names {len(types)} layer_types for {num_layers} layers.",
            hint="The file is damaged; fetch it again.",
        )
    if not window or (types and "sliding" not in types):
        return {"sliding_window": 0, "layer_types": ()}
    return {"sliding_window": int(window), "layer_types": () if "full" not in types else types}


def _layer_type(name: str) -> LayerType:
    if name not in LAYER_TYPES:
        raise FormatError(
            f"config.json asks for a layer of type {name!r}, which is not known.",
            hint=f"Known: {', '.join(LAYER_TYPES)}.",
        )
    return LAYER_TYPES[name]


def write_layer_types(config: ModelConfig) -> list[str]:
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    return [names["sliding" if config.is_sliding(i) else "full"] for i in range(config.num_layers)]


def rope_keys(hf: HFConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of a config, from either spelling: transformers 5's `rope_parameters` (possibly one table
    per layer type) or the older `rope_theta` + `rope_scaling`."""
    table = dict(hf.get("rope_parameters") or {})
    if layer_type in table:
        table = dict(table[layer_type] or {})
    older = dict(hf.get("rope_scaling") or {})
    keys = {**older, **table}
    for key in ("rope_theta", "partial_rotary_factor"):
        keys.setdefault(key, hf.get(key))
    # Phi-3 keeps it beside the table, and transformers prefers that one
    if hf.get("original_max_position_embeddings"):
        keys["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    kind = keys.get("rope_type") or keys.get("type") or "default"
    keys["kind"] = "longrope" if kind == "su" else kind
    return keys


def rope(
    hf: HFConfig, *, theta: float = 10000.0, layer_type: str = "full_attention", partial: float = 1.0
) -> dict[str, Any]:
    """Config fields of rotary positions. Raises FormatError for a scaling that is not known or lacks a parameter."""
    keys = rope_keys(hf, layer_type)
    hidden, heads = int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))
    head_dim = int(hf.get("head_dim") or hidden // heads)
    fraction = keys.get("partial_rotary_factor") or partial
    rotary = int(head_dim * fraction)
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise FormatError(
            f"config.json rotates {rotary} of {head_dim} dimensions of a head; they turn in pairs.",
            hint="Check head_dim and partial_rotary_factor.",
        )
    return {
        "rope_theta": float(keys.get("rope_theta") or theta),
        "rotary_dim": 0 if rotary == head_dim else rotary,
        "rope_scaling": _scaling(keys, hf, rotary),
    }


SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""The rotary scalings and the parameters that have no default."""


def _scaling(keys: Mapping[str, Any], hf: HFConfig, rotary: int) -> RopeScaling | None:
    kind = keys["kind"]
    if kind == "default":
        return None
    if kind not in SCALINGS:
        raise FormatError(
            f"config.json asks for the rotary scaling {kind!r}, which is not known.",
            hint=f"Known: {', '.join(SCALINGS)}.",
        )
    for key in SCALINGS[kind]:
        if keys.get(key) is None:
            raise FormatError(
                f"config.json asks for the rotary scaling {kind!r} without its {key!r}.",
                hint="The file is damaged; fetch it again.",
            )
    context = int(hf.get("max_position_embeddings") or 2048)
    original = int(keys.get("original_max_position_embeddings") or context)
    if kind == "dynamic":  # transformers counts from here, whatever the table says
        original = context
    factor = keys.get("factor")
    scaling = RopeScaling(
        kind=kind,
        factor=float(context / original if factor is None else factor),
        original_context=0 if kind == "linear" else original,
        low_freq_factor=float(keys.get("low_freq_factor") or 1.0),
        high_freq_factor=float(keys.get("high_freq_factor") or 4.0),
        beta_fast=float(keys.get("beta_fast") or 32.0),
        beta_slow=float(keys.get("beta_slow") or 1.0),
        mscale=float(keys.get("mscale") or 0.0),
        mscale_all_dim=float(keys.get("mscale_all_dim") or 0.0),
        truncate=bool(keys.get("truncate", True)),
        attention_factor=keys.get("attention_factor"),
        short_factor=tuple(float(x) for x in keys.get("short_factor") or ()),
        long_factor=tuple(float(x) for x in keys.get("long_factor") or ()),
    )
    for name, values in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
        if kind == "longrope" and len(values) != rotary // 2:
            raise FormatError(
                f"config.json gives {len(values)} numbers as {name} of the rotary scaling; {rotary // 2} are needed.",
                hint="The file is damaged; fetch it again.",
            )
    return scaling


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


def rotary_fraction(config: ModelConfig) -> float:
    """The `partial_rotary_factor` from which `int(head_dim * factor)` is our rotary_dim again."""
    fraction = config.rope_dim / config.head_dim
    return fraction if int(config.head_dim * fraction) == config.rope_dim else math.nextafter(fraction, 2.0)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The older spelling, `rope_theta` and `rope_scaling`, which every transformers version reads. Goes after
    `write_base`, because some scalings have a word on `max_position_embeddings`."""
    keys: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None, "rope_parameters": None}
    if config.rotary_dim:
        keys["partial_rotary_factor"] = rotary_fraction(config)
    scaling = config.rope_scaling
    if scaling is None:
        return keys
    out: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "longrope" or scaling.factor != config.context_length / scaling.original_context:
        out["factor"] = scaling.factor
    match scaling.kind:
        case "dynamic":
            keys["max_position_embeddings"] = scaling.original_context
        case "llama3":
            out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        case "yarn":
            out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            if scaling.mscale:
                out |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
        case "longrope":
            out |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
            keys["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind in ("llama3", "yarn", "longrope"):
        out["original_max_position_embeddings"] = scaling.original_context
    if scaling.attention_factor is not None:
        out["attention_factor"] = scaling.attention_factor
    return keys | {"rope_scaling": out}
