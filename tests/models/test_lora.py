"""Adapters that PEFT wrote give PEFT's logits here, for every layout of weights; what we can't compute is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_equality import hf_logits, load_ours, our_logits, random_prompts, save_hf, tiny_model
from peft_adapters import LLAMA_PARTS, peft_logits, save_random_adapter, write_adapter
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from llmasos.errors import FormatError, NotFoundError, PickleRefusedError, UnsupportedError
from llmasos.models.families import family_of
from llmasos.models.families.mapping import to_hf
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.lora import LoraState, LoraWeights, linear_layers, part_rows, read_adapter, unwrap, wrap
from llmasos.models.lowbit import Int8Linear

VOCAB = 101
IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA_LIKE: dict[str, Any] = IDS | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
FALCON: dict[str, Any] = IDS | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**LLAMA_LIKE), LLAMA_PARTS),
    "qwen2": (Qwen2Config(**LLAMA_LIKE), ["q_proj", "v_proj", "up_proj"]),
    "gpt2": (
        GPT2Config(**IDS, n_embd=36, n_layer=2, n_head=3, n_positions=96),
        ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    ),
    "phi": (PhiConfig(**LLAMA_LIKE), ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "gpt_neox": (
        GPTNeoXConfig(
            **IDS,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=70,
            max_position_embeddings=96,
        ),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "falcon one key head": (FalconConfig(**FALCON), ["query_key_value", "dense"]),
    "falcon groups": (
        FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        ["query_key_value", "dense_4h_to_h"],
    ),
}


def apply(model: LoadedModel, state: LoraState, slot: int, folder: Path) -> None:
    """What the registry of `inference` does, without its rules."""
    for name, weights in read_adapter(folder, model).layers.items():
        layer = wrap(model, name, state)
        layer.reserve(slot + 1, max(weights.ranks))
        layer.put(slot, weights)


def slots_of(slots: list[int], prompts: list[Tensor]) -> np.ndarray:
    return np.repeat(slots, [len(p) for p in prompts])


@pytest.mark.parametrize("name", MODELS)
def test_logits_with_an_adapter_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    config, parts = MODELS[name]
    hf = tiny_model(config)
    ours = load_ours(save_hf(hf, tmp_path / "model"))
    prompts = random_prompts(VOCAB)
    adapter = save_random_adapter(
        hf, tmp_path / "adapter", r=5, lora_alpha=3, target_modules=parts, fan_in_fan_out=name == "gpt2"
    )
    state = LoraState()
    apply(ours, state, 0, adapter)
    state.plan(slots_of([0, 0], prompts))
    for with_adapter, wanted, prompt in zip(
        our_logits(ours, prompts), peft_logits(hf, adapter, prompts), prompts, strict=True
    ):
        assert (wanted - hf_logits(hf, prompt)).abs().max() > 0.05, "the adapter must change something"
        torch.testing.assert_close(with_adapter, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2, "^model.layers.1.self_attn.q_proj": 9}, "alpha_pattern": {"0.mlp.up_proj": 20}},
        {"layers_to_transform": [1]},
    ],
    ids=["rank-stabilised", "patterns", "some layers"],
)
def test_options_of_peft_that_change_the_arithmetic_are_followed(options: dict[str, Any], tmp_path: Path) -> None:
    hf = tiny_model(MODELS["llama"][0])
    ours = load_ours(save_hf(hf, tmp_path / "model"))
    adapter = save_random_adapter(hf, tmp_path / "a", r=4, lora_alpha=7, target_modules=LLAMA_PARTS, **options)
    prompts = random_prompts(VOCAB)
    state = LoraState()
    apply(ours, state, 0, adapter)
    state.plan(slots_of([0, 0], prompts))
    for found, wanted in zip(our_logits(ours, prompts), peft_logits(hf, adapter, prompts), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path, list[Path]]:
    """A model, its folder and two adapters of other ranks and layers."""
    folder = tmp_path_factory.mktemp("llama")
    hf = tiny_model(MODELS["llama"][0])
    adapters = [
        save_random_adapter(hf, folder / "a", seed=1, r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        save_random_adapter(hf, folder / "b", seed=2, r=20, target_modules=["q_proj", "gate_proj", "down_proj"]),
    ]
    return load_ours(save_hf(hf, folder / "model")), folder / "model", adapters


def test_sequences_with_different_adapters_in_one_pass_equal_each_alone(
    llama: tuple[LoadedModel, Path, list[Path]],
) -> None:
    _, path, adapters = llama
    ours = load_ours(path)
    prompts = random_prompts(VOCAB, (7, 5, 6, 4, 3))
    plain = our_logits(ours, prompts)
    state = LoraState()
    for slot, folder in enumerate(adapters):
        apply(ours, state, slot, folder)
    for name in linear_layers(ours.module):
        if hasattr(layer := ours.module.get_submodule(name), "reserve"):
            layer.reserve(2, 0)
    alone = []
    for slot in range(2):
        state.plan(slots_of([slot] * 5, prompts))
        alone.append(our_logits(ours, prompts))
    slots = [1, -1, 0, 1, 0]
    state.plan(slots_of(slots, prompts))
    mixed = our_logits(ours, prompts)
    for i, slot in enumerate(slots):
        wanted = plain[i] if slot < 0 else alone[slot][i]
        torch.testing.assert_close(mixed[i], wanted, rtol=1e-5, atol=1e-5)
    assert all((alone[0][i] - alone[1][i]).abs().max() > 0.05 for i in range(5))
    state.plan(None)
    assert all(torch.equal(a, b) for a, b in zip(our_logits(ours, prompts), plain, strict=True))


def test_a_wrapped_model_saves_its_own_weights_and_unwraps_to_what_it_was(
    llama: tuple[LoadedModel, Path, list[Path]], tmp_path: Path
) -> None:
    _, path, adapters = llama
    ours = load_ours(path)
    before = dict(ours.module.named_modules())
    apply(ours, LoraState(), 0, adapters[0])
    ours.save_pretrained(tmp_path / "saved")
    again = load_ours(tmp_path / "saved").module.state_dict()
    unwrap(ours)
    assert dict(ours.module.named_modules()) == before
    state = ours.module.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)


def test_low_bit_layers_take_adapters(tmp_path: Path) -> None:
    hf = tiny_model(LlamaConfig(**LLAMA_LIKE | {"hidden_size": 96, "intermediate_size": 96}))
    path = save_hf(hf, tmp_path / "model")
    adapter = save_random_adapter(hf, tmp_path / "a", r=4, target_modules=LLAMA_PARTS)
    ours = load_model(path, device="cpu", dtype="float32", quantization="int8", with_tokenizer=False)
    state = LoraState()
    apply(ours, state, 0, adapter)
    layer = ours.module.get_submodule("layers.0.attn.qkv")
    assert isinstance(layer.base, Int8Linear)
    x = torch.randn(5, 96)
    state.plan(np.array([0, -1, 0, -1, -1]))
    weights = read_adapter(adapter, ours).layers["layers.0.attn.qkv"]
    wanted = layer.base(x)
    wanted[[0, 2]] += x[[0, 2]] @ delta(weights, layer.sizes).T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def delta(weights: LoraWeights, sizes: tuple[int, ...]) -> Tensor:
    """[N, K]: B A of each part."""
    return torch.cat([b @ a for a, b in zip(weights.a, weights.b.split(sizes), strict=True)])


def test_rows_follow_the_layout_of_a_model_born_from_gguf(llama: tuple[LoadedModel, Path, list[Path]]) -> None:
    """Its rotary pairs are neighbours: B must be permuted as the weights are."""
    model, _, adapters = llama
    plain = read_adapter(adapters[0], model).layers["layers.0.attn.qkv"]
    config = replace(model.config, rope_interleaved=True)
    turned = read_adapter(adapters[0], replace(model, config=config)).layers["layers.0.attn.qkv"]
    sizes = (48, 16, 16)
    name = "layers.0.attn.qkv.weight"
    family = family_of(config)
    assert not torch.equal(plain.b, turned.b)
    for (_, a), (_, b) in zip(
        to_hf(family, model.config, {name: delta(plain, sizes)}),
        to_hf(family, config, {name: delta(turned, sizes)}),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_a_fused_layer_belongs_to_one_module(name: str, tmp_path: Path) -> None:
    ours = load_ours(save_hf(tiny_model(MODELS[name][0]), tmp_path / "model"))
    for layer_name, layer in linear_layers(ours.module).items():
        assert isinstance(layer, nn.Linear)
        _, rows = part_rows(ours, layer_name, layer.out_features)
        assert torch.cat(rows).sort().values.tolist() == list(range(layer.out_features))


# wrong input

Q = "model.layers.0.self_attn.q_proj"


def q_tensors(**changes: Tensor) -> dict[str, Tensor]:
    return {f"{Q}.lora_A.weight": torch.ones(4, 48), f"{Q}.lora_B.weight": torch.ones(48, 4)} | changes


def test_an_adapter_with_bare_names_and_with_an_adapters_name_in_them_is_read(
    llama: tuple[LoadedModel, Path, list[Path]], tmp_path: Path
) -> None:
    bare = Q.removeprefix("model.")
    named = {f"{bare}.lora_A.default.weight": torch.ones(4, 48), f"{bare}.lora_B.default.weight": torch.ones(48, 4)}
    layers = read_adapter(write_adapter(tmp_path / "a", named), llama[0]).layers
    assert list(layers) == ["layers.0.attn.qkv"]
    assert layers["layers.0.attn.qkv"].ranks == (4, 0, 0)
    assert layers["layers.0.attn.qkv"].b.sum() == 48 * 4 * 8 / 4


@pytest.mark.parametrize(
    "config, said",
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "None"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"rank_pattern": {"(a+)+q_proj": 4}}, "regular expression"),
    ],
)
def test_a_feature_that_is_not_computed_here_is_refused_by_name(
    config: dict[str, Any], said: str, llama: tuple[LoadedModel, Path, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="(?s)" + said.replace("(", r"\(")):
        read_adapter(write_adapter(tmp_path / "a", q_tensors(), **config), llama[0])


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"lm_head.lora_A.weight": torch.ones(4, 48)}, "'lm_head'"),
        ({"model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, "layers.7.self_attn.q_proj"),
        ({"model.layers.0.self_attn.w_pack.lora_A.weight": torch.ones(4, 48)}, "gate_proj, k_proj"),
        ({"model.embed_tokens.lora_embedding_A": torch.ones(4, 101)}, "lora_embedding_A"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector"),
        ({f"{Q}.lora_B.bias": torch.ones(48)}, "lora_B.bias"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 48, dtype=torch.int64)}, "int64"),
    ],
)
def test_a_tensor_that_is_no_matrix_of_a_block_is_refused_by_name(
    tensors: dict[str, Tensor], said: str, llama: tuple[LoadedModel, Path, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read_adapter(write_adapter(tmp_path / "a", q_tensors(**tensors)), llama[0])


@pytest.mark.parametrize(
    "tensors, config, said",
    [
        (q_tensors(**{f"{Q}.lora_A.weight": torch.ones(4, 64)}), {}, r"q_proj.lora_A.weight.*\[4, 64\].*\[4, 48\]"),
        (q_tensors(**{f"{Q}.lora_B.weight": torch.ones(64, 4)}), {}, r"q_proj.lora_B.weight.*\[64, 4\].*\[48, 4\]"),
        (q_tensors(), {"r": 8}, r"\[4, 48\].*\[8, 48\]"),
        (q_tensors(), {"r": 0}, "r=0"),
        (q_tensors(), {"lora_alpha": "big"}, "'big'"),
        (q_tensors(), {"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 48)}, {}, f"lora_B of {Q}"),
        (q_tensors(**{f"{Q}.lora_A.default.weight": torch.ones(4, 48)}), {}, "two adapters"),
        (q_tensors() | {k.removeprefix("model."): v for k, v in q_tensors().items()}, {}, "twice"),
        ({}, {}, "no tensors"),
    ],
)
def test_files_that_contradict_model_or_config_are_format_errors_that_name_the_tensor(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    said: str,
    llama: tuple[LoadedModel, Path, list[Path]],
    tmp_path: Path,
) -> None:
    with pytest.raises(FormatError, match=said):
        read_adapter(write_adapter(tmp_path / "a", tensors, **config), llama[0])


def test_pickled_weights_and_missing_files_are_refused(
    llama: tuple[LoadedModel, Path, list[Path]], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", q_tensors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match=r"adapter_model\.bin"):
        read_adapter(folder, llama[0])
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"adapter_config\.json"):
        read_adapter(folder, llama[0])
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(FormatError, match="list"):
        read_adapter(folder, llama[0])
