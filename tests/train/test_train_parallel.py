"""Two processes learn what one does, lose nothing, and agree on everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_work import BUILT, FAILS, LEARNT, OTHER_NUMBER, RUNS, losses, make, options, weights
from safetensors.torch import load_file
from torch import Tensor

from llmasos.errors import InvalidInputError
from llmasos.train.optim import _alike
from llmasos.train.parallel import Ranks
from llmasos.train.parallel.tensor import Cut
from llmasos.train.run import resume, train
from tiny import write_tiny_model

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(400)  # the first one waits for all that two processes do


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did, beside what one does."""
    path = tmp_path_factory.mktemp("parallel")
    before, os.environ["LLMASOS_HOME"] = os.environ.get("LLMASOS_HOME"), str(path / "home")
    try:
        write_tiny_model(path / "model", intermediate_size=96)  # some matrices have states in 8 bits
        write_tiny_model(path / "deep", num_hidden_layers=12)
        rows = [
            {"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(60)
        ]
        (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for lora, optimizer in LEARNT:
            make(path, Ranks(), f"one-{lora}-{optimizer}", lora=lora, optimizer=optimizer).train()
        for name in RUNS:
            train(options(path, name, name=f"one-{name}"))
        for name, (_, _, optimizer) in OTHER_NUMBER.items():
            make(path, Ranks(), f"from-one-{name}", optimizer=optimizer).train()
        for optimizer in ("adamw", "adamw8bit", "muon"):
            make(path, Ranks(), f"one-long-{optimizer}", steps=4, optimizer=optimizer).train()
        said = two(path, "equal", "runs", "building", "kill", "failing", "other_number", "lost")
        (path / "said.txt").write_text(said)
    finally:
        if before is None:
            del os.environ["LLMASOS_HOME"]
        else:
            os.environ["LLMASOS_HOME"] = before
    return path


def two(path: Path, *names: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "parallel_work.py"), str(path), str(rank), "2", str(port), *names],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=360)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 0, "\n=====\n".join(said)
    return said[0]


@pytest.mark.parametrize("how", ["ddp1", "fsdp1", "ddp2", "hsdp1"])
@pytest.mark.parametrize(("lora", "optimizer"), [each for each in LEARNT if each[1] != "adamw8bit"])
def test_two_processes_learn_what_one_does(how: str, lora: bool, optimizer: str, home: Path) -> None:
    """ddp2: tensor parallel."""
    _, expected, found = learnt(home, how, lora, optimizer)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["ddp1", "fsdp1", "hsdp1"])
@pytest.mark.parametrize("lora", [False, True])
def test_states_in_8_bits_are_divided_too(how: str, lora: bool, home: Path) -> None:
    """Other blocks have other scales: weights differ by a little of what they have moved."""
    before, expected, found = learnt(home, how, lora, "adamw8bit")
    moved = torch.stack([(expected[name] - before[name]).norm() for name in expected]).norm()
    apart = torch.stack([(expected[name] - found[name]).norm() for name in expected]).norm()
    assert apart < 0.05 * moved


def learnt(
    home: Path, how: str, lora: bool, optimizer: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights before, of one process, and of two, whose losses are the same."""
    name = f"one-{lora}-{optimizer}"
    one = make(home, Ranks(), name, lora=lora, optimizer=optimizer)
    before = weights(one)
    assert one.resume()
    found = torch.load(home / f"{how}{'lora' if lora else ''}{optimizer}.pt")
    assert found["losses"] == pytest.approx(losses(home / name), abs=1e-5)
    expected = weights(one)
    assert max(float((expected[n] - before[n]).abs().max()) for n in expected) > 1e-3
    return before, expected, found["weights"]


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_on_two_processes_is_that_of_one(name: str, home: Path) -> None:
    """Its losses, evaluations and answers, and the weights that are exported."""
    one, two = (home / "home" / "runs" / f"{number}-{name}" for number in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and len(losses(one)) == 3
    assert losses(one)[-1] < losses(one)[0] - 0.01
    if options(home, name).validation:
        for ours, theirs in zip(evaluations(two), evaluations(one), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert (ours["num_tokens"], ours["samples"]) == (theirs["num_tokens"], theirs["samples"])
    files = list(one.glob("*/*model.safetensors"))
    assert files
    for file in files:
        found, expected = load_file(two / file.relative_to(one)), load_file(file)
        assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in expected.items()}
        apart = torch.cat([(found[key] - tensor).abs().flatten() for key, tensor in expected.items()])
        # a gradient that is nothing but rounding is a whole step for AdamW: two processes may round it otherwise
        assert int((apart > 1e-5).sum()) <= 1e-4 * len(apart) and float(apart.max()) < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_one_process_goes_on_with_what_two_began(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(home / "home"))
    for who in ("one", "two"):
        found = resume(f"{who}-{name}", steps=5, gpus=1, parallel="auto", tensor_parallel_size=1, export=False)
        assert (found.reason, found.step) == ("finished", 5)
    one, two = (home / "home" / "runs" / f"{number}-{name}" for number in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == 5


@pytest.mark.parametrize("name", BUILT)
def test_a_process_holds_its_own_part_of_a_model_and_one_block_while_it_is_built(name: str, home: Path) -> None:
    """And the numbers are those of one process, also where they are drawn or quantised."""
    built = json.loads((home / "built.json").read_text())[name]
    (alone, _), (kept, most) = built["one"], built["two"]
    assert built["same"]
    assert kept < 0.7 * alone  # tensor parallel has embeddings and head whole
    assert most < kept + 1.5 * built["part"]


def test_what_cannot_be_cut_is_refused_in_words(home: Path) -> None:
    said = json.loads((home / "refused.json").read_text())
    assert "lengths of whole rows (DoRA)" in said["dora"] and 'parallel="ddp"' in said["dora"]
    assert "weights in few bits" in said["qlora"]
    assert "adamw8bit keeps its states in blocks" in said["adamw8bit"] and 'optimizer="adamw"' in said["adamw8bit"]
    assert "the two are not used together" in said["fsdp"]
    assert "The model has 1 heads, which 2 processes cannot share" in said["heads"]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", OTHER_NUMBER)
def test_a_run_goes_on_with_another_number_of_processes(name: str, home: Path) -> None:
    """Two steps by one process and two by two are four by one; and what two saved, one reads."""
    optimizer = OTHER_NUMBER[name][2]
    back = make(home, Ranks(), f"from-one-{name}", steps=4, optimizer=optimizer)
    assert back.resume() and back.step == 4
    one = make(home, Ranks(), f"one-long-{optimizer}", steps=4, optimizer=optimizer)
    assert one.resume()
    is_rounded = optimizer == "adamw8bit"
    near = 2e-3 if is_rounded else 1e-5
    assert losses(home / f"from-one-{name}") == pytest.approx(losses(home / f"one-long-{optimizer}"), abs=near)
    found = weights(back)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(found[key], tensor, atol=5e-3 if is_rounded else 2e-5, rtol=0)


def test_more_processes_than_micro_batches_do_not_go_on(home: Path) -> None:
    loop = make(home, Ranks(), "one-long-adamw")
    loop.options = replace(loop.options, accumulation=1)
    loop.ranks = replace(loop.ranks, world_size=4)
    with pytest.raises(InvalidInputError, match=r"reads 256 tokens, in micro-batches of 128; with 4 .* read 512") as e:
        loop._check_step(256)
    assert e.value.hint.endswith(": 1, 2.")
    again = make(home, Ranks(), "one-long-adamw")
    again.options = replace(again.options, accumulation=4)
    with pytest.raises(InvalidInputError, match="would read 512"):
        again.resume()


def test_a_process_that_is_killed_ends_the_others_with_a_clear_message(home: Path) -> None:
    said = (home / "lost.txt").read_text()
    assert said.startswith("LostRankError") and "lost another one of the run" in said


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", FAILS)
def test_listeners_that_fail_on_all_ranks_end_all_with_the_first_ones_error(kind: str, what: str, home: Path) -> None:
    first, other = (json.loads((home / f"failing-{kind}-{rank}.json").read_text())[what] for rank in range(2))
    error = f"ConnectionError: no network for {what} on rank 0"
    assert first["said"] == error
    assert other["said"] == f"LLMasOSError: The run ended by an error of its first process: {error}"
    for one in (first, other):
        assert (one["step"], one["resumed"], one["then"]) == (FAILS[what], FAILS[what] > 0, "finished")


def test_a_run_that_was_lost_before_its_first_checkpoint_forgets_its_steps(home: Path) -> None:
    loop = make(home, Ranks(), "early")
    loop.run.mkdir()
    (loop.run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert not loop.resume()
    assert losses(loop.run) == []


def test_matrices_that_are_parts_of_others_are_not_made_orthogonal_together() -> None:
    """Half of the rows of one and half of the columns of another may have the same shape."""
    halves = list(torch.arange(8).chunk(2))
    rows, columns, plain = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(3))
    rows.cut, columns.cut = Cut(0, halves), Cut(1, halves)  # type: ignore[attr-defined]  # as tensor.py does
    assert [[id(p) for p in alike] for alike in _alike([rows, columns, plain])] == [
        [id(rows)],
        [id(columns)],
        [id(plain)],
    ]
