"""What clients leave with the server: rows in the database, bytes in `<home>/files/`. Opened when it is first used.

Several servers may share a database. Each works for one *place*, its home: files lie there, models are pulled to it,
and only a server of the same place goes on with what another has left unfinished.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout

from llmasos.errors import DiskFullError, StoreError
from llmasos.settings import settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from llmasos.store.database import Database

T = TypeVar("T")


DISK_MARGIN = 2**30
"""Bytes that clients' files leave free on the disk, or a hundredth of a smaller one: databases and logs need them."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,256}")


def is_id(text: str) -> bool:
    """Whether anything here can have this id: databases do not take every text."""
    return _ID.fullmatch(text) is not None


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises DiskFullError if so many more would leave less than the margin. Blocking, for microseconds."""
    disk = shutil.disk_usage(folder)
    margin = min(DISK_MARGIN, disk.total // 100)
    if disk.free - num_bytes < margin:
        raise DiskFullError(
            f"There is no room for {num_bytes} bytes: the server's disk has {disk.free} free and keeps {margin} so.",
            hint="DELETE /v1/files/{id} makes some.",
        )


class Storage:
    """`database`: an open one, which stays the caller's; by default the home's, opened here and closed by `close`."""

    def __init__(self, database: Database | None = None, home: Path | None = None) -> None:
        self.home = home or settings().home
        self._given = database is not None
        self._database = database
        self._opening = asyncio.Lock()
        self._life: FileLock | None = None

    @property
    def files(self) -> Path:
        return self.home / "files"

    @cached_property
    def place(self) -> str:
        """The home's name in the database. Raises StoreError for a home that can't be written to."""
        return place_of(self.home)

    @cached_property
    def server(self) -> str:
        """The name of this one of the place's servers. Until `close`, or its process's end, it counts as alive. Raises
        StoreError."""
        id = secrets.token_hex(8)
        life = FileLock(self._lives / f"{id}.lock", thread_local=False)
        with _alone(self._lives):
            life.acquire()
        self._life = life
        return id

    def living(self) -> set[str]:
        """The servers of this place that are alive; one that is not never comes back. Blocking. Raises StoreError."""
        found = set()
        with _alone(self._lives):
            for path in self._lives.glob("*.lock"):
                try:
                    with FileLock(path, blocking=False, thread_local=False):
                        pass
                except Timeout:
                    found.add(path.stem)
                else:
                    path.unlink(missing_ok=True)
        return found

    @property
    def _lives(self) -> Path:
        return self.home / "servers"

    async def run(self, work: Callable[[Session], T], *, read_only: bool = False) -> T:
        """`work(session)` in a thread, in one transaction."""
        return await (await self.database()).run(work, read_only=read_only)

    async def database(self) -> Database:
        """It stays the storage's."""
        if self._database is None:
            async with self._opening:
                if self._database is None:
                    self._database = await asyncio.to_thread(_open)
        return self._database

    async def close(self) -> None:
        if self._life is not None:
            self._life.release()
            self._life = None
            del self.server
        if self._database is not None and not self._given:
            await asyncio.to_thread(self._database.close)
            self._database = None


def place_of(home: Path) -> str:
    """The name of this home among all that use a database. It is kept in the home, so it moves with the files, and the
    name of the machine, which a container gets anew at each start, does not matter. Raises StoreError."""
    path = home / "servers" / "place"
    with _alone(path.parent):
        if not path.exists():
            whole = path.with_suffix(".new")
            whole.write_text(secrets.token_hex(8), encoding="ascii")
            os.replace(whole, path)
        return path.read_text(encoding="ascii")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else is in `folder`: no server is taken for dead between the making of its file and the locking."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "guard", thread_local=False):
            yield
    except OSError as e:
        raise StoreError(
            f"{folder} can't be used: {e.strerror or e}.", hint="Set LLMASOS_HOME to a folder that you can write to."
        ) from e


def _open() -> Database:
    from llmasos.store.database import Database

    return Database.open()
