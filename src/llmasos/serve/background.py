"""What lives as long as the server and longer than a request: responses, files, batches, and their cleaning up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from fastapi import FastAPI

from llmasos.errors import LLMasOSError
from llmasos.serve.aside import Aside
from llmasos.serve.batches.answers import Answers
from llmasos.serve.batches.routes import create_router as batch_routes
from llmasos.serve.batches.worker import Batches
from llmasos.serve.files.routes import create_router as file_routes
from llmasos.serve.files.store import MAX_STORED_BYTES, Files
from llmasos.serve.files.uploads import Uploads
from llmasos.serve.models import Models
from llmasos.serve.responses.routes import create_router as response_routes
from llmasos.serve.responses.service import Responses
from llmasos.serve.storage import Storage

if TYPE_CHECKING:
    from llmasos.serve.access.access import Access

CLEAN_SECONDS = 600
"""How often what has expired is removed, and what a server that ended left is looked for."""

log = logging.getLogger("llmasos.serve")


class Background:
    """`start` it with the server, before the first request, and `stop` it after the last one; the storage stays open.

    What is unfinished when it stops goes on after the next start.
    """

    def __init__(
        self,
        models: Models,
        storage: Storage,
        access: Access | None = None,
        *,
        max_stored_bytes: int = MAX_STORED_BYTES,
    ) -> None:
        aside = Aside(access)
        self.responses = Responses(models, storage, aside)
        self.files = Files(storage, max_stored_bytes=max_stored_bytes)
        self.uploads = Uploads(self.files)
        self.batches = Batches(storage, self.files, models, Answers(models, self.responses, aside), aside)
        self._cleaning: asyncio.Task[None] | None = None

    def include(self, app: FastAPI) -> None:
        app.include_router(response_routes(self.responses))
        app.include_router(file_routes(self.files, self.uploads))
        app.include_router(batch_routes(self.batches))

    async def start(self) -> None:
        await self.responses.start()
        await self.batches.start()
        self._cleaning = asyncio.create_task(self._clean())

    async def stop(self) -> None:
        if self._cleaning is not None:
            self._cleaning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._cleaning
        await self.batches.stop()
        await self.responses.stop()

    async def _clean(self) -> None:
        steps = (self.responses.take_up, self.responses.clean, self.files.clean, self.uploads.clean)
        while True:
            for step in steps:
                try:
                    await step()
                except (LLMasOSError, OSError):
                    log.exception("what others left, or what has expired, could not be seen to")
            await asyncio.sleep(CLEAN_SECONDS)
