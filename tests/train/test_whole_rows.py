"""On CPUs bfloat16 batches of all lengths take few shapes of products, and learn what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmasos.models.load import load_model
from llmasos.train import losses
from llmasos.train.divergence import Divergence, Scores, linear_divergence
from llmasos.train.model import Placed, Trainee
from tiny import write_tiny_model


class Products(TorchDispatchMode):
    """Shapes that kernels are compiled for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm") or "dot_product" in str(func):
            self.seen.add((str(func), *(tuple(a.shape) for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


def batch(*lengths: int, num_trained: int) -> Placed:
    tokens = torch.arange(sum(lengths)) % 90
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Placed(tokens, positions, torch.arange(num_trained), tokens[:num_trained], list(lengths))


def trainee(tmp_path: Path) -> Trainee:
    model = load_model(write_tiny_model(tmp_path / "model"), device="cpu", dtype="float32", quantization="none")
    model.module.requires_grad_()
    return Trainee(model.module.train(), dtype=torch.bfloat16)


def learnt(one: Trainee, given: Placed) -> list[Tensor]:
    """The loss and its gradients."""
    loss = one.loss(given)
    loss.backward()
    found = [p.grad for p in one.decoder.parameters() if p.grad is not None]
    one.decoder.zero_grad()
    return [loss.detach(), *found]


def test_lengths_that_differ_by_a_little_have_the_same_products(tmp_path: Path) -> None:
    one = trainee(tmp_path)
    shapes = []
    for given in (batch(40, 61, num_trained=70), batch(43, 62, num_trained=99), batch(64, 64, num_trained=128)):
        with Products() as products:
            learnt(one, given)
        shapes.append(products.seen)
    assert shapes[0] == shapes[1] == shapes[2]
    assert any("mm" in name for name, *_ in shapes[0]) and any("dot_product" in name for name, *_ in shapes[0])


def test_filled_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, given = trainee(tmp_path), batch(40, 61, num_trained=70)
    filled = learnt(one, given)
    assert len(one.hidden(given)) == 101
    monkeypatch.setattr(losses, "ROWS", 1)
    for ours, plain in zip(filled, learnt(one, given), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))


def test_filled_rows_of_a_divergence_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (64, 1):
        monkeypatch.setattr(losses, "ROWS", rows)
        torch.manual_seed(0)
        ours, theirs = (torch.randn(2, 41, 16, dtype=torch.bfloat16) for _ in range(2))
        hidden, weight = (x.clone().requires_grad_() for x in ours)
        student, teacher = Scores(hidden, weight), Scores(*theirs)
        labels = torch.arange(41)
        loss, *_ = linear_divergence(student, teacher, labels, Divergence())
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None and hidden.grad.shape == hidden.shape
        found.append([loss.detach(), hidden.grad, weight.grad])
    for filled, plain in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=0.02, atol=0.02)
