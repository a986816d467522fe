"""A job as it is in memory, and those who wait for its next change: what applications and the server share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

J = TypeVar("J", bound=BaseModel)


class Live(Generic[J]):
    """`job` is replaced, never changed: whoever has one may keep it. `task` carries it out. Belongs to one event
    loop."""

    def __init__(self, job: J) -> None:
        self.job = job
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def change(self, **fields: Any) -> None:
        """Also of its `updated`."""
        self.job = self.job.model_copy(update={**fields, "updated": datetime.now(UTC)})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, is_active: Callable[[J], bool]) -> AsyncGenerator[J, None]:
        """The job as it is, then at each change, until it is not active any more. Who is slow misses some changes, not
        the last one."""
        while True:
            job = self.job
            yield job
            if not is_active(job):
                return
            if self.job is job:
                await self._changed.wait()

    async def stop(self, timeout: float | None = None) -> None:
        """Cancel the task and wait until it has ended, or for `timeout` seconds."""
        if (task := self.task) is not None and not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=timeout)
        self.task = None
