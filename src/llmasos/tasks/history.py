"""What pipelines have done: one row for each run, in the database of the home (`llmasos.store.database`)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.errors import NotFoundError
from llmasos.store.database import Base, Database, utc_now

State = Literal["running", "done", "failed"]


class TaskRunRow(Base):
    """`steps`: what `StepRecord` says of each. A process that was killed leaves its run as running."""

    __tablename__ = "task_runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    pipeline: Mapped[str]
    model: Mapped[str | None]
    state: Mapped[str]
    inputs: Mapped[dict[str, Any]]
    steps: Mapped[list[Any]]
    output: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
    created: Mapped[datetime] = mapped_column(index=True)
    updated: Mapped[datetime]


class StepRecord(BaseModel):
    """How a step of a pipeline went. `attempts`: questions that were tried again count; `num_cached` of its `num_calls`
    were known from before; `seconds` from its start to its end."""

    id: str
    task: str
    state: Literal["done", "failed", "skipped"]
    num_calls: int = 0
    num_cached: int = 0
    attempts: int = 0
    seconds: float = 0.0
    error: str | None = None


class TaskRun(BaseModel):
    """A run of a pipeline."""

    id: str
    pipeline: str
    model: str | None
    state: State
    inputs: dict[str, Any]
    steps: list[StepRecord]
    output: dict[str, Any] | None
    error: str | None
    created: datetime
    updated: datetime


def new_run_id() -> str:
    return f"run_{secrets.token_hex(12)}"


class History:
    """The runs in a database, which stays the caller's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, pipeline: str, model: str | None, inputs: Mapping[str, Any], *, id: str | None = None) -> str:
        """The new run's id. `id`: given by who runs it, and then maybe of a run that goes on."""
        now = utc_now()
        row = TaskRunRow(
            id=id or new_run_id(),
            pipeline=pipeline,
            model=model,
            state="running",
            inputs=dict(inputs),
            steps=[],
            output=None,
            error=None,
            created=now,
            updated=now,
        )
        with self._database.session() as session:
            if (before := session.get(TaskRunRow, row.id)) is not None:
                row.created = before.created
            session.merge(row)
            return row.id

    def end(self, id: str, steps: list[StepRecord], *, output: Any = None, error: str | None = None) -> None:
        with self._database.session() as session:
            row = session.get(TaskRunRow, id)
            if row is None:  # it never began, or was deleted meanwhile
                return
            row.steps = [one.model_dump() for one in steps]
            row.state = "done" if error is None else "failed"
            row.output, row.error, row.updated = output, error, utc_now()

    def list(self, *, limit: int = 50) -> list[TaskRun]:
        """The newest first."""
        wanted = select(TaskRunRow).order_by(TaskRunRow.created.desc(), TaskRunRow.id).limit(limit)
        with self._database.session(read_only=True) as session:
            return [_run(row) for row in session.scalars(wanted)]

    def get(self, id: str) -> TaskRun:
        """Raises NotFoundError."""
        with self._database.session(read_only=True) as session:
            row = session.get(TaskRunRow, id)
            if row is None:
                raise NotFoundError(f"There is no run {id!r}.", hint="`llmasos task runs` lists them.")
            return _run(row)


def _run(row: TaskRunRow) -> TaskRun:
    return TaskRun.model_validate({name: getattr(row, name) for name in TaskRun.model_fields})


@contextmanager
def open_history() -> Iterator[History]:
    """That of the home. Raises StoreError for a database that can't be used."""
    with Database.open() as database:
        yield History(database)
