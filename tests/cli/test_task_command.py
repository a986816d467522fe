"""`llmasos task`: one task, a batch, a pipeline, the runs."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from cli_runner import Cli

from llmasos.cli.task import MANY_PARTS, _Forecast
from llmasos.tasks import TASKS


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(tiny_model, tmp_path / "tiny"))


def test_a_task_takes_a_text_a_file_or_standard_input(cli: Cli, model: str, tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text("A fox.", encoding="utf-8")
    asked = ("--labels", "fox", "--labels", "dog", "--model", model, "--json")
    found = [
        cli("task", "classify", "A fox.", *asked),
        cli("task", "classify", str(tmp_path / "fox.txt"), *asked),
        cli("task", "classify", "-", *asked, stdin="A fox."),
    ]
    assert [one.code for one in found] == [0, 0, 0]
    assert found[0].json == found[1].json == found[2].json and found[0].json["labels"][0] in ("fox", "dog")


@pytest.mark.parametrize("name", ["none.txt", "folder/none.MD", "~/none.pdf"])
def test_a_file_that_is_not_there_is_no_text(cli: Cli, model: str, name: str) -> None:
    refused = cli("task", "classify", name, "fox", "dog", "--model", model)
    assert refused.code == 2 and f"There is no file {name}." in refused.err and f"--text {name}" in refused.err
    assert refused.out == ""
    meant = cli("task", "classify", "--text", name, "--labels", "fox", "--labels", "dog", "--model", model)
    assert meant.code == 0 and meant.out.strip() in ("fox", "dog")


def test_a_message_is_typed_as_text(cli: Cli, model: str) -> None:
    said = cli("task", "chat", "Say hello", "--max-tokens", "3", "--model", model)
    assert said.code == 0 and said.err == ""


def test_the_result_alone_is_on_stdout(cli: Cli, model: str) -> None:
    result = cli("task", "classify", "A fox.", "fox", "dog", "--model", model)
    assert result.out.strip() in ("fox", "dog") and result.err == ""


def test_long_work_says_its_parts_before_and_the_time_left_after_the_first(
    cli: Cli, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(step=100.0)
    monkeypatch.setattr("llmasos.cli.task._Forecast", partial(_Forecast, clock=lambda: next(clock)))
    (tmp_path / "long.txt").write_text("The fox is kind. " * 400, encoding="utf-8")
    result = cli("task", "classify", str(tmp_path / "long.txt"), "fox", "dog", "--model", model, "--json")
    assert result.json["labels"][0] in ("fox", "dog")
    first, *rest = result.err.splitlines()
    parts = int(re.fullmatch(rf"classify: (\d+) parts for {model}\..*", first)[1])  # type: ignore[index] # it matches
    assert parts > MANY_PARTS and parts % 2 == 0
    assert rest[0].startswith(f"classify: 1 of {parts} parts, about ") and rest[0].endswith(" min left")
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    chinese = cli("task", "classify", str(tmp_path / "long.txt"), "fox", "dog", "--model", model)
    assert chinese.err.startswith(f"classify：共 {parts} 个部分") and chinese.out.strip() in ("fox", "dog")


def test_the_time_left_counts_what_runs_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 60.0, 61.0, 90.0, 120.0])
    forecast = _Forecast("translate", "m", lambda _: None, clock=lambda: next(clock))
    forecast(0, 40, 1)
    forecast(1, 40, 8)  # the first of eight
    forecast(1, 40, 8)
    forecast(20, 40, 8)
    forecast(40, 40, 8)
    assert capsys.readouterr().err.splitlines() == [
        "translate: 40 parts for m. How long that takes is said after the first.",
        "translate: 1 of 40 parts, about 4 min 52 s left",
        "translate: 20 of 40 parts, about 1 min 30 s left",
    ]


def test_a_batch_that_goes_on_counts_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 10.0])
    forecast = _Forecast("translate", "m", lambda _: None, clock=lambda: next(clock))
    forecast(90, 100, 1)
    forecast(91, 100, 1)
    assert capsys.readouterr().err.splitlines() == [
        "translate: 10 parts for m. How long that takes is said after the first.",
        "translate: 1 of 10 parts, about 1 min 30 s left",
    ]


def test_the_list_has_every_task_and_the_inputs_of_one(cli: Cli) -> None:
    assert [line.split()[0] for line in cli("task", "ls").out.splitlines()] == list(TASKS)
    assert "--style paragraph|bullets|plain|formal [paragraph]" in cli("task", "ls", "summarise").out
    assert cli("task", "ls", "summarise", "--json").json == TASKS["summarise"].describe()
    assert len(cli("task", "ls", "--json").json) == len(TASKS)


def test_a_batch_says_what_was_done(cli: Cli, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "A fox.", "labels": ["fox", "dog"]}\n{"text": ""}\n', encoding="utf-8")
    result = cli("task", "batch", "classify", str(source), str(target), "--model", model)
    assert result.code == 0 and "2 lines" in result.err and "1 with an error" in result.err
    assert [set(json.loads(line)) - {"index", "key"} for line in target.read_text().splitlines()] == [
        {"output"},
        {"error"},
    ]
    again = cli("task", "batch", "classify", str(source), str(target), "--model", model, "--json")
    assert again.json == {"total": 2, "failed": 1, "resumed": 2}


def test_a_pipeline_runs_from_a_file_and_is_in_the_runs(cli: Cli, model: str, tmp_path: Path) -> None:
    file = tmp_path / "kinds.yaml"
    step = {"id": "kind", "task": "classify", "inputs": {"text": "${inputs.text}", "labels": ["fox", "dog"]}}
    file.write_text(json.dumps({"steps": [step], "output": "${kind.labels[0]}"}), encoding="utf-8")
    result = cli("task", "pipeline", str(file), "--text", "A fox.", "--model", model)
    assert result.code == 0 and result.out.strip() in ("fox", "dog")
    [line] = cli("task", "runs").out.splitlines()
    assert "done" in line and "kinds" in line
    run = cli("task", "runs", line.split()[0]).json
    assert run["inputs"] == {"text": "A fox."} and run["steps"][0]["id"] == "kind"
    assert cli("task", "runs", "--json").json == [run]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("dance",), 3, "There is no task 'dance'."),
        (("summarise",), 2, "text: Field required"),
        (("summarise", "x", "--wrds", "3"), 2, "There is no option --wrds."),
        (("summarise", "x", "--words", "many"), 2, "words: "),
        (("batch", "chat"), 2, "A batch needs"),
        (("batch", "chat", "none.jsonl", "out.jsonl", "--model", "x:y"), 3, "There is no file none.jsonl."),
        (("pipeline",), 2, "file is missing"),
        (("pipeline", "none.yaml"), 3, "There is no file none.yaml."),
        (("runs", "run_none"), 3, "There is no run 'run_none'."),
        (("runs", "a", "b"), 2, "b"),
        (("ls", "dance"), 3, "There is no task"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, words: tuple[str, ...], code: int, message: str) -> None:
    result = cli("task", *words)
    assert result.code == code and message in result.err, result.err
