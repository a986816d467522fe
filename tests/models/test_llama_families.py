"""LLaMA and its relatives equal transformers, in every variant that changes arithmetic; both spellings of a config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from family_equality import check_family, check_logits, edit_weights, load_ours, quiet, random_prompts, save_hf
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from llmasos.errors import FormatError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.families import config_from_hf, config_to_hf

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = (23, 9)
"""Prompts that leave a window of 8."""
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_llama_equals_transformers(tmp_path):
    check_family(LlamaConfig(**SIZES), tmp_path)


def test_llama_with_biases_a_head_width_of_its_own_and_tied_ends_equals_transformers(tmp_path):
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True)
    check_family(config, tmp_path)


def test_mistral_beyond_its_window_equals_transformers(tmp_path):
    check_family(MistralConfig(**SIZES, sliding_window=8, head_dim=16), tmp_path, lengths=LONG)


def test_mistral_without_a_window_stays_without(tmp_path):
    check_family(MistralConfig(**SIZES, sliding_window=None), tmp_path, greedy=False)


def test_qwen2_equals_transformers(tmp_path):
    check_family(Qwen2Config(**SIZES, tie_word_embeddings=True), tmp_path)


def test_qwen2_with_windows_in_upper_layers_equals_transformers(tmp_path):
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    check_family(config, tmp_path, lengths=LONG)


def test_qwen3_equals_transformers(tmp_path):
    check_family(Qwen3Config(**SIZES, head_dim=16, attention_bias=True), tmp_path, seed=1)


def test_smollm3_with_layers_that_do_not_rotate_equals_transformers(tmp_path):
    check_family(SmolLM3Config(**SIZES, no_rope_layer_interval=2), tmp_path)


def test_smollm3_with_windows_equals_transformers(tmp_path):
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=8)
    check_family(config, tmp_path, lengths=LONG)


def test_granite_equals_transformers(tmp_path):
    config = GraniteConfig(
        **SIZES,
        attention_multiplier=0.4,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=0.7,
        attention_bias=True,
        mlp_bias=True,
    )
    check_family(config, tmp_path)


def test_phi3_equals_transformers(tmp_path):
    check_family(Phi3Config(**SIZES, sliding_window=8), tmp_path, lengths=LONG)


def test_phi4_mini_with_partial_rotation_equals_transformers(tmp_path):
    longrope = {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.0, 2.0, 4.0],
        "partial_rotary_factor": 0.75,
    }
    config = Phi3Config(
        **SIZES, original_max_position_embeddings=100, rope_parameters=longrope, tie_word_embeddings=True
    )
    check_family(config, tmp_path)


def test_olmo_with_clipping_equals_transformers(tmp_path):
    check_family(OlmoConfig(**SIZES, clip_qkv=0.8), tmp_path)


def test_olmo2_equals_transformers(tmp_path):
    check_family(Olmo2Config(**SIZES), tmp_path)


def test_stablelm_equals_transformers(tmp_path):
    check_family(StableLmConfig(**SIZES, use_qkv_bias=True, partial_rotary_factor=0.5), tmp_path)


def test_stablelm_parallel_with_a_norm_for_every_head_equals_transformers(tmp_path):
    config = StableLmConfig(**SIZES, use_parallel_residual=True, qk_layernorm=True)
    check_family(config, tmp_path)


def test_starcoder2_beyond_its_window_equals_transformers(tmp_path):
    check_family(Starcoder2Config(**SIZES, sliding_window=8), tmp_path, lengths=LONG)


def test_starcoder2_without_biases_equals_transformers(tmp_path):
    check_family(Starcoder2Config(**SIZES, use_bias=False, tie_word_embeddings=False), tmp_path, greedy=False)


def test_gemma_equals_transformers(tmp_path):
    check_family(GemmaConfig(**SIZES, head_dim=16), tmp_path)


def test_gemma2_beyond_its_window_equals_transformers(tmp_path):
    config = Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    )
    check_family(config, tmp_path, lengths=LONG)


def gemma3(**changes: Any) -> Gemma3TextConfig:
    both = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    keys = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return Gemma3TextConfig(**(SIZES | keys | {"num_hidden_layers": 4, "rope_parameters": both} | changes))


def test_gemma3_with_two_rotary_bases_equals_transformers(tmp_path):
    check_family(gemma3(), tmp_path, lengths=LONG)


@pytest.mark.parametrize("transformers_4", [False, True])
def test_gemma3_text_loads_from_a_multimodal_checkpoint(tmp_path, transformers_4, caplog):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = gemma3(vocab_size=120)
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.image_token_index, config.mm_tokens_per_image = 119, 4
    torch.manual_seed(0)
    with quiet():
        model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = save_hf(model, tmp_path / "hf")
    if transformers_4:
        moved = {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        }
        edit_weights(folder, lambda tensors: {_renamed(name, moved): tensor for name, tensor in tensors.items()})
    loaded = load_ours(folder)
    assert not caplog.records, "the vision part is left out on purpose"
    prompts = random_prompts(100, LONG)
    check_logits(loaded, model, prompts, 1e-4)
    loaded.save_pretrained(tmp_path / "text")
    with quiet():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert type(alone).__name__ == "Gemma3ForCausalLM"
    check_logits(loaded, alone, prompts, 1e-4)


def _renamed(name: str, moved: dict[str, str]) -> str:
    for old, new in moved.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# config.json


def read(config: PretrainedConfig, **changes: Any) -> ModelConfig:
    """Through config.json as transformers 5 writes it."""
    keys = json.loads(config.to_json_string(use_diff=False)) | changes
    return config_from_hf(keys | {"architectures": [AutoModelForCausalLM._model_mapping[type(config)].__name__]})


def older(config: PretrainedConfig) -> dict[str, Any]:
    """The same config.json as transformers 4 wrote it: rope_theta and rope_scaling."""
    keys = json.loads(config.to_json_string(use_diff=False))
    table = keys.pop("rope_parameters")
    if "full_attention" in table:
        keys["rope_local_base_freq"] = table["sliding_attention"]["rope_theta"]
        table = table["full_attention"]
    keys["rope_theta"] = table.pop("rope_theta")
    keys["partial_rotary_factor"] = table.pop("partial_rotary_factor", None)
    table["type"] = table.pop("rope_type")
    keys["rope_scaling"] = None if table["type"] == "default" else table
    keys["architectures"] = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return keys


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, rope_parameters=LLAMA3),
        Qwen2Config(**SIZES, rope_parameters=YARN),
        Phi3Config(**SIZES, rope_parameters=dict(LONGROPE), original_max_position_embeddings=32),
        StableLmConfig(**SIZES),
        gemma3(),
        SmolLM3Config(**SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_both_spellings_of_a_config_mean_the_same(config):
    assert config_from_hf(older(config)) == read(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), {"rope_theta": 10000.0, "sliding_window": 0, "tie_embeddings": False}),
        (SmolLM3Config(**SIZES), {"rope_theta": 2000000.0, "tie_embeddings": True}),
        (StableLmConfig(**SIZES), {"rotary_dim": 2}),
        (Qwen2Config(**SIZES), {"sliding_window": 0, "qkv_bias": True, "out_bias": False}),
        (GemmaConfig(**SIZES, hidden_act="gelu"), {"activation": "gelu_tanh", "head_dim": 256}),
        (Gemma2Config(**SIZES), {"layer_types": ("sliding", "full", "sliding"), "final_softcap": 30.0}),
        (GraniteConfig(**SIZES), {"attention_scale": 1.0, "logit_scale": 1.0}),
        (Starcoder2Config(**SIZES), {"sliding_window": 0, "qkv_bias": True, "tie_embeddings": True}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_key_left_out_means_what_its_class_means(config, expected):
    keys = json.loads(config.to_json_string(use_diff=False))
    names = config_from_hf(keys | {"architectures": None}).architecture
    sparse = {key: keys[key] for key in SIZES} | {"model_type": config.model_type, "architectures": [names]}
    found = config_from_hf(sparse)
    assert {key: getattr(found, key) for key in expected} == expected
    assert found == read(config)


def test_the_text_part_of_a_multimodal_gemma3_may_leave_out_all_but_its_sizes():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    keys = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    found = config_from_hf(keys)
    assert (found.num_heads, found.num_kv_heads, found.head_dim, found.vocab_size) == (8, 4, 256, 262208)
    assert found.layer_types[:6] == ("sliding",) * 5 + ("full",)
    assert (found.rope_theta, found.rope_local_theta, found.context_length) == (1000000.0, 10000.0, 131072)
    assert found.rope_scaling is not None and found.rope_scaling.factor == 8.0
    assert found.architecture == "Gemma3ForCausalLM" and found.extra["eos_token_id"] == [1, 106]
    assert config_from_hf(config_to_hf(found)) == found


def test_scalings_say_how_long_the_context_is():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert read(LlamaConfig(**SIZES, rope_parameters=dynamic)).context_length == 512
    assert read(Qwen2Config(**SIZES, rope_parameters=YARN)).context_length == 512
    assert read(LlamaConfig(**SIZES, rope_parameters=LLAMA3)).context_length == 128


def llama_json(**changes: Any) -> dict[str, Any]:
    keys = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | changes
    return {key: value for key, value in keys.items() if value != "missing"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "missing"}, ["hidden_size"]),
        ({"hidden_size": "wide"}, ["wide"]),
        ({"num_attention_heads": 0}, ["zero"]),
        ({"num_key_value_heads": 3}, ["4", "3"]),
        ({"hidden_act": "swiglu"}, ["swiglu", "silu"]),
        ({"rope_scaling": {"type": "xpos", "factor": 2.0}}, ["xpos", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ["short_factor", "4"]),
        ({"partial_rotary_factor": 0.4}, ["3 of 8"]),
        ({"model_type": "qwen2", "architectures": None, "layer_types": ["chunked_attention"] * 3}, ["chunked"]),
        ({"model_type": "qwen2", "architectures": None, "layer_types": ["full_attention"]}, ["layer_types"]),
        ({"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]}, ["no_rope_layers"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_config_that_cannot_be_meant_is_named(changes, words):
    with pytest.raises(FormatError) as caught:
        config_from_hf(llama_json(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.hint


def test_gemma_that_looks_both_ways_is_refused():
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        config_from_hf(json.loads(gemma3(use_bidirectional_attention=True).to_json_string()))
