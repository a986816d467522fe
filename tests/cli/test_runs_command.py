"""`llmasos runs` on what runs have left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import Cli

from llmasos.cli.runs import curve
from llmasos.train.events import Evaluation, Generated, StepReport
from llmasos.train.logs.files import Files
from llmasos.train.logs.meter import Meter
from llmasos.train.logs.watch import Watch


@pytest.fixture
def runs(home: Path) -> Path:
    for name, rate, steps in (("first", 1e-3, 4), ("second", 1e-4, 6)):
        meter = Meter(1.0, None)
        facts = {
            "name": name,
            "method": "sft",
            "config": {"lr": rate},
            "model": {"name": "tiny", "num_weights": 31_392},
        }
        watch = Watch(meter, [Files(home / "runs" / name, facts, meter)])
        watch.began(0, 6)
        for step in range(1, steps + 1):
            watch.stepped(StepReport(step, 6.0 / step, 1.0, rate, 100, 60, 0.5))
            if step % 2 == 0:
                said = (Generated("Is it?", f"It is {step}.\x1b[2J"),)
                watch.evaluated(Evaluation(step, 5.0 / step, 2.5 / step, 40, 0.1, said))
        watch.ended(steps, "finished" if name == "second" else "ValueError: no")
    return home / "runs"


def test_runs_are_listed_with_how_far_they_are(cli: Cli, runs: Path, home: Path) -> None:
    lines = cli("runs").out.splitlines()
    assert lines[0].split("  ")[0] == "name" and len(lines) == 3
    [second] = [line.split() for line in lines if line.startswith("second")]
    assert second[:7] == ["second", "sft", "tiny", "finished", "6", "/", "6"] and second[7] == "0.8333"
    listed = {one["name"]: one for one in cli("runs", "ls", "--json").json}
    assert listed["first"]["state"] == "failed" and listed["first"]["step"] == 4
    assert listed["second"]["evaluation"]["loss"] == pytest.approx(5 / 6)


def test_no_runs_are_no_error(cli: Cli) -> None:
    result = cli("runs")
    assert (result.code, result.out, result.err.strip()) == (0, "", "There are no runs.")
    assert cli("runs", "--json").json == []


def test_one_run_is_shown_with_its_curve_evaluations_and_answers(cli: Cli, runs: Path) -> None:
    out = cli("runs", "show", "second").out
    assert "held-out loss after     0.8333" in out and "31,392" in out and str(runs / "second") in out
    assert "6 █▄▂▁▁▁ 1" in out, "the loss of the six steps"
    assert "> Is it?\nIt is 6. [2J" in out and "\x1b" not in out
    assert "ValueError: no" in cli("runs", "show", str(runs / "first")).out
    shown = cli("runs", "show", "second", "--json").json
    assert shown["state"] == "finished" and [one["step"] for one in shown["all"]] == [2, 4, 6]


def test_runs_are_set_side_by_side_where_both_were_measured(cli: Cli, runs: Path, tmp_path: Path) -> None:
    result = cli("runs", "compare", "first", "second", "--output", str(tmp_path / "both.html"))
    lines = [line.split() for line in result.out.splitlines()]
    assert ["lr", "0.001", "0.0001"] in lines and ["2", "2.5", "2.5"] in lines and ["4", "1.25", "1.25"] in lines
    assert not [line for line in lines if line[:1] == ["6"]], "one of them only was measured there"
    assert "both.html" in result.err and "run1" in (tmp_path / "both.html").read_text()
    found = cli("runs", "compare", "first", "second", "--json").json
    assert found["losses"]["6"] == [None, pytest.approx(5 / 6)] and found["options"] == {"lr": [1e-3, 1e-4]}


def test_the_report_is_written_anew(cli: Cli, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("runs", "report", "second").out.strip() == str(runs / "second" / "report.html")
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    assert cli("runs", "report", "second", "--output", str(tmp_path / "x.html"), "--json").json == {
        "report": str(tmp_path / "x.html")
    }
    assert "训练运行 second" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["show"], 2, "takes one run"),
        (["show", "a", "b"], 2, "takes one run"),
        (["compare", "first"], 2, "two to six"),
        (["ls", "first"], 2, "takes no run"),
        (["show", "secnd"], 3, "Did you mean second?"),
        (["compare", "first", "none"], 3, "no run 'none'"),
        (["show", "../first"], 3, "no run '../first'"),
        (["ls", "--output", "x"], 2, "--output"),
        (["report", "second", "--output", "/no/such/x.html"], 2, "no place for a file"),
        (["dance"], 2, "dance"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, runs: Path, words: list[str], code: int, said: str) -> None:
    result = cli("runs", *words)
    assert result.code == code and said in result.err, result.err


def test_curves_are_drawn_of_any_numbers() -> None:
    assert curve([1.0]) == "▁" and curve([2.0, 2.0]) == "▁▁" and curve([float("inf"), 1.0]) == "▁▁"
    assert len(curve([float(i) for i in range(1000)])) == 60 and curve([0.0, 1.0, 2.0]) == "▁▅█"


def test_looking_at_runs_loads_no_torch(runs: Path) -> None:
    code = (
        "import sys; from llmasos.cli import main; main(['runs', 'show', 'second']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "second" in done.stdout, done.stderr
