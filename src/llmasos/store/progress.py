"""Progress in words, for programs that pass no `on_progress` of their own: minutes of silence look like a hang."""

from __future__ import annotations

import sys
import time

from llmasos.store.transfer import Progress

EVERY = 5.0
"""Seconds between two lines."""


class PrintProgress:
    """Writes to stderr: every message, and where a long step stands from its fifth second on."""

    def __init__(self) -> None:
        self._phase, self._next = "", 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.message:
            print(progress.message, file=sys.stderr)
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._next = progress.phase, now + EVERY
        elif progress.phase in ("download", "check", "unpack") and now >= self._next:
            self._next = now + EVERY
            of = f" of {progress.total / 1e6:,.1f}" if progress.total else ""
            print(f"{progress.phase}: {progress.done / 1e6:,.1f}{of} MB", file=sys.stderr)
