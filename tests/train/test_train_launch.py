"""Runs on two processes as people begin them: `--gpus 2`, and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from parallel_work import losses

from llmasos.train.config import TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.parallel import LostRankError
from llmasos.train.parallel.launch import _shared_threads
from llmasos.train.run import resume, train
from tiny import write_tiny_model

OPTIONS: dict[str, Any] = {
    "data": "chats.jsonl", "device": "cpu", "dtype": "float32", "steps": 2, "lr": 1e-2, "max_length": 64,
    "batch_tokens": 128, "micro_batch_tokens": 64, "validation": 0.2, "evaluate_every": 100, "lora.r": 4,
}  # fmt: skip
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
HOW = {"gpus": ([], ["--gpus", "2"]), "torchrun": (TORCHRUN, ["--parallel", "fsdp"])}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launch")
    write_tiny_model(path / "model")
    chats = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}] for i in range(60)
    ]
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def typed(home: Path, own: str, begin: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *begin, "-m", "llmasos", *words],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LLMASOS_HOME": str(home / own)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("how", HOW)
def test_two_processes_make_one_run_with_which_one_goes_on(
    how: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, flags = HOW[how]
    done = typed(home, how, begin, "train", "sft", "--model", "model", *FLAGS, *flags, "--name", how, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # of one process: two would not be JSON
    assert (said["reason"], said["step"], said["installed"]) == ("finished", 2, how)

    monkeypatch.setenv("LLMASOS_HOME", str(home / how))
    monkeypatch.chdir(home)
    run = home / how / "runs" / how
    assert [folder.name for folder in run.parent.iterdir()] == [how]
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert (run / "adapter" / "adapter_model.safetensors").exists() and (run / "report.html").exists()
    state = json.loads((run / "checkpoints" / "000002" / "state.json").read_text())
    assert state["world_size"] == 2
    assert json.loads((run / "run.json").read_text())["device"]["count"] == 2
    alone = train(TrainConfig.of(model="model", **OPTIONS | {"data": ["chats.jsonl"]}, name="alone"), export=False)
    assert losses(run) == pytest.approx(losses(alone.folder), abs=1e-5)
    again = resume(how, steps=4, gpus=1, parallel="auto", export=False)
    assert (again.reason, again.step) == ("finished", 4)


@pytest.mark.slow
def test_what_two_processes_refuse_is_said_once(home: Path) -> None:
    flags = [*FLAGS, "--gpus", "2", "--tensor-parallel-size", "2", "--tuning", "qlora", "--name", "refused"]
    done = typed(home, "refused", [], "train", "sft", "--model", "model", *flags)
    assert done.returncode == 2
    assert done.stderr.count("weights in few bits") == 1 and "Traceback" not in done.stderr


class At(Listener):
    """Does something when a step is done."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step, self.work = step, work

    def stepped(self, report: StepReport) -> None:
        if report.step == self.step:
            self.work()


def test_a_process_that_is_killed_is_named_and_the_run_goes_on_without_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(home / "killed"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(home)
    begun: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def begin(*given: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(real(*given, **options))
        return begun[-1]

    monkeypatch.setattr("llmasos.train.parallel.launch.subprocess.Popen", begin)
    config = TrainConfig.of(
        model="model", **OPTIONS | {"data": ["chats.jsonl"], "steps": 6}, name="cut", gpus=2, save_every=2
    )
    with pytest.raises(LostRankError) as e:
        train(config, listeners=[At(5, lambda: begun[0].kill())])
    assert e.value.message.startswith("Process 1 of 2 was killed (SIGKILL).")
    assert "`llmasos train resume cut`" in e.value.hint
    assert begun[0].returncode == -9 and not dist.is_initialized()
    assert (home / "killed" / "runs" / "cut" / "checkpoints" / "000002").is_dir()
    again = resume("cut", gpus=1)
    assert (again.reason, again.step) == ("finished", 6)
    steps = [json.loads(line)["step"] for line in (again.folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


FIRST = """
import os
from llmasos.train.config import TrainConfig
from llmasos.train.run import train
from test_train_launch import OPTIONS, At
train(
    TrainConfig.of(model="model", **OPTIONS | {"data": ["chats.jsonl"], "steps": 6}, name="first", gpus=2),
    listeners=[At(3, lambda: os.kill(os.getpid(), 9))],
)
"""


def test_when_the_first_process_is_killed_the_others_end_and_say_why(home: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(  # until all of them have closed what they write to
        [sys.executable, "-c", FIRST],
        cwd=home,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LLMASOS_HOME": str(home / "first"),
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9
    assert "Process 1 of 2 " in done.stderr and "`llmasos train resume " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("said", "each"), [({}, 2), ({"OMP_NUM_THREADS": "3"}, None), ({"LLMASOS_THREADS": "3"}, None)]
)
def test_processes_share_the_cores_unless_somebody_said_how_many_threads(
    said: dict[str, str], each: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "LLMASOS_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    now: list[int] = []
    monkeypatch.setattr("llmasos.train.parallel.launch.set_threads", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", now.append)
    assert _shared_threads(4) == (
        {} if each is None else dict.fromkeys(("OMP_NUM_THREADS", "LLMASOS_THREADS"), str(each))
    )
    assert now == ([] if each is None else [each])
    if each is not None:
        assert _shared_threads(16)["OMP_NUM_THREADS"] == "1"
