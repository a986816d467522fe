"""GPT-2, GPT-Neo, GPT-J, GPT-NeoX, OPT, BLOOM, Falcon, Phi equal transformers; broken checkpoints give our errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_equality import (
    FP32,
    check_family,
    check_logits,
    check_pieces,
    edit_weights,
    load_ours,
    random_prompts,
    save_hf,
    tiny_model,
)
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
)

from llmasos.errors import FormatError, UnknownArchitectureError, UnsupportedError
from llmasos.models.families import config_from_hf, config_to_hf, known_architectures
from llmasos.models.load import load_model

VOCAB = 101
IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def gpt2(**changes: Any) -> GPT2Config:
    return GPT2Config(**IDS | {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 96} | changes)


def gpt_neo(**changes: Any) -> GPTNeoConfig:
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 96, "window_size": 5}
    types = {"attention_types": [[["global", "local"], 1], [["local"], 1]]}
    return GPTNeoConfig(**IDS | sizes | types | changes)


def gptj(**changes: Any) -> GPTJConfig:
    sizes = {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 96, "rotary_dim": 8}
    return GPTJConfig(**IDS | sizes | changes)


def gpt_neox(**changes: Any) -> GPTNeoXConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 70}
    return GPTNeoXConfig(**IDS | sizes | {"max_position_embeddings": 96} | changes)


def opt(**changes: Any) -> OPTConfig:
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 50}
    return OPTConfig(**IDS | sizes | {"max_position_embeddings": 96} | changes)


def bloom(**changes: Any) -> BloomConfig:
    return BloomConfig(**IDS | {"hidden_size": 36, "n_layer": 2, "n_head": 6} | changes)


def falcon(**changes: Any) -> FalconConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    return FalconConfig(**IDS | sizes | {"max_position_embeddings": 96} | changes)


def phi(**changes: Any) -> PhiConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 70}
    return PhiConfig(**IDS | sizes | {"num_key_value_heads": 2, "max_position_embeddings": 96} | changes)


RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
OPT_350M = {"word_embed_proj_dim": 20, "do_layer_norm_before": False}

FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": gpt2(),
    "gpt2-unscaled-by-layer": gpt2(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_inner=50),
    "gpt-neo": gpt_neo(),
    "gpt-j": gptj(),
    "gpt-neox": gpt_neox(),
    "gpt-neox-sequential": gpt_neox(use_parallel_residual=False, attention_bias=False),
    "opt": opt(),
    "opt-350m": opt(**OPT_350M),
    "bloom": bloom(),
    "falcon-7b": falcon(),
    "falcon-rw": falcon(**RW),
    "falcon-40b": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "phi": phi(),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_transformers(name: str, tmp_path: Path) -> None:
    check_family(FAMILIES[name], tmp_path, seed=1)


VARIANTS: dict[str, PretrainedConfig] = {
    "gpt2-relu-untied": gpt2(activation_function="relu", tie_word_embeddings=False),
    "gpt-neo-all-global": gpt_neo(attention_types=[[["global"], 3]]),
    "gpt-neo-all-local": gpt_neo(attention_types=[[["local"], 3]], intermediate_size=50),
    "gpt-j-rotates-whole-heads": gptj(rotary_dim=12, n_inner=50),
    "gpt-neox-tied": gpt_neox(
        tie_word_embeddings=True, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "opt-without-parameters": opt(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "opt-without-final-norm": opt(_remove_final_layer_norm=True, tie_word_embeddings=False),
    "bloom-one-head": bloom(n_head=1),
    "falcon-11b": falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=50),
    "falcon-groups-of-one": falcon(new_decoder_architecture=True, num_kv_heads=6, num_ln_in_parallel_attn=1),
    "falcon-alibi-multi-query": falcon(alibi=True, tie_word_embeddings=False),
    "falcon-sequential-rope": falcon(parallel_attn=False, multi_query=False),
    "phi-qk-norm": phi(qk_layernorm=True, num_key_value_heads=4),
    "phi-rotates-whole-heads": phi(rope_parameters={"rope_theta": 1000.0, "partial_rotary_factor": 1.0}),
    "phi-linear-rope": phi(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_transformers(name: str, tmp_path: Path) -> None:
    check_family(VARIANTS[name], tmp_path, seed=1, greedy=False)


def test_alibi_of_falcon_is_rounded_to_bfloat16_even_in_float32(tmp_path: Path) -> None:
    model = tiny_model(falcon(**RW, max_position_embeddings=400))
    loaded, prompts = load_ours(save_hf(model, tmp_path)), random_prompts(VOCAB, (300, 20))
    check_logits(loaded, model, prompts, FP32)
    check_pieces(loaded, prompts)


# config.json as older transformers wrote it


def without(*keys: str, **added: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {k: v for k, v in config.items() if k not in keys} | added


OLDER: dict[str, tuple[PretrainedConfig, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "gpt2": (gpt2(), without("tie_word_embeddings", "scale_attn_weights", "n_inner", n_ctx=96)),
    "gpt-neo": (gpt_neo(), without("tie_word_embeddings")),
    "gpt-j": (gptj(), without("tie_word_embeddings", rotary=True)),
    "gpt-neox": (
        gpt_neox(rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
        without("rope_parameters", "attention_bias", "tie_word_embeddings", rotary_pct=0.5, rotary_emb_base=500),
    ),
    "opt": (opt(), without("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings")),
    "bloom": (bloom(), without("hidden_size", "n_head", n_embed=36, num_attention_heads=6, seq_length=96)),
    "falcon-7b": (falcon(), without("rope_parameters", "ffn_hidden_size", "activation", "num_kv_heads")),
    "falcon-40b": (
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        without("rope_parameters", "num_ln_in_parallel_attn", "parallel_attn", "multi_query", rope_theta=10000.0),
    ),
    "phi": (
        phi(rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.34}),
        without("rope_parameters", "qk_layernorm", rope_theta=500.0, partial_rotary_factor=0.34, rope_scaling=None),
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_configs_of_older_versions_read_alike(name: str, tmp_path: Path) -> None:
    config, edit = OLDER[name]
    check_family(config, tmp_path, edit=edit, greedy=False)


# checkpoints that name things differently

BARE = [
    ("gpt2", "GPT2Model", "transformer."),
    ("gpt-neo", "GPTNeoModel", "transformer."),
    ("opt", "OPTModel", "model."),
    ("opt-350m", "OPTModel", "model.decoder."),
    ("bloom", "BloomModel", "transformer."),
    ("falcon-7b", "FalconModel", "transformer."),
]


@pytest.mark.parametrize(("name", "architecture", "prefix"), BARE)
def test_checkpoints_of_bare_models_load(name: str, architecture: str, prefix: str, tmp_path: Path) -> None:
    model = tiny_model(FAMILIES[name])
    folder = save_hf(model, tmp_path, lambda config: config | {"architectures": [architecture]})
    edit_weights(folder, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    loaded = load_ours(folder)
    check_logits(loaded, model, random_prompts(VOCAB), FP32)
    assert config_to_hf(loaded.config)["architectures"] == [type(model).__name__]


def test_the_head_of_gpt_neox_may_be_called_lm_head(tmp_path: Path) -> None:
    model = tiny_model(gpt_neox())
    folder = save_hf(model, tmp_path)
    edit_weights(folder, lambda tensors: {n.replace("embed_out", "lm_head"): t for n, t in tensors.items()})
    check_logits(load_ours(folder), model, random_prompts(VOCAB), FP32)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("gpt2", "transformer.h.0.attn"),
        ("gpt-neo", "transformer.h.0.attn.attention"),
        ("gpt-neox", "gpt_neox.layers.0.attention"),
    ],
)
def test_mask_buffers_in_a_checkpoint_change_nothing(name: str, module: str, tmp_path: Path) -> None:
    model = tiny_model(FAMILIES[name])
    folder = save_hf(model, tmp_path)
    masks = {f"{module}.bias": torch.ones(1, 1, 96, 96), f"{module}.masked_bias": torch.tensor(-1e4)}
    edit_weights(folder, lambda tensors: tensors | masks)
    check_logits(load_ours(folder), model, random_prompts(VOCAB), FP32)


# what is wrong with a folder is said in our words


def broken(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    merged = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}, default=str))
    return folder


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    return save_hf(tiny_model(gpt2()), tmp_path)


def test_scores_that_layers_divide_by_their_numbers_keep_them(tmp_path: Path) -> None:
    folder = save_hf(tiny_model(gpt2(scale_attn_by_inverse_layer_idx=True)), tmp_path)
    assert load_model(folder, device="cpu", with_tokenizer=False, layers=(0, 1)).config.num_layers == 2
    with pytest.raises(UnsupportedError, match="divides the scores") as refused:
        load_model(folder, device="cpu", with_tokenizer=False, layers=(0, 2))
    assert refused.value.hint == "Take the first ones: 0,1."


def test_a_missing_tensor_is_named(gpt2_folder: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    edit_weights(gpt2_folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(FormatError, match=name):
        load_ours(gpt2_folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(gpt2_folder: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    edit_weights(gpt2_folder, lambda tensors: tensors | {name: torch.zeros(36, 7)})
    with pytest.raises(FormatError, match=r"h\.1\.mlp\.c_fc\.weight has the shape \[7, 36\].*\[144, 36\]"):
        load_ours(gpt2_folder)


def test_a_fused_tensor_of_another_shape_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = save_hf(tiny_model(falcon()), tmp_path)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    edit_weights(folder, lambda tensors: tensors | {name: torch.zeros(144, 48)})
    with pytest.raises(FormatError, match=r"144.*64"):
        load_ours(folder)


NEEDED = {
    "gpt2": ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size"),
    "gpt-neo": ("hidden_size", "num_heads", "num_layers", "max_position_embeddings", "vocab_size"),
    "gpt-j": ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size"),
    "gpt-neox": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    "opt": ("hidden_size", "ffn_dim", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"),
    "bloom": ("hidden_size", "n_head", "n_layer", "vocab_size"),
    "falcon-7b": ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    "phi": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
}


def config_of(name: str) -> dict[str, Any]:
    config = FAMILIES[name].to_dict()
    return json.loads(json.dumps(config)) | {"architectures": []}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys])
def test_a_missing_key_is_named(name: str, key: str) -> None:
    config = config_of(name)
    assert config.pop(key) is not None
    with pytest.raises(FormatError, match=f"'{key}'"):
        config_from_hf(config)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "activation_function"),
        ("gpt-neo", "activation_function"),
        ("gpt-j", "activation_function"),
        ("gpt-neox", "hidden_act"),
        ("opt", "activation_function"),
        ("falcon-7b", "activation"),
        ("phi", "hidden_act"),
    ],
)
def test_an_unknown_activation_is_named(name: str, key: str) -> None:
    with pytest.raises(FormatError, match="'snake'"):
        config_from_hf(config_of(name) | {key: "snake"})


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("gpt2", {"n_head": 5}, FormatError, "5 heads in a width of 36"),
        ("gpt2", {"n_head": 0, "num_attention_heads": 0}, FormatError, "0 heads"),
        ("gpt2", {"n_layer": "many"}, FormatError, "many"),
        ("gpt2", {"n_layer": [3]}, FormatError, "config.json"),
        ("gpt-neo", {"attention_types": [[["global", "local"], 3]]}, FormatError, "3 layers"),
        ("gpt-neo", {"attention_types": [[["sparse"], 3]]}, FormatError, "sparse"),
        ("gpt-neo", {"attention_types": "global"}, FormatError, "config.json"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, UnsupportedError, "post_layernorm"),
        ("gpt2", {"architectures": ["GPT2000"]}, UnknownArchitectureError, "GPT2000"),
    ],
)
def test_configs_that_make_no_model_give_our_errors(
    name: str, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        config_from_hf(config_of(name) | changes)


def test_all_architectures_are_listed() -> None:
    names = {type(config).__name__.removesuffix("Config") for config in FAMILIES.values()}
    assert names == {"GPT2", "GPTNeo", "GPTJ", "GPTNeoX", "OPT", "Bloom", "Falcon", "Phi"}
    assert {f"{name}ForCausalLM" for name in names - {"GPT2"}} | {"GPT2LMHeadModel"} <= set(known_architectures())
