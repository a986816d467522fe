"""A run as a process: events of everything, gone on with after any end, and a result that is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmasos.data import train_tokenizer
from llmasos.errors import InvalidInputError
from llmasos.store import Library, import_model
from llmasos.store.adapters import find_adapter, installed_adapters
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.train.config import TrainConfig
from llmasos.train.methods import pretrain
from llmasos.train.process import SERVED_CHECKPOINTS, Checkpointed, JobOptions, carry_out, epochs_for, read_job, settle
from tiny import write_tiny_model


@pytest.fixture
def job(tmp_path: Path, home: Path):
    """Writes the file of a job; gives its path and the run's folder."""
    write_tiny_model(tmp_path / "tiny")
    import_model(tmp_path / "tiny", name="tiny")
    data = tmp_path / "chats.jsonl"
    pairs = [(f"What is {i}?", f"It is {i}.") for i in range(20)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = home / "runs" / "ft-tiny-x-1"

    def write(**options: object) -> tuple[Path, Path]:
        config = {"model": "tiny", "data": [str(data)], "name": run.name, "output": str(run), "steps": 6}
        config |= {"save_every": 1, "device": "cpu", "dtype": "float32", "validation": 0.0, "max_length": 64}
        config |= {"batch_tokens": 64, "job": {"serves_as": "ft:tiny:x:1"}} | options
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(config))
        return path, run

    return write


def told(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def of(events: list[dict], kind: str) -> list[dict]:
    return [one for one in events if one["type"] == kind]


def test_everything_is_told_and_the_adapter_serves_with_its_checkpoints(job, capsys) -> None:
    path, run = job()
    assert carry_out(*read_job(path), sys.stdout) == 0
    events = told(capsys.readouterr().out)
    assert events == told((run / "events.jsonl").read_text())
    [settled], [began], [result] = of(events, "settled"), of(events, "began"), of(events, "result")
    assert settled["num_samples"] == 20 and began["steps"] == 6
    steps = of(events, "step")
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5, 6] and all(one["loss"] > 0 for one in steps)
    assert result["trained_tokens"] == steps[-1]["trained_tokens"] == sum(one["num_trained"] for one in steps)
    assert result["model"] == "ft:tiny:x:1" and find_adapter("ft:tiny:x:1").path.name == "ft-tiny-x-1"
    checkpoints = of(events, "checkpoint")
    assert checkpoints[0]["model"] == "ft:tiny:x:1:ckpt-step-1" and checkpoints[-1]["model"] is None
    served = {one.name for one in installed_adapters()} - {"ft:tiny:x:1"}
    assert served == {f"ft:tiny:x:1:ckpt-step-{n}" for n in (3, 4, 5)} and len(served) == SERVED_CHECKPOINTS


def test_a_checkpoint_that_cannot_be_served_is_said_and_training_goes_on(job, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such tensor")

    monkeypatch.setattr(Checkpointed, "_serve", fail)
    path, _ = job(steps=2)
    assert carry_out(*read_job(path), sys.stdout) == 0
    said = capsys.readouterr()
    [message] = of(told(said.out), "message")
    assert message["level"] == "warn"
    assert message["message"] == "The checkpoint of step 1 is not served: ValueError: no such tensor"
    assert "Traceback" in said.err and of(told(said.out), "result")


def test_a_whole_model_comes_under_its_name(job, capsys) -> None:
    path, _ = job(tuning="full")
    assert carry_out(*read_job(path), sys.stdout) == 0
    assert Library().path("ft:tiny:x:1").name == "ft-tiny-x-1" and not installed_adapters()
    assert all(one["model"] is None for one in of(told(capsys.readouterr().out), "checkpoint"))


def test_a_killed_process_goes_on_and_ends_as_if_it_had_not_been(job, capsys) -> None:
    path, run = job(steps=12)
    command = [sys.executable, "-m", "llmasos.train.process", str(path), "--with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["type"] == "checkpoint":
                break
        process.send_signal(signal.SIGKILL)
    assert carry_out(*read_job(path), sys.stdout) == 0
    again = told(capsys.readouterr().out)
    assert of(again, "began")[0]["step"] >= 1 and not of(again, "settled")
    assert len((run / "log.jsonl").read_text().splitlines()) == 12
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert of(again, "result")[0]["trained_tokens"] == sum(one["num_trained"] for one in logged)
    found = find_adapter("ft:tiny:x:1").path / "adapter_model.safetensors"
    first = found.read_bytes()
    other = json.loads(json.dumps(yaml.safe_load(path.read_text())))
    other |= {"name": "whole", "output": str(run.parent / "whole"), "job": {"serves_as": "ft:tiny:x:2"}}
    path.write_text(yaml.safe_dump(other))
    assert carry_out(*read_job(path), sys.stdout) == 0
    assert (find_adapter("ft:tiny:x:2").path / found.name).read_bytes() == first


def test_it_saves_and_stops_when_its_parent_has_gone(job) -> None:
    path, run = job(steps=10_000, save_every=0)
    command = [sys.executable, "-m", "llmasos.train.process", str(path), "--with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            if json.loads(line)["type"] == "step":
                break
        process.stdin.close()
        rest = told(process.stdout.read().decode())
        assert process.wait() == 75
    assert rest[-1]["type"] == "stopped" and rest[-2]["type"] == "checkpoint" and any((run / "checkpoints").iterdir())


def test_what_is_wrong_is_an_event_and_an_exit_code(job, tmp_path, capsys) -> None:
    path, run = job(model="none-of-this-name")
    assert carry_out(*read_job(path), sys.stdout) == 3
    [error] = told(capsys.readouterr().out)
    assert error["type"] == "error" and "none-of-this-name" in error["message"] and "NotFoundError" in error["kinds"]
    path, _ = job(job={"batch_size": 0})
    with pytest.raises(InvalidInputError, match=r"job\.batch_size: .* \(it is 0\)"):
        read_job(path)
    path, _ = job(colour="red")
    with pytest.raises(InvalidInputError, match="no option 'colour'"):
        read_job(path)
    path, _ = job(output=None)
    with pytest.raises(InvalidInputError, match="no output"):
        carry_out(*read_job(path), sys.stdout)
    assert not run.joinpath("checkpoints").exists()


def test_a_job_from_scratch_learns_its_tokenizer_once_and_anew_for_other_data(job, tmp_path, monkeypatch) -> None:
    learnt: list[int] = []

    def learn(refs: list[str], *, vocab_size: int, **options: object) -> Tokenizer:
        learnt.append(vocab_size)
        return train_tokenizer(refs, vocab_size=vocab_size, **options)

    monkeypatch.setattr(pretrain, "train_tokenizer", learn)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Row {i}: fox {i * 7 % 13} jumps."}) + "\n" for i in range(60)))
    scratch = {"method": "pretrain", "model": None, "depth": 1, "data": [str(texts)], "steps": 1, "save_every": 0}
    path, run = job(**scratch, vocab_size=300, micro_batch_tokens=8)  # smaller than a sample: the run never begins
    assert carry_out(*read_job(path), sys.stdout) != 0 and learnt == [300]
    path, run = job(**scratch, vocab_size=320)
    assert carry_out(*read_job(path), sys.stdout) == 0 and learnt == [300, 320]
    assert load_tokenizer(run / "tokenizer").vocab_size == 320


def test_a_batch_of_so_many_samples_is_one_of_so_many_tokens(job) -> None:
    path, _ = job(steps=None, batch_tokens=None, max_length=None)
    config, _ = read_job(path)
    one, facts = settle(config, JobOptions(batch_size=2, learning_rate_multiplier=0.5))
    assert facts["batch_size"] == 2 and facts["num_epochs"] == one.epochs == 5 and one.lr == pytest.approx(1e-4)
    many, _ = settle(config, JobOptions(batch_size=1000))
    tokens = many.batch_tokens / 1000
    assert one.batch_tokens == one.max_length == one.micro_batch_tokens and one.batch_tokens < 3 * tokens
    assert many.max_length is None
    own, _ = settle(TrainConfig.of(**config.model_dump(exclude_unset=True, by_alias=True), lr=0.1), JobOptions())
    assert own.lr == 0.1 and own.batch_tokens is None


@pytest.mark.parametrize(
    ("samples", "epochs"), [(1, 25), (10, 10), (33, 3), (34, 3), (8000, 3), (12_500, 2), (10**6, 1)]
)
def test_few_samples_are_read_more_often(samples, epochs) -> None:
    assert epochs_for(samples) == epochs
