"""Pulls as jobs: they go on when their client has gone, can be paused, and are paused ones after a restart.

Each runs in a process of its own (`worker`), which is ended to pause it: the partial files stay and the next one goes
on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from llmasos.client.types.native import PullJob, PullJobList, PullRequest
from llmasos.errors import BusyError
from llmasos.serve import inflight
from llmasos.serve.jobs.room import ACTIVE, OVER, Jobs, Kept, Kind, Work, is_active
from llmasos.serve.native import worker
from llmasos.serve.native.common import responses, sse
from llmasos.serve.native.library import check_no_path
from llmasos.serve.respond import streamed
from llmasos.store.card import check_name
from llmasos.store.library import Library

PULL = "pull"
AT_ONCE = 2
"""Pulls that run; more wait. Each fetches several files at once itself."""

Run = Callable[[str, dict[str, Any], worker.OnProgress], Awaitable[dict[str, Any]]]


async def _in_process(task: str, options: dict[str, Any], on_progress: worker.OnProgress) -> dict[str, Any]:
    return await worker.run(task, options, on_progress)


class Pulls(Kind):
    """The pulls among the server's jobs. `run` carries one out; tests pass another."""

    name = PULL
    scope = "manage"
    at_once = AT_ONCE
    after_restart = "paused"

    def __init__(self, jobs: Jobs, *, run: Run = _in_process) -> None:
        self._jobs, self._run_one = jobs, run
        self._stays: set[str] = set()
        """Those that go on when nobody holds them."""
        self._num_holders: Counter[str] = Counter()
        jobs.add(self)

    async def list(self) -> Sequence[PullJob]:
        """The latest first."""
        await self._jobs.read()
        found = sorted((work.job for work in self._jobs.of_kind(PULL)), key=lambda job: job.created, reverse=True)
        return [_shown(job) for job in found]

    async def get(self, id: str) -> PullJob:
        return _shown((await self._jobs.find(id, PULL)).job)

    async def start(self, model: str, name: str | None = None) -> PullJob:
        """The job that pulls `model`: a new one, or the unfinished one of the same name, which goes on.

        Raises NotFoundError for an unknown name, InvalidInputError for a path of this machine, BusyError while the name
        is pulled from elsewhere.
        """
        work = await self._wanted(model, name)
        self._stays.add(work.job.id)
        return _shown(self._jobs.go_on(work).job)

    async def hold(self, model: str, name: str) -> AsyncGenerator[PullJob, None]:
        """As `start`, then `follow`, for a client that ends the pull by leaving: it is paused when the last one closes
        the generator, unless somebody has started it. Raises what it fails with, too, and BusyError when somebody else
        ends it."""
        work = await self._wanted(model, name)
        id = work.job.id
        if work.job.state not in ACTIVE or work.task is None:
            self._stays.discard(id)
        self._num_holders[id] += 1
        try:
            self._jobs.go_on(work)
            async with contextlib.aclosing(work.follow(is_active)) as jobs:
                async for job in jobs:
                    yield _shown(job)
            if work.error is not None:
                raise work.error
            if work.job.state != "done":
                raise BusyError(f"The pull of {work.job.name} is {work.job.state}.", hint="Pull it again to go on.")
        finally:
            self._num_holders[id] -= 1
            if work.job.state in ACTIVE and not self._num_holders[id] and id not in self._stays:
                await asyncio.shield(self._jobs.pause(work))  # also when its request is cancelled

    async def _wanted(self, model: str, name: str | None) -> Work:
        await self._jobs.read()
        check_no_path(model)
        library = Library()
        wanted = library.resolve(model)
        target = check_name(name or wanted.name)
        for work in self._jobs.of_kind(PULL):
            job, asked = work.job, work.job.spec["model"]
            if job.name.lower() == target.lower() and job.state not in OVER:
                if asked != model and library.resolve(asked).sources != wanted.sources:
                    raise BusyError(
                        f"{job.name} is being pulled from {asked!r}.",
                        hint=f"Wait for it, cancel the pull {job.id}, or choose another name.",
                    )
                return work
        return await self._jobs.make(PULL, target, {"model": model, "name": target})

    async def pause(self, id: str) -> PullJob:
        return _shown((await self._jobs.pause(await self._jobs.find(id, PULL))).job)

    async def resume(self, id: str) -> PullJob:
        work = await self._jobs.resume(await self._jobs.find(id, PULL))
        self._stays.add(id)
        return _shown(work.job)

    async def cancel(self, id: str) -> PullJob:
        """Ends the job and deletes what has arrived."""
        return _shown((await self._jobs.cancel(await self._jobs.find(id, PULL))).job)

    async def follow(self, id: str) -> AsyncGenerator[PullJob, None]:
        """The job as it is, then at each change, until nothing more happens to it by itself."""
        work = await self._jobs.find(id, PULL)
        async with contextlib.aclosing(work.follow(is_active)) as jobs:
            async for job in jobs:
                yield _shown(job)

    # what the room asks

    async def run(self, work: Work) -> dict[str, Any]:
        spec = work.job.spec
        found = await self._run_one(PULL, dict(spec), lambda seen: self._moved(work, seen))
        work.change(details={**work.job.details, "phase": "done"})
        return found

    @staticmethod
    def _moved(work: Work, seen: dict[str, Any]) -> None:
        fields: dict[str, Any] = {"message": seen["message"]} if seen["message"] else {}
        if seen["phase"] not in ("note", "wait", "done"):
            fields["details"] = {name: seen[name] for name in ("phase", "file", "done", "total")}
            fields["progress"] = min(1.0, seen["done"] / seen["total"]) if seen["total"] else None
        work.change(**fields)

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        """What has arrived of a pull that is only forgotten stays: the next one of this model goes on from there."""
        if not is_forgotten:
            await asyncio.to_thread(self._delete_partial, job.name)

    def _delete_partial(self, name: str) -> None:
        mine = re.compile(re.escape(name) + r"-[0-9a-f]{8}")
        with contextlib.suppress(OSError):
            for folder in (self._jobs.storage.home / "cache" / "partial").iterdir():
                if mine.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)


def _shown(job: Kept) -> PullJob:
    """As the routes of pulls have always told it."""
    state: Any = "waiting" if job.state == "queued" else job.state
    over = {"done": 0} if job.state == "cancelled" else {}
    error = f"{job.error['message']} {job.error.get('hint', '')}".strip() if job.error else None
    return PullJob(
        id=job.id,
        model=job.spec["model"],
        name=job.name,
        state=state,
        message=job.message,
        error=error,
        error_code=job.error["code"] if job.error else None,
        created=job.created,
        updated=job.updated,
        **{**job.details, **over},
    )


def create_router(pulls: Pulls, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter(prefix="/pulls")

    @router.post("", status_code=202, summary="Pull a model", responses=responses(404, 409))
    async def start(body: PullRequest) -> PullJob:
        inflight.asks(body.model)
        return await pulls.start(body.model, body.name)

    @router.get("", summary="List the pulls")
    async def list_pulls() -> PullJobList:
        return PullJobList(data=[*await pulls.list()])

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
