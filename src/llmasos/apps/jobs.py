"""Calls that take long: a job instead of an answer (RFC 7240, `Prefer: respond-async`).

    POST /summarise  with  Prefer: respond-async   ->  202, Location: /jobs/job_…, and the job
    GET /jobs        GET /jobs/ID                  the jobs, the latest first; one
    GET /jobs/ID/events                            server-sent events: the job at each change, until it is over
    DELETE /jobs/ID                                ends it

`GET /jobs?brief=true` leaves out results. Behind a server with keys, a job is its key's (see `clients.py`). A function
says how far it is with `report_progress`. Jobs live in the application's memory: they end with it, and the oldest that
are over are forgotten.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from llmasos.apps import clients, problems
from llmasos.apps.live import Live
from llmasos.client import leaving
from llmasos.errors import BusyError, InvalidInputError, LLMasOSError, NotFoundError

KEPT = 200
"""Jobs that are remembered."""
AT_ONCE = 100
"""Jobs that are not over; more are refused."""

State = Literal["running", "done", "failed", "cancelled"]
_report: ContextVar[Callable[[float | None, str], None] | None] = ContextVar("report_progress", default=None)


def report_progress(done: float | None = None, message: str = "") -> None:
    """Say how far the call is: a share from 0 to 1, a few words. Where nobody listens it does nothing.

    Raises InvalidInputError for a share that is none."""
    if done is not None and not 0 <= done <= 1:
        raise InvalidInputError(f"{done!r} is no share from 0 to 1.", param="done")
    if (report := _report.get()) is not None:
        report(done, message)


@contextmanager
def reporting_to(report: Callable[[float | None, str], None]) -> Iterator[None]:
    """What is called inside says to `report` how far it is, from any thread."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


class Job(BaseModel):
    """A call on its way, or over."""

    id: str
    route: str
    state: State
    created: datetime
    updated: datetime
    progress: float | None = None
    """From 0 to 1, as the function says; null: it does not."""
    message: str = ""
    num_items: int = 0
    """Elements of a stream so far."""
    result: Any = None
    error: dict[str, Any] | None = None
    """The problem document of a job that failed."""
    client: str | None = None
    """Whose it is; None where nobody tells callers apart."""


class JobNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no job {id!r}.", hint="GET /jobs lists those that are remembered.")


class Jobs:
    """The jobs of an application, in its event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, Live[Job]] = {}
        self._tokens: dict[str, leaving.Token] = {}

    def start(self, route: str, call: Callable[[Callable[[Any], Awaitable[None]]], Awaitable[bytes]]) -> Job:
        """Begin `call`, whose argument wants to hear of each element of a stream. Raises BusyError for too many."""
        running = sum(live.job.state == "running" for live in self._jobs.values())
        if running >= AT_ONCE:
            raise BusyError(f"{running} jobs are running already.", hint="Try again when some are over.")
        now = datetime.now(UTC)
        id, client = f"job_{secrets.token_hex(8)}", clients.current.get()
        live = Live(Job(id=id, route=route, state="running", created=now, updated=now, client=client))
        self._forget()
        self._jobs[live.job.id] = live
        token = self._tokens[live.job.id] = leaving.Token()
        with token.active():
            live.task = asyncio.create_task(self._carry_out(live, call))
        return live.job

    def list(self) -> list[Job]:
        """The latest first; those that the caller may see."""
        return [live.job for live in reversed(self._jobs.values()) if clients.may_see(live.job.client)]

    def get(self, id: str) -> Job:
        return self._find(id).job

    async def cancel(self, id: str) -> Job:
        """A function in a thread can't be interrupted: it is told (`is_cancelled`), and what it gives is thrown
        away."""
        live = self._find(id)
        if live.job.state == "running":
            live.change(state="cancelled")
            self._tokens[id].cancel()
            await live.stop(timeout=1)
        return live.job

    def follow(self, id: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then at each change, until it is over."""
        return self._find(id).follow(lambda job: job.state == "running")

    async def close(self) -> None:
        tasks = [live.task for live in self._jobs.values() if live.task is not None and not live.task.done()]
        for live in self._jobs.values():
            if live.job.state == "running":
                live.change(state="cancelled")
                self._tokens[live.job.id].cancel()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    async def settle(self) -> None:
        """Wait until all are over."""
        while tasks := [live.task for live in self._jobs.values() if live.task is not None and not live.task.done()]:
            await asyncio.wait(tasks)

    def _find(self, id: str) -> Live[Job]:
        found = self._jobs.get(id)
        if found is None or not clients.may_see(found.job.client):
            raise JobNotFoundError(id)
        return found

    def _forget(self) -> None:
        over = [id for id, live in self._jobs.items() if live.job.state != "running"]
        for id in over[: max(0, len(self._jobs) - KEPT + 1)]:
            del self._jobs[id], self._tokens[id]

    async def _carry_out(
        self, live: Live[Job], call: Callable[[Callable[[Any], Awaitable[None]]], Awaitable[bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()

        def report(done: float | None, message: str) -> None:
            loop.call_soon_threadsafe(progressed, done, message)

        def progressed(done: float | None, message: str) -> None:
            if live.job.state == "running":
                live.change(progress=live.job.progress if done is None else done, message=message)

        async def count(item: Any) -> None:
            live.change(num_items=live.job.num_items + 1)

        try:
            with reporting_to(report):
                result = json.loads(await call(count))
        except asyncio.CancelledError:
            raise
        except (Exception, SystemExit) as e:
            problem = problems.of_exception(e, live.job.route)
            live.change(state="failed", error=json.loads(problems.encode(problem)))
        else:
            if live.job.state == "running":
                live.change(state="done", result=result, progress=None if live.job.progress is None else 1.0)


def is_wanted(headers: Headers) -> bool:
    """Whether a request would rather have a job than wait."""
    wishes = (wish.partition(";")[0].strip().lower() for line in headers.getlist("prefer") for wish in line.split(","))
    return "respond-async" in wishes


def accepted(job: Job, root_path: str) -> Response:
    headers = {"location": f"{root_path}/jobs/{job.id}", "preference-applied": "respond-async"}
    return _shown(job, status=202, headers=headers)


def create_router(jobs: Jobs) -> APIRouter:
    """Where the jobs of an application are looked at."""
    router = APIRouter(include_in_schema=False)

    @router.get("/jobs")
    async def list_jobs(brief: bool = False) -> Response:
        hidden = {"client", "result"} if brief else {"client"}
        body = b"[" + b",".join(job.model_dump_json(exclude=hidden).encode() for job in jobs.list()) + b"]"
        return Response(body, media_type="application/json")

    @router.get("/jobs/{id}")
    async def get_job(id: str) -> Response:
        return _answer(lambda: _shown(jobs.get(id)))

    @router.get("/jobs/{id}/events")
    async def follow_job(id: str) -> Response:
        def follow() -> Response:
            jobs.get(id)
            return StreamingResponse(_events(jobs, id), media_type="text/event-stream", headers=_UNBUFFERED)

        return _answer(follow)

    @router.delete("/jobs/{id}")
    async def cancel_job(id: str) -> Response:
        try:
            return _shown(await jobs.cancel(id))
        except LLMasOSError as e:
            return problems.response(problems.of_exception(e, "cancel"))

    return router


_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _answer(make: Callable[[], Response]) -> Response:
    try:
        return make()
    except LLMasOSError as e:
        return problems.response(problems.of_exception(e, "jobs"))


def _shown(job: Job, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_json(job), status, headers, "application/json")


def _json(job: Job) -> bytes:
    return job.model_dump_json(exclude={"client"}).encode()


async def _events(jobs: Jobs, id: str) -> AsyncGenerator[bytes, None]:
    async for job in jobs.follow(id):
        yield b"data: " + _json(job) + b"\n\n"
    yield b"event: done\ndata: {}\n\n"
