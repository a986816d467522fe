"""What every kind of job has: a row in the database, a turn, progress, pause, going on after a restart, an end.

A kind says what its jobs do (`Kind.run`); everything else is here. Jobs of other origins (those that an application
keeps itself) are a `Source` and stand in the same list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from pydantic import BaseModel
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from llmasos.apps.live import Live
from llmasos.client.types.jobs import Job, JobError, JobState
from llmasos.errors import BusyError, LLMasOSError, NotFoundError
from llmasos.serve.caller import ANYONE, Caller, Scope
from llmasos.serve.jobs.tables import JobRow
from llmasos.serve.storage import Storage, is_id
from llmasos.store.database import utc_now

KEPT = 100
"""Jobs of a kind that are remembered."""
MOST_ACTIVE = 100
"""Jobs of one key that are not over; more are refused."""
SAVED_EVERY = 5.0
"""Seconds between two notes of the progress in the database."""
POLL_SECONDS = 1.0
"""How often a job that another server runs is looked at."""
ACTIVE: tuple[JobState, ...] = ("queued", "running")
OVER: tuple[JobState, ...] = ("done", "cancelled")
"""Failed ones can go on."""

log = logging.getLogger("llmasos.serve.jobs")


class JobNotFoundError(NotFoundError):
    param = "id"

    def __init__(self, id: str) -> None:
        super().__init__(f"There is no job {id!r}.", hint="GET /llmasos/v1/jobs lists them.")


class JobFailedError(LLMasOSError):
    code = "internal_error"


class Kept(BaseModel):
    """A job as the database has it. `spec`: what was asked. `details`: what the kind tells beside `progress`."""

    id: str
    kind: str
    name: str
    state: JobState = "queued"
    progress: float | None = None
    message: str = ""
    spec: dict[str, Any] = {}
    details: dict[str, Any] = {}
    result: Any = None
    error: dict[str, Any] | None = None
    key_id: str | None = None
    server: str = ""
    created: datetime
    updated: datetime


class Work(Live[Kept]):
    """A job at work. `error`: what it failed with."""

    def __init__(self, job: Kept) -> None:
        super().__init__(job)
        self.error: LLMasOSError | None = None


class Kind:
    """What jobs of one kind do, in the event loop of the server.

    `scope`: without `manage`, who may see and end jobs of its own. `at_once`: jobs that run; more wait.
    `after_restart`: what becomes of those whose server has ended.
    """

    name: str
    scope: Scope = "inference"
    at_once = 2
    can_pause = True
    after_restart: Literal["queued", "paused"] = "queued"

    async def run(self, work: Work) -> Any:
        """Do it, `work.change(progress=..., message=..., details=...)` meanwhile; gives the result as JSON values.
        It is cancelled to pause it, and called again to go on. Raises what the job fails with."""
        raise NotImplementedError

    async def give_up(self, job: Kept) -> Any:
        """The job is cancelled: what there is of its result."""

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        """The job is done, cancelled or forgotten: delete what only its work needs."""

    def shown(self, job: Kept) -> Job:
        error = JobError(**job.error) if job.error else None
        facts = job.model_dump(include=set(Job.model_fields) - {"error", "result"})
        can_pause = self.can_pause and job.state not in OVER
        return Job(**facts, result=job.result, error=error, can_pause=can_pause)


class Source(Protocol):
    """Jobs that are kept elsewhere. `get`, `cancel` and `follow` give None for an id that is none of theirs."""

    async def list(self, caller: Caller) -> Sequence[Job]: ...
    async def get(self, caller: Caller, id: str) -> Job | None: ...
    async def cancel(self, caller: Caller, id: str) -> Job | None: ...
    async def follow(self, caller: Caller, id: str) -> AsyncGenerator[Job, None] | None: ...


class Jobs:
    """The jobs of one server. `add` its kinds before the first call, `start` and `close` it with the server."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.sources: list[Source] = []
        self._kinds: dict[str, Kind] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._works: dict[str, Work] = {}
        self._writes: dict[str, asyncio.Future[Any]] = {}
        self._reading = asyncio.Lock()
        self._is_read = False
        self._starting: asyncio.Task[None] | None = None

    def add(self, kind: Kind) -> None:
        self._kinds[kind.name] = kind
        self._turns[kind.name] = asyncio.Semaphore(kind.at_once)

    async def start(self) -> None:
        """What a server that ended has left goes on."""

        async def take_up() -> None:
            try:
                await self.read()
            except LLMasOSError as e:
                log.error("jobs could not be read; the next call tries again: %s", e)

        self._starting = asyncio.create_task(take_up())

    async def close(self) -> None:
        """What runs goes on after the next start, or is paused then."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        active = [work for work in self._works.values() if work.job.state in ACTIVE]
        for work in active:
            await work.stop()
            with contextlib.suppress(LLMasOSError):  # the next start finds it running
                await self._settle(work, state=self._kinds[work.job.kind].after_restart, message="", server="")

    # for kinds

    async def begin(self, kind: str, name: str, spec: dict[str, Any], caller: Caller = ANYONE) -> Work:
        """A new job, on its way. Raises BusyError for a key with too many that are not over."""
        work = await self.make(kind, name, spec, caller)
        return self.go_on(work)

    async def make(
        self, kind: str, name: str, spec: dict[str, Any], caller: Caller = ANYONE, *, id: str | None = None
    ) -> Work:
        """A new job that waits to be told to `go_on`."""
        await self.read()
        theirs = [work.job for work in self._works.values() if work.job.key_id == caller.key_id]
        if sum(job.state in ACTIVE for job in theirs) >= MOST_ACTIVE:
            raise BusyError(f"{MOST_ACTIVE} jobs are not over yet.", hint="Wait for one, or cancel it.")
        now = utc_now()
        job = Kept(
            id=id or new_id(kind),
            kind=kind,
            name=name,
            spec=spec,
            key_id=caller.key_id,
            server=self.storage.server,
            created=now,
            updated=now,
        )
        work = self._works[job.id] = Work(job)
        try:
            await self.storage.run(lambda session: session.add(self._row(job)))
        except BaseException:
            del self._works[job.id]
            raise
        await self._forget(kind)
        return work

    def go_on(self, work: Work) -> Work:
        """Begin, or begin again; nothing for one that is on its way."""
        if work.job.state not in ACTIVE or work.task is None:
            work.error = None
            work.change(state="queued", error=None, message="")
            work.task = asyncio.get_running_loop().create_task(self._carry_out(work))
        return work

    def of_kind(self, kind: str) -> Sequence[Work]:
        """In memory, after `read`."""
        return [work for work in self._works.values() if work.job.kind == kind]

    async def find(self, id: str, kind: str | None = None) -> Work:
        """A job of this server, or one that another has left. Raises JobNotFoundError, and BusyError for one that
        another runs."""
        await self.read()
        job = await self._now(id)
        if job is None or job.kind not in self._kinds or kind not in (None, job.kind):
            raise JobNotFoundError(id)
        if (work := self._works.get(id)) is not None:
            return work
        if job.state in ACTIVE or not await self._take(job):
            raise BusyError(f"{id} is another server's of the same home.", hint="Ask that one.")
        return self._works[id]

    async def pause(self, work: Work) -> Work:
        """Raises BusyError where there is nothing to pause."""
        job, kind = work.job, self._kinds[work.job.kind]
        if job.state == "paused":
            return work
        if job.state not in ACTIVE or not kind.can_pause:
            raise not_now(job, "paused")
        await work.stop()
        await self._settle(work, state="paused", message="")
        return work

    async def resume(self, work: Work) -> Work:
        if work.job.state in OVER:
            raise not_now(work.job, "resumed")
        return self.go_on(work)

    async def cancel(self, work: Work) -> Work:
        """End it for good. Raises BusyError for one that is done."""
        if work.job.state == "done":
            raise not_now(work.job, "cancelled")
        if work.job.state != "cancelled":
            await work.stop()
            kind = self._kinds[work.job.kind]
            result = await kind.give_up(work.job)
            await self._settle(work, state="cancelled", message="", result=result, error=None)
            await kind.clear(work.job, is_forgotten=False)
        return work

    # for everybody

    async def list(self, caller: Caller = ANYONE, *, kind: str | None = None) -> Sequence[Job]:
        """The latest first, of all kinds and origins."""
        await self.read()
        rows = await self.storage.run(self._rows, read_only=True)
        found = [self._shown(job) for job in map(self._newer, rows) if self._may_see(caller, job)]
        for source in self.sources:
            found += await source.list(caller)
        return sorted((job for job in found if kind in (None, job.kind)), key=lambda job: job.created, reverse=True)

    async def kept(self, caller: Caller, kind: str) -> Sequence[Kept]:
        """Those of a kind that the caller may see, the latest first, with all that is known of them: for the kind."""
        await self.read()
        rows = await self.storage.run(self._rows, read_only=True)
        found = [self._newer(row) for row in rows if row.kind == kind and self._may_see(caller, row)]
        return sorted(found, key=lambda job: job.created, reverse=True)

    async def kept_one(self, caller: Caller, id: str, kind: str) -> Kept:
        """One of these. Raises JobNotFoundError."""
        await self.read()
        job = await self._now(id)
        if job is None or job.kind != kind or not self._may_see(caller, job):
            raise JobNotFoundError(id)
        return job

    async def get(self, caller: Caller, id: str) -> Job:
        """Raises JobNotFoundError, also for what the caller may not see."""
        await self.read()
        job = await self._now(id)
        if job is not None and self._may_see(caller, job):
            return self._shown(job)
        for source in self.sources:
            if (found := await source.get(caller, id)) is not None:
                return found
        raise JobNotFoundError(id)

    async def follow(self, caller: Caller, id: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then at each change, until nothing more happens to it by itself."""
        for source in self.sources:
            if (following := await source.follow(caller, id)) is not None:
                async with contextlib.aclosing(following) as jobs:
                    async for job in jobs:
                        yield job
                return
        said = await self.get(caller, id)
        if (work := self._works.get(id)) is not None:
            async with contextlib.aclosing(work.follow(is_active)) as changes:
                async for kept in changes:
                    yield self._shown(kept)
            return
        yield said
        while said.state in ACTIVE:
            await asyncio.sleep(POLL_SECONDS)
            if (now := await self.get(caller, id)) != said:
                yield now
                said = now

    async def act(self, caller: Caller, id: str, action: Literal["pause", "resume", "cancel"]) -> Job:
        """Raises JobNotFoundError, BusyError for what can't be done now."""
        if action == "cancel":
            for source in self.sources:
                if (found := await source.cancel(caller, id)) is not None:
                    return found
        found = await self.get(caller, id)
        if found.kind not in self._kinds:
            raise BusyError(f"The job {id} ({found.kind} {found.name}) can't be {_DONE[action]}.")
        work = await self.find(id)
        done = await {"pause": self.pause, "resume": self.resume, "cancel": self.cancel}[action](work)
        return self._shown(done.job)

    def _may_see(self, caller: Caller, job: Kept) -> bool:
        if "manage" in caller.scopes:
            return True
        kind = self._kinds.get(job.kind)
        return kind is not None and kind.scope in caller.scopes and job.key_id == caller.key_id

    def _shown(self, job: Kept) -> Job:
        return self._kinds.get(job.kind, _GONE).shown(job)

    # carrying out

    async def _carry_out(self, work: Work) -> None:
        kind = self._kinds[work.job.kind]
        try:
            async with self._turns[kind.name]:
                await self._settle(work, state="running")
                saving = asyncio.create_task(self._save_now_and_then(work))
                try:
                    result = await kind.run(work)
                finally:
                    saving.cancel()
            progress = None if work.job.progress is None else 1.0
            await self._settle(work, state="done", message="", result=result, progress=progress)
            await kind.clear(work.job, is_forgotten=False)
        except LLMasOSError as e:
            work.error = e
            await self._settle(work, state="failed", error=_facts(e))
        except Exception:
            log.exception("the job %s (%s %s) failed", work.job.id, kind.name, work.job.name)
            work.error = JobFailedError("The server failed on this job; its log has the cause.")
            await self._settle(work, state="failed", error=_facts(work.error))
        finally:
            work.task = None

    async def _save_now_and_then(self, work: Work) -> None:
        saved = work.job
        while True:
            await asyncio.sleep(SAVED_EVERY)
            if work.job is not saved:
                saved = work.job
                with contextlib.suppress(LLMasOSError):
                    await self._save(saved)

    async def _settle(self, work: Work, **fields: Any) -> None:
        work.change(**fields)
        await self._save(work.job)

    async def _save(self, job: Kept) -> None:
        values = job.model_dump(exclude={"id", "kind", "name", "spec", "key_id", "created"})
        while (before := self._writes.get(job.id)) is not None and not before.done():
            await asyncio.wait([before])  # one that was cancelled writes all the same, and may not come last
        write = self.storage.run(
            lambda session: session.execute(update(JobRow).where(JobRow.id == job.id).values(values))
        )
        self._writes[job.id] = task = asyncio.ensure_future(write)
        await asyncio.shield(task)

    # the database

    def _row(self, job: Kept) -> JobRow:
        return JobRow(place=self.storage.place, **job.model_dump())

    async def read(self) -> None:
        """What servers that ended have left becomes this one's, once; some of it goes on."""
        if self._is_read:
            return
        async with self._reading:
            if self._is_read:
                return
            own = await asyncio.to_thread(lambda: self.storage.server)
            living = await asyncio.to_thread(self.storage.living) - {own}
            for job in await self.storage.run(self._rows, read_only=True):
                if job.server not in living and job.kind in self._kinds:
                    await self._take(job)
            left = [work for work in self._works.values() if work.job.state in ACTIVE]
            for work in left:
                await self._settle(work, state=self._kinds[work.job.kind].after_restart, message="")
            self._is_read = True
        for work in left:
            if work.job.state == "queued":
                self.go_on(work)

    async def _take(self, job: Kept) -> bool:
        """It is this server's from now on, unless another was faster."""
        own = self.storage.server
        unchanged = (JobRow.id == job.id) & (JobRow.server == job.server)

        def claim(session: Session) -> bool:
            return session.execute(select(JobRow.id).where(unchanged).with_for_update()).first() is not None and bool(
                session.execute(update(JobRow).where(unchanged).values(server=own))
            )

        taken = await self.storage.run(claim)
        if taken:
            self._works[job.id] = Work(job.model_copy(update={"server": own}))
        return taken

    def _rows(self, session: Session) -> Sequence[Kept]:
        mine = select(JobRow).where(JobRow.place == self.storage.place).order_by(JobRow.created)
        return [_kept(row) for row in session.scalars(mine)]

    async def _now(self, id: str) -> Kept | None:
        if (work := self._works.get(id)) is not None and work.job.state in ACTIVE:
            return work.job

        def look(session: Session) -> Kept | None:
            row = session.get(JobRow, id) if is_id(id) else None
            return _kept(row) if row is not None and row.place == self.storage.place else None

        row = await self.storage.run(look, read_only=True)
        return None if row is None else self._newer(row)

    def _newer(self, row: Kept) -> Kept:
        """Memory is newer than the database, but for what another server has taken over."""
        if (work := self._works.get(row.id)) is None:
            return row
        if work.job.state in ACTIVE or row.server == self.storage.server:
            return work.job
        del self._works[row.id]
        return row

    async def _forget(self, kind: str) -> None:
        """Only the latest jobs are kept; those that could go on are forgotten last."""
        all_ = [work.job for work in self.of_kind(kind)]
        idle = sorted((j for j in all_ if j.state not in ACTIVE), key=lambda job: (job.state not in OVER, job.updated))
        # the new one is queued before it is told to go on: it is none of the idle ones
        old = idle[: max(0, len(all_) - KEPT)]
        if not old:
            return
        for job in old:
            del self._works[job.id]
            self._writes.pop(job.id, None)
            await self._kinds[kind].clear(job, is_forgotten=True)
        ids = [job.id for job in old]
        await self.storage.run(lambda session: session.execute(delete(JobRow).where(JobRow.id.in_(ids))))


_DONE = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}
_GONE = Kind()
"""Of a kind that this build has not."""


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


def is_active(job: Kept) -> bool:
    return job.state in ACTIVE


def not_now(job: Kept, what: str) -> BusyError:
    return BusyError(f"The job {job.id} ({job.kind} {job.name}) is {job.state}; it can't be {what}.")


def _kept(row: JobRow) -> Kept:
    return Kept.model_validate({name: getattr(row, name) for name in Kept.model_fields})


def _facts(e: LLMasOSError) -> dict[str, Any]:
    return JobError(code=e.code, message=e.message, hint=e.hint).model_dump()
