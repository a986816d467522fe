"""Jobs as `client.jobs`: work of the server that goes on without its request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing

from llmasos.client.http import AsyncHttp, Http, Target, path_of
from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.sse import Event
from llmasos.client.types.jobs import Job, JobList
from llmasos.errors import NetworkError, ProviderError


def _job(event: Event, target: Target) -> Job:
    data = event_json(event, target.label)
    if event.event == "error" or (isinstance(data, dict) and "error" in data and "id" not in data):
        raise ProviderError(f"{target.label}: {data['error'].get('message', event.data)}")
    return parsed(Job, data, target.label)


def _ended(job: Job | None, target: Target) -> None:
    """Raises if a stream ended without its job, or because it failed. Paused and cancelled ones end."""
    if job is None or job.state in ("queued", "running"):
        raise NetworkError(
            f"{target.label} ended the stream before the job did.", hint="It goes on there: see client.jobs.list()."
        )
    if job.state == "failed":
        error = job.error
        raise ProviderError(
            f"The job {job.id} ({job.name}) failed: {error.message if error else 'no reason given'}",
            hint=error.hint if error else "",
            server_code=error.code if error else "",
        )


class Jobs:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self, *, kind: str | None = None) -> list[Job]:
        """The caller's, with the scope `manage` everybody's; the latest first."""
        data = self._http.json("GET", path_of("jobs", kind=kind))
        return parsed(JobList, data, self._http.target.label).data

    def get(self, id: str) -> Job:
        return parsed(Job, self._http.json("GET", path_of("jobs", id)), self._http.target.label)

    def follow(self, id: str) -> Generator[Job, None, None]:
        """Yields the job at each change until it is done, paused or cancelled. Raises ProviderError if it fails."""
        job: Job | None = None
        with closing(self._http.events("GET", path_of("jobs", id, "events"))) as events:
            for event in events:
                job = _job(event, self._http.target)
                yield job
        _ended(job, self._http.target)

    def wait(self, id: str) -> Job:
        """The job when nothing more happens to it by itself. Raises ProviderError if it fails."""
        with closing(self.follow(id)) as jobs:
            for job in jobs:
                last = job
        return last

    def pause(self, id: str) -> Job:
        return self._act(id, "pause")

    def resume(self, id: str) -> Job:
        return self._act(id, "resume")

    def cancel(self, id: str) -> Job:
        """End it for good; what there is of its result stays."""
        return self._act(id, "cancel")

    def _act(self, id: str, action: str) -> Job:
        return parsed(Job, self._http.json("POST", path_of("jobs", id, action)), self._http.target.label)


class AsyncJobs:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self, *, kind: str | None = None) -> list[Job]:
        data = await self._http.json("GET", path_of("jobs", kind=kind))
        return parsed(JobList, data, self._http.target.label).data

    async def get(self, id: str) -> Job:
        return parsed(Job, await self._http.json("GET", path_of("jobs", id)), self._http.target.label)

    async def follow(self, id: str) -> AsyncGenerator[Job, None]:
        job: Job | None = None
        async with aclosing(self._http.events("GET", path_of("jobs", id, "events"))) as events:
            async for event in events:
                job = _job(event, self._http.target)
                yield job
        _ended(job, self._http.target)

    async def wait(self, id: str) -> Job:
        async with aclosing(self.follow(id)) as jobs:
            async for job in jobs:
                last = job
        return last

    async def pause(self, id: str) -> Job:
        return await self._act(id, "pause")

    async def resume(self, id: str) -> Job:
        return await self._act(id, "resume")

    async def cancel(self, id: str) -> Job:
        return await self._act(id, "cancel")

    async def _act(self, id: str, action: str) -> Job:
        return parsed(Job, await self._http.json("POST", path_of("jobs", id, action)), self._http.target.label)
