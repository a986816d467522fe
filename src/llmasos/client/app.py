"""Clients of applications: `AppClient` and `AsyncAppClient`, which any application's routes can be called with.

    app = AppClient("http://127.0.0.1:8000")
    app.call("add", a=1, b=2)                        # -> 3
    for word in app.stream("say", words="a b"): ...
    job = app.start("summarise", text=text)          # goes on by itself
    app.wait(job).result
    app.call("size", picture=Path("cat.png"))        # a file: a path, bytes, an open file or a data: URL
    save(app.call("draw"), "cat.png")                # and one that comes back

`llmasos app client` writes a class with a typed method for each route; it stands on these.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, closing
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import quote, urlencode

import httpx
from pydantic import BaseModel

from llmasos.client import dataurl
from llmasos.client.dataurl import FileLike as FileLike
from llmasos.client.http import AsyncHttp, Http, Request, Target, broken_off, response_error
from llmasos.client.providers.openai import parsed
from llmasos.client.sse import Event
from llmasos.errors import InvalidInputError, NotFoundError

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET", "__bool__": lambda self: False})()
"""An input that is not given: the function's own default counts."""
_WHOLE, _JOB = {"accept": "application/json"}, {"prefer": "respond-async"}


class Door(NamedTuple):
    """Where a route answers."""

    method: str
    path: str
    safe: bool = False
    """It changes nothing, so it may be asked again where it is unclear whether it was done."""


class AppJob(BaseModel):
    """A call on its way, or over: see `llmasos.apps.jobs`."""

    id: str
    route: str
    state: Literal["running", "done", "failed", "cancelled"]
    created: datetime
    updated: datetime
    progress: float | None
    message: str
    num_items: int
    result: Any
    error: dict[str, Any] | None


OnChange = Callable[[AppJob], None]


class _Calls:
    """What both share: paths, bodies and parsing, no I/O."""

    doors: ClassVar[Mapping[str, Door]] = {}
    """By the routes' names; empty: asked of the application."""

    def __init__(
        self, base_url: str, api_key: str | None, timeout: float, max_retries: int, session: str | None
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        headers |= {"llmasos-session": session} if session else {}
        self.target = Target(base_url, "The application", headers, timeout=timeout, max_retries=max_retries)
        self._found: Mapping[str, Door] = self.doors

    def _learn(self, document: Mapping[str, Any]) -> None:
        self._found = doors_of(document)

    def _request(self, route: str, inputs: Mapping[str, Any], headers: Mapping[str, str]) -> Request:
        door = self._found.get(route)
        if door is None:
            raise NotFoundError(f"There is no route {route!r}.", hint=f"Known: {', '.join(self._found) or 'none'}.")
        values = {name: _sent(value) for name, value in inputs.items() if value is not UNSET}
        path = _fill(route, door.path, values)
        if door.method in ("GET", "DELETE"):
            query = urlencode([pair for name, value in values.items() for pair in _pairs(name, value)])
            return Request(door.method, f"{path}?{query}" if query else path, headers=headers, once=not door.safe)
        return Request(door.method, path, values, headers=headers, once=not door.safe)

    def _job(self, data: Any) -> AppJob:
        return parsed(AppJob, data, self.target.label)

    def _over(self, job: AppJob) -> AppJob:
        """Raises what the call raised."""
        if job.state == "failed" and job.error is not None:
            raise response_error(self.target, job.error.get("status", 500), json.dumps(job.error))
        return job

    def _item(self, event: Event) -> tuple[bool, Any]:
        """Whether the stream is over, and the element."""
        if event.event == "error":
            problem = json.loads(event.data)
            raise response_error(self.target, problem.get("status", 500), event.data)
        return event.event == "done", json.loads(event.data)

    @staticmethod
    def _is_progress(event: Event) -> bool:
        """What a function says of how far it is; the elements are all that is asked for here."""
        return event.event == "progress"


class AppClient(_Calls):
    """Blocking calls. Raises what `Client` raises; a failed call's error has the application's words and status.

    `session` names the state that the application keeps for a client (16 to 128 characters, chosen at random); without
    it, one client's calls share a session that the application begins.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        session: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries, session)
        self._http = Http(self.target, transport)

    def document(self) -> dict[str, Any]:
        """What the application says of its routes."""
        found: dict[str, Any] = self._http.json("GET", "/app.json")
        return found

    def call(self, route: str, /, **inputs: Any) -> Any:
        """The result; of a stream, all elements put together."""
        return self._http.send(self._asked(route, inputs, _WHOLE))

    def stream(self, route: str, /, **inputs: Any) -> Generator[Any, None, None]:
        """The elements as they come. Closing the generator ends the call."""
        with closing(self._http.events_of(self._asked(route, inputs, {}))) as events:
            for event in events:
                if self._is_progress(event):
                    continue
                done, item = self._item(event)
                if done:
                    return
                yield item
        raise broken_off(self.target)

    def start(self, route: str, /, **inputs: Any) -> AppJob:
        """Begin a call that goes on by itself."""
        return self._job(self._http.send(self._asked(route, inputs, _JOB)))

    def jobs(self) -> list[AppJob]:
        return [self._job(one) for one in self._http.json("GET", "/jobs")]

    def job(self, id: str) -> AppJob:
        return self._job(self._http.json("GET", f"/jobs/{quote(id, safe='')}"))

    def wait(self, job: AppJob | str, *, on_change: OnChange | None = None) -> AppJob:
        """Until the job is over; `on_change` gets it at each change. Raises what the call raised."""
        id = job if isinstance(job, str) else job.id
        seen: AppJob | None = None
        with closing(self._http.events("GET", f"/jobs/{quote(id, safe='')}/events")) as events:
            for event in events:
                if event.event == "done" and seen is not None:
                    return self._over(seen)
                seen = self._job(json.loads(event.data))
                if on_change is not None:
                    on_change(seen)
        raise broken_off(self.target)

    def cancel(self, job: AppJob | str) -> AppJob:
        id = job if isinstance(job, str) else job.id
        return self._job(self._http.json("DELETE", f"/jobs/{quote(id, safe='')}"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> AppClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _asked(self, route: str, inputs: Mapping[str, Any], headers: Mapping[str, str]) -> Request:
        if not self._found:
            self._learn(self.document())
        return self._request(route, inputs, headers)


class AsyncAppClient(_Calls):
    """The same for asyncio."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        session: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries, session)
        self._http = AsyncHttp(self.target, transport)

    async def document(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._http.json("GET", "/app.json")
        return found

    async def call(self, route: str, /, **inputs: Any) -> Any:
        return await self._http.send(await self._asked(route, inputs, _WHOLE))

    async def stream(self, route: str, /, **inputs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(self._http.events_of(await self._asked(route, inputs, {}))) as events:
            async for event in events:
                if self._is_progress(event):
                    continue
                done, item = self._item(event)
                if done:
                    return
                yield item
        raise broken_off(self.target)

    async def start(self, route: str, /, **inputs: Any) -> AppJob:
        return self._job(await self._http.send(await self._asked(route, inputs, _JOB)))

    async def jobs(self) -> list[AppJob]:
        return [self._job(one) for one in await self._http.json("GET", "/jobs")]

    async def job(self, id: str) -> AppJob:
        return self._job(await self._http.json("GET", f"/jobs/{quote(id, safe='')}"))

    async def wait(self, job: AppJob | str, *, on_change: OnChange | None = None) -> AppJob:
        id = job if isinstance(job, str) else job.id
        seen: AppJob | None = None
        async with aclosing(self._http.events("GET", f"/jobs/{quote(id, safe='')}/events")) as events:
            async for event in events:
                if event.event == "done" and seen is not None:
                    return self._over(seen)
                seen = self._job(json.loads(event.data))
                if on_change is not None:
                    on_change(seen)
        raise broken_off(self.target)

    async def cancel(self, job: AppJob | str) -> AppJob:
        id = job if isinstance(job, str) else job.id
        return self._job(await self._http.json("DELETE", f"/jobs/{quote(id, safe='')}"))

    async def close(self) -> None:
        await self._http.close()

    async def __aenter__(self) -> AsyncAppClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _asked(self, route: str, inputs: Mapping[str, Any], headers: Mapping[str, str]) -> Request:
        if not self._found:
            self._learn(await self.document())
        return self._request(route, inputs, headers)


def save(result: str, path: str | os.PathLike[str]) -> None:
    """Write a file that a route gave, a data: URL. Raises InvalidInputError for what is none, OSError."""
    Path(path).write_bytes(dataurl.decode(result).data)


def _sent(value: Any) -> Any:
    """A file, or a list with files, as text; anything else as it is."""
    return [dataurl.encode_file(one) for one in value] if isinstance(value, list) else dataurl.encode_file(value)


def doors_of(document: Mapping[str, Any]) -> dict[str, Door]:
    """By the routes' names; a body holds any input, so a method with one is taken where there is a choice."""
    doors = {}
    for route in document["routes"]:
        method = next((m for m in ("POST", "PUT", "PATCH") if m in route["methods"]), route["methods"][0])
        path = re.sub(r":[^{}]*}", "}", route["path"])
        doors[route["name"]] = Door(method, path, bool(route["hints"]["read_only"]))
    return doors


def _fill(route: str, path: str, values: dict[str, Any]) -> str:
    """The path with its inputs, which are taken out of `values`."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise InvalidInputError(f"{route}() needs {found[1]!r}.", param=found[1])
        return quote(_text(values.pop(found[1])), safe="")

    return re.sub(r"{([^{}]*)}", value, path)


def _pairs(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, list | tuple):
        return [(name, _text(one)) for one in value]
    return [] if value is None else [(name, _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
