"""Runs on two processes as people begin them: `--gpus 2`, and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parallel_work import losses

from llmasos.train.config import TrainConfig
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
