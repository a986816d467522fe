"""`llmasos train inspect` shows what a run of the same options reads first: the same tokens, the same labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runner import Cli

from llmasos.data import Batch
from llmasos.train import TrainConfig, train
from llmasos.train.model import Placed
from tiny import write_tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    rows = [{"q": f"What is {i} + 1?", "a": f"It is {i + 1}, " * (1 + i % 4)} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(90)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def first_of_a_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: list[Batch] = []
    place = Placed.of

    def placed(batch: Batch, *more: Any) -> Placed:
        seen.append(batch)
        return place(batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Placed, "of", placed)
        train(config, export=False)
    return {"tokens": seen[0].tokens.tolist(), "labels": seen[0].labels.tolist(), "lengths": seen[0].lengths}


PAIRS = {"model": "model", "data": ["pairs.jsonl"], "columns": {"prompt": "q", "completion": "a"}, "validation": 0,
         "max_length": 32, "overlong": "truncate", "seed": 7, "batch_tokens": 128}  # fmt: skip
TEXTS = {"method": "pretrain", "data": ["texts.jsonl"], "depth": 1, "vocab_size": 300, "max_length": 48, "seed": 3,
         "batch_tokens": 256, "micro_batch_tokens": 96, "validation": 0}  # fmt: skip


@pytest.mark.parametrize("options", [PAIRS, TEXTS], ids=["sft", "pretrain"])
def test_inspect_shows_the_first_batch_of_the_run(
    options: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    options = {**options, "steps": 1, "device": "cpu", "dtype": "float32"}
    (home / "run.yaml").write_text(yaml.safe_dump(options))
    said = cli("train", "inspect", "run.yaml", "--json")
    assert said.code == 0, said.err
    expected = first_of_a_run(TrainConfig.of(home / "run.yaml", name="one"), monkeypatch)
    assert said.json == expected
    other = cli("train", "inspect", "run.yaml", "--seed", "8", "--json")
    assert other.json != expected


def test_words_are_data_beside_flags_and_the_batch_is_shown_in_marks(home: Path, cli: Cli) -> None:
    flags = ["--columns", "prompt=q,completion=a", "--model", "model", "--device", "cpu", "--validation", "0"]
    said = cli("train", "inspect", "sft", "pairs.jsonl", *flags)
    assert said.code == 0 and "⟦" in said.out and "pairs.jsonl:" in said.out
    assert cli("train", "inspect", "--data", "pairs.jsonl", *flags).out == said.out
    nothing = cli("train", "inspect")
    assert nothing.code == 2 and "No data is named" in nothing.err


@pytest.mark.parametrize("action", ["sft", "plan", "inspect"])
def test_one_file_of_options_is_taken_and_no_other_words(action: str, home: Path, cli: Cli) -> None:
    (home / "run.yaml").write_text("model: model\n")
    said = cli("train", action, "run.yaml", "more.yaml")
    assert said.code == 2 and "no more.yaml" in said.err
    if action != "inspect":
        said = cli("train", action, "pairs.jsonl")
        assert said.code == 2 and "no pairs.jsonl" in said.err and "--data" in said.err


def test_a_run_without_held_out_rows_has_no_loss_to_tell(home: Path, cli: Cli) -> None:
    flags = ["--model", "model", "--data", "pairs.jsonl", "--columns", "prompt=q,completion=a", "--device", "cpu"]
    said = cli("train", "sft", *flags, "--validation", "0", "--prompts", "Hi", "--steps", "1", "--json")
    assert said.code == 0 and said.json["loss"] is None
