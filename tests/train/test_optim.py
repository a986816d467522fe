"""Optimizers: AdamW with states in 8 bits is AdamW but for their rounding, learns like it, and takes a quarter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmasos.models.load import load_model
from llmasos.train import optim
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import FEW, AdamW8bit, Muon, OptimizerOptions, Optimizers
from tiny import write_tiny_model

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def pair(*shape: int, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


def steps(count: int, gradient: Callable[[int], Tensor], *both: tuple[nn.Parameter, torch.optim.Optimizer]) -> None:
    for step in range(count):
        for parameter, optimizer in both:
            parameter.grad = gradient(step)
            optimizer.step()


def noise(*shape: int, scale: float = 1.0) -> Callable[[int], Tensor]:
    return lambda step: torch.randn(shape, generator=torch.Generator().manual_seed(100 + step)) * scale


def test_the_first_step_is_adamws() -> None:
    ours, theirs = pair(40, 130)
    each = (ours, AdamW8bit([ours], **OPTIONS)), (theirs, torch.optim.AdamW([theirs], **OPTIONS))
    steps(1, noise(40, 130), *each)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_small_tensors_are_adamws_for_ever() -> None:
    ours, theirs = pair(FEW)
    each = (ours, AdamW8bit([ours], **OPTIONS)), (theirs, torch.optim.AdamW([theirs], **OPTIONS))
    steps(20, noise(FEW), *each)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 130), (5001,), (3, 50, 40)])
def test_many_steps_stay_near_adamws(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(*shape)
    before = ours.detach().clone()
    each = (ours, AdamW8bit([ours], **OPTIONS)), (theirs, torch.optim.AdamW([theirs], **OPTIONS))
    steps(30, noise(*shape), *each)
    moved, apart = (theirs.detach() - before).norm(), (ours.detach() - theirs.detach()).norm()
    assert float(apart / moved) < 0.05


def test_pieces_of_a_tensor_are_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(7001)
    steps(3, noise(7001), (ours, AdamW8bit([ours], **OPTIONS)))
    monkeypatch.setattr(optim, "PIECE", 1024)
    steps(3, noise(7001), (theirs, AdamW8bit([theirs], **OPTIONS)))
    assert torch.equal(ours, theirs)


def test_rare_gradients_make_no_leaps() -> None:
    """A row that is seen once beside large ones, as rare tokens are: its second moment must not become 0 before its
    first does."""
    ours, theirs = pair(64, 256)
    each = (ours, AdamW8bit([ours], **OPTIONS)), (theirs, torch.optim.AdamW([theirs], **OPTIONS))

    def gradient(step: int) -> Tensor:
        large = noise(64, 256, scale=10.0)(step)
        large[:, 128:] = noise(64, 128, scale=3e-4)(step) if step == 0 else 0.0
        return large

    before = ours.detach().clone()
    steps(12, gradient, *each)
    ours_moved, moved = ((p.detach() - before).abs().max() for p in (ours, theirs))
    assert float(ours_moved) < 2 * float(moved)  # with a second moment of 0 it would be thousands of times as far
    assert torch.isfinite(ours).all()


def test_a_gradient_of_zeros_moves_nothing_but_decay() -> None:
    ours, theirs = pair(5000)
    each = (ours, AdamW8bit([ours], **OPTIONS)), (theirs, torch.optim.AdamW([theirs], **OPTIONS))
    steps(3, lambda step: torch.zeros(5000), *each)
    torch.testing.assert_close(ours, theirs)


def test_states_take_a_quarter_of_adamws() -> None:
    [ours, _] = pair(512, 512)
    optimizer = AdamW8bit([ours], **OPTIONS)
    steps(1, noise(512, 512), (ours, optimizer))
    held = sum(t.nbytes for t in optimizer.state[ours].values())
    assert held < 2.04 * ours.numel() < 8 * ours.numel() / 3.9


def test_states_come_back_bit_for_bit() -> None:
    ours, theirs = pair(96, 96)
    small, small_again = pair(10)
    one = AdamW8bit([{"params": [ours], "weight_decay": 0.1}, {"params": [small], "weight_decay": 0.0}], lr=1e-3)

    def go(optimizer: AdamW8bit, large: nn.Parameter, little: nn.Parameter, first: int) -> None:
        for step in range(first, first + 3):
            large.grad, little.grad = noise(96, 96)(step), noise(10)(step)
            optimizer.step()

    go(one, ours, small, 0)
    with torch.no_grad():
        theirs.copy_(ours)
        small_again.copy_(small)
    saved = copy.deepcopy(one.state_dict())
    two = AdamW8bit(
        [{"params": [theirs], "weight_decay": 0.1}, {"params": [small_again], "weight_decay": 0.0}], lr=1e-3
    )
    two.load_state_dict(saved)
    assert two.state[theirs]["mean_code"].dtype == torch.uint8
    go(one, ours, small, 3)
    go(two, theirs, small_again, 3)
    assert torch.equal(ours, theirs) and torch.equal(small, small_again)


class Batch:
    def __init__(self, seed: int) -> None:
        start = torch.randint(5, 30, (4,), generator=torch.Generator().manual_seed(seed))
        self.lengths = [16] * 4
        self.tokens = torch.cat([(torch.arange(16) * 7 + s) % 97 + 5 for s in start])
        self.labels = self.tokens.roll(-1)
        self.labels[15::16] = -100
        self.positions = torch.arange(16).repeat(4)


def learnt(folder: Path, name: str) -> list[float]:
    module = load_model(folder, device="cpu", dtype="float32").module.requires_grad_()
    trainee = Trainee(module, dtype=torch.float32)
    optimizers = Optimizers(module, OptimizerOptions(name=name, lr=3e-3))  # type: ignore[arg-type]
    losses = []
    for step in range(40):
        placed = Placed.of(Batch(step), torch.device("cpu"))
        loss = trainee.loss(placed) / len(placed)
        loss.backward()
        optimizers.step(1.0)
        losses.append(float(loss.detach()))
    return losses


def test_a_model_learns_with_8_bit_states_as_it_does_with_32(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    eight, whole = learnt(folder, "adamw8bit"), learnt(folder, "adamw")
    assert whole[-1] < 0.5 * whole[0]
    for at in (10, 20, 39):
        assert eight[at] == pytest.approx(whole[at], rel=0.05)


def test_muon_is_torchs_but_for_rounding() -> None:
    for shape in ((96, 40), (40, 96)):
        ours, theirs = pair(*shape)
        both = (
            (ours, Muon([ours], lr=1e-2, weight_decay=0.1)),
            (theirs, torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")),
        )
        before = ours.detach().clone()
        steps(5, noise(*shape), *both)
        apart, moved = (ours - theirs).norm(), (theirs - before).norm()
        assert apart < 0.01 * moved


def test_muon_takes_matrices_of_one_shape_together_and_steps_each_as_if_it_were_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, alone = [], []
    for shape in ((24, 40), (40, 24), (24, 40), (24, 40)):
        ours, theirs = pair(*shape)
        together.append(ours)
        alone.append(theirs)
    monkeypatch.setattr(optim, "AT_ONCE", 2 * 24 * 40)
    taken: list[tuple[int, ...]] = []
    whole = optim.orthogonal

    def noted(matrices: Tensor) -> Tensor:
        taken.append(tuple(matrices.shape))
        return whole(matrices)

    monkeypatch.setattr(optim, "orthogonal", noted)
    one, many = Muon(together, lr=1e-2, weight_decay=0.1), [Muon([p], lr=1e-2, weight_decay=0.1) for p in alone]
    torch.manual_seed(5)
    for _ in range(3):
        for ours, theirs in zip(together, alone, strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        taken.clear()
        one.step()
        assert taken == [(2, 24, 40), (1, 24, 40), (1, 40, 24)]
        for optimizer in many:
            optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
