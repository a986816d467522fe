"""How fast a run is: from the clock between steps, so that waiting for data counts and evaluations do not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llmasos.train.events import StepReport
from llmasos.train.resident import most_resident

WINDOW = 20
"""Steps whose mean people see."""


@dataclass(frozen=True)
class Speed:
    """Of the last step, and `smooth` of the last WINDOW ones; `seconds` are those left."""

    tokens_per_second: float
    mfu: float | None
    smooth_tokens_per_second: float
    smooth_mfu: float | None
    seconds_left: float
    memory: int
    """The most bytes so far of one device's tensors; without a GPU of the whole process. As a plan counts them."""


class Meter:
    """flops: of one token. peak: of all devices together, FLOP/s; None where it is not known."""

    def __init__(self, flops: float, peak: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._flops, self._peak, self._clock = flops, peak, clock
        self.began(0, 0)

    def began(self, step: int, num_steps: int) -> None:
        self._num_steps, self._first = num_steps, step
        self._begin = self._mark = self._clock()
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._paused = 0.0

    def go_on(self) -> None:
        """What was done since the last step was no training."""
        now = self._clock()
        self._paused += now - self._mark
        self._mark = now

    @property
    def seconds(self) -> float:
        """Since the run began, here."""
        return self._clock() - self._begin

    def stepped(self, report: StepReport) -> Speed:
        now = self._clock()
        seconds, self._mark = max(now - self._mark, 1e-9), now
        self._steps.append((report.num_tokens, seconds))
        tokens, taken = (sum(column) for column in zip(*self._steps, strict=True))
        pause = self._paused / max(1, report.step - self._first)
        left = max(0, self._num_steps - report.step) * (taken / len(self._steps) + pause)
        rate, smooth = report.num_tokens / seconds, tokens / taken
        memory = report.memory or most_resident()
        return Speed(rate, self._mfu(rate), smooth, self._mfu(smooth), left, memory)

    def _mfu(self, rate: float) -> float | None:
        return None if self._peak is None else rate * self._flops / self._peak
