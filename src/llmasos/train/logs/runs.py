"""Runs as they are on disk: find them, read what they left, set them side by side. Light: no torch."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import math
import platform
import statistics
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmasos.errors import NotFoundError
from llmasos.settings import settings

RUN, METRICS, EVALUATIONS, REPORT = "run.json", "metrics.csv", "evaluations.jsonl", "report.html"
ENDS = ("finished", "stopped", "data", "time", "failed")
LAST = 10
"""Steps whose mean loss stands for a run's last loss."""
_TAIL = 1 << 16
_NO_DIFFERENCE = ("name", "output", "resume")
_MEASURED = ("loss", "num_tokens", "num_trained", "memory", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Metrics:
    """metrics.csv: its columns, and rows of texts by column."""

    names: list[str]
    rows: list[dict[str, str]]

    def numbers(self, name: str) -> list[float]:
        """A column; NaN where a row has none."""
        return [_number(row.get(name, "")) for row in self.rows]


def plan_error(predicted: Any, measured: Any) -> float | None:
    """(predicted - measured) / measured; None where one of them is not known."""
    if not isinstance(predicted, int | float) or not isinstance(measured, int | float) or not predicted or not measured:
        return None
    return predicted / measured - 1


def planned(plan: Mapping[str, Any], name: str) -> float | None:
    """memory or tokens_per_second of a plan as run.json has it."""
    if name == "memory":
        return plan.get("memory")
    num, seconds = plan.get("num_tokens"), plan.get("seconds")
    return num / seconds if num and seconds else None


def plan_errors(plan: Mapping[str, Any], measured: Measured) -> dict[str, float]:
    """How far it was off, by name, where both are known."""
    found = measured.as_dict()
    errors = {name: plan_error(planned(plan, name), found[name]) for name in ("memory", "tokens_per_second")}
    return {name: error for name, error in errors.items() if error is not None}


class Measured:
    """What the rows of a run tell together."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.num_tokens = self.num_trained = self.memory = self.num_skipped = 0
        self._losses: deque[float] = deque(maxlen=LAST)
        self._rates, self._mfus = array("d"), array("d")
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.csv."""
        number = {name: _number(row.get(name, "")) for name in _MEASURED}
        self.num_tokens += int(_or_zero(number["num_tokens"]))
        self.num_trained += int(_or_zero(number["num_trained"]))
        self.memory = max(self.memory, int(_or_zero(number["memory"])))
        self.num_skipped += bool(row.get("skipped"))
        for kept, name in ((self._losses, "loss"), (self._rates, "tokens_per_second"), (self._mfus, "mfu")):
            if math.isfinite(number[name]):
                kept.append(number[name])

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_tokens": self.num_tokens,
            "num_trained": self.num_trained,
            "loss": statistics.fmean(self._losses) if self._losses else None,
            "tokens_per_second": round(statistics.median(self._rates), 1) if self._rates else None,
            "mfu": round(statistics.median(self._mfus), 4) if self._mfus else None,
            "memory": self.memory,
            "num_skipped": self.num_skipped,
        }


@dataclass(frozen=True)
class Run:
    folder: Path
    facts: Mapping[str, Any]
    """run.json; {} for a run that was cut off before it began."""

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.folder.name)

    @property
    def state(self) -> str:
        """running, interrupted (its process is gone), finished, stopped, data, time or failed."""
        state = str(self.facts.get("state", "interrupted"))
        sessions = self.facts.get("sessions") or [{}]
        return "interrupted" if state == "running" and not _is_alive(sessions[-1]) else state

    @cached_property
    def metrics(self) -> Metrics:
        return read_metrics(self.folder)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return read_evaluations(self.folder)

    @property
    def step(self) -> int:
        """The last one that was done, also by a run that goes on."""
        told = int(self.facts.get("step") or 0)
        return told if self.state in ENDS else last_step(self.folder, told)

    def fact(self, path: str, default: Any = None) -> Any:
        """`model.num_weights` and the like."""
        value: Any = self.facts
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value


def runs_folder() -> Path:
    return settings().home / "runs"


def list_runs() -> list[Run]:
    """Those in the home, the newest first."""
    folder = runs_folder()
    found = [open_folder(one) for one in folder.iterdir() if _is_run(one)] if folder.is_dir() else []
    return sorted(found, key=lambda run: str(run.facts.get("created", "")), reverse=True)


def open_run(name: str | Path) -> Run:
    """By its name or its folder. Raises NotFoundError."""
    for folder in (runs_folder() / str(name), Path(name).expanduser()):
        if _is_run(folder):
            return open_folder(folder.absolute())
    known = [run.name for run in list_runs()]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`llmasos runs` lists them."
    raise NotFoundError(f"There is no run {str(name)!r}.", hint=hint)


def open_folder(folder: Path) -> Run:
    return Run(folder, read_facts(folder))


def _is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() or (folder / "config.yaml").is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(folder: Path) -> Metrics:
    """Whole rows only: the last line may still be in the making. A step that stands twice counts as it was last."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Metrics([], [])
    whole = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(whole))
    rows: dict[int, dict[str, str]] = {}
    names: list[str] = []
    with contextlib.suppress(csv.Error):  # of what is damaged, as much as can be read
        names = next(reader, [])
        for cells in reader:
            row = dict(zip(names, cells, strict=False))
            if len(cells) == len(names) and row.get("step", "").isdecimal():
                rows[int(row["step"])] = row
    return Metrics(names if "step" in names else [], [rows[step] for step in sorted(rows)])


def last_step(folder: Path, otherwise: int = 0) -> int:
    """Of metrics.csv, which is not read as a whole."""
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return otherwise
    first = lines[-1].split(b",")[0] if lines else b""
    return int(first) if first.isdigit() else otherwise


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / EVALUATIONS).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int) and "loss" in one:
            found[one["step"]] = one
    return [found[step] for step in sorted(found)]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. options, facts: by name, a value of each run; options are those that differ. losses: held-out
    loss by step, of each run, None where it has none."""

    names: list[str]
    options: dict[str, list[Any]]
    facts: dict[str, list[Any]]
    losses: dict[int, list[float | None]]
    bits_per_byte: dict[int, list[float | None]]


FACTS = {
    "state": "state",
    "steps": "step",
    "first_loss": "evaluations.first.loss",
    "last_loss": "evaluations.last.loss",
    "best_loss": "evaluations.best.loss",
    "bits_per_byte": "evaluations.last.bits_per_byte",
    "train_loss": "measured.loss",
    "tokens": "measured.num_tokens",
    "time": "seconds",
    "speed": "measured.tokens_per_second",
    "mfu": "measured.mfu",
    "memory": "measured.memory",
    "weights": "model.num_weights",
    "trained_weights": "model.num_trained",
    "device": "device.name",
}
"""Words of people, and where in run.json the value stands."""


def compare(runs: Sequence[Run]) -> Comparison:
    configs = [_flat(run.fact("config", {})) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    options = {name: [config.get(name) for config in configs] for name in names if name not in _NO_DIFFERENCE}
    differ = {name: values for name, values in options.items() if any(value != values[0] for value in values)}
    facts = {word: [fact_of(run, word) for run in runs] for word in FACTS}
    return Comparison(
        [run.name for run in runs],
        differ,
        {word: values for word, values in facts.items() if any(value is not None for value in values)},
        _by_step(runs, "loss"),
        _by_step(runs, "bits_per_byte"),
    )


def fact_of(run: Run, word: str) -> Any:
    if word == "state":
        return run.state
    return run.step if word == "steps" else run.fact(FACTS[word])


def _by_step(runs: Sequence[Run], name: str) -> dict[int, list[float | None]]:
    each = [{one["step"]: one.get(name) for one in run.evaluations} for run in runs]
    steps = sorted({step for one in each for step, value in one.items() if value is not None})
    return {step: [one.get(step) for one in each] for step in steps}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def _is_alive(session: Mapping[str, Any]) -> bool:
    """A run on another host may go on: nothing here can tell."""
    import psutil

    if session.get("host") != platform.node():
        return session.get("host") is not None
    try:
        began = psutil.Process(int(session["pid"])).create_time()
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
    return abs(began - float(session.get("process_began") or 0)) < 2


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("nan")


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
