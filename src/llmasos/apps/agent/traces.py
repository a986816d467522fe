"""Runs of agents in the database: one row for each, with all of the run as it was when it last ended or paused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from llmasos.apps.agent.models import text_of
from llmasos.client.types.agents import AgentError, AgentRun, AgentRunInfo
from llmasos.errors import BusyError, NotFoundError
from llmasos.store.database import Base, Database, utc_now

_SHOWN = 200
_WORKER = "worker"
"""In the body of a run that somebody works on: place and server."""


class AgentRunRow(Base):
    """`key_id`: of the key that asked for it over HTTP; `body`: the AgentRun."""

    __tablename__ = "agent_runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None] = mapped_column(index=True)
    agent: Mapped[str]
    model: Mapped[str]
    state: Mapped[str]
    input: Mapped[str]
    created: Mapped[datetime] = mapped_column(index=True)
    updated: Mapped[datetime]
    body: Mapped[dict[str, Any]]


class RunNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no run {id!r}.", hint="`llmasos agent ls` lists them.")


def save(session: Session, run: AgentRun, key_id: str | None = None) -> None:
    row = session.get(AgentRunRow, run.id)
    if row is None:
        row = AgentRunRow(id=run.id, key_id=key_id, agent=run.agent, input=asked(run)[:_SHOWN], created=run.created)
        session.add(row)
    row.model, row.state, row.updated = run.model, run.state, run.updated
    row.body = run.model_dump(mode="json", exclude_none=True)


def load(session: Session, id: str, key_id: str | None = None) -> AgentRun:
    """Raises RunNotFoundError; what another key asked for does not exist for this one."""
    body = _row(session, id, key_id).body
    return AgentRun.model_validate({name: value for name, value in body.items() if name != _WORKER})


def infos(session: Session, key_id: str | None = None, *, limit: int = 50) -> list[AgentRunInfo]:
    """The newest first."""
    wanted = select(AgentRunRow).where(_of(key_id)).order_by(AgentRunRow.created.desc(), AgentRunRow.id).limit(limit)
    fields = AgentRunInfo.model_fields
    return [
        AgentRunInfo.model_validate({name: getattr(row, name) for name in fields}) for row in session.scalars(wanted)
    ]


def remove(session: Session, id: str, key_id: str | None = None) -> None:
    session.delete(_row(session, id, key_id))


def take(
    session: Session, id: str, key_id: str | None, check: Callable[[AgentRun], None], *, worker: Sequence[str] = ()
) -> AgentRun:
    """The run, which waited, to go on with it: it waits no longer, so nobody else can. `check` may raise before that.
    `worker`: place and server of who does, for `give_up`. Raises RunNotFoundError, and BusyError for a run that waits
    for nothing."""
    row = session.get(AgentRunRow, id, with_for_update=True) if _is_id(id) else None
    if row is None or row.key_id != key_id:
        raise RunNotFoundError(id)
    if row.state != "requires_action":
        raise BusyError(f"The run {id!r} is {row.state}; it waits for nothing.", hint="GET it to see how it ended.")
    run = AgentRun.model_validate(row.body)
    check(run)
    row.state, row.body = "running", {**row.body, "state": "running", _WORKER: list(worker)}
    return run


def give_up(session: Session, place: str, living: Collection[str]) -> int:
    """Runs that a server of this place was working on when it ended are failed, and say so. How many they are."""
    rows = session.scalars(select(AgentRunRow).where(AgentRunRow.state == "running").with_for_update())
    ended = [row for row in rows if _has_ended(row.body.get(_WORKER), place, living)]
    for row in ended:
        run = AgentRun.model_validate({name: value for name, value in row.body.items() if name != _WORKER})
        run.state, run.pending, run.updated = "failed", [], utc_now()
        run.error = AgentError(
            code="server_ended", message="The server ended while it worked on this run.", hint="Run it again."
        )
        for call in (call for step in run.steps for call in step.calls if call.result is None):
            call.result, call.is_error = "Not finished: the server ended.", True
        save(session, run, row.key_id)
    return len(ended)


def _has_ended(worker: Sequence[str] | None, place: str, living: Collection[str]) -> bool:
    """Nobody knows who works on one that says nothing: it is of an earlier version, whose servers have ended."""
    return not worker or (worker[0] == place and worker[1] not in living)


def _row(session: Session, id: str, key_id: str | None) -> AgentRunRow:
    row = session.get(AgentRunRow, id) if _is_id(id) else None
    if row is None or row.key_id != key_id:
        raise RunNotFoundError(id)
    return row


def _of(key_id: str | None) -> Any:
    return AgentRunRow.key_id.is_(None) if key_id is None else AgentRunRow.key_id == key_id


def _is_id(text: str) -> bool:
    """Databases do not take every text."""
    return text.isascii() and text.isprintable() and len(text) <= 256


def asked(run: AgentRun) -> str:
    """The question that a run began with, on one line."""
    given = [one for one in run.messages[: run.num_given] if one["role"] == "user"]
    return " ".join(text_of(given[-1].get("content")).split()) if given else ""


class Traces:
    """The runs in a database, which stays the caller's: those without a key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, run: AgentRun) -> None:
        with self._database.session() as session:
            save(session, run)

    def get(self, id: str) -> AgentRun:
        """Raises NotFoundError."""
        with self._database.session(read_only=True) as session:
            return load(session, id)

    def list(self, *, limit: int = 50) -> list[AgentRunInfo]:
        """The newest first."""
        with self._database.session(read_only=True) as session:
            return infos(session, limit=limit)

    def remove(self, id: str) -> None:
        """Raises NotFoundError."""
        with self._database.session() as session:
            remove(session, id)

    def forget_before(self, moment: datetime) -> None:
        with self._database.session() as session:
            session.execute(delete(AgentRunRow).where(AgentRunRow.created < moment, AgentRunRow.key_id.is_(None)))


@contextmanager
def open_traces() -> Iterator[Traces]:
    """Those of the home. Raises StoreError for a database that can't be used."""
    with Database.open() as database:
        yield Traces(database)
