"""Families with GPT's parts: LayerNorm, biases, an MLP without gate. See `mapping` for what a row means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmasos.errors import FormatError
from llmasos.models.config import LayerType, ModelConfig
from llmasos.models.families.mapping import Family, HFConfig, Join, Source, qkv, rows, same, transposed
from llmasos.models.families.reading import activation, activation_name, base, need, rope, write_rope

if TYPE_CHECKING:
    from torch import Tensor

MASKS = r".*\.attn\.(bias|masked_bias)|.*\.attention\.(bias|masked_bias)|.*rotary_emb\.inv_freq"
"""Buffers that older checkpoints carry: causal masks and rotary frequencies."""


def _join_grouped(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Rows by key head: its queries, its key, its value -> all queries, all keys, all values."""
    tensor, group = parts[0], config.num_heads // config.num_kv_heads
    wanted = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if tensor.shape[0] != wanted:
        raise FormatError(
            f"A fused query-key-value tensor has {tensor.shape[0]} rows; the config asks for {wanted}.",
            hint="config.json and weights belong to different models.",
        )
    heads = tensor.view(config.num_kv_heads, group + 2, config.head_dim, *tensor.shape[1:])
    pieces = (heads[:, :group], heads[:, group], heads[:, group + 1])
    return rows([piece.reshape(-1, *tensor.shape[1:]) for piece in pieces])


def _split_grouped(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    import torch

    group, rest = config.num_heads // config.num_kv_heads, tensor.shape[1:]
    heads = tensor.view(-1, config.head_dim, *rest)
    q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads])
    q = q.view(config.num_kv_heads, group, config.head_dim, *rest)
    return [torch.cat([q, k[:, None], v[:, None]], 1).reshape(tensor.shape)]


GROUPED_QKV = Join(_join_grouped, _split_grouped)
"""One module, interleaved by key head. With as many key heads as heads that is GPT-NeoX's and BLOOM's layout, with a
single one the layout of multi-query models, in between that of Falcon-40B."""


def grouped_qkv(name: str) -> Source:
    return Source((name,), GROUPED_QKV)


def identity(hf: HFConfig, family: str, architecture: str) -> dict[str, Any]:
    """A bare model whose embeddings are its head too (GPT2Model) is read as the language model that it makes."""
    return base(hf, family, architecture) | {"architecture": architecture}


def first(hf: HFConfig, *keys: str) -> Any:
    """The value of the first spelling that is there. Raises FormatError that names the usual one."""
    for key in keys:
        if hf.get(key) is not None:
            return hf[key]
    return need(hf, keys[0])


def head_sizes(hidden: int, heads: int) -> dict[str, Any]:
    if heads < 1 or hidden % heads:
        raise FormatError(
            f"config.json asks for {heads} heads in a width of {hidden}, which is no multiple of it.",
            hint="The file is damaged; fetch it again.",
        )
    return {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": heads, "head_dim": hidden // heads}


def _gpt(hf: HFConfig, family: str, architecture: str) -> dict[str, Any]:
    """What GPT-2 and GPT-J configs have in common, and the parts of all of these families."""
    sizes = head_sizes(int(first(hf, "n_embd", "hidden_size")), int(first(hf, "n_head", "num_attention_heads")))
    return dict(
        **identity(hf, family, architecture),
        **sizes,
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=int(hf.get("n_inner") or 4 * sizes["hidden_size"]),
        num_layers=int(first(hf, "n_layer", "num_hidden_layers")),
        context_length=int(first(hf, "n_positions", "max_position_embeddings")),
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        gated=False,
        mlp_bias=True,
        activation=activation(hf.get("activation_function", "gelu_new")),
    )


def _write_gpt(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_name(config.activation, config.extra.get("activation_function")),
        "tie_word_embeddings": config.tie_embeddings,
    }


# GPT-2 and the models distilled from it


def read_gpt2(hf: HFConfig) -> ModelConfig:
    return ModelConfig(
        **_gpt(hf, "gpt2", "GPT2LMHeadModel"),
        position="learned",
        qkv_bias=True,
        out_bias=True,
        attention_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        scale_by_layer=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_gpt(config),
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }


GPT2 = Family(
    "gpt2",
    ("GPT2LMHeadModel", "GPT2Model"),
    read_gpt2,
    write_gpt2,
    {
        "embed": same("transformer.wte"),
        "position": same("transformer.wpe"),
        "final_norm": same("transformer.ln_f"),
        "head": same("lm_head"),
        "layers.{i}.attn_norm": same("transformer.h.{i}.ln_1"),
        "layers.{i}.attn.qkv": transposed("transformer.h.{i}.attn.c_attn"),
        "layers.{i}.attn.out": transposed("transformer.h.{i}.attn.c_proj"),
        "layers.{i}.mlp_norm": same("transformer.h.{i}.ln_2"),
        "layers.{i}.mlp.up": transposed("transformer.h.{i}.mlp.c_fc"),
        "layers.{i}.mlp.down": transposed("transformer.h.{i}.mlp.c_proj"),
    },
    prefix="transformer.",
    ignored=MASKS,
)

# GPT-Neo: every other layer sees a window; scores are not scaled

_NEO_LAYERS: dict[str, LayerType] = {"global": "full", "local": "sliding"}


def _neo_layer_types(hf: HFConfig, num_layers: int) -> tuple[LayerType, ...]:
    """[[["global", "local"], 12]] -> one type per layer; empty if all are global."""
    pattern = hf.get("attention_types") or [[["global", "local"], 12]]
    names = [name for types, repeats in pattern for _ in range(repeats) for name in types]
    if len(names) != num_layers or not set(names) <= set(_NEO_LAYERS):
        raise FormatError(
            f"config.json describes the attention of {num_layers} layers as {pattern!r}.",
            hint="attention_types must name 'global' or 'local' once for each of num_layers.",
        )
    types = tuple(_NEO_LAYERS[name] for name in names)
    return types if "sliding" in types else ()


def read_gpt_neo(hf: HFConfig) -> ModelConfig:
    sizes = head_sizes(int(need(hf, "hidden_size")), int(first(hf, "num_heads", "num_attention_heads")))
    num_layers = int(first(hf, "num_layers", "num_hidden_layers"))
    layer_types = _neo_layer_types(hf, num_layers)
    return ModelConfig(
        **identity(hf, "gpt_neo", "GPTNeoForCausalLM"),
        **sizes,
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=int(hf.get("intermediate_size") or 4 * sizes["hidden_size"]),
        num_layers=num_layers,
        context_length=int(need(hf, "max_position_embeddings")),
        position="learned",
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        out_bias=True,
        attention_scale=1.0,
        sliding_window=int(hf.get("window_size", 256)) if layer_types else 0,
        layer_types=layer_types,
        gated=False,
        mlp_bias=True,
        activation=activation(hf.get("activation_function", "gelu_new")),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _NEO_LAYERS.items()}
    layers = [names[t] for t in config.layer_types] or ["global"] * config.num_layers
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_name(config.activation, config.extra.get("activation_function")),
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "window_size": config.sliding_window or config.extra.get("window_size"),
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT_NEO = Family(
    "gpt_neo",
    ("GPTNeoForCausalLM", "GPTNeoModel"),
    read_gpt_neo,
    write_gpt_neo,
    {
        "embed": same("transformer.wte"),
        "position": same("transformer.wpe"),
        "final_norm": same("transformer.ln_f"),
        "head": same("lm_head"),
        "layers.{i}.attn_norm": same("transformer.h.{i}.ln_1"),
        "layers.{i}.attn.qkv": qkv(*(f"transformer.h.{{i}}.attn.attention.{p}_proj" for p in "qkv")),
        "layers.{i}.attn.out": same("transformer.h.{i}.attn.attention.out_proj"),
        "layers.{i}.mlp_norm": same("transformer.h.{i}.ln_2"),
        "layers.{i}.mlp.up": same("transformer.h.{i}.mlp.c_fc"),
        "layers.{i}.mlp.down": same("transformer.h.{i}.mlp.c_proj"),
    },
    prefix="transformer.",
    ignored=MASKS,
)

# GPT-J: attention and MLP side by side behind one norm; neighbouring pairs rotate


def read_gptj(hf: HFConfig) -> ModelConfig:
    fields = _gpt(hf, "gptj", "GPTJForCausalLM")
    rotary = int(hf.get("rotary_dim", 64) or fields["head_dim"])
    return ModelConfig(
        **fields,
        rotary_dim=0 if rotary == fields["head_dim"] else rotary,
        rope_interleaved=True,
        block="parallel",
        shared_norm=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        head_bias=True,
    )


def write_gptj(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gpt(config), "rotary_dim": config.rope_dim}


GPTJ = Family(
    "gptj",
    ("GPTJForCausalLM",),
    read_gptj,
    write_gptj,
    {
        "embed": same("transformer.wte"),
        "final_norm": same("transformer.ln_f"),
        "head": same("lm_head"),
        "layers.{i}.attn_norm": same("transformer.h.{i}.ln_1"),
        "layers.{i}.attn.qkv": qkv(*(f"transformer.h.{{i}}.attn.{p}_proj" for p in "qkv")),
        "layers.{i}.attn.out": same("transformer.h.{i}.attn.out_proj"),
        "layers.{i}.mlp.up": same("transformer.h.{i}.mlp.fc_in"),
        "layers.{i}.mlp.down": same("transformer.h.{i}.mlp.fc_out"),
    },
    prefix="transformer.",
    ignored=MASKS,
)

# GPT-NeoX and Pythia


def _standard(hf: HFConfig, family: str, architecture: str) -> dict[str, Any]:
    """Configs in the spelling that later became common."""
    return dict(
        **identity(hf, family, architecture),
        **head_sizes(int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))),
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=int(need(hf, "intermediate_size")),
        num_layers=int(need(hf, "num_hidden_layers")),
        context_length=int(need(hf, "max_position_embeddings")),
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_eps", 1e-5)),
        gated=False,
        mlp_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def _write_standard(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation, config.extra.get("hidden_act")),
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_gpt_neox(hf: HFConfig) -> ModelConfig:
    older = {"rope_theta": hf.get("rotary_emb_base"), "partial_rotary_factor": hf.get("rotary_pct")}
    bias = bool(hf.get("attention_bias", True))
    return ModelConfig(
        **_standard(hf, "gpt_neox", "GPTNeoXForCausalLM"),
        **rope({**older, **hf}, partial=0.25),
        activation=activation(hf.get("hidden_act", "gelu")),
        block="parallel" if hf.get("use_parallel_residual", True) else "pre",
        qkv_bias=bias,
        out_bias=bias,
    )


def write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    """Rotary parameters under the names that this family had from the start."""
    return {
        **_write_standard(config),
        **write_rope(config),
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rope_dim / config.head_dim,
        "use_parallel_residual": config.block == "parallel",
        "attention_bias": config.qkv_bias,
    }


GPT_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    read_gpt_neox,
    write_gpt_neox,
    {
        "embed": same("gpt_neox.embed_in"),
        "final_norm": same("gpt_neox.final_layer_norm"),
        "head": same("embed_out"),
        "layers.{i}.attn_norm": same("gpt_neox.layers.{i}.input_layernorm"),
        "layers.{i}.attn.qkv": grouped_qkv("gpt_neox.layers.{i}.attention.query_key_value"),
        "layers.{i}.attn.out": same("gpt_neox.layers.{i}.attention.dense"),
        "layers.{i}.mlp_norm": same("gpt_neox.layers.{i}.post_attention_layernorm"),
        "layers.{i}.mlp.up": same("gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
        "layers.{i}.mlp.down": same("gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    },
    prefix="gpt_neox.",
    aliases=(("embed_out.", "lm_head."),),
    ignored=MASKS,
)

# OPT


def read_opt(hf: HFConfig) -> ModelConfig:
    sizes = head_sizes(int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads")))
    bias, pre = bool(hf.get("enable_bias", True)), bool(hf.get("do_layer_norm_before", True))
    width = int(hf.get("word_embed_proj_dim") or sizes["hidden_size"])
    return ModelConfig(
        **identity(hf, "opt", "OPTForCausalLM"),
        **sizes,
        vocab_size=int(need(hf, "vocab_size")),
        intermediate_size=int(need(hf, "ffn_dim")),
        num_layers=int(need(hf, "num_hidden_layers")),
        context_length=int(need(hf, "max_position_embeddings")),
        embedding_size=0 if width == sizes["hidden_size"] else width,
        position="learned",
        position_offset=2,
        norm="layernorm" if hf.get("layer_norm_elementwise_affine", True) else "nonparametric",
        final_norm=pre and not hf.get("_remove_final_layer_norm", False),
        block="pre" if pre else "post_residual",
        qkv_bias=bias,
        out_bias=bias,
        gated=False,
        mlp_bias=bias,
        activation=activation(hf.get("activation_function", "relu")),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_opt(config: ModelConfig) -> dict[str, Any]:
    pre = config.block == "pre"
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.embedding_size or config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "activation_function": activation_name(config.activation, config.extra.get("activation_function")),
        "do_layer_norm_before": pre,
        "_remove_final_layer_norm": pre and not config.final_norm,
        "layer_norm_elementwise_affine": config.norm == "layernorm",
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
    }


OPT = Family(
    "opt",
    ("OPTForCausalLM", "OPTModel"),
    read_opt,
    write_opt,
    {
        "embed": same("model.decoder.embed_tokens"),
        "position": same("model.decoder.embed_positions"),
        "project_in": same("model.decoder.project_in"),
        "project_out": same("model.decoder.project_out"),
        "final_norm": same("model.decoder.final_layer_norm"),
        "head": same("lm_head"),
        "layers.{i}.attn_norm": same("model.decoder.layers.{i}.self_attn_layer_norm"),
        "layers.{i}.attn.qkv": qkv(*(f"model.decoder.layers.{{i}}.self_attn.{p}_proj" for p in "qkv")),
        "layers.{i}.attn.out": same("model.decoder.layers.{i}.self_attn.out_proj"),
        "layers.{i}.mlp_norm": same("model.decoder.layers.{i}.final_layer_norm"),
        "layers.{i}.mlp.up": same("model.decoder.layers.{i}.fc1"),
        "layers.{i}.mlp.down": same("model.decoder.layers.{i}.fc2"),
    },
    prefix="model.",
    aliases=(("model.decoder.", ""),),
)

# Phi 1, 1.5 and 2


def read_phi(hf: HFConfig) -> ModelConfig:
    fields = _standard(hf, "phi", "PhiForCausalLM")
    kv_heads = int(hf.get("num_key_value_heads") or fields["num_heads"])
    return ModelConfig(
        **(fields | {"num_kv_heads": kv_heads}),
        **rope(hf, partial=0.5),
        activation=activation(hf.get("hidden_act", "gelu_new")),
        block="parallel",
        shared_norm=True,
        qkv_bias=True,
        out_bias=True,
        qk_norm="head" if hf.get("qk_layernorm", False) else "none",
        head_bias=True,
    )


def write_phi(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_standard(config),
        **write_rope(config),
        "partial_rotary_factor": config.rope_dim / config.head_dim,
        "num_key_value_heads": config.num_kv_heads,
        "qk_layernorm": config.qk_norm == "head",
    }


PHI = Family(
    "phi",
    ("PhiForCausalLM",),
    read_phi,
    write_phi,
    {
        "embed": same("model.embed_tokens"),
        "final_norm": same("model.final_layernorm"),
        "head": same("lm_head"),
        "layers.{i}.attn_norm": same("model.layers.{i}.input_layernorm"),
        "layers.{i}.attn.qkv": qkv(*(f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv")),
        "layers.{i}.attn.q_norm": same("model.layers.{i}.self_attn.q_layernorm"),
        "layers.{i}.attn.k_norm": same("model.layers.{i}.self_attn.k_layernorm"),
        "layers.{i}.attn.out": same("model.layers.{i}.self_attn.dense"),
        "layers.{i}.mlp.up": same("model.layers.{i}.mlp.fc1"),
        "layers.{i}.mlp.down": same("model.layers.{i}.mlp.fc2"),
    },
    prefix="model.",
    ignored=MASKS,
)

FAMILIES = (GPT2, GPT_NEO, GPTJ, GPT_NEOX, OPT, PHI)
