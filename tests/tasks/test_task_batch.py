"""Batches: every line once, whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_task_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.errors import BusyError, InvalidInputError, NetworkError, NotFoundError
from llmasos.tasks.batch import BatchProgress, arun_batch, run_batch

HERE = Path(__file__).parent


def lines(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in entries), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def upper(**options: Any) -> FakeModel:
    return FakeModel(lambda question, _: question.upper(), **options)


def texts(path: Path) -> list[str]:
    return [one["output"]["text"] for one in read(path)]


def test_lines_are_answered_in_order_and_errors_stand_in_theirs(tmp_path: Path) -> None:
    def answers(question: str, schema: Any) -> Any:
        return NetworkError("gone", hint="Wait.") if question == "bad" else question.upper()

    source = tmp_path / "in.jsonl"
    entries = ['"a"', '{"message": "b"}', "", '"bad"', '{"mesage": "c"}', "{", "[1]", '"d"']
    source.write_text("\n".join(entries), encoding="utf-8")  # no line end at the end
    told: list[BatchProgress] = []
    found = run_batch("chat", source, tmp_path / "out.jsonl", model=FakeModel(answers), on_progress=told.append)
    out = read(tmp_path / "out.jsonl")
    assert found == told[-1] == BatchProgress(done=7, total=7, failed=4, resumed=0)
    assert [one["index"] for one in out] == list(range(7))
    assert [one["output"]["text"] for one in out if "output" in one] == ["A", "B", "D"]
    codes = [one["error"]["code"] for one in out if "error" in one]
    assert codes == ["network", "invalid_input", "invalid_json", "invalid_input"]
    assert out[2]["error"] == {"code": "network", "message": "gone", "hint": "Wait."}


def test_several_lines_run_at_once_and_no_more_than_asked(tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", [str(i) for i in range(20)])
    model = upper(delay=0.005)
    run_batch("chat", source, tmp_path / "out.jsonl", model=model, parallel=5)
    assert model.most_running == 5 and texts(tmp_path / "out.jsonl") == [str(i) for i in range(20)]


@settings(max_examples=30)
@given(st.integers(0, 2000))
def test_whatever_a_crash_leaves_is_completed_without_a_lost_or_doubled_line(
    tmp_path_factory: pytest.TempPathFactory, num_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    source = lines(folder / "in.jsonl", [f"text {i}" for i in range(12)])
    run_batch("chat", source, folder / "whole.jsonl", model=upper())
    whole = (folder / "whole.jsonl").read_bytes()
    (folder / "out.jsonl").write_bytes(whole[:num_bytes])
    model = upper()
    found = run_batch("chat", source, folder / "out.jsonl", model=model)
    assert (folder / "out.jsonl").read_bytes() == whole
    assert found.done == 12 and len(model.asked) == 12 - found.resumed == 12 - whole[:num_bytes].count(b"\n")


def test_a_thousand_lines_survive_two_kills(tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", [f"text {i}" for i in range(1000)])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(HERE / "batch_to_kill.py"), str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent / "serve")))}
    sizes = []
    for wanted in (100, 400):
        process = subprocess.Popen([*command, str(wanted + 300)], env=environment)
        while (out.read_bytes().count(b"\n") if out.exists() else 0) < wanted:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(out.read_bytes().count(b"\n"))
    assert 100 <= sizes[0] <= sizes[1] < 1000
    found = run_batch("chat", source, out, model=upper())
    assert found.resumed == sizes[1] and texts(out) == [f"TEXT {i}" for i in range(1000)]


def test_a_finished_batch_asks_nothing_more(tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", ["a"])
    run_batch("chat", source, tmp_path / "out.jsonl", model=upper())
    model = upper()
    assert run_batch("chat", source, tmp_path / "out.jsonl", model=model).resumed == 1 and not model.asked


@pytest.mark.parametrize("change", ["input", "task", "model", "foreign", "longer"])
def test_an_output_of_something_else_is_refused_and_left_alone(tmp_path: Path, change: str) -> None:
    source, out = lines(tmp_path / "in.jsonl", ["a", "b"]), tmp_path / "out.jsonl"
    run_batch("chat", source, out, model=upper())
    task, model = "chat", upper()
    if change == "input":
        lines(source, ["a", "c"])
    elif change == "longer":
        lines(source, ["a"])
    elif change == "task":
        task = "sentiment"
    elif change == "model":
        model = upper(name="another")
    else:
        out.write_text("my notes\n")
    before = out.read_bytes()
    with pytest.raises(InvalidInputError, match="is not of this batch"):
        run_batch(task, source, out, model=model)
    assert out.read_bytes() == before


def test_two_at_once_on_one_output_are_refused(tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", ["a"])

    async def both() -> None:
        model = upper(delay=60)
        first = asyncio.ensure_future(arun_batch("chat", source, tmp_path / "out.jsonl", model=model))
        while not model.num_running:
            await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await arun_batch("chat", source, tmp_path / "out.jsonl", model=upper())
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert model.num_running == 0

    asyncio.run(both())
    run_batch("chat", source, tmp_path / "out.jsonl", model=upper())
    assert texts(tmp_path / "out.jsonl") == ["A"]


def test_wrong_calls_are_said_before_anything_is_written(tmp_path: Path) -> None:
    source, out = lines(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.jsonl"
    with pytest.raises(NotFoundError, match="no task"):
        run_batch("dance", source, out, model=upper())
    with pytest.raises(NotFoundError, match="no file"):
        run_batch("chat", tmp_path / "none.jsonl", out, model=upper())
    with pytest.raises(InvalidInputError, match="less than 1"):
        run_batch("chat", source, out, model=upper(), parallel=0)
    with pytest.raises(InvalidInputError, match="input itself"):
        run_batch("chat", source, source, model=upper())
    assert not out.exists()
