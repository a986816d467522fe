"""What people see: errors, tables, sizes, progress. Everything but data goes to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.errors import LLMasOSError
from llmasos.settings import settings

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from llmasos.store import Progress

PLAIN_EVERY = 5.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


class Told(KeyboardInterrupt):
    """Ctrl-C, and what it ended was said already."""


def say(text: str = "") -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A line for people that stays, above one that changes (`working`) where there is a terminal."""
    say(f"\r\x1b[K{text}" if sys.stderr.isatty() else text)


def emit(data: Any) -> None:
    """JSON for programs."""
    print(json.dumps(data, ensure_ascii=False, indent=2, default=str))


def show_error(error: LLMasOSError, *, as_json: bool = False) -> None:
    """One line of what happened, one of what to do; with `as_json` an object on stdout instead."""
    if as_json:
        body = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        emit({"error": body | ({"param": param} if (param := getattr(error, "param", None)) else {})})
    else:
        say(f"{t('error')}: {_line(error.message)}")
        if error.hint:
            say(f"{t('hint')}: {_line(error.hint)}")
    _traceback(error)


def show_unexpected(error: Exception, *, as_json: bool = False) -> None:
    """An error that nobody foresaw: its type, its text, and how to see where it came from."""
    message = t("unexpected", kind=type(error).__name__, text=str(error) or "-")
    if as_json:
        body = {"code": "unexpected", "message": message, "hint": t("unexpected.hint"), "exit_code": 1}
        emit({"error": body})
    else:
        say(f"{t('error')}: {_line(message)}")
        say(f"{t('hint')}: {t('unexpected.hint')}")
    _traceback(error)


def _line(text: str) -> str:
    return " ".join(text.split())


def _traceback(error: BaseException) -> None:
    with contextlib.suppress(LLMasOSError):
        if settings().log_level == "debug":
            import traceback

            traceback.print_exception(error)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell (a Chinese character is two wide), nothing cut off."""
    widths = [max(map(cell_width, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell + " " * (w - cell_width(cell)) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join(lines)


def pairs(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, one a line."""
    width = max(cell_width(name) for name, _ in facts)
    return "\n".join(f"{name}{' ' * (width - cell_width(name))}  {value}".rstrip() for name, value in facts)


def cell_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def size(num_bytes: float) -> str:
    from llmasos.store.pull import size

    return size(num_bytes)


def span(seconds: float) -> str:
    """`40 s`, `3 min 20 s`, `1 h 03 min`."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def working(message: str) -> Iterator[Callable[[str], None] | None]:
    """`message` on the terminal while something takes its time, with what the yielded function is given behind it;
    nothing, and no function, where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(more: str) -> None:
        print(f"\r\x1b[K{message} … {more}", end="", file=sys.stderr, flush=True)

    show("")
    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Reporter:
    """Draws the progress of a pull or a check: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._phase, self._last = "", time.monotonic()

    def __enter__(self) -> Reporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Bar(
                *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.message:
            self._note(progress.message)
        if progress.phase in ("download", "check", "unpack"):
            self._draw(progress) if self._bar else self._lines(progress)

    def _note(self, message: str) -> None:
        if self._bar:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            say(message)

    def _draw(self, progress: Progress) -> None:
        assert self._bar is not None
        label = t(f"phase.{progress.phase}")
        if self._task is None:
            self._task = self._bar.add_task(label, total=progress.total)
        self._bar.update(self._task, description=label, completed=progress.done, total=progress.total)

    def _lines(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._last < PLAIN_EVERY:
            return
        self._phase, self._last = progress.phase, now
        of = f" / {size(progress.total)} ({progress.done * 100 // progress.total} %)" if progress.total else ""
        say(f"{t(f'phase.{progress.phase}')} {size(progress.done)}{of}")
