"""Operations of training: what torch counts, and what the published figures count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.decoder import Decoder
from llmasos.models.families import config_from_hf
from llmasos.train.flops import (
    attention_width,
    flops_per_token,
    num_multiplied,
    num_weights,
    peak_flops,
    peak_of,
)

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
TINY = {
    **QWEN3,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def small(**changes: Any) -> Any:
    return config_from_hf({**TINY, **changes})


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_torch_counts_the_same_products(is_tied: bool, is_frozen: bool) -> None:
    """With frozen weights the gradient of every layer's input is still computed, as for an adapter beside it."""
    config, length = small(tie_word_embeddings=is_tied), 48
    decoder = Decoder(config)
    if is_frozen:
        decoder.requires_grad_(False)
    tokens = torch.randint(0, config.vocab_size, (length,))
    attend = Varlen(layer_specs(config), [length])
    embedded = decoder.embed(tokens).detach().requires_grad_()
    decoder.embed_tokens = lambda tokens, positions: embedded  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counter:
        decoder.logits(decoder(tokens, torch.arange(length), attend)).sum().backward()
    counts = {str(op): num for op, num in counter.get_flop_counts()["Global"].items()}
    products = sum(num for op, num in counts.items() if "scaled_dot_product" not in op and "bmm" not in op)
    assert products == (4 if is_frozen else 6) * num_multiplied(config) * length


def test_attention_is_two_products_with_the_keys_that_are_seen() -> None:
    config = small()
    # T (T + 1) / 2 pairs of a query and a key that it sees, and as good as T / 2 for each token
    assert attention_width(config, 1000) == 2 * 2 * 4 * 16 * 500
    windowed = replace(config, sliding_window=100, layer_types=("sliding", "full"))
    seen = sum(min(position + 0.5, 100) for position in range(1000)) / 1000
    assert attention_width(windowed, 1000) == pytest.approx(2 * 4 * 16 * (500 + seen), rel=1e-3)
    assert attention_width(windowed, 80) == attention_width(config, 80)


def test_figures_that_others_publish_count_the_same() -> None:
    """6 N and 12 L T D / 2 with the weights' round number: nanoGPT's and PaLM's formula."""
    gpt2, qwen3 = config_from_hf(GPT2), config_from_hf(QWEN3)
    assert num_weights(gpt2) == 124_439_808 and num_weights(qwen3) == 596_049_920
    assert flops_per_token(gpt2, length=1024) == pytest.approx(6 * 124e6 + 12 * 12 * 768 * 1024 / 2, rel=0.005)
    assert flops_per_token(qwen3, length=4096) == pytest.approx(6 * 596e6 + 12 * 28 * 2048 * 4096 / 2, rel=0.001)
    attention = 6 * attention_width(qwen3, 4096)
    assert flops_per_token(qwen3, length=4096, frozen=True) - attention == pytest.approx(4 * 596e6, rel=0.001)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Tesla T4", None),
        ("NVIDIA L400", None),
    ],
)
def test_rates_are_those_of_the_data_sheets_and_unknown_elsewhere(name: str, rate: float | None) -> None:
    assert peak_of(name) == rate


def test_no_rate_is_told_for_cpus() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_flops(torch.device("cuda"), torch.float32) is None
