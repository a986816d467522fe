"""LLaMA and its relatives equal transformers, in every variant that changes arithmetic, from either spelling of a config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_equality import check_family
from transformers import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

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
