"""Files: a row in the database for each, its bytes beside. Bytes come first and go last, so no row is without."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from llmasos.client.types.files import File, FileList
from llmasos.errors import BusyError, InvalidInputError, NotFoundError, StoreError
from llmasos.formats import sync
from llmasos.serve.batches.tables import ACTIVE, BatchRow
from llmasos.serve.caller import Caller
from llmasos.serve.files.form import TEMPORARY, TooLargeError, disk_errors
from llmasos.serve.files.tables import FileRow, PartRow, UploadRow
from llmasos.serve.storage import Storage, check_room, is_id
from llmasos.store.database import utc_now

T = TypeVar("T")

MAX_FILE_BYTES = 512 * 2**20
"""Of one file (OpenAI's limit)."""
MAX_STORED_BYTES = 100 * 2**30
STRAY_SECONDS = 24 * 3600
"""Bytes without a row that are older than this were left by a server that was killed."""
_ID = re.compile(r"(file|part)[-_][0-9a-f]{32}")


class FileNotFoundHereError(NotFoundError):
    code = "file_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(f"There is no file {id!r}.", hint="GET /v1/files lists those of this key.")


class Files:
    """`max_stored_bytes`: of all files of one key."""

    def __init__(
        self, storage: Storage, *, max_file_bytes: int = MAX_FILE_BYTES, max_stored_bytes: int = MAX_STORED_BYTES
    ) -> None:
        self.storage = storage
        self.max_file_bytes, self.max_stored_bytes = max_file_bytes, max_stored_bytes

    @property
    def folder(self) -> Path:
        return self.storage.files

    def path(self, id: str) -> Path:
        """Where the bytes are. `id` is one that was made here."""
        assert _ID.fullmatch(id), id
        return self.folder / id

    async def keep(
        self, caller: Caller, source: Path, *, filename: str, purpose: str, seconds: int | None = None
    ) -> File:
        """Take the whole and synced file `source`, which is in `folder`, as a new one. Raises TooLargeError for more
        than the key may store."""

        def work(session: Session, id: str) -> File:
            self.check_share(session, caller.key_id, self.path(id).stat().st_size)
            return self.add(session, id, caller.key_id, filename=filename, purpose=purpose, seconds=seconds)

        return await self.take(source, work)

    async def take(self, source: Path, work: Callable[[Session, str], T]) -> T:
        """Move the whole and synced file `source`, which is in `folder`, to its place; `work(session, id)` writes its
        row. If that fails, the bytes are removed."""
        id = new_file_id()
        path = self.path(id)
        with disk_errors():
            await asyncio.to_thread(_move, source, path)
        try:
            return await self.storage.run(lambda session: work(session, id))
        except Exception:  # not if we are cancelled: the row may be written all the same
            path.unlink(missing_ok=True)
            raise

    async def admit(self, caller: Caller) -> None:
        """Raises TooLargeError for a key that stores as much as it may, and DiskFullError: before bytes
        are sent or made."""
        await self.storage.run(lambda session: self.check_share(session, caller.key_id, 1), read_only=True)
        await self.check_disk(1)

    async def check_disk(self, num_bytes: int) -> None:
        """Raises DiskFullError without room for so many more."""

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_room(self.folder, num_bytes)

        with disk_errors():
            await asyncio.to_thread(work)

    def check_share(self, session: Session, key_id: str | None, num_bytes: int) -> None:
        """Raises TooLargeError if with so many more the key would store more than it may. Uploads that wait for their
        parts count as what they will be."""
        files = select(func.sum(FileRow.bytes)).where(same_key(FileRow.key_id, key_id), _in_force())
        coming = (UploadRow.status == "pending") & (UploadRow.expires > utc_now())
        uploads = select(func.sum(UploadRow.bytes)).where(same_key(UploadRow.key_id, key_id), coming)
        stored = sum(session.scalar(query) or 0 for query in (files, uploads))
        if stored + num_bytes > self.max_stored_bytes:
            raise TooLargeError(
                f"This key stores {stored} bytes, and may store {self.max_stored_bytes}.",
                hint="DELETE /v1/files/{id} makes room; or llmasos serve --max-stored.",
            )

    def add(
        self, session: Session, id: str, key_id: str | None, *, filename: str, purpose: str, seconds: int | None = None
    ) -> File:
        """The row of a file whose bytes are there."""
        now = utc_now()
        row = FileRow(
            id=id,
            key_id=key_id,
            place=self.storage.place,
            filename=filename,
            purpose=purpose,
            bytes=self.path(id).stat().st_size,
            created=now,
            expires=now + timedelta(seconds=seconds) if seconds else None,
        )
        session.add(row)
        return shown(row)

    async def get(self, caller: Caller, id: str) -> File:
        """Raises FileNotFoundHereError."""
        return await self.storage.run(lambda session: shown(row_of(session, id, caller.key_id)), read_only=True)

    async def content(self, caller: Caller, id: str) -> tuple[File, Path]:
        """Raises FileNotFoundHereError, StoreError without the bytes."""
        row = await self.storage.run(lambda session: row_of(session, id, caller.key_id), read_only=True)
        path = self.path(row.id)
        if not await asyncio.to_thread(path.is_file):
            if row.place != self.storage.place:
                raise StoreError(f"The bytes of {id} are at another server.", hint="Ask the one that it was sent to.")
            raise StoreError(f"The bytes of {id} are not in {self.folder.name}/ any more.", hint="Upload them again.")
        return shown(row), path

    async def delete(self, caller: Caller, id: str) -> None:
        """Raises FileNotFoundHereError, BusyError while a batch needs it."""

        def work(session: Session) -> None:
            row = row_of(session, id, caller.key_id)
            if used := session.scalar(_batches_that_need().where(BatchRow.input_file_id == id).limit(1)):
                raise BusyError(f"{id} is the input of {used}, which is not over.", hint="Cancel that first.")
            session.delete(row)

        await self.storage.run(work)
        await asyncio.to_thread(self.path(id).unlink, missing_ok=True)

    async def list(
        self, caller: Caller, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> FileList:
        def work(session: Session) -> FileList:
            query = select(FileRow).where(same_key(FileRow.key_id, caller.key_id), _in_force())
            if purpose is not None:
                if not is_id(purpose):
                    return FileList(data=[])
                query = query.where(FileRow.purpose == purpose)
            if after is not None:
                try:
                    last = row_of(session, after, caller.key_id)
                except FileNotFoundHereError as e:
                    raise InvalidInputError(e.message, param="after") from e
                query = query.where(beyond(FileRow, last.created, last.id, ascending))
            rows = session.scalars(ordered(query, FileRow, ascending).limit(limit + 1)).all()
            data = [shown(row) for row in rows[:limit]]
            first, last_ = (data[0].id, data[-1].id) if data else (None, None)
            return FileList(data=data, first_id=first, last_id=last_, has_more=len(rows) > limit)

        return await self.storage.run(work, read_only=True)

    async def clean(self) -> None:
        """Remove what has expired, and bytes that a killed server left."""
        expired, known = await self.storage.run(_remove_expired)
        await asyncio.to_thread(self._remove, expired, known)

    def _remove(self, expired: Sequence[str], known: set[str]) -> None:
        for id in expired:
            self.path(id).unlink(missing_ok=True)
        oldest = time.time() - STRAY_SECONDS
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            ours = path.name.startswith(TEMPORARY) or _ID.fullmatch(path.name)
            if ours and path.name not in known and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


def row_of(session: Session, id: str, key_id: str | None) -> FileRow:
    row = session.get(FileRow, id) if is_id(id) else None
    if row is None or row.key_id != key_id or (row.expires is not None and row.expires <= utc_now()):
        raise FileNotFoundHereError(id)
    return row


def shown(row: FileRow) -> File:
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created.timestamp()),
        expires_at=int(row.expires.timestamp()) if row.expires else None,
        filename=row.filename,
        purpose=row.purpose,
    )


def same_key(column: Any, key_id: str | None) -> ColumnElement[bool]:
    found: ColumnElement[bool] = column.is_(None) if key_id is None else column == key_id
    return found


def beyond(table: Any, created: datetime, id: str, ascending: bool) -> ColumnElement[bool]:
    """What comes after the row of this moment and id in a list."""
    if ascending:
        return or_(table.created > created, (table.created == created) & (table.id > id))
    return or_(table.created < created, (table.created == created) & (table.id < id))


def ordered(query: Any, table: Any, ascending: bool) -> Any:
    if ascending:
        return query.order_by(table.created, table.id)
    return query.order_by(table.created.desc(), table.id.desc())


def _in_force() -> ColumnElement[bool]:
    return or_(FileRow.expires.is_(None), FileRow.expires > utc_now())


def _remove_expired(session: Session) -> tuple[list[str], set[str]]:
    """The ids that are gone, and all names that still belong to something."""
    running = session.execute(select(BatchRow).where(BatchRow.status.in_(ACTIVE))).scalars().all()
    used = {id for row in running for id in (row.input_file_id, row.output_id, row.error_id)}
    rows = session.scalars(select(FileRow).where(FileRow.expires <= utc_now())).all()
    gone = [row for row in rows if row.id not in used]
    for row in gone:
        session.delete(row)
    session.flush()
    known = {*session.scalars(select(FileRow.id)), *session.scalars(select(PartRow.id)), *used}
    return [row.id for row in gone], known


def _batches_that_need() -> Select[Any]:
    return select(BatchRow.id).where(BatchRow.status.in_(ACTIVE))


def _move(source: Path, path: Path) -> None:
    os.replace(source, path)
    sync(path.parent)  # the name itself must reach the disk as well


def join(parts: Sequence[Path], into: Path) -> tuple[int, str]:
    """Write the parts one after the other: (bytes, MD5 in hex). Blocking."""
    digest, num_bytes = hashlib.md5(usedforsecurity=False), 0
    with into.open("xb") as file:
        for part in parts:
            with part.open("rb") as source:
                while data := source.read(2**20):
                    file.write(data)
                    digest.update(data)
                    num_bytes += len(data)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()
