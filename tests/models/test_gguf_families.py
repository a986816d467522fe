"""GGUF files of every architecture equal the transformers model that they were made of.

The files are written here as llama.cpp's converter writes them: `Layout` holds what that does to metadata and weights
of each architecture (names come from the gguf package). Quantised variants equal the model with dequantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from family_equality import FP32, furthest, hf_logits, our_logits, quiet, random_prompts, tiny_model
from test_encoder_families import hidden_states, prompts, theirs
from test_encoder_families import tiny as tiny_encoder
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmasos.errors import FormatError, LLMasOSError, UnknownArchitectureError, UnsupportedError
from llmasos.formats import open_checkpoint
from llmasos.formats.quants import FOUR_BIT
from llmasos.models import load as load_room
from llmasos.models.config import ModelConfig
from llmasos.models.families import config_from_hf
from llmasos.models.families.gguf import config_from_gguf, known_gguf_architectures
from llmasos.models.load import LoadedModel, hf_state, load_model, read_config
from llmasos.models.lowbit import MANY_TOKENS, BlockEmbedding, Int4Linear, Int8Linear, PackedLinear
from llmasos.models.weights import Upload

Type = gguf.GGMLQuantizationType
Keys = dict[str, Any]

# what the converter does to weights


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head: (first half, second half) -> neighbouring pairs."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def pair_rows(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return paired(tensor, config.num_attention_heads)
    if re.search(r"\.k_proj\.(weight|bias)$", name):
        return paired(tensor, config.num_key_value_heads)
    return tensor


def add_one(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    return tensor + 1 if name.endswith("norm.weight") else tensor


def transpose(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    return tensor.t() if re.search(r"\.c_(attn|proj|fc)\.weight$", name) else tensor


def ungroup(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """Fused rows by key head (its queries, key, value) -> all queries, all keys, all values."""
    if "query_key_value" not in name:
        return tensor
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_kv_heads", heads)
    groups = tensor.reshape(kv_heads, heads // kv_heads + 2, config.hidden_size // heads, *tensor.shape[1:])
    pieces = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return torch.cat([p.reshape(-1, *tensor.shape[1:]) for p in pieces])


def stack_head_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """StableLM 2 12B: one tensor of all heads' norms."""
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        if found := re.match(r"(.*[qk]_layernorm)\.norms\.(\d+)\.weight", name):
            out.setdefault(f"{found[1]}.weight", []).append(tensor)
        else:
            out[name] = tensor
    return {name: torch.stack(t) if isinstance(t, list) else t for name, t in out.items()}


# what it does to config.json


def metadata(c: PretrainedConfig) -> Keys:
    """Keys that most architectures share."""
    keys: Keys = {
        "block_count": c.num_hidden_layers,
        "context_length": getattr(c, "max_position_embeddings", 64),
        "embedding_length": c.hidden_size,
        "feed_forward_length": getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        "attention.head_count": c.num_attention_heads,
    }
    found = {
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.key_length": "head_dim",
    }
    keys |= {key: getattr(c, name) for key, name in found.items() if getattr(c, name, None) is not None}
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(c, name):
            keys["attention.layer_norm_epsilon"] = getattr(c, name)
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        keys["rope.freq_base"] = float(rope["rope_theta"])
    if (fraction := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        keys["rope.dimension_count"] = int(fraction * (c.hidden_size // c.num_attention_heads))
    return keys


@dataclass(frozen=True)
class Layout:
    arch: str
    config: PretrainedConfig
    keys: Keys = field(default_factory=dict)
    """Metadata beyond the common keys; None takes one away."""
    weights: Callable[[str, Tensor, PretrainedConfig], Tensor] = lambda name, tensor, config: tensor
    extra: Mapping[str, list[float]] = field(default_factory=dict)
    """Tensors that the converter makes from the config."""
    exact: bool = True
    """Taking back what was done to the weights gives the same bits."""


def write_gguf(
    path: Path, layout: Layout, state: Mapping[str, Tensor], kind: Type | None = None, keys: Keys | None = None
) -> Path:
    """`kind`: block type of the matrices; None: float32."""
    writer = gguf.GGUFWriter(path, layout.arch)
    for key, value in (metadata(layout.config) | layout.keys | (keys or {})).items():
        add(writer, f"{layout.arch}.{key}", value)
    for name, array in gguf_tensors(layout, state).items():
        quantise = kind is not None and array.ndim == 2 and "position_embd" not in name
        data = blocks(array, kind) if quantise and kind is not None else array
        writer.add_tensor(name, data, raw_dtype=kind if quantise else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def gguf_tensors(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[layout.arch], layout.config.num_hidden_layers)
    found = {}
    for name, tensor in stack_head_norms(state).items():
        spelled = (name, name.removeprefix("transformer."))
        found_names = [names.get_name(n, try_suffixes=(".weight", ".bias")) for n in spelled]
        ours = next((n for n in found_names if n), name)
        assert ours != name or name.startswith("blk."), name
        found[ours] = layout.weights(name, tensor, layout.config).contiguous().numpy()
    return found | {f"{name}.weight": np.array(values, np.float32) for name, values in layout.extra.items()}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Without the head where it is the embeddings."""
    tied = {"lm_head.weight", "embed_out.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load(path: Path, dtype: str = "float32", quantization: str = "none") -> LoadedModel:
    return load_model(path, device="cpu", dtype=dtype, quantization=quantization, with_tokenizer=False)


# one tiny model of every architecture, and of every variant that is laid out in another way

SIZES: Keys = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS: Keys = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_KV = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | IDS
FALCON: Keys = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | IDS
LLAMA3_ROPE: Keys = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA: Keys = SIZES | IDS | {"head_dim": 32}
SLIDING: Keys = GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 8}
PHI3: Keys = SIZES | IDS
FACTORS = {"rope_factors_short": [1.0 + i / 10 for i in range(6)], "rope_factors_long": [2.0 + i / 4 for i in range(6)]}
LONGROPE: Keys = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 8,
    "short_factor": FACTORS["rope_factors_short"],
    "long_factor": FACTORS["rope_factors_long"],
}


def divisors(rope: Keys, head_dim: int = 16) -> list[float]:
    """rope_freqs.weight: by what LLaMA 3's scaling divides each frequency."""
    config = hf.LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=1 << 17)
    scaled, _ = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).tolist()


def llama(rope: Keys | None = None, **changes: Any) -> PretrainedConfig:
    with quiet():
        return hf.LlamaConfig(**(SIZES | IDS | changes), **({"rope_parameters": rope} if rope else {}))


def rope(kind: str, **keys: Any) -> Keys:
    return {"rope_type": kind, "rope_theta": 10000.0, **keys}


ODD_ROPE = LLAMA3_ROPE | {"original_max_position_embeddings": 32, "factor": 5.0}
LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", llama(), weights=pair_rows),
    "llama biases": Layout("llama", llama(attention_bias=True, mlp_bias=True), weights=pair_rows),
    "llama 3.1": Layout(
        "llama",
        llama(LLAMA3_ROPE, tie_word_embeddings=True),
        weights=pair_rows,
        extra={"rope_freqs": divisors(LLAMA3_ROPE)},
    ),
    "llama odd divisors": Layout("llama", llama(ODD_ROPE), weights=pair_rows, extra={"rope_freqs": divisors(ODD_ROPE)}),
    "llama linear": Layout(
        "llama",
        llama(rope("linear", factor=4.0)),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        pair_rows,
    ),
    "llama linear, older key": Layout(
        "llama", llama(rope("linear", factor=4.0)), {"rope.scale_linear": 4.0}, pair_rows
    ),
    "llama yarn": Layout(
        "llama",
        llama(rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0)),
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 16.0,
        },
        pair_rows,
    ),
    "mistral": Layout("llama", hf.MistralConfig(**SIZES, head_dim=32, sliding_window=None), weights=pair_rows),
    "qwen2": Layout("qwen2", hf.Qwen2Config(**SIZES, **IDS)),
    "qwen3": Layout("qwen3", hf.Qwen3Config(**SIZES, **IDS, head_dim=32)),
    "smollm3": Layout("smollm3", hf.SmolLM3Config(**(SIZES | IDS | {"num_hidden_layers": 5})), weights=pair_rows),
    "granite": Layout(
        "granite",
        hf.GraniteConfig(
            **(SIZES | IDS),
            attention_multiplier=0.2,
            embedding_multiplier=6.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        {"attention.scale": 0.2, "embedding_scale": 6.0, "residual_scale": 0.5, "logit_scale": 2.0},
        pair_rows,
    ),
    "gemma": Layout("gemma", hf.GemmaConfig(**GEMMA), weights=add_one, exact=False),
    "gemma2": Layout(
        "gemma2",
        hf.Gemma2Config(**SLIDING),
        {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        add_one,
        exact=False,
    ),
    "gemma3": Layout(
        "gemma3",
        hf.Gemma3TextConfig(
            **(SLIDING | {"num_hidden_layers": 7}),
            rope_parameters={
                "full_attention": rope("linear", factor=8.0) | {"rope_theta": 1e6},
                "sliding_attention": rope("default"),
            },
        ),
        {"attention.sliding_window": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        add_one,
        exact=False,
    ),
    "gemma3, layers listed": Layout(
        "gemma3",
        hf.Gemma3TextConfig(**SLIDING, layer_types=["full_attention", "sliding_attention", "full_attention"]),
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True, False]},
        add_one,
        exact=False,
    ),
    "phi2": Layout("phi2", hf.PhiConfig(**(NO_KV | {"intermediate_size": 256}))),
    "phi3": Layout("phi3", hf.Phi3Config(**PHI3, sliding_window=9), {"attention.sliding_window": 9}),
    "phi3 longrope": Layout(
        "phi3",
        hf.Phi3Config(**PHI3, original_max_position_embeddings=8, rope_parameters=LONGROPE),
        {
            "attention.sliding_window": 0,
            "rope.scaling.original_context_length": 8,
            "rope.scaling.attn_factor": float((1 + np.log(8) / np.log(8)) ** 0.5),
        },
        extra=FACTORS,
    ),
    "olmo": Layout("olmo", hf.OlmoConfig(**(SIZES | IDS), clip_qkv=0.9), {"attention.clamp_kqv": 0.9}, pair_rows),
    "olmo2": Layout("olmo2", hf.Olmo2Config(**(SIZES | IDS))),
    "stablelm": Layout("stablelm", hf.StableLmConfig(**(SIZES | IDS), use_qkv_bias=True)),
    "stablelm 12B": Layout(
        "stablelm", hf.StableLmConfig(**(SIZES | IDS), use_parallel_residual=True, qk_layernorm=True)
    ),
    "starcoder2": Layout("starcoder2", hf.Starcoder2Config(**(SIZES | IDS), use_bias=True, sliding_window=None)),
    "gpt2": Layout(
        "gpt2",
        hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=64, **IDS),
        weights=transpose,
    ),
    "gptneox": Layout("gptneox", hf.GPTNeoXConfig(**NO_KV), {"use_parallel_residual": True}, ungroup),
    "gptneox in sequence": Layout(
        "gptneox", hf.GPTNeoXConfig(**NO_KV, use_parallel_residual=False), {"use_parallel_residual": False}, ungroup
    ),
    "bloom": Layout(
        "bloom", hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=3, n_head=4, seq_length=64, **IDS), {}, ungroup
    ),
    "falcon 7B": Layout("falcon", hf.FalconConfig(**FALCON, num_kv_heads=1), {"attention.head_count_kv": 1}, ungroup),
    "falcon 40B": Layout(
        "falcon",
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        {"attention.head_count_kv": 2},
        ungroup,
    ),
    "falcon 11B": Layout(
        "falcon",
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        {"attention.head_count_kv": 2},
        ungroup,
    ),
}


def test_every_architecture_has_a_test() -> None:
    assert {layout.arch for layout in LAYOUTS.values()} | {"bert"} == set(known_gguf_architectures())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gguf_file_equals_the_model_it_was_made_of_and_can_be_saved_as_that(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    model = tiny_model(layout.config)
    loaded = load(write_gguf(tmp_path / "m.gguf", layout, weights_of(model)))
    texts = random_prompts(128, (30, 7))
    ours = our_logits(loaded, texts)
    worst = max(furthest(o, hf_logits(model, text)) for o, text in zip(ours, texts, strict=True))
    print(f"{name}: {worst:.1e}, std {ours[0].std():.2f}")
    assert worst <= FP32
    assert ours[0].std() > 0.05, "no fair measure"

    loaded.save_pretrained(tmp_path / "hf")
    with quiet():
        again, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float32, output_loading_info=True
        )
    assert not any(info.values()), info
    original = model.state_dict()
    assert set(again.state_dict()) == set(original)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, original[key]) if layout.exact else furthest(tensor, original[key]) < 1e-6, key
    assert max(furthest(hf_logits(again, text), hf_logits(model, text)) for text in texts) <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_some_layers_of_a_gguf_file_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    path = write_gguf(tmp_path / "m.gguf", layout, weights_of(tiny_model(layout.config)))
    whole = load(path).module
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "quantization": "none", "with_tokenizer": False}
    some = load_model(path, **options, layers=(0, 2)).module
    for key, weight in some.named_parameters():
        assert torch.equal(weight, whole.get_parameter(key.replace("layers.1.", "layers.2."))), key


class Uploaded(load_room._Filler):
    """As for a GPU: blocks are taken there as they are, and decoded there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.upload = Copies(self.device)


class Copies(Upload):
    def begin(self) -> None:
        pass

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_decoded_where_they_are_computed_with_are_the_same(
    kind: Type, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS["llama"]
    path = write_gguf(tmp_path / "m.gguf", layout, weights_of(tiny_model(layout.config)), kind)
    expected = dict(load(path, dtype).module.named_parameters())
    monkeypatch.setattr(load_room, "_Filler", Uploaded)
    found = dict(load(path, dtype).module.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1])
def test_a_gpu_decodes_blocks_to_the_bits_of_a_cpu(kind: Type, tmp_path: Path) -> None:
    layout = LAYOUTS["llama"]
    path = write_gguf(tmp_path / "m.gguf", layout, weights_of(tiny_model(layout.config)), kind)
    expected = dict(load(path, "bfloat16").module.named_parameters())
    there = load_model(path, device="cuda", dtype="bfloat16", quantization="none", with_tokenizer=False)
    for name, weight in there.module.named_parameters():
        assert torch.equal(weight.cpu(), expected[name]), name


def test_gemma_norms_that_were_bfloat16_come_back_exactly(tmp_path: Path) -> None:
    layout = LAYOUTS["gemma2"]
    model = tiny_model(layout.config).bfloat16().float()
    state = hf_state(load(write_gguf(tmp_path / "m.gguf", layout, weights_of(model))))
    for name, tensor in state.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["llama 3.1", "llama yarn", "gemma3", "phi3 longrope", "falcon 40B", "granite"])
def test_the_config_is_that_of_the_original_but_for_the_layout_of_weights(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    model = tiny_model(layout.config)
    found = read_config(write_gguf(tmp_path / "m.gguf", layout, weights_of(model)))
    with quiet():
        original = config_from_hf(layout.config.to_dict() | {"architectures": [type(model).__name__]})
    differ = {f for f in ModelConfig.__dataclass_fields__ if f != "extra" and vars(found)[f] != vars(original)[f]}
    assert differ <= {"rope_interleaved"}, {f: (vars(found)[f], vars(original)[f]) for f in differ}


# encoders


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel"])
def test_an_encoder_in_gguf_equals_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny_encoder(architecture)
    loaded = load(write_encoder(tmp_path / "m.gguf", model))
    texts = prompts()
    hidden = hidden_states(loaded, texts).split([len(t) for t in texts])
    for ours, text in zip(hidden, texts, strict=True):
        assert furthest(ours, theirs(model, text).last_hidden_state[0]) <= FP32
    loaded.save_pretrained(tmp_path / "hf")
    with quiet():
        again = AutoModel.from_pretrained(tmp_path / "hf").eval()
    for text in texts:
        assert furthest(theirs(again, text).last_hidden_state, theirs(model, text).last_hidden_state) <= 1e-5


def test_an_encoder_keeps_quantised_weights_low_bit(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "m.gguf", tiny_encoder("BertModel", intermediate_size=64), Type.Q8_0)
    full, low = load(path), load(path, "bfloat16", "auto")
    assert isinstance(low.module.layers[0].attn.qkv, Int8Linear)
    assert isinstance(low.module.embed, BlockEmbedding)
    expected = hidden_states(full, prompts())
    assert (hidden_states(low, prompts()) - expected).norm() <= LOW_BIT_LOGITS * expected.norm()


def write_encoder(path: Path, model: PreTrainedModel, kind: Type | None = None) -> Path:
    """The converter leaves the pooler out and cuts off the rows before RoBERTa's first position."""
    config = model.config
    offset = config.pad_token_id + 1 if "Roberta" in type(model).__name__ else 0
    keys: Keys = {"context_length": config.max_position_embeddings - offset, "attention.causal": False}
    keys |= {"feed_forward_length": getattr(config, "hidden_dim", None) or config.intermediate_size}
    keys |= {"attention.layer_norm_epsilon": 1e-12, "token_type_count": getattr(config, "type_vocab_size", 1)}

    def cut(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
        return tensor[offset:] if "position_embeddings" in name else tensor

    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    return write_gguf(path, Layout("bert", config, keys, cut), state, kind)


# low-bit

RANDOM_BLOCKS = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
"""The gguf package can decode these, not make them: random bits with sensible scales do for a test."""


def blocks(array: np.ndarray, kind: Type) -> np.ndarray:
    if kind.name not in RANDOM_BLOCKS:
        return gguf.quants.quantize(array.astype(np.float32), kind)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(array.size)
    out = random.integers(0, 256, (array.shape[0], array.shape[1] // size, num_bytes), np.uint8)
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}[kind.name]
    step = np.float16(array.std() / {"Q2_K": 16, "Q3_K": 64, "Q4_K": 400, "Q5_K": 800, "Q6_K": 1200}[kind.name])
    low = np.float16(float(step) * {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}.get(kind.name, 1.0))
    half = np.array([step, low], np.float16).view(np.uint8)
    out[..., scales[0] : scales[1]] = half[: scales[1] - scales[0]]
    return out.reshape(array.shape[0], -1)


def dequantised(layout: Layout, model: PreTrainedModel, kind: Type) -> PreTrainedModel:
    """The model with the weights that a quantised file holds, decoded by the gguf package."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows = gguf.quants.dequantize(blocks(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rows))
    return model


WIDE: Keys = SIZES | IDS | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
QWEN = Layout("qwen2", hf.Qwen2Config(**WIDE, tie_word_embeddings=True))
PHI = Layout("phi3", hf.Phi3Config(**WIDE))
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
QUANTISED = [(QWEN, kind) for kind in KINDS] + [(PHI, "Q4_1"), (PHI, "Q6_K")]


@pytest.mark.parametrize(("layout", "kind"), QUANTISED, ids=[f"{layout.arch} {kind}" for layout, kind in QUANTISED])
def test_a_quantised_file_equals_the_model_with_its_dequantised_weights(
    layout: Layout, kind: str, tmp_path: Path
) -> None:
    model = tiny_model(layout.config)
    path = write_gguf(tmp_path / "m.gguf", layout, weights_of(model), Type[kind])
    reference = dequantised(layout, model, Type[kind])
    texts = random_prompts(128, (MANY_TOKENS + 5, 7))
    expected = [hf_logits(reference, text) for text in texts]
    full = load(path)
    assert max(furthest(our_logits(full, [t])[0], e) for t, e in zip(texts, expected, strict=True)) <= FP32

    low = load(path, "bfloat16", "auto")
    assert isinstance(low.module.embed, BlockEmbedding)
    check_low_bit_layers(low, full, four_bit=kind in FOUR_BIT)
    for text, logits in zip(texts, expected, strict=True):
        difference = float((our_logits(low, [text])[0] - logits).norm() / logits.norm())
        print(f"{layout.arch} {kind}, {len(text)} tokens: {difference:.1%}")
        assert difference <= LOW_BIT_LOGITS


BF16_ERROR = 2.0**-9
"""Largest relative error of rounding to bfloat16."""
LOW_BIT_LOGITS = 0.03
"""Allowed distance of the logits, relative to their length: a few bfloat16 steps and the int8 layers' rounding."""


def check_low_bit_layers(low: LoadedModel, full: LoadedModel, four_bit: bool) -> None:
    """Each layer holds the weight up to its own rounding, and multiplies by what it holds, for few tokens and many."""
    kind = Int4Linear if four_bit else Int8Linear
    low_bit = Int4Linear | Int8Linear | PackedLinear
    modules = {name: m for name, m in low.module.named_modules() if isinstance(m, low_bit)}
    width = full.module.get_submodule("head").weight.shape[1]
    heads = {"head": PackedLinear} if kind is Int8Linear and PackedLinear.fits(width, torch.bfloat16) else {}
    assert all(type(m) is heads.get(name, kind) for name, m in modules.items())
    assert set(modules) == {n for n, m in full.module.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in modules.items():
        weight = full.module.get_submodule(name).weight
        largest = weight.abs().amax(-1, keepdim=True)
        # bfloat16 rounds scale, weight and their product; int8 adds half a step of 127
        allowed = largest * (2 * BF16_ERROR if four_bit else 0.5 / 127 + 4 * BF16_ERROR)
        held = module.dequantize().float()
        assert ((held - weight).abs() <= allowed + 1e-6).all(), name
        for num_tokens in (1, MANY_TOKENS):
            x = torch.randn(num_tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
            y = torch.nn.functional.linear(x.float(), held)
            y = y if module.bias is None else y + module.bias.float()
            assert furthest(module(x).float(), y) <= 6 * BF16_ERROR * float(y.abs().max()), name


def test_low_bit_weights_cannot_be_saved(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", QWEN, weights_of(tiny_model(QWEN.config)), Type.Q4_0)
    with pytest.raises(UnsupportedError, match="low-bit in memory"):
        load(path, "bfloat16", "auto").save_pretrained(tmp_path / "hf")


# what metadata can't tell, and what is refused


def saved(tmp_path: Path, layout: Layout, keys: Keys | None = None, **tensors: Tensor) -> Path:
    state = weights_of(tiny_model(layout.config))
    return write_gguf(tmp_path / "m.gguf", layout, state | tensors, keys=keys)


def test_planning_reads_the_config_without_a_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, LAYOUTS["llama 3.1"])
    checkpoint = open_checkpoint(path)
    planned = config_from_gguf(checkpoint.metadata, checkpoint.tensors)
    checkpoint.close()
    full = read_config(path)
    assert planned.rope_scaling is None
    assert full.rope_scaling is not None
    assert full.rope_scaling.kind == "llama3"
    assert (planned.num_layers, planned.vocab_size, planned.tie_embeddings) == (3, 128, True)


@pytest.mark.parametrize(
    ("name", "keys", "error", "message"),
    [
        ("llama", {"block_count": None}, FormatError, r"no llama\.block_count"),
        ("llama", {"attention.head_count": 0}, FormatError, "asks for 0 heads"),
        ("llama", {"expert_count": 8}, UnknownArchitectureError, "mixture of 8 experts"),
        ("llama", {"attention.head_count_kv": [1, 2, 2]}, UnsupportedError, r"each layer its own llama\.attention"),
        ("llama", {"rope.scaling.type": "spiral"}, FormatError, "'spiral'"),
        ("olmo2", {"attention.sliding_window": 8}, UnknownArchitectureError, "OLMo 3"),
        ("granite", {"rope.scaling.finetuned": False}, UnsupportedError, "no rotary positions"),
        ("llama", {"embedding_length": 32}, FormatError, "has the shape"),
    ],
)
def test_files_that_would_be_computed_wrongly_are_refused(
    name: str, keys: Keys, error: type[LLMasOSError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load(saved(tmp_path, LAYOUTS[name], keys))


def test_the_same_number_for_every_layer_is_that_number(tmp_path: Path) -> None:
    assert read_config(saved(tmp_path, LAYOUTS["llama"], {"attention.head_count_kv": [2, 2, 2]})).num_kv_heads == 2


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'mamba' is not known\. Known: bert, bloom"):
        config_from_gguf({"general.architecture": "mamba"})


def test_tensors_that_nothing_uses_are_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": torch.ones(16)}
    with pytest.raises(UnsupportedError, match=r"no use for: blk\.0\.attn_q_norm\.weight"):
        load(saved(tmp_path, LAYOUTS["qwen2"], **extra))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = weights_of(tiny_model(LAYOUTS["llama"].config))
    del state["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(FormatError, match=r"no tensor 'blk\.1\.ffn_down\.weight'"):
        load(write_gguf(tmp_path / "m.gguf", LAYOUTS["llama"], state))


def test_a_model_that_its_class_cannot_express_runs_but_is_not_saved(tmp_path: Path) -> None:
    """Biases on Q, K and V alone: other families are converted to LLaMA's architecture so."""
    biases = {
        f"model.layers.{i}.self_attn.{p}_proj.bias": torch.ones(64 if p == "q" else 32) for i in range(3) for p in "qkv"
    }
    loaded = load(saved(tmp_path, LAYOUTS["llama"], **biases))
    assert loaded.config.qkv_bias
    assert our_logits(loaded, random_prompts(128))[0].isfinite().all()
    with pytest.raises(UnsupportedError, match="out_bias would change"):
        loaded.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_vocabulary_is_as_long_as_the_embeddings(tmp_path: Path) -> None:
    path = saved(tmp_path, LAYOUTS["qwen2"], {"vocab_size": 100})
    assert read_config(path).vocab_size == 128
