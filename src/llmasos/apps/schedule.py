"""Functions that run by the clock: `@app.schedule("*/5 * * * *")`, or every so many seconds.

Cron expressions count in this machine's local time; a sixth field is seconds. They need the package croniter. A
function takes no inputs, but dependencies. It never runs twice at once: a time that comes while it still runs is passed
over. A failure is logged and the next time comes as ever. `GET /schedules` says when that is. Schedules run while the
application is served, not in single calls from a command line.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import docstring_parser

from llmasos.apps import problems
from llmasos.apps.depends import Node, Special, name_of, node_of
from llmasos.errors import InvalidInputError, UnsupportedError

PATH = "/schedules"
_LONGEST_SLEEP = 60.0
"""Seconds; clocks are set, and machines sleep."""
_SHORTEST = 0.01


@dataclass
class Schedule:
    """`cron` or `every` (seconds), and what has become of it. Times are aware."""

    name: str
    summary: str
    node: Node
    cron: str | None = None
    every: float | None = None
    next: datetime | None = None
    started: datetime | None = None
    """When it began last."""
    seconds: float | None = None
    """How long the last time took that has ended."""
    error: str | None = None
    """How it failed."""
    num_runs: int = 0
    is_running: bool = field(default=False)

    def describe(self) -> dict[str, Any]:
        """What never changes: its part of the application's document."""
        return {"name": self.name, "summary": self.summary, "cron": self.cron, "every": self.every}

    def state(self) -> dict[str, Any]:
        moments = {name: one and one.isoformat() for name, one in (("next", self.next), ("started", self.started))}
        return (
            self.describe()
            | moments
            | {
                "running": self.is_running,
                "seconds": self.seconds,
                "error": self.error,
                "num_runs": self.num_runs,
            }
        )

    def after(self, now: datetime) -> datetime:
        """The next time."""
        if self.every is not None:
            return now + timedelta(seconds=self.every)
        return _next(self.cron or "", now)

    async def keep(self, call: Callable[[Node], Awaitable[Any]]) -> None:
        """Run it at its times, until this is cancelled."""
        while True:
            self.next = self.after(datetime.now(UTC))
            while (left := (self.next - datetime.now(UTC)).total_seconds()) > 0:
                await asyncio.sleep(min(left, _LONGEST_SLEEP))
            await self.run(call)

    async def run(self, call: Callable[[Node], Awaitable[Any]]) -> None:
        begun = time.monotonic()
        self.started, self.is_running = datetime.now(UTC), True
        error = None
        try:
            await call(self.node)
        except (Exception, SystemExit) as e:
            problem = problems.of_exception(e, self.name)
            if "error_id" not in problem:
                problems.log.error("The schedule %s() failed: %s", self.name, problem["message"])
            error = problem["message"] + (f" ({problem['error_id']})" if "error_id" in problem else "")
        finally:
            self.is_running = False
        self.error, self.num_runs, self.seconds = error, self.num_runs + 1, time.monotonic() - begun


def describe_schedule(function: Callable[..., Any], cron: str | None, every: float | None) -> Schedule:
    """Raises InvalidInputError for times that never come and functions that can't run by themselves, UnsupportedError
    without the package croniter."""
    name = name_of(function)
    if (cron is None) == (every is None):
        raise InvalidInputError(
            f"{name}() runs by a cron expression or every so many seconds: give one.",
            hint='@app.schedule("*/5 * * * *") or @app.schedule(every=300)',
        )
    if every is not None and not (math.isfinite(every) and every >= _SHORTEST):
        raise InvalidInputError(f"every={every!r} is no number of seconds from {_SHORTEST:g}.", param="every")
    if cron is not None:
        _next(cron, datetime.now(UTC))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidInputError(f"{name}() is a generator: nobody would read what a schedule yields.")
    node = node_of(function, _no_input)
    specials: tuple[Special, ...] = ("session", "request")
    for special in specials:
        if node.uses(special):
            raise InvalidInputError(f"{name}() wants a {special}, and a schedule has no client.")
    words = docstring_parser.parse(inspect.getdoc(function) or "")
    return Schedule(name, words.short_description or name.replace("_", " ").strip().capitalize(), node, cron, every)


def _no_input(owner: str, p: inspect.Parameter, hint: Any) -> str:
    if p.default is p.empty:
        raise InvalidInputError(
            f"{owner}() wants {p.name!r}, and a schedule has no inputs.",
            hint="Give it a default, or Depends(...).",
            param=p.name,
        )
    return p.name


def _next(cron: str, now: datetime) -> datetime:
    try:
        from croniter import CroniterError, croniter
    except ImportError as e:
        raise UnsupportedError(
            "Cron expressions need the package croniter, which is not installed.",
            hint="pip install llmasos[apps], or use every=SECONDS.",
        ) from e
    try:
        local = now.astimezone().replace(tzinfo=None)  # as clocks on the wall show it: they are set twice a year
        found: datetime = croniter(cron, local, max_years_between_matches=5).get_next(datetime)
    except (CroniterError, ValueError, AttributeError, TypeError) as e:
        raise InvalidInputError(
            f"{cron!r} is no cron expression: {e}.", hint='Such as "*/5 * * * *": minute hour day month weekday.'
        ) from None
    moment = found.astimezone()
    if moment <= now:  # of the hour that comes twice, the second one
        moment = found.replace(fold=1).astimezone()
    return max(moment, now + timedelta(seconds=1))
