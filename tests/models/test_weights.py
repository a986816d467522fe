"""Weights made up, brought to a device, put to sleep and woken."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmasos.errors import FormatError, InvalidInputError, NotFoundError, UnsupportedError
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.weights import PIECE, Upload, sleep, wake
from tiny import TINY_LLAMA, write_tiny_model


@torch.inference_mode()
def logits(model: LoadedModel) -> Tensor:
    tokens = torch.arange(5, 20, device=model.module.device)
    attend = Varlen(layer_specs(model.config), [len(tokens)])
    return model.module.logits(model.module(tokens, attend.positions(tokens.device), attend)).cpu()


def dummy(folder: Path, **changes: object) -> LoadedModel:
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "vocab_size": 300, **changes}))
    return load_model(folder, device="cpu", dtype="bfloat16", load_format="dummy")


def test_dummy_weights_need_a_config_alone(tmp_path: Path) -> None:
    model = dummy(tmp_path, hidden_size=128, initializer_range=0.05, tie_word_embeddings=False)
    assert model.tokenizer is None
    for name, weight in model.module.named_parameters():
        assert weight.dtype == torch.bfloat16
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert abs(float(weight.float().std()) - 0.05) < 0.005, name
            assert abs(float(weight.float().mean())) < 0.005, name
    assert torch.equal(logits(dummy(tmp_path, hidden_size=128)), logits(dummy(tmp_path, hidden_size=128)))


def test_dummy_norms_multiply_by_one_where_one_is_added(tmp_path: Path) -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}
    module = dummy(tmp_path, **gemma).module
    assert (module.final_norm.weight == 0).all()
    assert module.head.weight is module.embed.weight


def test_a_dummy_keeps_its_tokenizer_where_there_is_one(tiny_model: Path) -> None:
    model = load_model(tiny_model, device="cpu", load_format="dummy")
    assert model.tokenizer is not None
    assert model.tokenizer.encode("The quick") == load_model(tiny_model, device="cpu").tokenizer.encode("The quick")


def test_what_no_dummy_can_be_made_of_is_said(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"load_format='fast'.*auto, dummy"):
        load_model(tiny_model, load_format="fast")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_model(tmp_path, load_format="dummy")
    with pytest.raises(UnsupportedError, match="int8"):
        load_model(tiny_model, device="cpu", load_format="dummy", quantization="int8")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="JSON"):
        load_model(tmp_path, load_format="dummy")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_wakes_as_it_fell_asleep(tiny_model: Path, quantization: str) -> None:
    model = load_model(tiny_model, device="cpu", quantization=quantization)
    before, objects = logits(model), dict(model.module.named_parameters())
    assert sleep(model.module) > 0
    assert all(p.numel() == 0 for p in [*model.module.parameters(), *model.module.buffers()])
    with pytest.raises((RuntimeError, IndexError)):
        logits(model)
    assert sleep(model.module) == 0, "it sleeps already"
    wake(model.module)
    assert torch.equal(logits(model), before)
    assert all(p is objects[name] for name, p in model.module.named_parameters())
    assert model.module.head.weight is model.module.embed.weight or quantization == "int8"
    wake(model.module)
    assert torch.equal(logits(model), before)


@pytest.mark.gpu
def test_a_gpu_gets_the_files_bits_and_gives_its_memory_back(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", hidden_size=1024, intermediate_size=8192)  # pieces and whole buffers
    on_cpu = load_model(folder, device="cpu", dtype="float32")
    before = torch.cuda.memory_allocated()
    model = load_model(folder, device="cuda", dtype="float32")
    theirs = dict(on_cpu.module.named_parameters())
    assert any(p.nbytes > 2 * PIECE for p in theirs.values())
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter.cpu(), theirs[name]), name
    held = torch.cuda.memory_allocated() - before
    assert 0.9 * held < sleep(model.module) <= held
    assert torch.cuda.memory_allocated() - before < held / 100
    wake(model.module)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter.cpu(), theirs[name]), name


@pytest.mark.gpu
def test_uploads_of_all_shapes_arrive() -> None:
    upload = Upload(torch.device("cuda", 0))
    upload.begin()
    for shape in ((1,), (3, 5), (PIECE + 1,), (2 * PIECE // 64, 64), (0, 4)):
        tensor = torch.randint(0, 255, shape, dtype=torch.uint8)
        assert torch.equal(upload(tensor).cpu(), tensor)
    matrix = torch.randn(64, 48)
    assert torch.equal(upload(matrix[:, 8:24]).cpu(), matrix[:, 8:24])
