"""Jobs that installed applications keep, in the server's own list: `NAME:job_…`, of the kind `app`. They live in their
application's memory and end with it.

What an application says of its jobs is its own word: what is not as it should be is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmasos.apps.clients import CLIENT, EVERYBODY, name_for
from llmasos.apps.jobs import Job as AppJob
from llmasos.client.types.jobs import Job, JobError
from llmasos.serve.apps.rights import may_use
from llmasos.serve.apps.running import HEALTH_SECONDS, JOBS, Running
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.caller import Caller

KIND = "app"
MOST_RESULT = 32 * 2**20
"""Bytes of one job with its result."""
LOOK_SECONDS = 0.5
"""Between two looks at a job that somebody follows."""
_WORDS = 500


class _Told(AppJob):
    """A job as its application tells it."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(pattern=r"^job_[0-9a-f]{1,64}$")
    route: str = Field(max_length=200)
    message: str = ""
    progress: float | None = Field(None, ge=0, le=1)


class _Problem(BaseModel):
    """Of a job that failed: as much as is shown of it."""

    model_config = ConfigDict(extra="ignore")

    code: str = "app_failed"
    message: str = ""
    hint: str | None = None


class AppJobs:
    """A `Source` of `serve.jobs.room`. A caller sees what its key has asked for; with the scope `manage`, all."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def list(self, caller: Caller) -> Sequence[Job]:
        running = [found for name, found in self._supervisor.at_work() if _may_look(caller, name)]
        found = await asyncio.gather(*(_jobs_of(one, caller) for one in running))
        return [job for jobs in found for job in jobs]

    async def get(self, caller: Caller, id: str) -> Job | None:
        return await self._one(caller, id, "GET")

    async def cancel(self, caller: Caller, id: str) -> Job | None:
        return await self._one(caller, id, "DELETE")

    async def follow(self, caller: Caller, id: str) -> AsyncGenerator[Job, None] | None:
        job = await self.get(caller, id)
        return None if job is None else self._following(caller, job)

    async def _following(self, caller: Caller, job: Job) -> AsyncGenerator[Job, None]:
        """Looked at again and again: its own events would come with its results each time."""
        yield job
        while job.state == "running":
            await asyncio.sleep(LOOK_SECONDS)
            now = await self.get(caller, job.id)
            if now is None:
                why = JobError(
                    code="app_ended", message=f"The application of {job.name} has ended, and its jobs with it."
                )
                now = job.model_copy(update={"state": "failed", "error": why})
            if now != job:
                job = now
                yield job

    async def _one(self, caller: Caller, id: str, method: str) -> Job | None:
        name, _, own = id.partition(":")
        running = dict(self._supervisor.at_work()).get(name)
        if running is None or not _may_look(caller, name) or not (own.isascii() and own.replace("_", "").isalnum()):
            return None
        status, told = await _ask(running, caller, method, f"/jobs/{own}", MOST_RESULT)
        return _shown(running, told) if status == 200 else None


async def _jobs_of(running: Running, caller: Caller) -> list[Job]:
    _, told = await _ask(running, caller, "GET", JOBS)
    jobs = [_shown(running, one) for one in told] if isinstance(told, list) else []
    return [job for job in jobs if job is not None]


def _may_look(caller: Caller, name: str) -> bool:
    return bool({"manage", "inference"} & caller.scopes) and may_use(caller, name)


async def _ask(running: Running, caller: Caller, method: str, path: str, most: int | None = None) -> tuple[int, Any]:
    """0 and nothing where it does not answer."""
    name = running.order.app.name
    who = EVERYBODY if "manage" in caller.scopes else name_for(name, caller.key_id)
    limit = {} if most is None else {"most": most}
    with contextlib.suppress(httpx.HTTPError, TimeoutError, ValueError):
        async with asyncio.timeout(HEALTH_SECONDS):
            return await running.ask(method, path, headers={} if who is None else {CLIENT: who}, **limit)
    return 0, None


def _shown(running: Running, told: Any) -> Job | None:
    name = running.order.app.name
    try:
        job = _Told.model_validate(told)
        problem = None if job.error is None else _Problem.model_validate(job.error)
    except ValidationError:
        return None
    error = None
    if problem is not None:
        hint = (problem.hint or "")[:_WORDS]
        error = JobError(code=problem.code[:100], message=problem.message[:_WORDS], hint=hint)
    return Job(
        id=f"{name}:{job.id}",
        kind=KIND,
        name=f"{name} {job.route}",
        state=job.state,
        progress=job.progress,
        message=job.message[:_WORDS],
        created=job.created,
        updated=job.updated,
        result=job.result,
        error=error,
    )
