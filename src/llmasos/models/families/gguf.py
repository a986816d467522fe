"""GGUF: metadata -> ModelConfig, and its tensor names. One table of names serves all architectures, because llama.cpp's
converter brings every family into one layout (format: ggml's docs/gguf.md and llama.cpp's gguf-py constants)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmasos.errors import FormatError, UnknownArchitectureError
from llmasos.models.config import ModelConfig

Metadata = Mapping[str, Any]

GGUF_WEIGHTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # our module -> the ways it is stored, first match wins; several names are rows one after the other
    "embed": (("token_embd",),),
    "position": (("position_embd",),),
    "embed_norm": (("token_embd_norm",),),
    "final_norm": (("output_norm",),),
    "head": (("output",),),
    "layers.{i}.attn_norm": (("blk.{i}.attn_norm",),),
    "layers.{i}.attn.qkv": (("blk.{i}.attn_qkv",), ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v")),
    "layers.{i}.attn.q_norm": (("blk.{i}.attn_q_norm",),),
    "layers.{i}.attn.k_norm": (("blk.{i}.attn_k_norm",),),
    "layers.{i}.attn.out": (("blk.{i}.attn_output",),),
    "layers.{i}.attn_out_norm": (("blk.{i}.post_attention_norm",),),
    "layers.{i}.mlp_norm": (("blk.{i}.ffn_norm",),),
    "layers.{i}.mlp.up": (("blk.{i}.ffn_gate", "blk.{i}.ffn_up"), ("blk.{i}.ffn_up",)),
    "layers.{i}.mlp.down": (("blk.{i}.ffn_down",),),
    "layers.{i}.mlp_out_norm": (("blk.{i}.post_ffw_norm",),),
}


def _sizes(meta: Metadata, arch: str) -> dict[str, Any]:
    def need(key: str) -> int:
        if f"{arch}.{key}" not in meta:
            raise FormatError(f"The GGUF metadata has no {arch}.{key}.", hint="The file is damaged; fetch it again.")
        return int(meta[f"{arch}.{key}"])

    heads, hidden = need("attention.head_count"), need("embedding_length")
    tokens = meta.get("tokenizer.ggml.tokens")
    return {
        "vocab_size": int(meta.get(f"{arch}.vocab_size") or (len(tokens) if tokens is not None else 0)),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_layers": need("block_count"),
        "num_heads": heads,
        "num_kv_heads": int(meta.get(f"{arch}.attention.head_count_kv") or heads),
        "head_dim": int(meta.get(f"{arch}.attention.key_length") or hidden // heads),
        "context_length": need("context_length"),
    }


def _llama(meta: Metadata, arch: str, tied: bool) -> ModelConfig:
    sizes = _sizes(meta, arch)
    rotary = int(meta.get(f"{arch}.rope.dimension_count") or sizes["head_dim"])
    return ModelConfig(
        architecture="LlamaForCausalLM",
        family="llama",
        **sizes,
        rope_theta=float(meta.get(f"{arch}.rope.freq_base") or 10000.0),
        rotary_dim=0 if rotary == sizes["head_dim"] else rotary,
        rope_interleaved=True,
        norm_eps=float(meta.get(f"{arch}.attention.layer_norm_rms_epsilon") or 1e-5),
        tie_embeddings=tied,
        extra=_token_ids(meta),
    )


def _token_ids(meta: Metadata) -> dict[str, Any]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {hf: int(meta[key]) for k, hf in names.items() if (key := f"tokenizer.ggml.{k}_token_id") in meta}


_READERS = {"llama": _llama}


def known_gguf_architectures() -> tuple[str, ...]:
    return tuple(sorted(_READERS))


def config_from_gguf(meta: Metadata, tensors: Mapping[str, Any] | None = None) -> ModelConfig:
    """GGUF metadata -> ModelConfig. `tensors` (names of the file's tensors) tells what metadata does not: whether the
    head is tied, which biases there are. Raises UnknownArchitectureError, FormatError."""
    arch = str(meta.get("general.architecture", ""))
    if arch not in _READERS:
        raise UnknownArchitectureError(
            f"The GGUF architecture {arch!r} is not known.", hint=f"Known: {', '.join(known_gguf_architectures())}."
        )
    names = tensors or {}
    config = _READERS[arch](meta, arch, "output.weight" not in names)
    if names:
        config = replace(
            config,
            qkv_bias="blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names,
            out_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_up.bias" in names,
        )
    return config
