"""Pulls as jobs: they go on when their client has gone, can be paused, and are paused ones after a restart.

Each runs in a process of its own (`worker`), which is ended to pause it: the partial files stay and the next one goes
on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import delete, select, update

from llmasos.client.types.native import PullJob, PullJobList, PullRequest
from llmasos.errors import BusyError, LLMasOSError, NotFoundError
from llmasos.serve import inflight
from llmasos.serve.native import worker
from llmasos.serve.native.common import responses, sse
from llmasos.serve.native.library import check_no_path
from llmasos.serve.native.tables import PullRow
from llmasos.serve.respond import streamed
from llmasos.serve.storage import Storage
from llmasos.store.card import check_name
from llmasos.store.library import Library

AT_ONCE = 2
"""Pulls that run; more wait. Each fetches several files at once itself."""
KEPT = 100
"""Pulls that are remembered."""
SAVED_EVERY = 5.0
"""Seconds between two notes of the progress in the database."""

log = logging.getLogger("llmasos.serve")

_ACTIVE = ("waiting", "running")
_OVER = ("done", "cancelled")
Run = Callable[[str, dict[str, Any], worker.OnProgress], Awaitable[dict[str, Any]]]


class PullNotFoundError(NotFoundError):
    param = "id"


class PullFailedError(LLMasOSError):
    code = "internal_error"


async def _in_process(task: str, options: dict[str, Any], on_progress: worker.OnProgress) -> dict[str, Any]:
    return await worker.run(task, options, on_progress)


class _Live:
    """A job as it is in memory, and those who wait for its next change. `stays`: it goes on when nobody holds it;
    `error` is what it failed with."""

    def __init__(self, job: PullJob) -> None:
        self.job = job
        self.stays = False
        self.num_holders = 0
        self.error: LLMasOSError | None = None
        self.task: asyncio.Task[None] | None = None
        self.saved = 0.0
        self._changed = asyncio.Event()

    def change(self, **fields: Any) -> None:
        self.job = self.job.model_copy(update={**fields, "updated": datetime.now(UTC)})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_change(self) -> None:
        await self._changed.wait()


class Pulls:
    """The jobs of this server. `run` carries one out; tests pass another."""

    def __init__(self, storage: Storage, *, run: Run = _in_process) -> None:
        self._storage, self._run = storage, run
        self._jobs: dict[str, _Live] = {}
        self._read = asyncio.Lock()
        self._is_read = False
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def list(self) -> list[PullJob]:
        """The latest first."""
        await self._load()
        return sorted((live.job for live in self._jobs.values()), key=lambda job: job.created, reverse=True)

    async def get(self, id: str) -> PullJob:
        return (await self._find(id)).job

    async def start(self, model: str, name: str | None = None) -> PullJob:
        """The job that pulls `model`: a new one, or the unfinished one of the same name, which goes on.

        Raises NotFoundError for an unknown name, InvalidInputError for a path of this machine, BusyError while the name
        is pulled from elsewhere.
        """
        live = await self._wanted(model, name)
        live.stays = True
        return self._begin(live)

    async def hold(self, model: str, name: str) -> AsyncGenerator[PullJob, None]:
        """As `start`, then `follow`, for a client that ends the pull by leaving: it is paused when the last one closes
        the generator, unless somebody has started it. Raises what it fails with, too, and BusyError when somebody else
        ends it."""
        live = await self._wanted(model, name)
        live.stays = live.stays and live.job.state in _ACTIVE
        live.num_holders += 1
        try:
            self._begin(live)
            async with contextlib.aclosing(self.follow(live.job.id)) as jobs:
                async for job in jobs:
                    yield job
            if live.error is not None:
                raise live.error
            if live.job.state != "done":
                raise BusyError(f"The pull of {live.job.name} is {live.job.state}.", hint="Pull it again to go on.")
        finally:
            live.num_holders -= 1
            if live.job.state in _ACTIVE and not live.num_holders and not live.stays:
                await asyncio.shield(self.pause(live.job.id))  # also when its request is cancelled

    async def _wanted(self, model: str, name: str | None) -> _Live:
        await self._load()
        check_no_path(model)
        library = Library()
        wanted = library.resolve(model)
        target = check_name(name or wanted.name)
        for live in self._jobs.values():
            if live.job.name.lower() == target.lower() and live.job.state not in _OVER:
                if live.job.model != model and library.resolve(live.job.model).sources != wanted.sources:
                    raise BusyError(
                        f"{live.job.name} is being pulled from {live.job.model!r}.",
                        hint=f"Wait for it, cancel the pull {live.job.id}, or choose another name.",
                    )
                return live
        now = datetime.now(UTC)
        id = f"pull_{secrets.token_hex(8)}"
        live = self._jobs[id] = _Live(
            PullJob(id=id, model=model, name=target, state="waiting", created=now, updated=now)
        )
        await self._storage.run(lambda session: session.add(_row(live.job, self._storage.place)))
        await self._forget()
        return live

    async def pause(self, id: str) -> PullJob:
        live = await self._find(id)
        if live.job.state in _ACTIVE:
            await self._stop(live)
            await self._settle(live, state="paused", message="")
        elif live.job.state != "paused":
            raise _not_now(live.job, "paused")
        return live.job

    async def resume(self, id: str) -> PullJob:
        live = await self._find(id)
        if live.job.state in _OVER:
            raise _not_now(live.job, "resumed")
        live.stays = True
        return self._begin(live)

    async def cancel(self, id: str) -> PullJob:
        """Ends the job and deletes what has arrived."""
        live = await self._find(id)
        if live.job.state == "done":
            raise _not_now(live.job, "cancelled")
        if live.job.state != "cancelled":
            await self._stop(live)
            await asyncio.to_thread(self._delete_partial, live.job.name)
            await self._settle(live, state="cancelled", done=0, message="", error=None, error_code=None)
        return live.job

    async def follow(self, id: str) -> AsyncGenerator[PullJob, None]:
        """The job as it is, then at each change, until nothing more happens to it by itself."""
        live = await self._find(id)
        while True:
            job = live.job
            yield job
            if job.state not in _ACTIVE:
                return
            if live.job is job:
                await live.next_change()

    async def close(self) -> None:
        """Running jobs are paused."""
        for live in list(self._jobs.values()):
            if live.job.state in _ACTIVE:
                await self._stop(live)
                with contextlib.suppress(LLMasOSError):  # the next start finds it running, and pauses it
                    await self._settle(live, state="paused", message="")

    def _begin(self, live: _Live) -> PullJob:
        if live.job.state not in _ACTIVE or live.task is None:
            live.error = None
            live.change(state="waiting", error=None, error_code=None, message="")
            live.task = asyncio.get_running_loop().create_task(self._carry_out(live))
        return live.job

    async def _carry_out(self, live: _Live) -> None:
        job = live.job
        try:
            async with self._turn:
                await self._settle(live, state="running")
                await self._run("pull", {"model": job.model, "name": job.name}, lambda seen: self._moved(live, seen))
            await self._settle(live, state="done", phase="done", message="")
        except LLMasOSError as e:
            live.error = e
            await self._settle(live, state="failed", error=str(e), error_code=e.code)
        except Exception:
            log.exception("the pull of %s failed", job.name)
            live.error = PullFailedError("The server failed on this pull; its log has the cause.")
            await self._settle(live, state="failed", error=str(live.error), error_code=live.error.code)
        finally:
            live.task = None

    def _moved(self, live: _Live, seen: dict[str, Any]) -> None:
        phase = seen["phase"]
        fields: dict[str, Any] = {"message": seen["message"]} if seen["message"] else {}
        if phase not in ("note", "wait", "done"):
            fields |= {"phase": phase, "file": seen["file"], "done": seen["done"], "total": seen["total"]}
        live.change(**fields)
        now = time.monotonic()
        if now - live.saved > SAVED_EVERY:
            live.saved = now
            saving = asyncio.get_running_loop().create_task(self._save(live.job))
            saving.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _stop(self, live: _Live) -> None:
        if task := live.task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            live.task = None

    async def _settle(self, live: _Live, **fields: Any) -> None:
        live.change(**fields)
        live.saved = time.monotonic()
        await self._save(live.job)

    async def _save(self, job: PullJob) -> None:
        values = {k: getattr(job, k) for k in ("state", "done", "total", "error", "error_code", "updated")}
        await self._storage.run(
            lambda session: session.execute(update(PullRow).where(PullRow.id == job.id).values(values))
        )

    async def _find(self, id: str) -> _Live:
        await self._load()
        if id not in self._jobs:
            raise PullNotFoundError(f"There is no pull {id!r}.", hint="GET /llmasos/v1/pulls lists them.")
        return self._jobs[id]

    async def _load(self) -> None:
        """What earlier servers left; what was running in them is paused."""
        async with self._read:
            if self._is_read:
                return
            mine = select(PullRow).where(PullRow.place == self._storage.place).order_by(PullRow.created)
            for row in await self._storage.run(lambda session: list(session.scalars(mine)), read_only=True):
                self._jobs[row.id] = _Live(_job(row))
            interrupted = (
                update(PullRow)
                .where(PullRow.place == self._storage.place, PullRow.state.in_(_ACTIVE))
                .values(state="paused")
            )
            await self._storage.run(lambda session: session.execute(interrupted))
            self._is_read = True

    async def _forget(self) -> None:
        """Only the latest jobs are kept; those that could go on are forgotten last, and their partial files stay."""
        idle = [live.job for live in self._jobs.values() if live.job.state not in _ACTIVE]
        idle.sort(key=lambda job: (job.state not in _OVER, job.updated))
        old = [job.id for job in idle[: max(0, len(self._jobs) - KEPT)]]
        if old:
            for id in old:
                del self._jobs[id]
            await self._storage.run(lambda session: session.execute(delete(PullRow).where(PullRow.id.in_(old))))

    def _delete_partial(self, name: str) -> None:
        mine = re.compile(re.escape(name) + r"-[0-9a-f]{8}")
        with contextlib.suppress(OSError):
            for folder in (self._storage.home / "cache" / "partial").iterdir():
                if mine.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)


def _not_now(job: PullJob, what: str) -> BusyError:
    return BusyError(f"The pull of {job.name} is {job.state}; it can't be {what}.")


def _row(job: PullJob, place: str) -> PullRow:
    named = ("id", "model", "name", "state", "done", "total", "error", "error_code", "created", "updated")
    return PullRow(place=place, **{name: getattr(job, name) for name in named})


def _job(row: PullRow) -> PullJob:
    state: Any = "paused" if row.state in _ACTIVE else row.state
    return PullJob(
        id=row.id,
        model=row.model,
        name=row.name,
        state=state,
        done=row.done,
        total=row.total,
        error=row.error,
        error_code=row.error_code,
        created=row.created,
        updated=row.updated,
    )


def create_router(pulls: Pulls, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter(prefix="/pulls")

    @router.post("", status_code=202, summary="Pull a model", responses=responses(404, 409))
    async def start(body: PullRequest) -> PullJob:
        inflight.asks(body.model)
        return await pulls.start(body.model, body.name)

    @router.get("", summary="List the pulls")
    async def list_pulls() -> PullJobList:
        return PullJobList(data=await pulls.list())

    @router.get("/{id}", summary="Describe one pull", responses=responses(404))
    async def get(id: str) -> PullJob:
        return await pulls.get(id)

    @router.get(
        "/{id}/events",
        summary="Follow a pull",
        response_class=Response,
        responses=responses(404, stream="PullJob objects, until the pull is done, failed, paused or cancelled"),
    )
    async def events(id: str, request: Request) -> Response:
        return await streamed(request, sse(pulls.follow(id), stopping))

    @router.post("/{id}/pause", summary="Pause a pull", responses=responses(404, 409))
    async def pause(id: str) -> PullJob:
        return await pulls.pause(id)

    @router.post("/{id}/resume", summary="Go on with a pull", responses=responses(404, 409))
    async def resume(id: str) -> PullJob:
        return await pulls.resume(id)

    @router.post("/{id}/cancel", summary="Give a pull up", responses=responses(404, 409))
    async def cancel(id: str) -> PullJob:
        return await pulls.cancel(id)

    return router
