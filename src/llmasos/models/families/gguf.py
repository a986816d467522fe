"""GGUF: metadata -> ModelConfig, and its tensor names.

Metadata is turned back into the config.json that llama.cpp's converter read, and the families take it from there: one
reading of every architecture, and a model born from GGUF can be saved as its Hugging Face original. One table of names
serves all architectures, because the converter brings every family into one layout. Sources: ggml's docs/gguf.md,
llama.cpp's gguf-py constants and converter, and its graphs for what no key tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmasos.errors import FormatError, UnknownArchitectureError, UnsupportedError
from llmasos.models.config import ModelConfig, RopeScaling
from llmasos.models.families import config_from_hf
from llmasos.models.families.mapping import rows

if TYPE_CHECKING:
    from torch import Tensor

HFKeys = dict[str, Any]

_WEIGHTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # our module -> the ways it is stored, first match wins; several names are rows one after the other
    "embed": (("token_embd",),),
    "position": (("position_embd",),),
    "token_types": (("token_types",),),
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

GGUF_IGNORED = re.compile(r"(blk\.\d+\.)?(rope_\w+|attn_rot_embd)\.weight|cls(\.output)?\.\w+")
"""Tensors that are no module's: rotary factors (part of the config here), a reranker's head."""

_ENCODER_NORMS = {
    "layers.{i}.attn_norm": (("blk.{i}.attn_output_norm",),),
    "layers.{i}.mlp_norm": (("blk.{i}.layer_output_norm",),),
}
_FALCON_NORMS = {"layers.{i}.attn_norm": (("blk.{i}.attn_norm_2",),), "layers.{i}.mlp_norm": (("blk.{i}.attn_norm",),)}
"""Of the models that have two norms side by side (Falcon-40B)."""


def gguf_weights(config: ModelConfig) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """Our module -> the ways in which a GGUF file of this config stores it."""
    if config.is_encoder:
        return _WEIGHTS | _ENCODER_NORMS
    if config.family == "falcon" and not config.shared_norm:
        return _WEIGHTS | _FALCON_NORMS
    return _WEIGHTS


def gguf_join(config: ModelConfig, parameter: str) -> Callable[[Sequence[Tensor]], Tensor]:
    """How the tensors found for a parameter become ours: rows one after the other; from Gemma's norms comes off the 1
    that the converter adds (exactly, for weights that were bfloat16)."""
    if config.norm_unit_offset and parameter.endswith("norm.weight"):
        return lambda parts: parts[0].float() - 1.0
    return lambda parts: parts[0] if len(parts) == 1 else rows(parts)


def _decimal(x: float) -> float:
    """A float32 as the decimal number that was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(x)))


class _File:
    """Metadata of one architecture and what tensors there are; `None` for tensors that can't be looked at."""

    def __init__(
        self,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Any] | None,
        read: Callable[[str], Tensor] | None,
    ) -> None:
        self.meta, self.tensors, self._read = meta, tensors, read
        self.arch = str(meta.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """A value; an array of one value per layer as that value, if all layers have the same."""
        value = self.meta.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedError(
                    f"The GGUF metadata gives each layer its own {self.arch}.{key}.",
                    hint="Models whose layers differ in size are not supported.",
                )
            value = value[0].item()
        return value

    def number(self, key: str, default: float = 0.0) -> float:
        value = self.get(key)
        return default if value is None else _decimal(value)

    def need(self, key: str) -> int:
        value = self.get(key)
        if value is None:
            raise FormatError(
                f"The GGUF metadata has no {self.arch}.{key}.", hint="The file is damaged; fetch it again."
            )
        return int(value)

    def has(self, *names: str) -> bool:
        return any(name in (self.tensors or {}) for name in names)

    def values(self, name: str) -> list[float]:
        """A small tensor's numbers; none where only the header is at hand."""
        return [_decimal(x) for x in self._read(name).tolist()] if self._read and self.has(name) else []

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length") or self.need("embedding_length") // self.heads)

    @property
    def heads(self) -> int:
        if (heads := self.need("attention.head_count")) < 1:
            raise FormatError(f"The GGUF metadata asks for {heads} heads.", hint="The file is damaged; fetch it again.")
        return heads

    @property
    def vocab_size(self) -> int:
        if self.has("token_embd.weight") and hasattr(info := (self.tensors or {})["token_embd.weight"], "shape"):
            return int(info.shape[0])
        tokens = self.meta.get("tokenizer.ggml.tokens")
        return int(self.get("vocab_size") or (len(tokens) if tokens is not None else 0))


# what many architectures share


def _common(f: _File) -> HFKeys:
    layers = f.need("block_count")
    return {
        "vocab_size": f.vocab_size,
        "hidden_size": f.need("embedding_length"),
        "intermediate_size": f.need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": f.heads,
        "num_key_value_heads": int(f.get("attention.head_count_kv") or f.heads),
        "head_dim": f.head_dim,
        "max_position_embeddings": f.need("context_length"),
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon", 1e-5),
        "tie_word_embeddings": not f.has("output.weight"),
        "attention_bias": f.has("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
        "mlp_bias": f.has("blk.0.ffn_up.bias"),
        **_rope(f),
    }


def _rope(f: _File) -> HFKeys:
    """Rotary keys. llama.cpp's defaults: base 10000, all dimensions, "linear" scaling by 1."""
    rotary, head_dim = int(f.get("rope.dimension_count") or f.head_dim), f.head_dim
    fraction = rotary / head_dim
    keys: HFKeys = {
        "rope_theta": f.number("rope.freq_base", 10000.0),
        # the loaded value is int(head_dim * fraction)
        "partial_rotary_factor": fraction if int(head_dim * fraction) == rotary else math.nextafter(fraction, 2.0),
        "original_max_position_embeddings": f.get("rope.scaling.original_context_length"),
    }
    kind = f.get("rope.scaling.type") or "linear"
    factor = f.number("rope.scaling.factor") or f.number("rope.scale_linear") or 1.0
    if f.has("rope_freqs.weight"):
        keys["rope_scaling"] = _per_frequency(f, rotary, keys["rope_theta"])
    elif kind == "longrope" or f.has("rope_factors_long.weight"):
        keys["rope_scaling"] = _longrope(f)
    elif kind == "yarn":
        keys["rope_scaling"] = _yarn(f, factor)
    elif kind == "linear" and factor != 1.0:
        keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise FormatError(
            f"The GGUF metadata asks for the rotary scaling {kind!r}, which is not known.",
            hint="Known: none, linear, yarn, longrope.",
        )
    return keys


def _yarn(f: _File, factor: float) -> HFKeys:
    found = {"rope_type": "yarn", "factor": factor}
    for key, name in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        if f.get(f"rope.scaling.yarn_{name}") is not None:
            found[key] = f.number(f"rope.scaling.yarn_{name}")
    return found


def _longrope(f: _File) -> HFKeys:
    context, factor = f.need("context_length"), f.number("rope.scaling.attn_factor", 1.0)
    original = int(f.get("rope.scaling.original_context_length") or context)
    usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
    found: HFKeys = {
        "rope_type": "longrope",
        "short_factor": f.values("rope_factors_short.weight"),
        "long_factor": f.values("rope_factors_long.weight"),
    }
    return found if abs(factor - usual) < 1e-5 else found | {"attention_factor": factor}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What LLaMA 3.1, 3.2 and 3.3 have in common."""


def _per_frequency(f: _File, rotary: int, theta: float) -> HFKeys | None:
    """The converter writes LLaMA 3's scaling as one divisor per frequency. Recognised if it is that; any other is
    kept as longrope with the same divisors for short and long texts, which is the same arithmetic."""
    divisors = f.values("rope_freqs.weight")
    if not divisors:
        return None
    import torch

    from llmasos.models.layers import rope_frequencies

    scaling = RopeScaling("llama3", max(divisors), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = (rope_frequencies(rotary, theta, s, 0)[0] for s in (None, scaling))
    if len(divisors) == len(plain) and torch.allclose(plain / scaled, torch.tensor(divisors), rtol=1e-5):
        return {"rope_type": "llama3", "factor": max(divisors), **LLAMA3}
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": f.need("context_length"),
        "short_factor": divisors,
        "long_factor": divisors,
    }


def _layer_norm(f: _File) -> float:
    return f.number("attention.layer_norm_epsilon", 1e-5)


# one function per architecture that needs more than the common keys


def _gemma(f: _File) -> HFKeys:
    return {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _windows(f: _File, full_every: int) -> HFKeys:
    """Window and kind of every layer: `sliding_window_pattern` lists them, or says which layers see everything."""
    layers, window = f.need("block_count"), int(f.get("attention.sliding_window") or 0)
    pattern = f.meta.get(f"{f.arch}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray | list):
        slides = [bool(p) for p in pattern]
    else:
        slides = [(i + 1) % int(pattern or full_every) != 0 for i in range(layers)]
    return {
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if s and window else "full_attention" for s in slides],
    }


def _gemma2(f: _File) -> HFKeys:
    windows = _windows(f, 2)
    return {
        **_gemma(f),
        **windows,
        "query_pre_attn_scalar": _query_scalar(f, layers_of_27b=46),
        "attn_logit_softcapping": f.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0),
    }


def _query_scalar(f: _File, layers_of_27b: int) -> int:
    """No key tells it. It is the width of a head in all published models but the 27B ones, which are known by their
    number of layers (as llama.cpp does)."""
    return f.need("embedding_length") // f.heads if f.need("block_count") == layers_of_27b else f.head_dim


def _gemma3(f: _File) -> HFKeys:
    return {
        **_gemma(f),
        **_windows(f, 6),
        "query_pre_attn_scalar": _query_scalar(f, layers_of_27b=62),
        "rope_local_base_freq": f.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": f.number("final_logit_softcapping") or None,
        "tie_word_embeddings": not f.has("output.weight"),
    }


def _phi2(f: _File) -> HFKeys:
    return {"layer_norm_eps": _layer_norm(f), "hidden_act": "gelu_new", "tie_word_embeddings": False}


def _phi3(f: _File) -> HFKeys:
    return {"sliding_window": int(f.get("attention.sliding_window") or 0) or None}


def _gpt2(f: _File) -> HFKeys:
    return {"n_inner": f.need("feed_forward_length"), "layer_norm_epsilon": _layer_norm(f)}


def _gptneox(f: _File) -> HFKeys:
    return {
        "layer_norm_eps": _layer_norm(f),
        "hidden_act": "gelu",
        "use_parallel_residual": bool(f.meta.get("gptneox.use_parallel_residual", True)),
    }


def _bloom(f: _File) -> HFKeys:
    return {"layer_norm_epsilon": _layer_norm(f), "seq_length": f.need("context_length")}


def _falcon(f: _File) -> HFKeys:
    two_norms, kv_heads = f.has("blk.0.attn_norm_2.weight"), int(f.get("attention.head_count_kv") or 1)
    grouped = two_norms or kv_heads not in (1, f.heads)
    return {
        "layer_norm_epsilon": _layer_norm(f),
        "ffn_hidden_size": f.need("feed_forward_length"),
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


def _olmo(f: _File) -> HFKeys:
    return {"clip_qkv": f.number("attention.clamp_kqv") or None}


def _olmo2(f: _File) -> HFKeys:
    if f.get("attention.sliding_window"):
        raise UnknownArchitectureError(
            "This GGUF file of architecture 'olmo2' holds an OLMo 3 (it has a sliding window).",
            hint="OLMo 1 and OLMo 2 are known.",
        )
    return {}


def _smollm3(f: _File) -> HFKeys:
    return {"no_rope_layer_interval": 4}


def _stablelm(f: _File) -> HFKeys:
    parallel = not f.has("blk.0.ffn_norm.weight") if f.tensors else f.meta.get("stablelm.use_parallel_residual", True)
    return {
        "layer_norm_eps": _layer_norm(f),
        "use_parallel_residual": bool(parallel),
        "use_qkv_bias": f.has("blk.0.attn_q.bias"),
        "qk_layernorm": f.has("blk.0.attn_q_norm.weight"),
    }


def _starcoder2(f: _File) -> HFKeys:
    return {"norm_epsilon": _layer_norm(f), "use_bias": f.has("blk.0.attn_output.bias")}


def _granite(f: _File) -> HFKeys:
    if f.meta.get("granite.rope.scaling.finetuned") is False:
        raise UnsupportedError(
            "This Granite has no rotary positions (rope.scaling.finetuned is false).", hint="Granite 3 is supported."
        )
    return {
        "attention_multiplier": f.number("attention.scale") or f.head_dim**-0.5,
        "embedding_multiplier": f.number("embedding_scale") or 1.0,
        "residual_multiplier": f.number("residual_scale") or 1.0,
        "logits_scaling": f.number("logit_scale") or 1.0,
    }


def _bert(f: _File) -> HFKeys:
    """The encoder alone: the converter drops pooler and masked-LM head. Without token types it is a DistilBERT;
    RoBERTa's offset of positions is taken off by the converter."""
    eps = f.number("attention.layer_norm_epsilon", 1e-12)
    if f.tensors and not f.has("token_types.weight"):
        keys = {"dim": "embedding_length", "hidden_dim": "feed_forward_length", "n_layers": "block_count"}
        return {"architectures": ["DistilBertModel"], "n_heads": f.heads} | {k: f.need(v) for k, v in keys.items()}
    types = f.tensors["token_types.weight"].shape[0] if f.tensors else f.get("token_type_count") or 2
    return {"layer_norm_eps": eps, "type_vocab_size": int(types)}


@dataclass(frozen=True)
class _Architecture:
    hf: str
    """The Hugging Face class that it was converted from."""
    keys: Callable[[_File], HFKeys] = lambda f: {}
    paired: bool = False
    """The converter interleaves the rows of Q and K, so that neighbouring dimensions rotate."""


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", paired=True),
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM"),
    "smollm3": _Architecture("SmolLM3ForCausalLM", _smollm3, paired=True),
    "granite": _Architecture("GraniteForCausalLM", _granite, paired=True),
    "gemma": _Architecture("GemmaForCausalLM", _gemma),
    "gemma2": _Architecture("Gemma2ForCausalLM", _gemma2),
    "gemma3": _Architecture("Gemma3ForCausalLM", _gemma3),
    "phi2": _Architecture("PhiForCausalLM", _phi2),
    "phi3": _Architecture("Phi3ForCausalLM", _phi3),
    "olmo": _Architecture("OlmoForCausalLM", _olmo, paired=True),
    "olmo2": _Architecture("Olmo2ForCausalLM", _olmo2),
    "stablelm": _Architecture("StableLmForCausalLM", _stablelm),
    "starcoder2": _Architecture("Starcoder2ForCausalLM", _starcoder2),
    "gpt2": _Architecture("GPT2LMHeadModel", _gpt2),
    "gptneox": _Architecture("GPTNeoXForCausalLM", _gptneox),
    "bloom": _Architecture("BloomForCausalLM", _bloom),
    "falcon": _Architecture("FalconForCausalLM", _falcon),
    "bert": _Architecture("BertModel", _bert),
}


def known_gguf_architectures() -> tuple[str, ...]:
    """Values of general.architecture that load here."""
    return tuple(sorted(_ARCHITECTURES))


def config_from_gguf(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> ModelConfig:
    """GGUF metadata -> ModelConfig. `tensors` (the file's tensors by name) tells what metadata does not: whether the
    head is tied, which biases there are. `read` gives a tensor; without it the rotary factors that LLaMA 3 and Phi-3
    files keep as tensors are missing, which only planning can do without.

    Raises UnknownArchitectureError, FormatError, UnsupportedError.
    """
    f = _File(meta, tensors, read)
    if f.arch not in _ARCHITECTURES:
        raise UnknownArchitectureError(
            f"The GGUF architecture {f.arch!r} is not known.", hint=f"Known: {', '.join(known_gguf_architectures())}."
        )
    if f.get("expert_count"):
        raise UnknownArchitectureError(
            f"This {f.arch} model is a mixture of {f.get('expert_count')} experts; only dense models are known.",
            hint="Choose a dense model of this family.",
        )
    architecture = _ARCHITECTURES[f.arch]
    ids = _token_ids(meta)
    config = config_from_hf({"architectures": [architecture.hf], **_common(f), **ids, **architecture.keys(f)})
    config = replace(config, extra=ids, pooler=False)
    if architecture.paired:
        config = replace(config, rope_interleaved=True)
    if f.tensors:
        config = replace(
            config,
            qkv_bias=f.has("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
            out_bias=f.has("blk.0.attn_output.bias"),
            mlp_bias=f.has("blk.0.ffn_up.bias"),
            head_bias=f.has("output.bias"),
        )
    return config


def _token_ids(meta: Mapping[str, Any]) -> HFKeys:
    """null where the file has none: left out, a Hugging Face class would assume its own."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {hf: meta.get(f"tokenizer.ggml.{name}_token_id") for name, hf in names.items()}
