"""How many completions of one model may be in flight, and how many of them one key's.

Beyond what the model computes at once, `max_waiting` may wait. More are refused with 503; a key that has taken half of
the line for itself gets 429, so that there is room left for others. Retry-After is the time in which what waits now
will have been answered at the pace of the last minute.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmasos.errors import InvalidInputError
from llmasos.inference.host.lending import QueueFullError
from llmasos.serve.caller import ANYONE, Caller

EMBEDDINGS = 2
"""Requests for embeddings that a model works on at once: one's texts become tokens while another is computed. Each
holds one of the threads that all models share."""
PACE_SECONDS = 60.0
MOST_SECONDS = 60
"""The longest that anybody is told to wait."""


class CallerQueueFullError(QueueFullError):
    """One caller's requests take their share of a model's line already."""

    http_status = 429


class Admission:
    """The completions of one model that are in flight. `at_once` tells how many it computes at a time."""

    def __init__(
        self, name: str, at_once: Callable[[], int], max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.max_waiting = name, max_waiting
        self.num_in_flight = 0
        self.embeddings = asyncio.Semaphore(EMBEDDINGS)
        self._at_once, self._clock = at_once, clock
        self._by_key: Counter[str] = Counter()
        self._ends: deque[tuple[float, int]] = deque(maxlen=1024)

    @property
    def limit(self) -> int:
        return self._at_once() + self.max_waiting

    @contextmanager
    def admit(self, num: int, caller: Caller = ANYONE, *, param: str = "n") -> Iterator[None]:
        """Raises QueueFullError, CallerQueueFullError; InvalidInputError (of `param`) for more than ever fit."""
        key = caller.key_id
        if num > self.limit:
            raise InvalidInputError(
                f"One request asks for {num} completions; {self.name} takes {self.limit} at a time.",
                hint="Send several requests of fewer prompts, or a lower n.",
                param=param,
            )
        if self.num_in_flight >= self.limit:
            raise QueueFullError(
                f"{self.num_in_flight} completions of {self.name} are running or waiting already.",
                retry_after=self.retry_after(),
            )
        if key is not None and self._by_key[key] >= self._at_once() + max(1, self.max_waiting // 2):
            raise CallerQueueFullError(
                f"{self._by_key[key]} completions of {self.name} are running or waiting for this key already.",
                retry_after=self.retry_after(),
            )
        self._count(num, key)
        try:
            yield
        finally:
            self._count(-num, key)
            self._ends.append((self._clock(), num))

    def _count(self, num: int, key: str | None) -> None:
        self.num_in_flight += num
        if key is not None:
            self._by_key[key] += num
            if not self._by_key[key]:
                del self._by_key[key]

    def retry_after(self) -> int:
        """Seconds."""
        now = self._clock()
        while self._ends and self._ends[0][0] < now - PACE_SECONDS:
            self._ends.popleft()
        waiting = self.num_in_flight - self._at_once()
        if waiting <= 0 or not self._ends:
            return 1
        seconds = max(now - self._ends[0][0], 0.1)
        pace = sum(num for _, num in self._ends) / seconds
        return max(1, min(MOST_SECONDS, math.ceil(waiting / pace)))
