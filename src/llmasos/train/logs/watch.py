"""Everybody who watches a run, behind one Listener: what must be kept comes first, and what is only for show cannot end
the run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.train.events import Evaluation, Listener, StepReport
from llmasos.train.logs.meter import Meter, Speed
from llmasos.train.logs.words import Words


class Watcher(Listener):
    """A Listener that is told of steps with their speed."""

    def metered(self, report: StepReport, speed: Speed) -> None: ...

    def close(self) -> None:
        """No more is told, the run's end included."""


class Watch(Listener):
    """needed: an error of one ends the run. optional: whoever fails is left out from then on, and that is said once."""

    def __init__(self, meter: Meter, needed: Sequence[Watcher], optional: Sequence[Watcher] = ()) -> None:
        self._meter, self._needed, self._optional = meter, list(needed), list(optional)

    def began(self, step: int, num_steps: int) -> None:
        """Here nothing is lost yet: what fails ends the run before its first step."""
        self._meter.began(step, num_steps)
        begun: list[Watcher] = []
        try:
            for one in [*self._needed, *self._optional]:
                begun.append(one)
                one.began(step, num_steps)
        except BaseException as e:
            for one in begun:
                with contextlib.suppress(Exception):
                    one.close()
            if isinstance(e, LLMasOSError) or not isinstance(e, Exception):
                raise
            raise UnsupportedError(
                f"{type(begun[-1]).__name__} could not begin: {_why(e)}.",
                hint="See to that, or leave it out of trackers.",
                param="trackers",
            ) from e
        self._meter.go_on()

    def stepped(self, report: StepReport) -> None:
        speed = self._meter.stepped(report)
        self._tell(lambda one: one.metered(report, speed))

    def evaluated(self, evaluation: Evaluation) -> None:
        self._tell(lambda one: one.evaluated(evaluation))

    def saved(self, step: int, path: Path) -> None:
        self._tell(lambda one: one.saved(step, path))

    def ended(self, step: int, reason: str) -> None:
        self._tell(lambda one: one.ended(step, reason))

    def _tell(self, tell: Callable[[Watcher], None]) -> None:
        for one in self._needed:
            tell(one)
        for one in list(self._optional):
            try:
                tell(one)
            except Exception as e:
                self._drop(one, e)
        self._meter.go_on()

    def _drop(self, one: Watcher, error: Exception) -> None:
        self._optional.remove(one)
        with contextlib.suppress(Exception):
            one.close()
        with contextlib.suppress(OSError, ValueError):  # standard error itself may be what failed
            print(Words()("dropped", what=type(one).__name__, why=_why(error)), file=sys.stderr, flush=True)


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")
