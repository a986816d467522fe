"""Spikes of loss and gradient: what is left out, what is not, and that a run that goes on judges as one that never
stopped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmasos.data import Batches
from llmasos.models.load import load_model
from llmasos.train.events import Listener, StepReport
from llmasos.train.loop import Loop, LoopOptions
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions
from llmasos.train.schedule import Schedule
from llmasos.train.spikes import FIRST, WINDOW, Spikes
from tiny import write_tiny_model


def after(steps: int, *, loss: float = 3.0, norm: float = 1.0) -> Spikes:
    """That has seen so many usual steps."""
    draw, found = random.Random(0), Spikes()
    for _ in range(steps):
        assert not found.why(loss + draw.gauss(0, 0.05), norm * math.exp(draw.gauss(0, 0.3)))
    return found


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (3.2, 2.0, ""),
        (3.4, 8.0, ""),
        (0.1, 0.0, ""),
        (3.8, 1.0, "the loss 3.8 is far above the 3 of the last"),
        (3.0, 30.0, "the gradient's norm 30 is far above the 1.0"),
        (math.nan, 1.0, "the loss is nan"),
        (3.0, math.inf, "the gradient is inf"),
    ],
)
def test_what_is_far_above_the_last_steps_is_said(loss: float, norm: float, said: str) -> None:
    why = after(WINDOW).why(loss, norm)
    assert why.startswith(said) and bool(why) == bool(said)


def test_nothing_is_a_spike_before_there_is_a_usual_step() -> None:
    assert not after(FIRST - 1).why(9.0, 90.0)
    assert after(FIRST).why(9.0, 90.0)


def test_a_level_that_stays_is_soon_the_usual_one() -> None:
    """Data of another kind begins: a few of its steps are lost, and not the run."""
    found = after(WINDOW)
    left_out = [bool(found.why(6.0, 1.0)) for _ in range(10)]
    assert left_out == [True] * sum(left_out) + [False] * (10 - sum(left_out)) and 1 <= sum(left_out) <= 4


def test_a_loss_that_explodes_never_becomes_usual() -> None:
    found = after(WINDOW)
    assert all(found.why(3.0 * 2**i, 1.0) for i in range(1, 8))


def test_steps_without_a_number_do_not_blind_the_rule() -> None:
    found = after(WINDOW)
    assert found.why(math.nan, math.nan) and not found.why(3.0, 1.0) and found.why(5.0, 1.0)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 100)), max_size=200), st.integers(0, 200))
def test_the_rule_goes_on_where_it_was(steps: list[tuple[float, float]], cut: int) -> None:
    whole, first, rest = Spikes(), Spikes(), Spikes()
    for step in steps[:cut]:
        first.why(*step)
        whole.why(*step)
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [rest.why(*step) for step in steps[cut:]] == [whole.why(*step) for step in steps[cut:]]


class Jumps:
    """A learner whose loss, without its gradient, is higher by `at` nats in some steps."""

    def __init__(self, trainee: Trainee, at: dict[int, float]) -> None:
        self.trainee, self.at = trainee, at
        self.step = 0

    @property
    def module(self) -> nn.Module:
        return self.trainee.decoder

    def loss(self, batch: Placed) -> Tensor:
        loss = self.trainee.loss(batch)
        return loss + self.at.get(self.step, 0.0) * len(batch.labels)

    def parts(self) -> dict[str, Tensor]:
        return {}


class Keep(Listener):
    def __init__(self, kill: int | None = None) -> None:
        self.reports: list[StepReport] = []
        self.kill = kill

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self.kill:
            raise KeyboardInterrupt("power cut")


def begun(folder: Path, name: str, keep: Keep) -> Loop:
    torch.manual_seed(0)
    model = load_model(folder / "model", device="cpu", dtype="float32")
    model.module.requires_grad_()
    assert model.tokenizer is not None
    learner = Jumps(Trainee(model.module, dtype=torch.float32), at={24: 3.0, 45: 6.0})
    return Loop(
        learner,
        Batches(folder / "data.jsonl", model.tokenizer, max_length=64, batch_tokens=128, epochs=None, seed=3),
        OptimizerOptions(lr=1e-4),
        Schedule(),
        LoopOptions(steps=50, save_every=20),
        folder / name,
        torch.device("cpu"),
        [keep],
    )


def test_a_loss_that_jumps_is_left_out_by_a_run_and_by_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is a usual one, and the second one depends on the first, which was before the checkpoint."""
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, first, rest = Keep(), Keep(kill=42), Keep()
    begun(tmp_path, "whole", whole).train()
    skipped = {report.step: report.skipped for report in whole.reports if report.skipped}
    assert list(skipped) == [25, 46] and all(why.startswith("the loss ") for why in skipped.values())
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        begun(tmp_path, "cut", first).train()
    again = begun(tmp_path, "cut", rest)
    assert again.resume() and again.step == 40
    again.train()
    seen = [(report.loss, report.skipped) for report in whole.reports]
    assert [(report.loss, report.skipped) for report in first.reports[:40] + rest.reports] == seen
