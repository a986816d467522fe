"""Uploads: a file that comes in parts, in any order and several at once, and becomes a file when all are there."""

from __future__ import annotations

import asyncio
import secrets
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from llmasos.client.types.files import CompleteUploadRequest, Upload, UploadPart, UploadRequest
from llmasos.errors import ChecksumError, InvalidInputError, NotFoundError, StoreError
from llmasos.serve.caller import Caller
from llmasos.serve.files.form import TEMPORARY, disk_errors, label
from llmasos.serve.files.store import Files, join
from llmasos.serve.files.store import shown as shown_file
from llmasos.serve.files.tables import FileRow, PartRow, UploadRow
from llmasos.serve.storage import is_id
from llmasos.store.database import utc_now

SECONDS = 3600
"""How long an upload waits for its parts (OpenAI's)."""
KEPT = timedelta(days=1)
"""How long it is known what became of an upload."""
MAX_PART_BYTES = 64 * 2**20
MAX_PARTS = 10_000


class UploadNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no upload {id!r}.", hint="POST /v1/uploads begins one.")


class WrongChecksumError(ChecksumError):
    http_status = 400


class Uploads:
    def __init__(self, files: Files) -> None:
        self.files, self.storage = files, files.storage

    async def create(self, caller: Caller, body: UploadRequest) -> Upload:
        if body.bytes > self.files.max_file_bytes:
            limit = self.files.max_file_bytes
            raise InvalidInputError(f"bytes={body.bytes} is above {limit}, this server's limit.", param="bytes")

        await self.files.check_disk(body.bytes)

        def work(session: Session) -> Upload:
            self.files.check_share(session, caller.key_id, body.bytes)
            now = utc_now()
            row = UploadRow(
                id=f"upload_{secrets.token_hex(16)}",
                key_id=caller.key_id,
                filename=label(body.filename),
                purpose=body.purpose,
                bytes=body.bytes,
                created=now,
                expires=now + timedelta(seconds=SECONDS),
                status="pending",
                file_seconds=body.expires_after.seconds if body.expires_after else None,
                file_id=None,
            )
            session.add(row)
            return _shown(session, row)

        return await self.storage.run(work)

    async def check_pending(self, caller: Caller, id: str) -> None:
        """Raises what would refuse a part, before its bytes are read."""
        await self.storage.run(lambda session: _pending(session, id, caller.key_id), read_only=True)

    async def add_part(self, caller: Caller, id: str, source: Path, num_bytes: int) -> UploadPart:
        """Take the whole file `source` as a part."""
        part = f"part_{secrets.token_hex(16)}"

        def work(session: Session) -> UploadPart:
            upload = _pending(session, id, caller.key_id, to_write=True)
            query = select(func.count(), func.coalesce(func.sum(PartRow.bytes), 0)).where(PartRow.upload_id == id)
            num_parts, there = session.execute(query).one()
            if num_parts >= MAX_PARTS:
                raise InvalidInputError(f"{id} has {MAX_PARTS} parts already.")
            if there + num_bytes > upload.bytes:
                raise InvalidInputError(
                    f"With this part of {num_bytes} bytes {id} would have {there + num_bytes}, not {upload.bytes}.",
                    param="data",
                )
            row = PartRow(id=part, upload_id=id, bytes=num_bytes, created=utc_now())
            session.add(row)
            source.replace(self.files.path(part))
            return UploadPart(id=part, created_at=int(row.created.timestamp()), upload_id=id)

        with disk_errors():
            return await self.storage.run(work)

    async def complete(self, caller: Caller, id: str, body: CompleteUploadRequest) -> Upload:
        """The file of these parts, in this order. Raises InvalidInputError when they are not what was announced,
        WrongChecksumError."""

        def parts_of(session: Session) -> tuple[Upload, int | None]:
            row = _pending(session, id, caller.key_id)
            known = set(session.scalars(select(PartRow.id).where(PartRow.upload_id == id)))
            for i, part in enumerate(body.part_ids):
                if part not in known or part in body.part_ids[:i]:
                    raise InvalidInputError(f"{part!r} is no further part of {id}.", param=f"part_ids.{i}")
            return _shown(session, row), row.file_seconds

        upload, seconds = await self.storage.run(parts_of, read_only=True)
        whole = self.files.folder / f"{TEMPORARY}{secrets.token_hex(16)}"

        def end(session: Session, file_id: str) -> tuple[Upload, list[str]]:
            name, purpose = upload.filename, upload.purpose
            self.files.add(session, file_id, caller.key_id, filename=name, purpose=purpose, seconds=seconds)
            return _end(session, caller, id, "completed", file_id)

        try:
            try:
                await self.files.check_disk(upload.bytes)
                with disk_errors():
                    paths = [self.files.path(part) for part in body.part_ids]
                    num_bytes, md5 = await asyncio.to_thread(join, paths, whole)
            except StoreError:
                await self.check_pending(caller, id)  # who completed or cancelled it meanwhile has removed its parts
                raise
            if num_bytes != upload.bytes:
                raise InvalidInputError(f"The parts have {num_bytes} bytes, not {upload.bytes}.", param="part_ids")
            if body.md5 is not None and body.md5.lower() != md5:
                raise WrongChecksumError(f"The parts' MD5 is {md5}, not {body.md5}.", hint="Send them again.")
            upload, parts = await self.files.take(whole, end)
        finally:
            whole.unlink(missing_ok=True)
        await asyncio.to_thread(self._remove, parts)
        return upload

    async def cancel(self, caller: Caller, id: str) -> Upload:
        upload, parts = await self.storage.run(lambda session: _end(session, caller, id, "cancelled"))
        await asyncio.to_thread(self._remove, parts)
        return upload

    async def clean(self) -> None:
        """Forget uploads that were never completed, and their parts."""

        def work(session: Session) -> list[str]:
            late = select(UploadRow).where(UploadRow.expires <= utc_now(), UploadRow.status == "pending")
            rows = session.scalars(late).all()
            for row in rows:
                row.status = "expired"
            session.execute(
                delete(UploadRow).where(UploadRow.expires <= utc_now() - KEPT, UploadRow.status != "pending")
            )
            return _forget_parts(session, [row.id for row in rows])

        await asyncio.to_thread(self._remove, await self.storage.run(work))

    def _remove(self, parts: list[str]) -> None:
        for part in parts:
            self.files.path(part).unlink(missing_ok=True)


def _end(
    session: Session, caller: Caller, id: str, status: str, file_id: str | None = None
) -> tuple[Upload, list[str]]:
    """The upload, and the parts that nobody needs any more. One that is over can't end again."""
    row = _pending(session, id, caller.key_id, to_write=True)
    row.status, row.file_id = status, file_id
    return _shown(session, row), _forget_parts(session, [id])


def _forget_parts(session: Session, uploads: list[str]) -> list[str]:
    mine = PartRow.upload_id.in_(uploads)
    parts = list(session.scalars(select(PartRow.id).where(mine)))
    session.execute(delete(PartRow).where(mine))
    return parts


def _pending(session: Session, id: str, key_id: str | None, *, to_write: bool = False) -> UploadRow:
    row = session.get(UploadRow, id, with_for_update=to_write) if is_id(id) else None
    if row is None or row.key_id != key_id:
        raise UploadNotFoundError(id)
    status = "expired" if row.status == "pending" and row.expires <= utc_now() else row.status
    if status != "pending":
        raise InvalidInputError(f"{id} is {status}.", hint="POST /v1/uploads begins another.")
    return row


def _shown(session: Session, row: UploadRow) -> Upload:
    file = session.get(FileRow, row.file_id) if row.file_id else None
    return Upload(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created.timestamp()),
        expires_at=int(row.expires.timestamp()),
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,  # type: ignore[arg-type]  # no others are written
        file=shown_file(file) if file else None,
    )
