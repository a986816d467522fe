"""What a run leaves to read: run.json, metrics.csv and evaluations.jsonl in its folder.

A row is on its way to the disk before the checkpoint that knows of its step; what a resumed run finds behind its
checkpoint (steps that were lost and come again, the beginning of a line) is taken out when it begins. So the files of a
run that was killed at any moment and went on equal those of one that was not, but for times.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from llmasos.models.load import write_atomically
from llmasos.train.events import Evaluation, StepReport
from llmasos.train.logs.meter import Meter, Speed
from llmasos.train.logs.runs import (
    ENDS,
    EVALUATIONS,
    METRICS,
    RUN,
    Measured,
    plan_errors,
    read_evaluations,
    read_facts,
    read_metrics,
)
from llmasos.train.logs.watch import Watcher
from llmasos.train.marks import written

VERSION = 1
_LEFT = ".*[.-]" + 8 * "[0-9a-f]" + ".tmp"
"""What a process that was killed has not moved into place: see `write_atomically`, and exports."""


class Files(Watcher):
    """facts: what is known of the run before its first step, JSON values by name."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], meter: Meter) -> None:
        self.folder, self._meter = folder, meter
        self._facts: dict[str, Any] = {"version": VERSION, **facts}
        self._session: dict[str, Any] = {}
        self._evaluations: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._measured = Measured()
        self._seconds = 0.0

    def began(self, step: int, num_steps: int) -> None:
        with written(self.folder / RUN):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(_LEFT):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        before = read_facts(self.folder)
        self._seconds = float(before.get("seconds") or 0.0)
        self._take_out(step)
        now = _now()
        self._session = {
            "began": now,
            "ended": None,
            "from_step": step,
            "to_step": None,
            "reason": None,
            "host": platform.node(),
            "pid": os.getpid(),
            "process_began": psutil.Process().create_time(),
        }
        self._facts |= {"created": before.get("created", now), "step": step, "steps": num_steps}
        self._facts["checkpoint"] = before.get("checkpoint") if step else None
        self._facts["sessions"] = [*before.get("sessions", []), self._session]
        self._facts |= {"state": "running", "reason": None}
        self._write()

    def _take_out(self, step: int) -> None:
        """What is of later steps, or not whole."""
        with written(self.folder / METRICS):
            found = read_metrics(self.folder)
            rows = [row for row in found.rows if int(row["step"]) <= step]
            self._names, self._measured = found.names, Measured(rows)
            write_atomically(self.folder / METRICS, _as_csv(self._names, rows))
        with written(self.folder / EVALUATIONS):
            self._evaluations = [one for one in read_evaluations(self.folder) if one["step"] <= step]
            write_atomically(self.folder / EVALUATIONS, "".join(map(_line, self._evaluations)))

    def metered(self, report: StepReport, speed: Speed) -> None:
        values = asdict(report)
        parts = {f"loss.{name}": value for name, value in (values.pop("parts") or {}).items()}
        values["skipped"] = " ".join(report.skipped.split())
        values |= {"tokens_per_second": round(speed.tokens_per_second, 1), "memory": speed.memory}
        values["mfu"] = "" if speed.mfu is None else round(speed.mfu, 4)
        row = {name: str(value) for name, value in (values | parts).items()}
        with written(self.folder / METRICS):
            if set(row) <= set(self._names):
                _append(self.folder / METRICS, _as_csv(self._names, [row], head=False))
            else:  # the first step, or a part of the loss that was not there before
                self._names += [name for name in row if name not in self._names]
                rows = [*read_metrics(self.folder).rows, row]
                write_atomically(self.folder / METRICS, _as_csv(self._names, rows))
        self._measured.add(row)
        self._facts["step"] = report.step

    def evaluated(self, evaluation: Evaluation) -> None:
        one = {**asdict(evaluation), "time": _now()}
        with written(self.folder / EVALUATIONS):
            earlier = [each for each in self._evaluations if each["step"] < evaluation.step]
            if earlier == self._evaluations:
                _append(self.folder / EVALUATIONS, _line(one))
            else:  # done before the run was cut off, and done again
                write_atomically(self.folder / EVALUATIONS, "".join(map(_line, [*earlier, one])))
            self._evaluations = [*earlier, one]
        self._write()

    def saved(self, step: int, path: Path) -> None:
        self._facts["checkpoint"] = {"step": step, "path": path.name}
        self._write()

    def ended(self, step: int, reason: str) -> None:
        self._facts |= {"state": reason if reason in ENDS[:-1] else "failed", "reason": reason, "step": step}
        self._session |= {"ended": _now(), "to_step": step, "reason": reason}
        self._write()

    def _write(self) -> None:
        self._facts["updated"] = _now()
        self._facts["seconds"] = round(self._seconds + self._meter.seconds, 3)
        self._facts["measured"] = self._measured.as_dict()
        errors = plan_errors(self._facts.get("plan") or {}, self._measured)
        self._facts["plan_error"] = {name: round(error, 4) for name, error in errors.items()}
        self._facts["evaluations"] = _ends_of(self._evaluations)
        with written(self.folder / RUN):
            write_atomically(self.folder / RUN, _as_json(self._facts, indent=2))


def _ends_of(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first, the last and the best, without their samples."""
    if not evaluations:
        return {}
    known = [one for one in evaluations if isinstance(one["loss"], float) and one["loss"] == one["loss"]]
    best = min(known, key=lambda one: one["loss"]) if known else evaluations[0]
    brief = {"first": evaluations[0], "last": evaluations[-1], "best": best}
    return {name: {k: v for k, v in one.items() if k != "samples"} for name, one in brief.items()}


def finite(value: Any) -> Any:
    """JSON has no word for what is no number: null."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def _line(one: Mapping[str, Any]) -> str:
    return _as_json(one)


def _as_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    text = json.dumps(finite(value), ensure_ascii=False, indent=indent) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # half a character from a command line


def _as_csv(names: Sequence[str], rows: Sequence[Mapping[str, str]], *, head: bool = True) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    if head and names:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _append(path: Path, text: str) -> None:
    """In one piece: a process that is killed leaves all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
