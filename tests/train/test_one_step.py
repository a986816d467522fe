"""One step of training equals transformers, peft and torch: full, LoRA in its variants, packed and apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.data import IGNORED
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.lora import read_adapter
from llmasos.train.lora import LoraOptions, add_lora, lora_layers, merge_lora, save_adapter
from llmasos.train.model import Placed, Trainee
from tiny import write_tiny_model

GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 8,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 20.0,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
}
# peft asks transformers for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "gemma2": GEMMA,
}
STEP = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-3}
"""Where a gradient is near 0 a step is lr / eps times its rounding: with 1e-4, 3.6 tolerances in one of 320 draws;
with this eps, at most a quarter of one."""


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]


def batch(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random tokens; the first two of every sequence are not trained."""
    draw = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 250, (n,), generator=draw) for n in lengths]
    labels = []
    for own in tokens:
        following = torch.cat([own[1:], torch.tensor([IGNORED])])
        following[:2] = IGNORED
        labels.append(following)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(torch.cat(tokens), torch.cat(labels), positions, list(lengths))


def reference_loss(model: Any, data: Batch) -> torch.Tensor:
    """Sequence by sequence, transformers' own way, without packing; the sum."""
    losses = []
    for tokens, labels in zip(data.tokens.split(data.lengths), data.labels.split(data.lengths), strict=True):
        logits = model(tokens[None]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED))
    return torch.stack(losses).sum()


def folder(tmp_path: Path, shape: str) -> Path:
    return write_tiny_model(tmp_path / shape, **SHAPES[shape])


def load(path: Path) -> LoadedModel:
    return load_model(path, device="cpu", dtype="float32")


def hugging_face(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").train()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_full_training_is_transformers(shape: str, tmp_path: Path) -> None:
    path = folder(tmp_path, shape)
    ours, theirs = load(path), hugging_face(path)
    ours.module.requires_grad_()
    trainee, data = Trainee(ours.module, dtype=torch.float32), batch([9, 17, 1, 5])
    placed = Placed.of(data, torch.device("cpu"))
    optimizer = torch.optim.AdamW(ours.module.parameters(), **STEP)
    reference = torch.optim.AdamW(theirs.parameters(), **STEP)
    for _ in range(2):
        loss, expected = trainee.loss(placed) / len(placed), reference_loss(theirs, data) / len(placed)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        optimizer.step(), reference.step()
        optimizer.zero_grad(), reference.zero_grad()
    ours.save_pretrained(tmp_path / "saved")
    again = hugging_face(tmp_path / "saved").state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"targets": ("q_proj", "down_proj")}])
def test_a_step_of_lora_is_pefts(shape: str, options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path = folder(tmp_path, shape)
    ours, asked = load(path), LoraOptions(r=4, alpha=8, **options)
    names = add_lora(ours, asked)
    assert len(names) == (2 if asked.targets else 4) * 2
    for _, layer in lora_layers(ours.module):
        torch.nn.init.normal_(layer.b, std=0.1)
    save_adapter(ours, tmp_path / "adapter")
    targets = list(asked.targets) or "all-linear"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, use_rslora=asked.rslora, use_dora=asked.dora, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(hugging_face(path), config)
    from peft import load_peft_weights, set_peft_model_state_dict

    found = set_peft_model_state_dict(theirs, load_peft_weights(str(tmp_path / "adapter"), device="cpu"))
    assert not found.unexpected_keys
    data = batch([11, 6, 20])
    placed = Placed.of(data, torch.device("cpu"))
    trainee = Trainee(ours.module, dtype=torch.float32)
    trained = [p for p in ours.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **STEP)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **STEP)
    for _ in range(2):
        loss, expected = trainee.loss(placed) / len(placed), reference_loss(theirs, data) / len(placed)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        optimizer.step(), reference.step()
        optimizer.zero_grad(), reference.zero_grad()
    assert all(p.grad is None for p in ours.module.parameters() if not p.requires_grad)
    from peft import get_peft_model_state_dict

    save_adapter(ours, tmp_path / "trained")
    saved, wanted = load_peft_weights(str(tmp_path / "trained"), device="cpu"), get_peft_model_state_dict(theirs)
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_adapter_computes_what_it_did_beside_the_layer(dora: bool, tmp_path: Path) -> None:
    model = load(folder(tmp_path, "llama"))
    add_lora(model, LoraOptions(r=4, dora=dora))
    for _, layer in lora_layers(model.module):
        torch.nn.init.normal_(layer.b, std=0.1)
        if dora:
            layer.length.data *= 1.3
    trainee, placed = Trainee(model.module, dtype=torch.float32), Placed.of(batch([12]), torch.device("cpu"))
    with torch.no_grad():
        before = trainee.hidden(placed)
        merge_lora(model)
        after = Trainee(model.module, dtype=torch.float32).hidden(placed)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not list(lora_layers(model.module))


def test_a_saved_adapter_is_read_by_the_engine(tmp_path: Path) -> None:
    model = load(folder(tmp_path, "llama"))
    add_lora(model, LoraOptions(r=4, alpha=8, targets=("k_proj", "up_proj")))
    for _, layer in lora_layers(model.module):
        torch.nn.init.normal_(layer.b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter", load(tmp_path / "llama"))
    for name, layer in lora_layers(model.module):
        weights = read.layers[name]
        torch.testing.assert_close(weights.b, 2 * layer.b.detach() * layer.own.any(1)[:, None])
        assert weights.ranks == tuple(4 if taken else 0 for taken in layer.chosen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_sequences_train_as_they_do_apart(shape: str, recompute: bool, tmp_path: Path) -> None:
    """Also: accumulated gradients of several batches are those of one."""
    path, gradients, losses = folder(tmp_path, shape), [], []
    whole = batch([9, 17, 5])
    apart = [
        Batch(whole.tokens[a:b], whole.labels[a:b], whole.positions[a:b], [b - a])
        for a, b in ((0, 9), (9, 26), (26, 31))
    ]
    for batches in ([whole], apart):
        model = load(path)
        model.module.requires_grad_()
        trainee = Trainee(model.module, dtype=torch.float32, recompute=recompute)
        total = sum(len(Placed.of(b, torch.device("cpu"))) for b in batches)
        losses.append(0.0)
        for each in batches:
            loss = trainee.loss(Placed.of(each, torch.device("cpu"))) / total
            loss.backward()
            losses[-1] += float(loss.detach())
        gradients.append({n: p.grad for n, p in model.module.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_weights_stay_float32_while_the_pass_is_bfloat16(tmp_path: Path) -> None:
    model = load_model(folder(tmp_path, "llama"), device="cpu", dtype="bfloat16")
    model.module.requires_grad_()
    trainee, placed = Trainee(model.module, dtype=torch.bfloat16), Placed.of(batch([20, 9]), torch.device("cpu"))
    assert trainee.hidden(placed).dtype == torch.bfloat16
    trainee.loss(placed).backward()
    assert {p.grad.dtype for p in model.module.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_blocks_that_are_computed_again_give_the_same_gradients(dtype: torch.dtype, lora: bool, tmp_path: Path) -> None:
    """In bfloat16 they must see the casts of the pass again, not the float32 weights."""
    found = []
    for recompute in (False, True):
        model = load(folder(tmp_path, "llama"))
        torch.manual_seed(0)
        if lora:
            add_lora(model, LoraOptions(r=4))
            for _, layer in lora_layers(model.module):
                torch.nn.init.normal_(layer.b, std=0.1)
        else:
            model.module.requires_grad_()
        trainee = Trainee(model.module, dtype=dtype, recompute=recompute)
        loss = trainee.loss(Placed.of(batch([9, 17]), torch.device("cpu")))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}))
    (plain, gradients), (again, theirs) = found
    assert torch.equal(plain, again)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, theirs[name]), name
