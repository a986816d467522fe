"""LLMasOS's own API as `client.native`: models, plans, pulls, uploads, requests, logs.

`Native` and `AsyncNative` have the same methods. They talk to `/llmasos/v1` of the server whose OpenAI API is at `/v1`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.sse import Event
from llmasos.client.types.apps import AppInfo, AppList, AppLogLine, RemovedApp
from llmasos.client.types.native import (
    CancelledRequest,
    CatalogModel,
    CatalogModelList,
    LibraryModel,
    LibraryModelList,
    LogLevel,
    LogLine,
    LogLineList,
    ModelPlan,
    ModelStatus,
    ModelStatusList,
    ModelUpload,
    PullJob,
    PullJobList,
    RemovedModel,
    RequestInfo,
    RequestInfoList,
    SystemInfo,
    UploadFile,
)
from llmasos.errors import NetworkError, ProviderError

T = TypeVar("T", bound=BaseModel)
PREFIX = "/llmasos/v1"
AppAct = Literal["start", "stop", "restart", "update", "rollback"]
_SENT = frozenset({".gguf", ".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
_PAPERS = frozenset({"LICENSE", "LICENCE", "NOTICE"})


def native_target(target: Target) -> Target:
    """The same server's own API: `http://host/v1` becomes `http://host/llmasos/v1`."""
    return replace(target, base_url=target.base_url.rstrip("/").removesuffix("/v1") + PREFIX)


class _Calls:
    """What both share: paths, bodies and parsing, no I/O."""

    target: Target

    def _parsed(self, model: type[T], data: Any) -> T:
        return parsed(model, data, self.target.label)

    def _event(self, model: type[T], event: Event) -> T:
        """One event's object. An event named `error` is raised as what it says."""
        data = event_json(event, self.target.label)
        if event.event == "error":
            detail = data.get("error", {}) if isinstance(data, dict) else {}
            raise ProviderError(f"{self.target.label}: {detail.get('message', event.data)}")
        return self._parsed(model, data)

    def _progress(self, event: Event) -> PullJob:
        return self._event(PullJob, event)

    def _ended(self, job: PullJob | None) -> None:
        """Raises if a stream of progress ended without its job: failed, or cut off. Paused and cancelled ones end."""
        if job is None or job.state in ("waiting", "running"):
            raise NetworkError(
                f"{self.target.label} ended the stream before the pull did.",
                hint="The pull goes on there, or is paused: see pulls().",
            )
        if job.state == "failed":
            raise ProviderError(f"{self.target.label} could not pull {job.model}: {job.error}")


def _path(*parts: str, **query: Any) -> str:
    given = {k: v for k, v in query.items() if v is not None and v is not False}
    path = "".join(f"/{quote(part, safe='')}" for part in parts)
    return f"{path}?{urlencode({k: 'true' if v is True else v for k, v in given.items()})}" if given else path


def _given(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}


def _plan_body(
    model: str, context: int | None, concurrency: int, device: str, dtype: str
) -> tuple[str, str, dict[str, Any]]:
    body = _given(model=model, context=context, concurrency=concurrency, device=device, dtype=dtype)
    return "POST", _path("plan"), body


def _log_query(follow: bool, level: LogLevel | None, request_id: str | None, limit: int | None) -> str:
    return _path("logs", follow=follow, level=level, request_id=request_id, limit=limit)


def upload_files(path: str | Path) -> Mapping[str, Path]:
    """The files of a model at `path` (a folder, or one .gguf file) by the names that they will have. What else lies in
    the folder (other formats, code) stays here."""
    path = Path(path)
    if not path.is_dir():
        return {path.name: path}
    found = [*path.glob("*"), *path.glob("*/*")]
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(found)
        if file.is_file() and not file.name.startswith(".") and (file.suffix in _SENT or file.name in _PAPERS)
    }


class Native(_Calls):
    """Blocking. Errors are those of `Client`."""

    def __init__(self, http: Http) -> None:
        """`http` asks `native_target` of the server."""
        self._http, self.target = http, http.target

    def models(self) -> list[LibraryModel]:
        """The models on the server's disk."""
        return self._parsed(LibraryModelList, self._http.json("GET", _path("models"))).data

    def model(self, name: str) -> LibraryModel:
        return self._parsed(LibraryModel, self._http.json("GET", _path("models", name)))

    def remove(self, name: str) -> RemovedModel:
        """Delete a model from the server's disk; it is unloaded first."""
        return self._parsed(RemovedModel, self._http.json("DELETE", _path("models", name)))

    def catalog(self, query: str = "") -> list[CatalogModel]:
        """Models that can be pulled by name, with every word of `query` in their facts."""
        return self._parsed(CatalogModelList, self._http.json("GET", _path("catalog", query=query or None))).data

    def status(self) -> list[ModelStatus]:
        """The models that are loaded, loading or failed, and those that were unloaded, with why."""
        return self._parsed(ModelStatusList, self._http.json("GET", _path("status"))).data

    def load(self, model: str, *, pin: bool | None = None, keep_alive: float | None = None) -> ModelStatus:
        """Returns when the model is ready. `keep_alive`: seconds that it stays after its last request; -1: until its
        room is needed."""
        fields = _given(model=model, pin=pin, keep_alive=keep_alive)
        return self._parsed(ModelStatus, self._http.json("POST", _path("load"), fields))

    def unload(self, model: str, *, force: bool = False) -> ModelStatus:
        return self._parsed(ModelStatus, self._http.json("POST", _path("unload"), {"model": model, "force": force}))

    def pin(self, model: str, pinned: bool = True) -> ModelStatus:
        """A pinned model is never unloaded to make room, nor by time."""
        return self._parsed(ModelStatus, self._http.json("POST", _path("pin"), {"model": model, "pinned": pinned}))

    def plan(
        self,
        model: str,
        *,
        context: int | None = None,
        concurrency: int = 1,
        device: str = "auto",
        dtype: str = "auto",
    ) -> ModelPlan:
        """What the model would cost on the server: bytes, memory, whether it fits."""
        return self._parsed(ModelPlan, self._http.json(*_plan_body(model, context, concurrency, device, dtype)))

    def start_pull(self, model: str, *, name: str | None = None) -> PullJob:
        """Begin a pull and return at once."""
        return self._parsed(PullJob, self._http.json("POST", _path("pulls"), _given(model=model, name=name)))

    def pull(self, model: str, *, name: str | None = None) -> Generator[PullJob, None, None]:
        """Begin a pull and yield it as it moves. Leaving the iterator leaves the pull running. Raises ProviderError if
        it fails."""
        yield from self.follow_pull(self.start_pull(model, name=name).id)

    def follow_pull(self, id: str) -> Generator[PullJob, None, None]:
        """Yields until the pull is done, paused or cancelled."""
        job: PullJob | None = None
        with closing(self._http.events("GET", _path("pulls", id, "events"))) as events:
            for event in events:
                job = self._progress(event)
                yield job
        self._ended(job)

    def pulls(self) -> list[PullJob]:
        """All pulls that the server remembers, the latest first."""
        return self._parsed(PullJobList, self._http.json("GET", _path("pulls"))).data

    def pause_pull(self, id: str) -> PullJob:
        return self._parsed(PullJob, self._http.json("POST", _path("pulls", id, "pause")))

    def resume_pull(self, id: str) -> PullJob:
        return self._parsed(PullJob, self._http.json("POST", _path("pulls", id, "resume")))

    def cancel_pull(self, id: str) -> PullJob:
        """Give it up; the bytes that are there are deleted."""
        return self._parsed(PullJob, self._http.json("POST", _path("pulls", id, "cancel")))

    def upload(self, path: str | Path, *, name: str) -> LibraryModel:
        """Send the model at `path` (a folder with safetensors, or a .gguf file) to the server and install it as
        `name`."""
        upload = self._parsed(ModelUpload, self._http.json("POST", _path("uploads"), {"name": name}))
        try:
            for relative, file in upload_files(path).items():
                self._parsed(UploadFile, self._http.send_file("PUT", _path("uploads", upload.id, relative), file))
            return self._parsed(LibraryModel, self._http.json("POST", _path("uploads", upload.id, "complete")))
        except BaseException:
            self._http.json("DELETE", _path("uploads", upload.id))
            raise

    def requests(self) -> list[RequestInfo]:
        """The requests that the server works on, the oldest first."""
        return self._parsed(RequestInfoList, self._http.json("GET", _path("requests"))).data

    def cancel_request(self, id: str) -> CancelledRequest:
        """Its client gets the error `request_cancelled`."""
        return self._parsed(CancelledRequest, self._http.json("POST", _path("requests", id, "cancel")))

    def logs(
        self,
        *,
        follow: bool = False,
        level: LogLevel | None = None,
        request_id: str | None = None,
        limit: int | None = None,
    ) -> Generator[LogLine, None, None]:
        """The latest lines, oldest first; with `follow` also those to come. `level` and more severe ones."""
        path = _log_query(follow, level, request_id, limit)
        if not follow:
            yield from self._parsed(LogLineList, self._http.json("GET", path)).data
            return
        with closing(self._http.events("GET", path)) as events:
            for event in events:
                yield self._event(LogLine, event)

    def system(self) -> SystemInfo:
        return self._parsed(SystemInfo, self._http.json("GET", _path("system")))

    def apps(self) -> list[AppInfo]:
        """Installed applications that the key may use."""
        return self._parsed(AppList, self._http.json("GET", _path("apps"))).data

    def app(self, name: str) -> AppInfo:
        return self._parsed(AppInfo, self._http.json("GET", _path("apps", name)))

    def install_app(
        self, reference: str, *, index: Sequence[str] = (), accept: str | bool = False, trust: str | None = None
    ) -> AppInfo:
        """`accept`: that of the permission sheet, or True for whatever is asked; without it a ProviderError of status
        409 tells what is."""
        body = _given(reference=reference, index=list(index), accept=accept, trust=trust)
        return self._parsed(AppInfo, self._http.json("POST", _path("apps"), body, once=True))

    def change_app(self, name: str, action: AppAct, **given: Any) -> AppInfo:
        """`given`: fields of AppAction."""
        return self._parsed(AppInfo, self._http.json("POST", _path("apps", name, action), given, once=True))

    def configure_app(self, name: str, /, **config: Any) -> AppInfo:
        """Set its values; None takes one away."""
        return self._parsed(AppInfo, self._http.json("PATCH", _path("apps", name), {"config": config}))

    def uninstall_app(self, name: str, *, data: bool = False) -> RemovedApp:
        """`data`: its own folder and its values, too."""
        return self._parsed(RemovedApp, self._http.json("DELETE", _path("apps", name, data=data)))

    def app_log(self, name: str, *, limit: int | None = None) -> str:
        """What it has printed, and what the server did with it: the latest lines."""
        return b"".join(self._http.pieces("GET", _path("apps", name, "logs", limit=limit))).decode("utf-8", "replace")

    def follow_app_log(self, name: str, *, limit: int | None = None) -> Generator[AppLogLine, None, None]:
        """The latest lines, then those to come."""
        with closing(self._http.events("GET", _path("apps", name, "logs", follow=True, limit=limit))) as events:
            for event in events:
                yield self._event(AppLogLine, event)


class AsyncNative(_Calls):
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self.target = http, http.target

    async def models(self) -> list[LibraryModel]:
        return self._parsed(LibraryModelList, await self._http.json("GET", _path("models"))).data

    async def model(self, name: str) -> LibraryModel:
        return self._parsed(LibraryModel, await self._http.json("GET", _path("models", name)))

    async def remove(self, name: str) -> RemovedModel:
        return self._parsed(RemovedModel, await self._http.json("DELETE", _path("models", name)))

    async def catalog(self, query: str = "") -> list[CatalogModel]:
        data = await self._http.json("GET", _path("catalog", query=query or None))
        return self._parsed(CatalogModelList, data).data

    async def status(self) -> list[ModelStatus]:
        return self._parsed(ModelStatusList, await self._http.json("GET", _path("status"))).data

    async def load(self, model: str, *, pin: bool | None = None, keep_alive: float | None = None) -> ModelStatus:
        fields = _given(model=model, pin=pin, keep_alive=keep_alive)
        return self._parsed(ModelStatus, await self._http.json("POST", _path("load"), fields))

    async def unload(self, model: str, *, force: bool = False) -> ModelStatus:
        body = {"model": model, "force": force}
        return self._parsed(ModelStatus, await self._http.json("POST", _path("unload"), body))

    async def pin(self, model: str, pinned: bool = True) -> ModelStatus:
        body = {"model": model, "pinned": pinned}
        return self._parsed(ModelStatus, await self._http.json("POST", _path("pin"), body))

    async def plan(
        self,
        model: str,
        *,
        context: int | None = None,
        concurrency: int = 1,
        device: str = "auto",
        dtype: str = "auto",
    ) -> ModelPlan:
        return self._parsed(ModelPlan, await self._http.json(*_plan_body(model, context, concurrency, device, dtype)))

    async def start_pull(self, model: str, *, name: str | None = None) -> PullJob:
        return self._parsed(PullJob, await self._http.json("POST", _path("pulls"), _given(model=model, name=name)))

    async def pull(self, model: str, *, name: str | None = None) -> AsyncGenerator[PullJob, None]:
        job = await self.start_pull(model, name=name)
        async with aclosing(self.follow_pull(job.id)) as jobs:
            async for job in jobs:
                yield job

    async def follow_pull(self, id: str) -> AsyncGenerator[PullJob, None]:
        job: PullJob | None = None
        async with aclosing(self._http.events("GET", _path("pulls", id, "events"))) as events:
            async for event in events:
                job = self._progress(event)
                yield job
        self._ended(job)

    async def pulls(self) -> list[PullJob]:
        return self._parsed(PullJobList, await self._http.json("GET", _path("pulls"))).data

    async def pause_pull(self, id: str) -> PullJob:
        return self._parsed(PullJob, await self._http.json("POST", _path("pulls", id, "pause")))

    async def resume_pull(self, id: str) -> PullJob:
        return self._parsed(PullJob, await self._http.json("POST", _path("pulls", id, "resume")))

    async def cancel_pull(self, id: str) -> PullJob:
        return self._parsed(PullJob, await self._http.json("POST", _path("pulls", id, "cancel")))

    async def upload(self, path: str | Path, *, name: str) -> LibraryModel:
        upload = self._parsed(ModelUpload, await self._http.json("POST", _path("uploads"), {"name": name}))
        try:
            for relative, file in upload_files(path).items():
                sent = await self._http.send_file("PUT", _path("uploads", upload.id, relative), file)
                self._parsed(UploadFile, sent)
            return self._parsed(LibraryModel, await self._http.json("POST", _path("uploads", upload.id, "complete")))
        except BaseException:
            await self._http.json("DELETE", _path("uploads", upload.id))
            raise

    async def requests(self) -> list[RequestInfo]:
        return self._parsed(RequestInfoList, await self._http.json("GET", _path("requests"))).data

    async def cancel_request(self, id: str) -> CancelledRequest:
        return self._parsed(CancelledRequest, await self._http.json("POST", _path("requests", id, "cancel")))

    async def logs(
        self,
        *,
        follow: bool = False,
        level: LogLevel | None = None,
        request_id: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        path = _log_query(follow, level, request_id, limit)
        if not follow:
            for line in self._parsed(LogLineList, await self._http.json("GET", path)).data:
                yield line
            return
        async with aclosing(self._http.events("GET", path)) as events:
            async for event in events:
                yield self._event(LogLine, event)

    async def system(self) -> SystemInfo:
        return self._parsed(SystemInfo, await self._http.json("GET", _path("system")))

    async def apps(self) -> list[AppInfo]:
        """Installed applications that the key may use."""
        return self._parsed(AppList, await self._http.json("GET", _path("apps"))).data

    async def app(self, name: str) -> AppInfo:
        return self._parsed(AppInfo, await self._http.json("GET", _path("apps", name)))

    async def install_app(
        self, reference: str, *, index: Sequence[str] = (), accept: str | bool = False, trust: str | None = None
    ) -> AppInfo:
        """`accept`: that of the permission sheet, or True for whatever is asked; without it a ProviderError of status
        409 tells what is."""
        body = _given(reference=reference, index=list(index), accept=accept, trust=trust)
        return self._parsed(AppInfo, await self._http.json("POST", _path("apps"), body, once=True))

    async def change_app(self, name: str, action: AppAct, **given: Any) -> AppInfo:
        """`given`: fields of AppAction."""
        return self._parsed(AppInfo, await self._http.json("POST", _path("apps", name, action), given, once=True))

    async def configure_app(self, name: str, /, **config: Any) -> AppInfo:
        """Set its values; None takes one away."""
        return self._parsed(AppInfo, await self._http.json("PATCH", _path("apps", name), {"config": config}))

    async def uninstall_app(self, name: str, *, data: bool = False) -> RemovedApp:
        """`data`: its own folder and its values, too."""
        return self._parsed(RemovedApp, await self._http.json("DELETE", _path("apps", name, data=data)))

    async def app_log(self, name: str, *, limit: int | None = None) -> str:
        """What it has printed, and what the server did with it: the latest lines."""
        pieces = [piece async for piece in self._http.pieces("GET", _path("apps", name, "logs", limit=limit))]
        return b"".join(pieces).decode("utf-8", "replace")

    async def follow_app_log(self, name: str, *, limit: int | None = None) -> AsyncGenerator[AppLogLine, None]:
        """The latest lines, then those to come."""
        async with aclosing(self._http.events("GET", _path("apps", name, "logs", follow=True, limit=limit))) as events:
            async for event in events:
                yield self._event(AppLogLine, event)
