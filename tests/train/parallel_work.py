"""What the ranks of tests/train/test_train_parallel.py do: python parallel_work.py FOLDER RANK WORLD PORT NAMES…"""

import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alive import Alive
from torch import Tensor

from llmasos.data import Batches
from llmasos.errors import LLMasOSError
from llmasos.models import load as loading
from llmasos.models.load import load_model
from llmasos.train.config import TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.loop import Loop, LoopOptions
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.methods import method_of
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions
from llmasos.train.parallel import Ranks, Spreader, whole
from llmasos.train.parallel.ranks import local
from llmasos.train.parallel.shard import own_part
from llmasos.train.run import train
from llmasos.train.schedule import Schedule


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


class At(Listener):
    def __init__(self, step: int, then: Any) -> None:
        self.step, self.then = step, then

    def stepped(self, report: StepReport) -> None:
        if report.step == self.step:
            self.then()


def make(
    home: Path, ranks: Ranks, run: str, *, lora: bool = False, steps: int = 2, optimizer: str = "adamw", **options: Any
) -> Loop:
    """A step reads two batches, whoever reads them."""
    torch.manual_seed(0)
    model = load_model(home / "model", device="cpu", dtype="float32")
    assert model.tokenizer is not None
    if lora:
        add_lora(model, LoraOptions(r=128 if optimizer == "adamw8bit" else 4))  # states of few weights are in float32
        for name, parameter in model.module.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        model.module.requires_grad_()
    spreader = Spreader(ranks, torch.float32, optimizer)
    spreader.whole(model.module)
    trainee = Trainee(model.module, dtype=torch.float32)
    spreader.prepare(trainee)
    batches = Batches(
        home / "data.jsonl", model.tokenizer, max_length=64, batch_tokens=128, epochs=None, seed=3,
        rank=ranks.data_rank, world_size=ranks.data_size,
    )  # fmt: skip
    return Loop(
        Learner(trainee),
        batches,
        OptimizerOptions(
            name=optimizer, lr=1e-3 if optimizer == "muon" else 1e-2, weight_decay=0.1, max_norm=0.5, eps=1e-3
        ),  # type: ignore[arg-type]  # a name of the table above
        Schedule("constant", warmup=0.0),
        LoopOptions(steps=steps, accumulation=2 // ranks.data_size, **options),
        home / run,
        torch.device("cpu"),
        ranks=ranks,
    )


def weights(loop: Loop) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in whole(loop.learner.module, loop.ranks).items()}


LEARNT = [(False, "adamw"), (True, "adamw"), (False, "muon"), (False, "adamw8bit"), (True, "adamw8bit")]
"""Whether an adapter, and by which optimizer."""
OTHER_NUMBER = {"fsdp": ("fsdp", 1, "adamw"), "tensor": ("ddp", 2, "adamw"), "fsdp8bit": ("fsdp", 1, "adamw8bit"),
                "tensor-muon": ("ddp", 2, "muon")}  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor": ({"tuning": "full", "validation": 0.2, "micro_batch_tokens": None}, {"tensor_parallel_size": 2}),
    "tensor-lora": ({"tuning": "lora", "lora": {"r": 4}, "validation": 0.2}, {"tensor_parallel_size": 2}),
    "ddp": ({"tuning": "lora", "lora": {"r": 4, "dora": True}, "validation": 0.2}, {"parallel": "ddp"}),
    "distill": ({"method": "distill", "tuning": "full", "validation": 0.2}, {"parallel": "fsdp"}),
    "qlora": ({"tuning": "qlora", "lora": {"r": 4}, "validation": 0.2}, {"parallel": "fsdp"}),
    "pretrain": (
        {"method": "pretrain", "model": None, "depth": 1, "vocab_size": 400, "validation": 0.2},
        {"parallel": "fsdp"},
    ),
}
"""Whole runs: what is learnt, and how it is spread over two processes."""


def options(home: Path, which: str, **more: Any) -> TrainConfig:
    base = {"model": str(home / "model"), "data": [str(home / "data.jsonl")], "device": "cpu", "dtype": "float32"}
    base |= {"steps": 3, "lr": 1e-3, "max_length": 64, "batch_tokens": 128, "micro_batch_tokens": 64}
    if RUNS[which][0].get("method") == "distill":
        base["distillation"] = {"teacher": str(home / "deep"), "hidden_weight": 0.1}
    return TrainConfig.of(**base | {"evaluate_every": 100, "install": False} | RUNS[which][0] | more)


def runs(home: Path) -> None:
    """What `train` does on each of two processes, and what it refuses."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "this"}
    for name, (_, how) in RUNS.items():
        train(options(home, name, **how, name=f"two-{name}"))
    said = {}
    for what, changes in REFUSED.items():
        try:
            train(options(home, "tensor", tensor_parallel_size=2, name=f"refused-{what}", **changes))
        except LLMasOSError as e:
            said[what] = f"{e.message} {e.hint}"
    if dist.get_rank() == 0:
        (home / "refused.json").write_text(json.dumps(said))


REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"tuning": "lora", "lora": {"dora": True}},
    "qlora": {"tuning": "qlora"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "fsdp": {"parallel": "fsdp"},
    "heads": {"method": "pretrain", "tuning": "full", "model": None, "depth": 1, "vocab_size": 400},
}


def equal(home: Path, kind: str, tensor: int, lora: bool, optimizer: str) -> None:
    ranks = Ranks.of_group(kind, tensor, "cpu", local_rank=dist.get_rank(), local_size=2)
    name = f"{kind}{tensor}{'lora' if lora else ''}{optimizer}"
    loop = make(home, ranks, name, lora=lora, optimizer=optimizer)
    loop.train()
    found = weights(loop)
    if ranks.is_first:
        torch.save({"weights": found, "losses": losses(home / name)}, home / f"{name}.pt")


def kill(home: Path) -> None:
    """Bit for bit on two ranks; both agree on NaN, on a full disk and on the end that one is told of."""
    ranks = Ranks.of_group("fsdp", 1, "cpu", local_rank=dist.get_rank(), local_size=2)
    uncut = make(home, ranks, "uncut", steps=6)
    uncut.train()
    expected = weights(uncut)
    cut = make(home, ranks, "cut", steps=6, save_every=2)

    inner = cut.learner.loss

    def fails(batch: Placed) -> Tensor:
        if cut.step == 3:
            raise Killed
        return inner(batch)

    cut.learner.loss = fails  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        cut.train()
    again = make(home, ranks, "cut", steps=6)
    torch.manual_seed(99)
    assert again.resume() and again.step == 2
    assert again.train() == "finished"
    found = weights(again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    bad = make(home, ranks, "bad", steps=3)
    plain = bad.learner.loss
    bad.learner.loss = lambda batch: plain(batch) * (float("nan") if ranks.rank == 1 and bad.step == 1 else 1)  # type: ignore[method-assign]
    told: list[str] = []

    class Told(Listener):
        def stepped(self, report: StepReport) -> None:
            told.append(report.skipped)

    bad.listeners = [Told()]
    assert bad.train() == "finished"
    assert [bool(t) for t in told] == ([False, True, False] if ranks.is_first else [])

    stopped = make(home, ranks, "stopped", steps=6)
    one = stopped.learner.loss

    def loss(batch: Placed) -> Tensor:
        if ranks.rank == 1 and stopped.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return one(batch)

    stopped.learner.loss = loss  # type: ignore[method-assign]
    assert stopped.train() == "stopped" and stopped.step == 2

    save = torch.save

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if ranks.rank == 1:
        torch.save = full
    try:
        stopped.save()
    except LLMasOSError as e:
        assert "could not be written" in str(e), e
    else:
        raise AssertionError("a full disk was not noticed")
    finally:
        torch.save = save
    assert [p.name for p in (home / "stopped" / "checkpoints").iterdir()] == ["000002"]


class FailsAt(Listener):
    """On whichever rank it is told."""

    def __init__(self, what: str, rank: int) -> None:
        self.what, self.rank = what, rank

    def _fail(self, what: str) -> None:
        if what == self.what:
            raise ConnectionError(f"no network for {what} on rank {self.rank}")

    def began(self, step: int, num_steps: int) -> None:
        self._fail("began")

    def stepped(self, report: StepReport) -> None:
        if report.step == 2:
            self._fail("stepped")

    def saved(self, step: int, path: Path) -> None:
        self._fail("saved")

    def ended(self, step: int, reason: str) -> None:
        self._fail("ended")


FAILS = {"began": 0, "stepped": 2, "saved": 3, "ended": 3}
"""When a listener fails, and how many steps are done when a run of 3 ends by that."""


def failing(home: Path) -> None:
    """The listeners of both ranks fail at the same time; the runs go on afterwards."""
    for kind in ("ddp", "fsdp"):
        ranks = Ranks.of_group(kind, 1, "cpu", local_rank=dist.get_rank(), local_size=2)
        found = {}
        for what in FAILS:
            loop = make(home, ranks, f"fails-{kind}-{what}", steps=3)
            loop.listeners = [FailsAt(what, ranks.rank)]
            ended = "not at all"
            try:
                loop.train()
            except (ConnectionError, LLMasOSError) as e:
                ended = f"{type(e).__name__}: {e}"
            again = make(home, ranks, f"fails-{kind}-{what}", steps=4)
            found[what] = {"said": ended, "step": loop.step, "resumed": again.resume(), "then": again.train()}
        (home / f"failing-{kind}-{ranks.rank}.json").write_text(json.dumps(found))


def other_number(home: Path) -> None:
    """From one rank to two, with tensor parallel and FSDP, and saved for one again."""
    for name, (kind, tensor, optimizer) in OTHER_NUMBER.items():
        ranks = Ranks.of_group(kind, tensor, "cpu", local_rank=dist.get_rank(), local_size=2)
        loop = make(home, ranks, f"from-one-{name}", steps=4, optimizer=optimizer)
        assert loop.resume() and loop.step == 2
        loop.train()


BUILT: dict[str, tuple[dict[str, Any], str, int]] = {
    "fsdp": ({"tuning": "full"}, "fsdp", 1),
    "fsdp-lora": ({"tuning": "lora"}, "fsdp", 1),
    "fsdp-int8": ({"tuning": "qlora", "quantization": "int8"}, "fsdp", 1),
    "fsdp-int4": ({"tuning": "qlora", "quantization": "int4"}, "fsdp", 1),
    "hsdp-dora": ({"tuning": "lora", "lora": {"dora": True}}, "hsdp", 1),
    "tensor": ({"tuning": "full"}, "ddp", 2),
    "tensor-lora": ({"tuning": "lora"}, "ddp", 2),
    "pretrain": ({"method": "pretrain", "model": None, "depth": 6, "tuning": "full"}, "fsdp", 1),
    "distill": ({"method": "distill", "tuning": "full", "distillation": {"teacher": "deep"}}, "fsdp", 1),
    "distill-cut": (
        {"method": "distill", "model": None, "tuning": "full", "distillation": {"teacher": "deep", "keep_layers": 6}},
        "fsdp",
        1,
    ),
}
"""What is built, and how it is spread over two processes."""


def building(home: Path) -> None:
    """What a process holds of a model at most while it is built, and that it is the model of one process."""
    os.chdir(home)
    loading._in_passing_thread = lambda work, stop: work()  # where it is counted
    loading._Filler._placed = lambda self, tensor: tensor.clone()  # type: ignore[method-assign]  # as to a GPU
    found = {}
    for name, (changes, kind, tensor) in BUILT.items():
        base = {"model": "deep", "data": ["data.jsonl"], "output": home / "built"}
        if changes.get("method") == "pretrain":
            base["tokenizer"] = "deep"
        method = method_of(TrainConfig.of(**base | changes))
        ranks = Ranks.of_group(kind, tensor, "cpu", local_rank=dist.get_rank(), local_size=2)
        built: list[Any] = []
        sizes = []
        for each in (Ranks(), ranks):
            torch.manual_seed(5)
            with Alive() as alive:
                built.append(method.build(torch.device("cpu"), Spreader(each, torch.float32)))
                sizes.append((alive.now, alive.most))
        one, two = built
        parts = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (*one.module.layers, one.module)]
        rest = parts[-1] - sum(parts[:-1])
        decoders = [(one.module, two.module)]
        if name.startswith("distill"):
            decoders.append((one.teacher.decoder, two.teacher.decoder))
        same = True
        for ours, theirs in decoders:
            weights = dict(ours.named_parameters()) | dict(ours.named_buffers())
            there = dict(theirs.named_parameters())
            same &= len(there) >= len(dict(ours.named_parameters()))
            same &= all(
                torch.equal(
                    *(t.detach().contiguous().view(torch.uint8) for t in (local(p), own_part(weights[key], p, ranks)))
                )
                for key, p in there.items()
            )
        same = not ranks.most(not same)[0]
        found[name] = {"one": sizes[0], "two": sizes[1], "part": max(rest, *parts[:-1]), "same": same}
    if dist.get_rank() == 1:
        (home / "built.json").write_text(json.dumps(found))


def lost(home: Path) -> None:
    ranks = Ranks.of_group("ddp", 1, "cpu", local_rank=dist.get_rank(), local_size=2)
    loop = make(home, ranks, "lost", steps=50)
    inner = loop.learner.loss

    def loss(batch: Placed) -> Tensor:
        if ranks.rank == 1 and loop.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(batch)

    loop.learner.loss = loss  # type: ignore[method-assign]
    try:
        loop.train()
    except LLMasOSError as e:
        (home / "lost.txt").write_text(f"{type(e).__name__}: {e}")
        os._exit(0)


def main() -> None:
    home, rank, world, port, *names = sys.argv[1:]
    store = dist.TCPStore("127.0.0.1", int(port), int(world), rank == "0", timeout=timedelta(seconds=90))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=90))
    for name in names:
        if name == "equal":
            for kind, tensor in (("ddp", 1), ("fsdp", 1), ("ddp", 2), ("hsdp", 1)):
                for lora, optimizer in LEARNT:
                    if tensor == 1 or optimizer != "adamw8bit":
                        equal(Path(home), kind, tensor, lora, optimizer)
        else:
            globals()[name](Path(home))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
