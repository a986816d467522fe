"""A run: it learns, its place on disk is exact, and what goes wrong is said and loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmasos.data import Batches
from llmasos.errors import DiskFullError, FormatError, InvalidInputError, LLMasOSError, StoreError
from llmasos.models.load import load_model
from llmasos.train import checkpoint
from llmasos.train.checkpoint import Checkpoints
from llmasos.train.events import Evaluation, Listener, StepReport
from llmasos.train.loop import DivergedError, Loop, LoopOptions
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions, Optimizers
from llmasos.train.schedule import KINDS, Schedule
from tiny import write_tiny_model

CPU = torch.device("cpu")


@dataclass
class Learner:
    trainee: Trainee

    @property
    def module(self) -> torch.nn.Module:
        return self.trainee.decoder

    def loss(self, batch: Placed) -> Tensor:
        return self.trainee.loss(batch)

    def parts(self) -> dict[str, Tensor]:
        return {}


class Told(Listener):
    """Calls `tell` after every step."""

    def __init__(self, tell: Callable[[StepReport], object]) -> None:
        self.tell = tell

    def stepped(self, report: StepReport) -> None:
        self.tell(report)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def loop(
    home: Path, name: str, *, steps: int = 8, lora: bool = False, optimizer: str = "adamw", **options: int
) -> Loop:
    torch.manual_seed(0)
    model = load_model(home / "model", device="cpu", dtype="float32")
    assert model.tokenizer is not None
    if lora:
        add_lora(model, LoraOptions(r=4, dropout=0.1))
    else:
        model.module.requires_grad_()
    batches = Batches(home / "data.jsonl", model.tokenizer, max_length=64, batch_tokens=128, epochs=None, seed=3)
    return Loop(
        Learner(Trainee(model.module, dtype=torch.float32)),
        batches,
        OptimizerOptions(name=optimizer, lr=1e-2),  # type: ignore[arg-type]
        Schedule(),
        LoopOptions(steps=steps, accumulation=2, **options),
        home / name,
        CPU,
    )


def weights(run: Loop) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.learner.module.named_parameters()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(lora: bool, optimizer: str, home: Path) -> None:
    """Dropout draws random numbers, so they are part of the place."""
    whole = loop(home, "whole", lora=lora, optimizer=optimizer)
    assert whole.train() == "finished"
    cut = loop(home, "cut", lora=lora, optimizer=optimizer, save_every=3)

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise Killed

    cut.listeners = [Told(kill)]
    with pytest.raises(Killed):
        cut.train()
    again = loop(home, "cut", lora=lora, optimizer=optimizer, save_every=3)
    torch.manual_seed(99)
    assert again.resume() and again.step == 3
    assert again.train() == "finished"
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())
    logs = [[json.loads(x) for x in (home / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "cut")]
    assert [row["step"] for row in logs[1]] == list(range(1, 9))
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_the_loss_falls(home: Path) -> None:
    run = loop(home, "run", steps=30)
    reports: list[StepReport] = []
    run.listeners = [Told(reports.append)]
    run.train()
    assert sum(r.loss for r in reports[-5:]) < 0.6 * sum(r.loss for r in reports[:5])
    assert all(0 < r.num_trained < r.num_tokens for r in reports)


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(home: Path) -> None:
    run = loop(home, "run")
    run.listeners = [Told(lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == 2 else None)]
    before = signal.getsignal(signal.SIGTERM)
    assert run.train() == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before
    again = loop(home, "run")
    assert again.resume() and again.step == 2


def test_steps_without_a_number_are_left_out_and_then_the_run_is(home: Path) -> None:
    run = loop(home, "run", max_bad=2)
    inner = run.learner.loss
    run.learner.loss = lambda batch: inner(batch) * (math.nan if run.step in (1, 2) else 1)  # type: ignore[method-assign]
    reports: list[StepReport] = []
    run.listeners = [Told(reports.append)]
    assert run.train() == "finished"
    assert [bool(r.skipped) for r in reports] == [False, True, True, *[False] * 5]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    worse = loop(home, "worse", max_bad=2)
    inner_worse = worse.learner.loss
    worse.learner.loss = lambda batch: inner_worse(batch) * math.nan  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="3 steps in a row"):
        worse.train()


def test_only_whole_checkpoints_count_and_old_ones_go(home: Path) -> None:
    run = loop(home, "run", steps=6, save_every=2)
    run.train()
    folder = home / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["000004", "000006"]
    (folder / "000009.abcd.tmp").mkdir()
    assert Checkpoints(folder).latest() == folder / "000006"
    run.save()
    assert not (folder / "000009.abcd.tmp").exists()


def test_a_checkpoint_of_other_weights_or_data_is_refused(home: Path) -> None:
    loop(home, "run", steps=2).train()
    with pytest.raises(FormatError, match="other weights"):
        loop(home, "run", lora=True).resume()
    with (home / "data.jsonl").open("a") as file:
        file.write('{"text": "one more row"}\n')
    with pytest.raises(InvalidInputError, match="other data"):
        loop(home, "run").resume()


def test_a_full_disk_keeps_the_last_checkpoint(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(home, "run", steps=2)
    run.train()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(DiskFullError, match="step 2"):
        run.save()
    assert [p.name for p in (home / "run" / "checkpoints").iterdir()] == ["000002"]


def test_norms_and_biases_do_not_shrink_and_muon_takes_matrices_of_blocks(home: Path) -> None:
    module = load_model(home / "model", device="cpu", dtype="float32").module.requires_grad_()
    adamw = Optimizers(module, OptimizerOptions(weight_decay=0.1)).each
    for group in adamw[0].param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    rest, muon = Optimizers(module, OptimizerOptions(name="muon")).each
    assert len(muon.param_groups[0]["params"]) == 8
    assert sum(len(g["params"]) for o in (rest, muon) for g in o.param_groups) == len(list(module.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_begin_low_reach_one_and_end_where_asked(kind: str) -> None:
    schedule = Schedule(kind, warmup=0.1, cooldown=0.3, floor=0.1)  # type: ignore[arg-type]
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and min(factors) > 0
    after = factors[10:]
    assert after == sorted(after, reverse=True)
    assert factors[-1] == (1.0 if kind == "constant" else pytest.approx(0.1, abs=0.04))
    with pytest.raises(InvalidInputError, match="cooldown"):
        Schedule(warmup=0.6, cooldown=0.6)
    assert Schedule("cosine", warmup=0.9, cooldown=0.2).factor(95, 100) < 1  # it has no cooldown of its own


@pytest.mark.parametrize("at", ["stepped", "evaluated", "saved"])
def test_a_listener_that_fails_ends_the_run_with_a_checkpoint_of_where_it_was(at: str, home: Path) -> None:
    told: list[str] = []

    class Fails(Listener):
        def fail(self, *_: object) -> None:
            if run.step >= 3:
                raise ConnectionError("no network")

    class Hears(Listener):
        def ended(self, step: int, reason: str) -> None:
            told.append(f"{step} {reason}")

    setattr(Fails, at, Fails.fail)
    run = loop(home, "run", save_every=3, evaluate_every=3)
    run.evaluate = lambda step: Evaluation(step, 1.0, None, 1, 0.1)
    run.listeners = [Fails(), Hears()]
    with pytest.raises(ConnectionError, match="no network"):
        run.train()
    again = loop(home, "run")
    assert again.resume() and again.step == run.step <= 6
    assert told == [f"{run.step} ConnectionError: no network"]
    assert again.train() == "finished"


def test_a_listener_that_fails_first_or_last_is_said(home: Path) -> None:
    class First(Listener):
        def began(self, step: int, num_steps: int) -> None:
            raise ConnectionError("no network")

    class Last(Listener):
        def ended(self, step: int, reason: str) -> None:
            raise ConnectionError("no network")

    run = loop(home, "run", steps=2)
    run.listeners = [First()]
    with pytest.raises(ConnectionError):
        run.train()
    assert run.step == 0
    run.listeners = [Last()]
    with pytest.raises(ConnectionError):
        run.train()
    again = loop(home, "run", steps=2)
    assert again.resume() and again.step == 2


def test_why_a_run_ends_is_said_though_its_checkpoint_fails_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run = loop(home, "run", steps=4)

    def fill(report: StepReport) -> None:
        if report.step == 2:
            monkeypatch.setattr(checkpoint.torch, "save", full)
            raise ConnectionError("no network")

    run.listeners = [Told(fill)]
    with pytest.raises(ConnectionError, match="no network") as caught:
        run.train()
    assert isinstance(caught.value.__context__, DiskFullError)


def test_a_log_that_cannot_be_written_is_said_with_its_name(home: Path) -> None:
    run = loop(home, "run", steps=4)
    (home / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"log\.jsonl could not be written: Is a directory") as caught:
        run.train()
    assert "goes on from the last checkpoint" in caught.value.hint
    assert run.step == 1 and Checkpoints(home / "run" / "checkpoints").latest() is not None


def test_what_a_thread_fails_to_write_is_said_when_the_run_fails_by_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    run = loop(home, "run", steps=4)
    with pytest.raises(LLMasOSError, match="ValueError") as caught:
        run.save()
    assert isinstance(caught.value.__cause__, ValueError)

    def kill(report: StepReport) -> None:
        run.save(wait=False)
        raise Killed

    run.listeners = [Told(kill)]
    with pytest.raises(Killed):
        run.train()
    assert "The checkpoint of step 1 failed" in caplog.text


def test_on_a_cpu_a_checkpoint_is_written_at_once_without_a_copy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_copied", None)
    run = loop(home, "run", steps=4)
    path = run.save(wait=False)
    assert not run.checkpoints.is_writing and run.checkpoints.latest() == path
