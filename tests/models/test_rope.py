"""Rotary positions: frequencies and whole models equal transformers for every scaling, below and above the trained
context; tables grow, follow dtype, and do not depend on what else is in the batch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from family_equality import FP32, furthest, hf_logits, load_ours, our_logits, random_prompts, save_hf, tiny_model
from transformers import LlamaConfig, Phi3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmasos.models.attention import ContiguousCache
from llmasos.models.config import RopeScaling
from llmasos.models.families import config_from_hf, config_to_hf
from llmasos.models.layers import Rope, rope_frequencies

TRAINED, STRETCHED = 32, 128
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHORT, LONG = [1.0 + 0.02 * i for i in range(16)], [1.5 + 0.5 * i for i in range(16)]
ORIGINAL = {"original_max_position_embeddings": TRAINED}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, **BANDS, **ORIGINAL},
    "yarn": YARN,
    "yarn with its own bands": YARN | {"beta_fast": 8.0, "beta_slow": 0.5},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn without truncation": YARN | {"truncate": False},
    "yarn with an attention factor": YARN | {"attention_factor": 1.3},
    "yarn trained on less than a turn": YARN | {"original_max_position_embeddings": 4},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **ORIGINAL},
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 2.0,
        **ORIGINAL,
    },
    "longrope with an attention factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.2,
        **ORIGINAL,
    },
}


def hf_config(scaling: str) -> PretrainedConfig:
    table = {"rope_theta": 10000.0, **SCALINGS[scaling]}
    if table["rope_type"] == "longrope":
        return Phi3Config(**SIZES, **ORIGINAL, max_position_embeddings=STRETCHED, rope_parameters=table)
    # dynamic counts from max_position_embeddings, all others end there
    context = TRAINED if table["rope_type"] == "dynamic" else STRETCHED
    return LlamaConfig(**SIZES, max_position_embeddings=context, rope_parameters=table)


def as_json(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string()) | {"architectures": None}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [16, 100])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "default"])
def test_frequencies_and_factor_equal_transformers(scaling, length):
    config = hf_config(scaling)
    theirs, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, seq_len=length)
    ours = config_from_hf(as_json(config))
    stretched = length if length > TRAINED else 0
    inverse, our_factor = rope_frequencies(
        ours.rope_dim, ours.rope_theta, ours.rope_scaling, ours.context_length, stretched
    )
    torch.testing.assert_close(inverse, theirs, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_equal_transformers_below_and_above_the_trained_context(tmp_path, scaling):
    model = tiny_model(hf_config(scaling))
    loaded = load_ours(save_hf(model, tmp_path))
    assert loaded.config.context_length == STRETCHED
    for length in (20, TRAINED, TRAINED + 1, 100):
        (prompt,) = random_prompts(64, [length])
        worst = furthest(our_logits(loaded, [prompt])[0], hf_logits(model, prompt))
        assert worst <= FP32, f"{length} tokens: {worst:.1e}"
    plain = load_ours(save_hf(tiny_model(hf_config("default")), tmp_path / "plain"))
    if scaling != "default":
        assert furthest(our_logits(loaded, [prompt])[0], our_logits(plain, [prompt])[0]) > 100 * FP32


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_written_config_says_the_same(scaling):
    config = config_from_hf(as_json(hf_config(scaling)))
    again = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(again) == config
    fresh = (Phi3Config if "longrope" in scaling else LlamaConfig)(**again)
    assert config_from_hf(as_json(fresh)) == config


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_a_sequence_turns_the_same_alone_and_beside_a_longer_one(tmp_path, scaling):
    loaded = load_ours(save_hf(tiny_model(hf_config(scaling)), tmp_path))
    prompts = random_prompts(64, [20, 90, 40, 25])
    for prompt, together in zip(prompts, our_logits(loaded, prompts), strict=True):
        assert furthest(together, our_logits(loaded, [prompt])[0]) <= 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_complex_product(interleaved):
    rope = Rope(8, 100.0, interleaved, None, 64)
    x, positions = torch.randn(5, 3, 12), torch.tensor([0, 7, 3, 63, 300])
    turned = rope.rotate(x, rope.tables(positions, torch.float32))

    def complex_pairs(heads: torch.Tensor) -> torch.Tensor:
        part = heads[..., :8].double()
        pairs = part.unflatten(-1, (4, 2)) if interleaved else part.unflatten(-1, (2, 4)).mT
        return torch.view_as_complex(pairs.contiguous())

    angles = positions[:, None].double() * 100.0 ** -(torch.arange(4).double() / 4)
    expected = complex_pairs(x) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(complex_pairs(turned), expected, atol=1e-4, rtol=0)
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_tables_grow_and_stay_right():
    rope = Rope(16, 10000.0, False, None, 4096)
    early = [t.clone() for t in rope.tables(torch.arange(10), torch.float32)]
    far = rope.tables(torch.tensor([5, 2999]), torch.float32)
    assert torch.equal(far[0][0], early[0][5]) and torch.equal(far[1][0], early[1][5])
    fresh = Rope(16, 10000.0, False, None, 4096).tables(torch.tensor([2999]), torch.float32)
    assert torch.equal(far[0][1:], fresh[0]) and torch.equal(far[1][1:], fresh[1])


def test_tables_are_computed_in_float32_for_every_dtype():
    rope = Rope(16, 10000.0, False, None, 4096)
    positions = torch.tensor([1, 1000, 4095])
    for exact, rounded in zip(
        rope.tables(positions, torch.float32), rope.tables(positions, torch.bfloat16), strict=True
    ):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


def test_tables_made_while_generating_serve_training():
    rope = Rope(8, 10000.0, False, None, 64)
    with torch.inference_mode():
        rope.tables(torch.arange(4), torch.float32)
    x = torch.randn(4, 2, 8, requires_grad=True)
    rope.rotate(x, rope.tables(torch.arange(4), torch.float32)).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_going_back_below_the_trained_context_goes_back_to_its_frequencies(tmp_path):
    loaded = load_ours(save_hf(tiny_model(hf_config("dynamic")), tmp_path))
    below, above = random_prompts(64, [20, 90])
    first = our_logits(loaded, [below])[0]
    our_logits(loaded, [above])
    assert torch.equal(our_logits(loaded, [below])[0], first)


@pytest.mark.parametrize("scaling", ["default", "yarn", "dynamic", "longrope"])
def test_a_prompt_in_pieces_turns_like_the_whole_prompt(tmp_path, scaling):
    loaded = load_ours(save_hf(tiny_model(hf_config(scaling)), tmp_path))
    (prompt,) = random_prompts(64, [50])
    cache = ContiguousCache(loaded.config, 1, device=torch.device("cpu"), dtype=torch.float32)
    parts = []
    for piece in prompt.split([20, 20, 10]):
        positions = cache.plan([0], [len(piece)])
        parts.append(loaded.module(piece, positions, cache, torch.full((len(piece),), 50)))
        cache.advance()
    whole = our_logits(loaded, [prompt])[0]
    assert furthest(loaded.module.logits(torch.cat(parts)), whole) <= 1e-5


def test_lengths_tell_neighbours_in_a_batch_apart():
    rope = Rope(8, 100.0, False, RopeScaling("dynamic", factor=4.0, original_context=32), 32)
    # three decodes whose positions happen to follow each other
    cos, sin = rope.tables(torch.tensor([31, 32, 33]), torch.float32, torch.tensor([32, 33, 34]))
    for i, position in enumerate([31, 32, 33]):
        alone = rope.tables(torch.tensor([position]), torch.float32, torch.tensor([position + 1]))
        assert torch.equal(cos[i : i + 1], alone[0]) and torch.equal(sin[i : i + 1], alone[1])


def test_prepared_tables_are_the_tables():
    prepared, grown = (Rope(16, 10000.0, False, None, 4096) for _ in range(2))
    prepared.prepare(1000, torch.device("cpu"), torch.bfloat16)
    positions = torch.tensor([0, 999, 3])
    for ours, theirs in zip(
        prepared.tables(positions, torch.bfloat16), grown.tables(positions, torch.bfloat16), strict=True
    ):
        assert torch.equal(ours, theirs)
