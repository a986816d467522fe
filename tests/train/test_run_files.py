"""What a run leaves: every step and evaluation once, whatever killed it and when; and what people see meanwhile."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.data import Batches
from llmasos.errors import DiskFullError, NotFoundError, StoreError, UnsupportedError
from llmasos.models.load import load_model
from llmasos.train.config import TrainConfig
from llmasos.train.evaluate import Evaluator
from llmasos.train.events import Evaluation, Generated, Listener, StepReport
from llmasos.train.logs import facts, files, listeners_for
from llmasos.train.logs.files import Files
from llmasos.train.logs.meter import Meter, Speed
from llmasos.train.logs.progress import Progress, fit, shown
from llmasos.train.logs.runs import compare, last_step, list_runs, open_run, read_evaluations, read_metrics
from llmasos.train.logs.watch import Watch, Watcher
from llmasos.train.loop import Loop, LoopOptions
from llmasos.train.methods.base import NextToken
from llmasos.train.model import Trainee
from llmasos.train.optim import OptimizerOptions
from llmasos.train.schedule import Schedule
from tiny import write_tiny_model

STEPS = 7


class Killed(BaseException):
    pass


class Clock:
    """Goes on by a second whenever it is read."""

    def __init__(self, tick: float = 1.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def report(step: int, **more: Any) -> StepReport:
    values = {
        "loss": 8 / step,
        "gradient_norm": 1.0,
        "rate": 1e-3,
        "num_tokens": 100,
        "num_trained": 60,
        "seconds": 0.5,
    }
    return StepReport(step, **(values | more))


def evaluation(step: int, loss: float = 2.5, text: str = "so\u2028 it\nis", **more: Any) -> Evaluation:
    values = {"bits_per_byte": loss / 2, "num_tokens": 40, "seconds": 0.1, "samples": (Generated("Is it?", text),)}
    return Evaluation(step, loss, **(values | more))


class Fake:
    """Tells of a run as the loop does: evaluations every three steps, checkpoints every two, and both at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place, self.was_evaluated = folder, 0, -1

    def run(self) -> None:
        meter = Meter(6e9, 1e15, Clock())
        watch = Watch(meter, [Files(self.folder, {"name": "fake", "config": {"lr": 1e-3}}, meter)])
        step, evaluated = self.place, self.was_evaluated
        saved = step
        watch.began(step, STEPS)
        if not step:
            watch.evaluated(evaluation(0, 3.0))
            evaluated = 0
        while step < STEPS:
            step += 1
            # a part of the loss that comes later than the others
            watch.stepped(report(step, parts={"kl": 0.5} if step >= 5 else None))
            if step % 3 == 0:
                watch.evaluated(evaluation(step, 3.0 / step))
                evaluated = step
            if step % 2 == 0:
                self.place, self.was_evaluated = saved, _ = step, evaluated
                watch.saved(step, Path(f"{step:06d}"))
        if saved != step:
            self.place, self.was_evaluated = step, evaluated
            watch.saved(step, Path(f"{step:06d}"))
        if evaluated != step:
            watch.evaluated(evaluation(step, 3.0 / step))
        watch.ended(step, "finished")


def left(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """What is there, without times."""
    times = ("seconds", "tokens_per_second", "mfu", "memory")
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]
    lines = (folder / "evaluations.jsonl").read_text().split("\n")
    return rows, [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines if line]


class Interrupted:
    """Kills at the n-th write: before it, in the middle of it, or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, when: str) -> None:
        self.at, self.when, self.num = at, when, 0
        for name in ("_append", "write_atomically"):
            patch.setattr(files, name, self._around(name, getattr(files, name)))

    def _around(self, name: str, write: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
        def written(path: Path, text: str) -> None:
            self.num += 1
            if self.num != self.at:
                write(path, text)
                return
            if self.when == "in":
                if name == "_append":
                    write(path, text[: len(text) // 2])
                else:
                    path.with_name(f".{path.name}.0123abcd.tmp").write_text(text[: len(text) // 2])
            elif self.when == "after":
                write(path, text)
            raise Killed

        return written


@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_a_run_that_is_killed_at_any_write_leaves_every_row_once(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fake(tmp_path / "whole").run()
    expected = left(tmp_path / "whole")
    assert [row["step"] for row in expected[0]] == [str(i + 1) for i in range(STEPS)]
    assert [one["step"] for one in expected[1]] == [0, 3, 6, 7]
    at = was_killed = 0
    while at == was_killed:
        at += 1
        fake = Fake(tmp_path / f"{at}")
        with monkeypatch.context() as patch:
            Interrupted(patch, at, when)
            try:
                fake.run()
            except Killed:
                was_killed = at
        fake.run()
        assert left(fake.folder) == expected, f"killed {when} write {at}"
        run = json.loads((fake.folder / "run.json").read_text())
        assert run["state"] == "finished" and run["step"] == STEPS and run["measured"]["num_tokens"] == 100 * STEPS
        assert not list(fake.folder.glob(".*.tmp"))
    assert was_killed > 20


def test_a_run_that_was_killed_twice_tells_of_its_sessions(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.run()
    fake.place = 4
    fake.run()
    run = json.loads((tmp_path / "run.json").read_text())
    assert [(one["from_step"], one["to_step"], one["reason"]) for one in run["sessions"]] == [
        (0, 7, "finished"),
        (4, 7, "finished"),
    ]
    assert run["checkpoint"] == {"step": 7, "path": "000007"}
    assert run["evaluations"]["first"]["loss"] == 3.0 and "samples" not in run["evaluations"]["last"]
    assert run["seconds"] > 0


def test_damaged_files_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    Fake(tmp_path).run()
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b'\x00\xff,"nonsense\n8,1.0')
    with (tmp_path / "evaluations.jsonl").open("a") as lines:
        lines.write('[1]\n{"step": "x", "loss": 1}\n{"step": 9')
    assert [row["step"] for row in read_metrics(tmp_path).rows] == [str(i + 1) for i in range(STEPS)]
    assert [one["step"] for one in read_evaluations(tmp_path)] == [0, 3, 6, 7]
    assert last_step(tmp_path, 3) == 3
    assert read_metrics(tmp_path / "none").rows == [] == read_evaluations(tmp_path / "none")


def test_what_is_no_number_is_null_and_json_stays_json(tmp_path: Path) -> None:
    meter = Meter(1.0, None, Clock())
    watch = Watch(meter, [Files(tmp_path, {"name": "x", "half": "\udc80"}, meter)])
    watch.began(0, 2)
    watch.stepped(report(1, loss=math.nan, skipped="the gradient is\nnan, so"))
    watch.evaluated(evaluation(1, math.nan, text="\udc80", bits_per_byte=None))
    watch.ended(1, "DivergedError: no")
    run = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    [line] = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert run["state"] == "failed" and run["reason"] == "DivergedError: no" and run["measured"]["num_skipped"] == 1
    [row] = read_metrics(tmp_path).rows
    assert row["skipped"] == "the gradient is nan, so"


def test_a_full_disk_is_said_with_the_file_and_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(1.0, None, Clock())
    watch = Watch(meter, [Files(tmp_path, {}, meter)])
    watch.began(0, 2)
    watch.stepped(report(1))

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_append", full)
    with pytest.raises(DiskFullError, match=r"metrics\.csv.*No space left") as caught:
        watch.stepped(report(2))
    assert "resume" in caught.value.hint

    def refused(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_append", refused)
    with pytest.raises(StoreError, match="Permission denied") as other:
        watch.stepped(report(3))
    assert not isinstance(other.value, DiskFullError) and "written" in other.value.hint


def test_speed_counts_waiting_for_data_and_leaves_out_evaluations() -> None:
    now = 0.0
    meter = Meter(1e9, 1e12, lambda: now)
    meter.began(0, 10)
    now = 2.0
    speed = meter.stepped(report(1, seconds=0.1))
    assert speed.tokens_per_second == 50 and speed.mfu == pytest.approx(0.05)
    assert speed.seconds_left == 9 * 2 and speed.memory > 1e6
    now = 12.0
    meter.go_on()
    now = 16.0
    speed = meter.stepped(report(2, memory=77))
    assert speed.tokens_per_second == 25 and speed.smooth_tokens_per_second == pytest.approx(200 / 6)
    assert speed.seconds_left == pytest.approx(8 * (3 + 10 / 2)) and speed.memory == 77


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def show(screen: Screen, *, tick: float = 20.0) -> str:
    meter = Meter(6e9, 1e15, Clock())
    progress = Progress(meter, reported=Path("runs/x/report.html"), stream=screen, clock=Clock(tick))
    watch = Watch(meter, [progress])
    watch.began(0, 3)
    for step in (1, 2, 3):
        watch.stepped(report(step, skipped="the gradient is inf" if step == 2 else ""))
    watch.evaluated(evaluation(3, text="\x1b[2Jno\x07"))
    watch.ended(3, "finished")
    return screen.getvalue()


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines() -> None:
    lines = show(Screen(False)).splitlines()
    assert lines[0].startswith("33%  step 1/3  loss 8  100 tok/s  MFU 0.1%  ") and lines[0].endswith("4.0 s left")
    assert lines[1] == "step 2 was left out: the gradient is inf"
    assert lines[4] == "step 3: held-out loss 2.5, 1.25 bits per byte (40 tokens, 0.1 s)"
    assert lines[5] == "  Is it? → [2Jno", "what a terminal would obey is taken out"
    assert lines[6].startswith("finished after step 3 in ") and lines[6].endswith("runs/x/report.html")
    assert len(show(Screen(False), tick=1.0).splitlines()) == 6, "the second step comes too early for a line"


def test_at_the_end_what_was_planned_stands_beside_what_was_measured(tmp_path: Path) -> None:
    plan = {"memory": 90 * 2**20, "num_tokens": 400, "seconds": 2.0}
    meter, screen = Meter(6e9, None, Clock()), Screen(False)
    files = Files(tmp_path, {"plan": plan}, meter)
    watch = Watch(meter, [files], [Progress(meter, plan=plan, stream=screen)])
    watch.began(0, 3)
    for step in (1, 2, 3):
        watch.stepped(report(step, memory=100 * 2**20))
    watch.ended(3, "finished")
    lines = screen.getvalue().splitlines()
    assert lines[-2] == "memory: 90 MiB planned, 100 MiB measured (-10.0%)"
    assert lines[-1] == "speed: 200 tok/s planned, 100 tok/s measured (+100.0%)"
    assert json.loads((tmp_path / "run.json").read_text())["plan_error"] == {"memory": -0.1, "tokens_per_second": 1.0}


def test_on_a_terminal_one_line_is_drawn_anew_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    shown = show(Screen(True))
    drawn = [part for part in shown.split("\r\x1b[K") if part and not part.endswith("\n")]
    assert len(drawn) == 3 and all(len(part) <= 39 for part in drawn) and "步 2/3" in drawn[1]
    assert "第 3 步：留出损失 2.5，每字节 1.25 比特" in shown and "已完成" in shown


def test_lines_are_cut_where_a_terminal_and_people_want_it() -> None:
    assert fit("损失 3", 4) == "损失" and fit("损失", 3) == "损" and fit("abc", 9) == "abc"
    assert shown("be kind\n" * 50 + "What is 2 + 2?", -20) == "…kind What is 2 + 2?"
    assert shown("It is 4, as said.", 8) == "It is 4…" and shown("a\tb", 8) == "a b"


def test_who_only_shows_cannot_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Watcher):
        times = closed = 0

        def metered(self, report: StepReport, speed: Speed) -> None:
            self.times += 1
            raise ConnectionError("no\nserver")

        def close(self) -> None:
            self.closed += 1
            raise OSError

    broken, fine = Broken(), Progress(Meter(1.0, None), stream=Screen(False))
    watch = Watch(Meter(1.0, None, Clock()), [], [broken, fine])
    watch.began(0, 2)
    watch.stepped(report(1))
    watch.stepped(report(2))
    watch.ended(2, "finished")
    assert (broken.times, broken.closed) == (1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "Broken failed and is left out from now on: ConnectionError: no server"
    ]


def test_what_fails_before_the_first_step_ends_the_run_there() -> None:
    """A tracker without a login: hours that nobody sees are worse than no beginning."""

    class Fine(Watcher):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    class NoLogin(Fine):
        def began(self, step: int, num_steps: int) -> None:
            raise ConnectionError("No API key configured.")

    fine, broken = Fine(), NoLogin()
    with pytest.raises(
        UnsupportedError, match=r"NoLogin could not begin: ConnectionError: No API key configured\. See"
    ):
        Watch(Meter(1.0, None), [], [fine, broken]).began(0, 2)
    assert (fine.closed, broken.closed) == (1, 1)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path


def real_loop(world: Path, name: str, *more: Listener) -> Loop:
    torch.manual_seed(0)
    model = load_model(world / "model", device="cpu", dtype="float32")
    assert model.tokenizer is not None
    model.module.requires_grad_()
    options: dict[str, Any] = {"max_length": 64, "batch_tokens": 128, "validation": 0.2}
    batches = Batches(world / "data.jsonl", model.tokenizer, epochs=None, **options)
    held_out = Batches(world / "data.jsonl", model.tokenizer, split="validation", **options)
    trainee = Trainee(model.module, dtype=torch.float32)
    folder = world / "home" / "runs" / name
    config = TrainConfig(model=str(world / "model"), data=(str(world / "data.jsonl"),), name=name, lr=1e-2)
    cpu = torch.device("cpu")
    seen = listeners_for(
        config,
        folder,
        shape=model.config,
        batches=batches,
        stats=batches.prepare(),
        device=cpu,
        dtype=torch.float32,
        path=world / "model",
        plan={"memory": 10**9},
        progress=False,
    )
    evaluate = Evaluator(trainee, held_out, model.tokenizer, new_tokens=4)
    schedule, limits = Schedule(), LoopOptions(steps=6, save_every=2, evaluate_every=3)
    learner = NextToken(model, trainee)
    return Loop(learner, batches, OptimizerOptions(lr=1e-2), schedule, limits, folder, cpu, [*seen, *more], evaluate)


class Kill(Listener):
    def __init__(self, at: str) -> None:
        self.at = at

    def stepped(self, report: StepReport) -> None:
        if self.at == f"step {report.step}":
            raise Killed

    def saved(self, step: int, path: Path) -> None:
        if self.at == f"saved {step}":
            raise Killed


@pytest.mark.parametrize("at", ["step 1", "step 5", "saved 6"])
def test_a_real_run_that_is_killed_and_goes_on_leaves_what_an_uninterrupted_one_does(at: str, world: Path) -> None:
    assert real_loop(world, "whole").train() == "finished"
    with pytest.raises(Killed):
        real_loop(world, "cut", Kill(at)).train()
    assert open_run("cut").state == "failed"
    again = real_loop(world, "cut")
    again.resume()
    assert again.train() == "finished"
    whole, cut = (left(world / "home" / "runs" / name) for name in ("whole", "cut"))
    assert cut[0] == whole[0] and len(cut[0]) == 6

    def fixed(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in one.items() if k != "seconds"} for one in evaluations]

    assert fixed(cut[1]) == fixed(whole[1]) and [one["step"] for one in cut[1]] == [0, 3, 6]


def test_run_json_says_what_is_needed_to_have_the_run_again(world: Path) -> None:
    real_loop(world, "one").train()
    run = open_run("one")
    assert (run.name, run.state, run.step) == ("one", "finished", 6)
    assert run.fact("config.lr") == 0.01 and run.fact("plan.memory") == 10**9
    assert run.fact("model.architecture") == "LlamaForCausalLM" and run.fact("model.num_weights") > 30_000
    [file] = run.fact("data.files")
    assert len(file["digest"]) == 64 and file["num_samples"] == 60 and run.fact("data.num_samples") < 60
    assert run.fact("versions.torch") == torch.__version__ and run.fact("device.type") == "cpu"
    assert run.fact("evaluations.last.loss") < run.fact("evaluations.first.loss")
    assert run.fact("measured.tokens_per_second") > 0 and run.fact("measured.mfu") is None
    assert "<svg" in (run.folder / "report.html").read_text()


def test_the_commit_is_told_where_there_is_one(tmp_path: Path) -> None:
    assert facts.git_facts(tmp_path) is None
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        facts.subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "untracked").write_text("x")
    found = facts.git_facts(tmp_path)
    assert found is not None and len(found["commit"]) == 40 and found["is_changed"] is False


def test_runs_are_found_by_name_and_the_dead_are_told_from_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    assert list_runs() == []
    for name in ("gsm8k-lora", "gsm8k-full"):
        Fake(tmp_path / "runs" / name).run()
    assert {run.name for run in list_runs()} == {"fake"} and open_run(tmp_path / "runs" / "gsm8k-full").step == 7
    with pytest.raises(NotFoundError, match="no run 'none'"):
        open_run("none")
    folder = tmp_path / "runs" / "gsm8k-lora"
    run = json.loads((folder / "run.json").read_text())

    def state(**session: Any) -> str:
        run["state"], run["sessions"] = "running", [run["sessions"][-1] | session]
        (folder / "run.json").write_text(json.dumps(run))
        return open_run("gsm8k-lora").state

    assert state() == "running" and open_run("gsm8k-lora").step == 7
    assert state(process_began=1.0) == "interrupted", "another process has its number now"
    assert state(pid=2**22 + 1) == "interrupted"
    assert state(host="elsewhere", pid=os.getpid()) == "running", "nobody here can tell"
    (folder / "run.json").write_text("{")
    (folder / "config.yaml").write_text("model: x")
    assert open_run("gsm8k-lora").state == "interrupted"


def test_two_runs_side_by_side_show_where_they_differ(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-3), ("b", 1e-4)):
        meter = Meter(1.0, None, Clock())
        config = {"lr": rate, "lora": {"r": 8}, "name": name, "steps": 2}
        watch = Watch(meter, [Files(tmp_path / name, {"name": name, "config": config}, meter)])
        watch.began(0, 2)
        watch.stepped(report(1))
        watch.evaluated(evaluation(1 if name == "a" else 2, rate))
        watch.ended(1, "finished")
    found = compare([open_run(tmp_path / "a"), open_run(tmp_path / "b")])
    assert found.names == ["a", "b"] and found.options == {"lr": [1e-3, 1e-4]}
    assert found.losses == {1: [1e-3, None], 2: [None, 1e-4]}
    assert found.facts["last_loss"] == [1e-3, 1e-4] and "mfu" not in found.facts
