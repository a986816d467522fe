"""Batches in the database. Functions take a session and run in a thread."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from llmasos.client.types.files import (
    Batch,
    BatchCounts,
    BatchError,
    BatchErrors,
    BatchList,
    BatchRequest,
    BatchUsage,
)
from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.serve.batches.ledger import Ledger
from llmasos.serve.batches.tables import ACTIVE, BatchRow
from llmasos.serve.files.store import FileNotFoundHereError, Files, beyond, new_file_id, ordered, row_of, same_key
from llmasos.serve.files.tables import FileRow
from llmasos.serve.storage import is_id
from llmasos.store.database import utc_now

_UNITS = {"m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([0-9]{1,5})([mhd])")
_MAX_WINDOW = 30 * 86400


class BatchNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no batch {id!r}.", hint="GET /v1/batches lists those of this key.")


@dataclass(frozen=True)
class Job:
    """What the worker has to know of a batch."""

    id: str
    key_id: str | None
    endpoint: str
    status: str
    input_id: str
    output_id: str
    error_id: str
    expires: datetime


def window_seconds(text: str) -> int:
    """Raises InvalidInputError."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _MAX_WINDOW:
        raise InvalidInputError(
            f"completion_window={text!r} is no time that a batch can have.",
            hint="Write 24h, or any number of m, h or d up to 30d.",
            param="completion_window",
        )
    return seconds


def create(session: Session, key_id: str | None, body: BatchRequest) -> Batch:
    try:
        file = row_of(session, body.input_file_id, key_id)
    except FileNotFoundHereError as e:
        raise InvalidInputError(e.message, hint=e.hint, param="input_file_id") from e
    if file.purpose != "batch":
        raise InvalidInputError(
            f"{file.id} was uploaded for {file.purpose!r}.", hint="Upload it with purpose batch.", param="input_file_id"
        )
    now = utc_now()
    row = BatchRow(
        id=f"batch_{secrets.token_hex(16)}",
        key_id=key_id,
        input_file_id=file.id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        status="validating",
        model=None,
        labels=body.metadata,
        errors=None,
        output_id=new_file_id(),
        error_id=new_file_id(),
        has_output=False,
        has_errors=False,
        output_seconds=body.output_expires_after.seconds if body.output_expires_after else None,
        total=0,
        completed=0,
        failed=0,
        usage=None,
        created=now,
        expires=now + timedelta(seconds=window_seconds(body.completion_window)),
        moments={},
    )
    session.add(row)
    return shown(row)


def get(session: Session, id: str, key_id: str | None) -> Batch:
    """Raises BatchNotFoundError."""
    return shown(_row(session, id, key_id))


def list_page(session: Session, key_id: str | None, after: str | None, limit: int) -> BatchList:
    query = select(BatchRow).where(same_key(BatchRow.key_id, key_id))
    if after is not None:
        last = session.get(BatchRow, after) if is_id(after) else None
        if last is None or last.key_id != key_id:
            raise InvalidInputError(f"There is no batch {after!r}.", param="after")
        query = query.where(beyond(BatchRow, last.created, last.id, False))
    rows = session.scalars(ordered(query, BatchRow, False).limit(limit + 1)).all()
    data = [shown(row) for row in rows[:limit]]
    first, last_ = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first, last_id=last_, has_more=len(rows) > limit)


def active(session: Session, place: str) -> list[Job]:
    """Those that are not over and whose input lies at this place, the oldest first."""
    mine = select(BatchRow).join(FileRow, FileRow.id == BatchRow.input_file_id).where(FileRow.place == place)
    rows = session.scalars(mine.where(BatchRow.status.in_(ACTIVE)).order_by(BatchRow.created, BatchRow.id))
    return [
        Job(row.id, row.key_id, row.endpoint, row.status, row.input_file_id, row.output_id, row.error_id, row.expires)
        for row in rows
    ]


def cancel(session: Session, id: str, key_id: str | None) -> Batch:
    """Raises InvalidInputError when it is over."""
    row = _row(session, id, key_id, to_write=True)
    if row.status in ("validating", "in_progress"):
        _become(row, "cancelling")
    elif row.status not in ("cancelling", "cancelled"):
        raise InvalidInputError(f"{id} is {row.status}; it can't be cancelled.", param="batch_id")
    return shown(row)


def begun(session: Session, id: str, total: int, model: str | None) -> str:
    """The input was found good. Gives the status, which a cancellation may have changed meanwhile."""
    row = _known(session, id)
    row.total, row.model = total, model
    if row.status == "validating":
        _become(row, "in_progress")
    return row.status


def progressed(session: Session, id: str, completed: int, failed: int) -> str:
    """Note how far it is; gives the status."""
    row = _known(session, id)
    row.completed, row.failed = completed, failed
    return row.status


def over(
    session: Session, job: Job, status: str, ledger: Ledger, files: Files, errors: list[BatchError] | None = None
) -> None:
    """The end: results become files. One transaction, so that it has happened or not."""
    row = _known(session, job.id)
    if row.status not in ACTIVE:
        return
    row.completed, row.failed = ledger.num_completed, ledger.num_failed
    row.total = max(row.total, row.completed + row.failed)
    row.has_output, row.has_errors = ledger.has_output, ledger.has_errors
    row.usage = ledger.usage.model_dump()
    row.errors = [error.model_dump() for error in errors] if errors else None
    for id, there, what in ((row.output_id, row.has_output, "output"), (row.error_id, row.has_errors, "error")):
        if there:
            name = f"{row.id}_{what}.jsonl"
            files.add(session, id, row.key_id, filename=name, purpose="batch_output", seconds=row.output_seconds)
    if status != "failed":
        row.moments = {**row.moments, "finalizing_at": int(time.time())}
    _become(row, status)


def _become(row: BatchRow, status: str) -> None:
    row.status = status
    row.moments = {**row.moments, f"{status}_at": int(time.time())}


def _row(session: Session, id: str, key_id: str | None, *, to_write: bool = False) -> BatchRow:
    row = session.get(BatchRow, id, with_for_update=to_write) if is_id(id) else None
    if row is None or row.key_id != key_id:
        raise BatchNotFoundError(id)
    return row


def _known(session: Session, id: str) -> BatchRow:
    row = session.get(BatchRow, id, with_for_update=True)
    assert row is not None, id
    return row


def shown(row: BatchRow) -> Batch:
    moments: dict[str, Any] = row.moments
    return Batch(
        id=row.id,
        endpoint=row.endpoint,
        model=row.model,
        errors=BatchErrors(data=[BatchError(**error) for error in row.errors]) if row.errors else None,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=row.status,  # type: ignore[arg-type]  # no others are written
        output_file_id=row.output_id if row.has_output else None,
        error_file_id=row.error_id if row.has_errors else None,
        created_at=int(row.created.timestamp()),
        expires_at=int(row.expires.timestamp()),
        request_counts=BatchCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=BatchUsage.model_validate(row.usage) if row.usage else None,
        metadata=row.labels,
        **moments,
    )
