"""One run of an application: its process in the sandbox, its sockets, its log, from a start to an end.

    server ── app.sock ──> application        requests to it; the process has the listening end as its standard input
    server <── server.sock ── application     what it asks of the server, with its key
    internet <── net.sock ── application      hosts that it was granted

The sockets lie in a folder that only this user can enter; of them only the last two are in the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
from pydantic_core import from_json
from starlette.types import ASGIApp

from llmasos.apps.clients import CLIENT, EVERYBODY
from llmasos.apps.sandbox import Policy, SandboxedProcess, start
from llmasos.apps.sandbox.report import enforcements
from llmasos.client.types.apps import AppEnforcement, AppExit
from llmasos.errors import ServerError
from llmasos.serve.access.access import Tenant
from llmasos.serve.apps import environment, terms
from llmasos.serve.apps.door import ServerDoor
from llmasos.serve.apps.log import AppLog
from llmasos.serve.apps.network import NetworkDoor
from llmasos.store.packages import Installed

START_SECONDS, HEALTH_SECONDS, STOP_SECONDS = 60.0, 5.0, 8.0
MOST_DOCUMENT = 4 * 2**20
"""Bytes that are read of what an application says of itself."""
JOBS = "/jobs?brief=true"
_BACKLOG = 128


class AppFailedError(ServerError):
    """An application that does not start, or is not there just now. `log`: its last lines."""

    http_status = 503
    code = "app_unavailable"

    def __init__(self, message: str, *, hint: str = "", retry_after: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Documents:
    """What an application says of itself: `/app.json` and `/openapi.json`."""

    app: Mapping[str, Any] = field(default_factory=dict)
    openapi: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chats(self) -> bool:
        return bool(self.app.get("chat"))

    @property
    def is_always_on(self) -> bool:
        """Whether it does something without being asked."""
        return bool(self.app.get("schedules"))


DOCUMENTS = "documents.json"
"""Beside a version's environment: what it said of itself last."""


def kept_documents(home: Path, app: Installed) -> Documents:
    """Blocking."""
    try:
        found = json.loads(_documents_path(home, app).read_bytes())
        return Documents(dict(found["app"]), dict(found["openapi"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Documents()


def keep_documents(home: Path, app: Installed, found: Documents) -> None:
    """Blocking."""
    path = _documents_path(home, app)
    whole = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        whole.write_text(json.dumps({"app": found.app, "openapi": found.openapi}), encoding="utf-8")
        os.replace(whole, path)


def _documents_path(home: Path, app: Installed) -> Path:
    return environment.folder_of(home, app.name, app.version) / DOCUMENTS


_PATH = re.compile(r"/[^?#\\\s]*")


def documents_of(app: Mapping[str, Any], openapi: Mapping[str, Any]) -> Documents:
    """Without paths that would lead out of the application's own: pages make addresses of them."""
    routes, paths = app.get("routes"), openapi.get("paths")
    kept = (
        [one for one in routes if isinstance(one, dict) and _is_own(one.get("path"))]
        if isinstance(routes, list)
        else []
    )
    doors = {path: one for path, one in paths.items() if _is_own(path)} if isinstance(paths, dict) else {}
    return Documents({**app, "routes": kept} if app else {}, {**openapi, "paths": doors} if openapi else {})


def _is_own(path: Any) -> bool:
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return False
    parts = unquote(path).split("/")[1:]
    return not any(part in (".", "..") for part in parts) and (path == "/" or "" not in parts[:-1])


@dataclass(frozen=True)
class Order:
    """What is to be run, and how. `python`: its environment's."""

    app: Installed
    home: Path
    data: Path
    python: Path
    tenant: Tenant
    key: str
    config: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> terms.Terms:
        assert self.app.manifest is not None
        return terms.terms_of(self.app.manifest)


class Running:
    """Made by `begin`. `app`: the ASGI application that answers at the server's door."""

    def __init__(self, order: Order, server: ASGIApp, log: AppLog) -> None:
        self.order, self.log = order, log
        self.terms = order.terms
        self.started, self.began = datetime.now(UTC), time.monotonic()
        self.last_used = time.monotonic()
        self.num_calls = self.num_running = 0
        self.documents = Documents()
        self.exit: AppExit | None = None
        self.why_ended: str | None = None
        self._is_beginning = False
        self._folder = Path(tempfile.mkdtemp(prefix="llmasos-app-"))
        self._door = ServerDoor(server, order.tenant)
        self._network: NetworkDoor | None = None
        self._process: SandboxedProcess | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._over = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=str(self._folder / "app.sock"), limits=httpx.Limits(max_connections=None, keepalive_expiry=4.0)
            ),
            base_url="http://app",
            timeout=httpx.Timeout(None, connect=5.0),
            trust_env=False,
        )

    @property
    def process(self) -> SandboxedProcess:
        assert self._process is not None
        return self._process

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def enforced(self) -> list[AppEnforcement]:
        return [
            AppEnforcement(what=row.what, by=list(row.by), why=row.why)
            for row in enforcements(self.process.means, self.process.policy)
        ]

    async def begin(self) -> None:
        """Returns when it answers. Raises AppFailedError that says why it does not, DiskFullError, ServerError; nothing
        of it is left then."""
        self._is_beginning = True
        try:
            await self._start()
            if self.why_ended is not None:
                raise AppFailedError(f"{self.order.app.name} was stopped before it had started.", retry_after=1)
            await self._first_answer()
            self.documents = documents_of(await self._document("/app.json"), await self._document("/openapi.json"))
        except BaseException:
            self._is_beginning = False
            await self.end("start")
            raise
        self._is_beginning = False
        self.log.add(f"{self.order.app.name} {self.order.app.version} runs as process {self.process.pid}")

    async def _start(self) -> None:
        order, manifest = self.order, self.order.app.manifest
        assert manifest is not None
        await self._door.open(self._folder / "server.sock")
        sockets = [self._folder / "server.sock"]
        if manifest.permissions.net:
            self._network = NetworkDoor(manifest.permissions.net, self.log.add)
            await self._network.open(self._folder / "net.sock")
            sockets.append(self._folder / "net.sock")
        rooms = terms.Rooms(order.app.folder, order.data, order.python.parents[1], tuple(sockets), order.config)
        self._process = await asyncio.to_thread(self._launch, rooms)
        assert self._process.stdout is not None and self._process.stderr is not None
        if self._network is not None and not self._process.means.get("net"):
            self.log.add("network: none, because this system has no network namespaces for this user")
        self._readers = [
            asyncio.create_task(self.log.read(self._process.stdout, "stdout")),
            asyncio.create_task(self.log.read(self._process.stderr, "stderr")),
        ]
        self._watch = asyncio.create_task(self._until_over())

    def _launch(self, rooms: terms.Rooms) -> SandboxedProcess:
        manifest = self.order.app.manifest
        assert manifest is not None
        terms.check_home(self.order.home.resolve())
        terms.make_data(rooms.data)
        policy = terms.policy_of(manifest, rooms, self.order.values)
        command = [
            str(self.order.python),
            "-I",
            "-B",
            "-u",
            "-X",
            "utf8",
            "-m",
            "llmasos.apps.process",
            self.order.app.entry,
        ]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self._folder / "app.sock"))
            listener.listen(_BACKLOG)
            return start(
                command,
                policy,
                stdin=listener.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._variables(policy),
            )

    def _variables(self, policy: Policy) -> dict[str, str]:
        order, threads = self.order, str(policy.limits.cores or 1)
        found = {
            "LLMASOS_SERVER": f"unix:{self._folder / 'server.sock'}",
            "LLMASOS_API_KEY": order.key,
            "LLMASOS_APP_NAME": order.app.name,
            "LLMASOS_APP_DATA": str(order.data),
            "LLMASOS_HOME": str(order.data / ".llmasos"),
            "VIRTUAL_ENV": str(order.python.parents[1]),
            # memory is limited by what is set aside, and glibc sets aside for each thread
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        if order.config is not None:
            found["LLMASOS_APP_CONFIG"] = str(order.config)
        if self._network is not None and policy.net == "loopback":
            found["LLMASOS_APP_PROXY"] = str(self._folder / "net.sock")
        return found

    async def _first_answer(self) -> None:
        """The listening socket is there before the process, so that one request waits for it."""
        asked = asyncio.create_task(self._answers())
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait({asked, over}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and not asked.exception() and asked.result():
                return
        finally:
            for task in (asked, over):
                task.cancel()
            await asyncio.gather(asked, over, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # a process that fails is over in a moment, and then it is known why
                await self._over.wait()
        name = self.order.app.name
        if not self.is_over:
            why = (
                f"it did not answer within {START_SECONDS:g} s"
                if not asked.done() or asked.cancelled()
                else "its /healthz failed"
            )
        else:
            why = f"its process ended ({self.exit.reason if self.exit else 'exited'})"
        said = self.log.last(1)
        raise AppFailedError(
            f"{name} does not start: {why}." + (f" It said: {said[0][:500]}" if said else ""),
            hint=f"`llmasos app logs {name}` has all that it said.",
        )

    async def _document(self, path: str) -> Mapping[str, Any]:
        """One that is too long or no JSON object counts as empty: it comes from the application."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                _, found = await self.ask("GET", path)
        except (httpx.HTTPError, TimeoutError, ValueError) as e:
            self.log.add(f"{path} can't be read: {type(e).__name__}: {e}")
            return {}
        return found if isinstance(found, dict) else {}

    async def ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, most: int = MOST_DOCUMENT
    ) -> tuple[int, Any]:
        """Status and JSON of an answer to the server itself. Nothing is believed of it: neither its length nor that it
        is what it says. Raises ValueError for one that is longer than `most` bytes or no JSON that can be passed on,
        httpx.HTTPError."""
        data = bytearray()
        async with self.client.stream(method, path, headers={"accept-encoding": "identity", **(headers or {})}) as told:
            async for piece in told.aiter_raw():  # not unpacked: a few bytes could be gigabytes
                data += piece
                if len(data) > most:
                    raise ValueError(f"longer than {most} bytes")
        found = from_json(bytes(data), allow_inf_nan=False) if data else None
        json.dumps(found, allow_nan=False)  # a number may still be too large for us
        return told.status_code, found

    async def _answers(self) -> bool:
        """Of its health only the status counts."""
        async with self.client.stream("GET", "/healthz") as told:
            return told.status_code == 200

    async def is_healthy(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                return await self._answers()
        except (httpx.HTTPError, TimeoutError):
            return False

    async def is_working(self) -> bool:
        """Whether it has jobs that go on."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                _, jobs = await self.ask("GET", JOBS, headers={CLIENT: EVERYBODY})
            return any(job["state"] == "running" for job in jobs)
        except (httpx.HTTPError, TimeoutError, ValueError, TypeError, KeyError):
            return False

    async def end(self, why: str | None = None) -> None:
        """Ask it to end, then end it. `why`: the reason to note, if it is not the process's own."""
        if self.why_ended is None:
            self.why_ended = why
        process = self._process
        if process is not None and process.running:
            if why is None:
                await asyncio.to_thread(process.terminate)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._over.wait()
            process.kill()
        if self._watch is not None:
            await asyncio.shield(self._watch)
        elif not self._is_beginning:  # else `begin` sees why_ended
            await self._clear()

    async def _until_over(self) -> None:
        try:
            end = await self.process.ended()
            code, reason = end.code, str(end.reason)
        except Exception as e:  # the watchdog's own failure: the process is ended all the same
            code, reason = None, type(e).__name__
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.gather(*self._readers, return_exceptions=True)
        reason = self.why_ended or reason
        self.exit = AppExit(at=datetime.now(UTC), reason=reason, code=code, log=self.log.last())
        self.log.add(f"{self.order.app.name} has ended: {reason}" + (f", code {code}" if code is not None else ""))
        self._over.set()
        await self._clear()

    async def _clear(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await self._door.close()
        if self._network is not None:
            await self._network.close()
        await self.client.aclose()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        self._over.set()

    async def wait(self) -> None:
        await self._over.wait()


def is_supported() -> bool:
    return hasattr(socket, "AF_UNIX") and os.name == "posix"
