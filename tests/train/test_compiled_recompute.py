"""Compiled blocks that compute their activations again learn as eager ones do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmasos.models.load import load_model
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions, Optimizers
from tiny import write_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # what torch's compiler says of torch
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
]


def losses(folder: Path, *, compiled: bool, recompute: bool) -> list[float]:
    """Of three steps of all weights in bfloat16."""
    model = load_model(folder, device="cpu", dtype="float32")
    model.module.requires_grad_().train()
    trainee = Trainee(model.module, dtype=torch.bfloat16, recompute=recompute, compiled=compiled)
    optimizers = Optimizers(model.module, OptimizerOptions(lr=1e-3))
    found = []
    for lengths in 3 * [[40, 24]]:
        tokens = torch.arange(sum(lengths)) * 7 % 90
        positions = torch.cat([torch.arange(length) for length in lengths])
        placed = Placed(tokens, positions, torch.arange(len(tokens)), tokens.roll(-1), lengths)
        loss = trainee.loss(placed) / len(tokens)
        loss.backward()
        optimizers.step(1.0)
        optimizers.zero()
        found.append(float(loss.detach()))
    return found


def test_a_compiled_model_with_recompute_learns_as_an_eager_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write_tiny_model(tmp_path / "model")
    try:
        # relative: fused steps round once where eager ones round each, to 8 bits
        eager = losses(folder, compiled=False, recompute=False)
        assert losses(folder, compiled=False, recompute=True) == pytest.approx(eager, rel=1e-3)
        assert losses(folder, compiled=True, recompute=True) == pytest.approx(eager, rel=1e-3)
        assert eager[2] < eager[0] - 0.05, "it learns: the losses are not those of a model that stands still"
    finally:
        torch.compiler.reset()
