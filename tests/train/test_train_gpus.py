"""Whole runs on two GPUs, over NCCL: `pytest -m gpu tests/train/test_train_gpus.py`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_work import losses

from llmasos.train.config import TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.parallel import LostRankError
from llmasos.train.run import Result, resume, train
from llmasos.train.verify import verify_run
from tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    # torch 2.11's compiler, of itself and of what it looks at
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning", "ignore:TensorFloat32:UserWarning"
    ),
]
DEVICE = "cuda"
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Heads of 64; states of most matrices in 8 bits."""
HALF, EXACT = 0.02, 5e-3
"""By which losses differ where bfloat16 and float32 are summed up in another order."""
FULL: dict[str, Any] = {"tuning": "full", "lr": 1e-3}
LORA: dict[str, Any] = {"tuning": "lora", "lr": 1e-3, "lora": {"r": 16}}
WHOLE: dict[str, Any] = FULL | {"dtype": "float32"}
"""Halves that are rounded to bfloat16 before they are added up lead all weights astray within four steps."""
TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": (LORA, {"parallel": "ddp"}),
    "fsdp": (FULL, {"parallel": "fsdp"}),
    "fsdp-lora": (LORA, {"parallel": "fsdp"}),
    "fsdp-qlora": (LORA | {"tuning": "qlora"}, {"parallel": "fsdp"}),
    "fsdp-int8": (LORA | {"tuning": "qlora", "quantization": "int8"}, {"parallel": "fsdp"}),
    "fsdp-muon": (FULL | {"optimizer": "muon"}, {"parallel": "fsdp"}),
    "fsdp-8bit": (FULL | {"optimizer": "adamw8bit"}, {"parallel": "fsdp"}),
    "fsdp-compiled": (FULL | {"recompute": True, "compile": True}, {"parallel": "fsdp"}),
    "fsdp-qlora-compiled": (LORA | {"tuning": "qlora", "compile": True}, {"parallel": "fsdp"}),
    "hsdp-8bit-lora": (LORA | {"optimizer": "adamw8bit"}, {"parallel": "hsdp"}),
    "tensor": (WHOLE, TENSOR),
    "tensor-lora": (LORA, TENSOR),
    "tensor-muon": (WHOLE | {"optimizer": "muon"}, TENSOR),
    "tensor-compiled": (WHOLE | {"recompute": True, "compile": True}, TENSOR),
    "pretrain": ({"method": "pretrain", "model": None, "depth": 2, "vocab_size": 400}, {"parallel": "fsdp"}),
    "distill": ({"method": "distill", "distillation": {"teacher": "model", "keep_layers": 1}}, {"parallel": "fsdp"}),
    "on-policy": (
        {
            "method": "distill",
            "distillation": {"teacher": "model", "keep_layers": 1, "on_policy": 0.5, "max_new_tokens": 8},
        },
        {"parallel": "ddp"},
    ),
}
"""What is learnt, and how it is spread."""
ALONE = {"gpus": 1, "parallel": "auto", "tensor_parallel_size": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpus")
    write_tiny_model(path / "model", **WIDE)
    chats = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1} {'and' * (i % 5)}"}]
        for i in range(400)
    ]
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(home / "home"))
    monkeypatch.chdir(home)


def options(case: str, name: str, **more: Any) -> TrainConfig:
    base = {"model": "model", "data": ["chats.jsonl"], "device": DEVICE, "steps": 4, "save_every": 2, "compile": False}
    base |= {"max_length": 64, "batch_tokens": 512, "micro_batch_tokens": 256, "validation": 0.2}
    changes = CASES[case][0]
    if changes.get("method") == "distill":
        del base["model"]
    return TrainConfig.of(**base | {"install": False, "evaluate_every": 100} | changes | more, name=name)


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_two_gpus_is_that_of_one_and_either_goes_on_as_the_other(case: str) -> None:
    spread = {"gpus": 2} | CASES[case][1]
    two, one = train(options(case, f"two-{case}", **spread)), train(options(case, f"one-{case}"))
    assert not dist.is_initialized()
    near = EXACT if "dtype" in CASES[case][0] else HALF
    if case != "on-policy":  # micro-batches that are drawn are others
        assert losses(one.folder)[-1] < losses(one.folder)[0]
        assert losses(two.folder) == pytest.approx(losses(one.folder), abs=near)
    # a random base is another model in 4 bits, which an adapter that is exported is not beside
    for result in (two, one) if "qlora" not in case else ():
        verified = verify_run(result.folder)
        assert verified.ok, verified.problems
    back = resume(f"two-{case}", steps=6, **ALONE)
    out = resume(f"one-{case}", steps=6, **spread)
    assert (back.reason, back.step, out.reason, out.step) == ("finished", 6, "finished", 6)
    if case != "on-policy":
        assert losses(back.folder) == pytest.approx(losses(out.folder), abs=near)


def test_torchrun_begins_the_processes_of_a_run(home: Path) -> None:
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "llmasos",
        "train",
        "sft",
        "--model",
        "model",
    ]
    flags = {"data": "chats.jsonl", "steps": 3, "max-length": 64, "batch-tokens": 512, "micro-batch-tokens": 256}
    flags |= {"parallel": "fsdp", "tuning": "full", "lr": 1e-3, "device": DEVICE, "name": "torchrun"}
    done = subprocess.run(
        [sys.executable, *words, "--json", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["reason"], said["step"], said["installed"]) == ("finished", 3, "torchrun")
    assert verify_run(home / "home" / "runs" / "torchrun").ok


class Kill(Listener):
    def __init__(self, begun: list[subprocess.Popen[bytes]]) -> None:
        self.begun = begun

    def stepped(self, report: StepReport) -> None:
        if report.step == 5:
            self.begun[0].kill()


@pytest.mark.parametrize("case", ["fsdp", "tensor"])
def test_a_process_that_is_killed_ends_the_run_with_its_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though GPUs wait for one another without end."""
    begun: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def begin(*given: Any, **more: Any) -> subprocess.Popen[bytes]:
        begun.append(real(*given, **more))
        return begun[-1]

    monkeypatch.setattr("llmasos.train.parallel.launch.subprocess.Popen", begin)
    with pytest.raises(LostRankError, match=r"Process 1 of 2 was killed \(SIGKILL\)"):
        train(options(case, f"killed-{case}", gpus=2, steps=200, **CASES[case][1]), listeners=[Kill(begun)])
    again: Result = resume(f"killed-{case}", steps=8, **ALONE)
    assert (again.reason, again.step) == ("finished", 8)


class Peak(Listener):
    """Of the GPU's memory until a run's first step."""

    before = most = 0

    def began(self, step: int, num_steps: int) -> None:
        self.most = torch.cuda.max_memory_allocated() - self.before


@pytest.mark.parametrize("case", ["fsdp", "tensor"])
def test_a_gpu_holds_its_part_of_a_model_and_one_block_while_it_is_loaded(case: str, home: Path) -> None:
    deep = write_tiny_model(
        home / "deep", num_hidden_layers=24, **WIDE | {"hidden_size": 512, "intermediate_size": 2048}
    )
    found = {}
    for gpus, how in ((1, {}), (2, CASES[case][1])):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peak = Peak()
        peak.before = torch.cuda.memory_allocated()
        train(options(case, f"peak-{case}-{gpus}", model=str(deep), gpus=gpus, steps=1, **how), listeners=[peak])
        found[gpus] = peak.most
    assert found[2] < 0.65 * found[1]  # a half, and a block of 24
