"""What clients leave with the server: rows in the database, bytes in `<home>/files/`. Opened when it is first used."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmasos.settings import settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from llmasos.store.database import Database

T = TypeVar("T")


_ID = re.compile(r"[A-Za-z0-9._:-]{1,256}")


def is_id(text: str) -> bool:
    """Whether anything here can have this id: databases do not take every text."""
    return _ID.fullmatch(text) is not None


class Storage:
    """`database`: an open one, which stays the caller's; by default the home's, opened here and closed by `close`."""

    def __init__(self, database: Database | None = None, home: Path | None = None) -> None:
        self.home = home or settings().home
        self._given = database is not None
        self._database = database
        self._opening = asyncio.Lock()

    @property
    def files(self) -> Path:
        return self.home / "files"

    async def run(self, work: Callable[[Session], T], *, read_only: bool = False) -> T:
        """`work(session)` in a thread, in one transaction."""
        if self._database is None:
            async with self._opening:
                if self._database is None:
                    self._database = await asyncio.to_thread(_open)
        return await self._database.run(work, read_only=read_only)

    async def close(self) -> None:
        if self._database is not None and not self._given:
            await asyncio.to_thread(self._database.close)
            self._database = None


def _open() -> Database:
    from llmasos.store.database import Database

    return Database.open()
