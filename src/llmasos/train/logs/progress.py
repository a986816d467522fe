"""A run in the terminal: one line that is drawn anew, and lines for what should stay. Elsewhere (a file, a pipe) a line
every few seconds."""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmasos.train.events import Evaluation, StepReport
from llmasos.train.logs.meter import Meter, Speed
from llmasos.train.logs.runs import Measured, plan_errors, planned
from llmasos.train.logs.watch import Watcher
from llmasos.train.logs.words import Words, amount, duration, number

PLAIN_EVERY = 10.0
"""Seconds between lines where nothing can be drawn anew."""
DRAW_EVERY = 0.1
_BAR = 16
_TEXT = 160
"""Characters of a sample that are shown."""


class Progress(Watcher):
    """Writes to `stream`, standard error if none is given. `reported`: the file that is named at the end. `plan`: as in
    run.json; with its memory and speed, what was measured is compared then."""

    def __init__(
        self,
        meter: Meter,
        *,
        reported: Path | None = None,
        plan: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter, self._reported, self._clock = meter, reported, clock
        self._stream = sys.stderr if stream is None else stream
        self._is_drawn = self._stream.isatty()
        self._words = Words()
        self._plan, self._measured = plan or {}, Measured()
        self._num_steps = 0
        self._last = -float("inf")

    def began(self, step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        if step:
            self._say(self._words("resumed", step=step, steps=num_steps))

    def metered(self, report: StepReport, speed: Speed) -> None:
        """After every step."""
        self._measured.add({"memory": speed.memory, "tokens_per_second": speed.tokens_per_second})
        if report.skipped:
            self._say(self._words("skipped", step=report.step, why=report.skipped))
        now = self._clock()
        if now - self._last < (DRAW_EVERY if self._is_drawn else PLAIN_EVERY) and report.step < self._num_steps:
            return
        self._last = now
        line = self._line(report, speed)
        if self._is_drawn:
            columns = shutil.get_terminal_size().columns
            self._put(f"\r\x1b[K{fit(line, columns - 1)}")
        else:
            self._put(f"{line}\n")

    def _line(self, report: StepReport, speed: Speed) -> str:
        share = report.step / max(1, self._num_steps)
        full = min(_BAR, int(_BAR * share))
        parts = [f"{share:4.0%} {'━' * full}{'╌' * (_BAR - full)}"] if self._is_drawn else [f"{share:.0%}"]
        parts.append(f"{self._words('step')} {report.step:,}/{self._num_steps:,}")
        parts.append(f"{self._words('loss')} {number(report.loss)}")
        parts.append(_rate(speed.smooth_tokens_per_second))
        if speed.smooth_mfu is not None:
            parts.append(f"MFU {speed.smooth_mfu:.1%}")
        parts.append(amount(speed.memory))
        parts.append(f"{duration(speed.seconds_left)} {self._words('left')}")
        return "  ".join(parts)

    def evaluated(self, evaluation: Evaluation) -> None:
        bits = evaluation.bits_per_byte
        self._say(
            self._words(
                "evaluated",
                step=evaluation.step,
                loss=number(evaluation.loss),
                bits="" if bits is None else self._words("bits", bits=number(bits)),
                tokens=f"{evaluation.num_tokens:,}",
                seconds=duration(evaluation.seconds),
            )
        )
        for sample in evaluation.samples:
            # a prompt's end is its question, whatever instructions come first
            self._say(f"  {shown(sample.prompt, -_TEXT // 2)} → {shown(sample.text, _TEXT)}")

    def saved(self, step: int, path: Path) -> None:
        self._say(self._words("saved", step=step))

    def ended(self, step: int, reason: str) -> None:
        state = self._words(f"ended.{reason}") if reason in ("finished", "stopped", "data", "time") else shown(reason)
        where = "" if self._reported is None else str(self._reported)
        self._say(self._words("ended", state=state, step=step, seconds=duration(self._meter.seconds), report=where))
        for name, error in plan_errors(self._plan, self._measured).items():
            pair = {"planned": planned(self._plan, name), "measured": self._measured.as_dict()[name]}
            shown_as = amount if name == "memory" else _rate
            self._say(self._words(f"planned.{name}", off=f"{error:+.1%}", **{k: shown_as(v) for k, v in pair.items()}))

    def _say(self, text: str) -> None:
        """A line that stays."""
        self._put(f"\r\x1b[K{text}\n" if self._is_drawn else f"{text}\n")

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _rate(tokens_per_second: float | None) -> str:
    return f"{number(tokens_per_second or 0.0)} tok/s"


def shown(text: str, length: int = 400) -> str:
    """On one line, its first `length` characters (the last, if that is negative), and nothing that a terminal would
    obey."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(clean) <= abs(length):
        return clean
    return f"{clean[: length - 1]}…" if length > 0 else f"…{clean[length + 1 :]}"


def fit(text: str, columns: int) -> str:
    """What of a line a terminal has room for: a Chinese character is two columns wide."""
    for at, c in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if columns < 0:
            return text[:at]
    return text
