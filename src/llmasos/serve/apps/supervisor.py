"""All installed applications of one server: started on first use, stopped when idle, started again after a crash with
growing pauses, held to their keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from llmasos.client.types.apps import AppExit
from llmasos.errors import DiskFullError, InvalidInputError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.serve.access.access import Access, Tenant
from llmasos.serve.apps import environment, log, running, values
from llmasos.serve.apps.keys import AppKeys
from llmasos.serve.apps.rights import rights_of
from llmasos.serve.apps.running import AppFailedError, Documents, Order, Running
from llmasos.serve.models import Models
from llmasos.settings import settings
from llmasos.store.packages import Apps, Installed, check_app_name

IDLE_SECONDS = 600.0
LOOK_SECONDS = 5.0
STEADY_SECONDS = 60.0
"""A process that ends sooner than this after its start, again and again, is waited for longer each time."""
MOST_PAUSE = 300.0
_ACTOR = "server"

_log = logging.getLogger("llmasos.serve.apps")


class AppBusyError(AppFailedError):
    code = "app_busy"


class Slot:
    """One installed application: what is known of it whether it runs or not."""

    def __init__(self, name: str, app_log: log.AppLog) -> None:
        self.name, self.log = name, app_log
        self.lock = asyncio.Lock()
        self.running: Running | None = None
        self.starting: asyncio.Task[Running] | None = None
        self.begun: Running | None = None
        """What is being started."""
        self.is_stopped = False
        self.num_crashes = 0
        self.retry_at: float | None = None
        self.last_exit: AppExit | None = None
        self.documents: tuple[str, Documents] = ("", Documents())
        self.is_changing = False
        self.num_waiting = 0
        """Who holds the lock, or wants it."""

    @property
    def pause(self) -> float:
        """Seconds until it may be started again."""
        return max(0.0, (self.retry_at or 0.0) - time.monotonic())

    def crashed(self, lived: float) -> None:
        self.num_crashes = self.num_crashes + 1 if lived < STEADY_SECONDS else 1
        self.retry_at = time.monotonic() + min(MOST_PAUSE, 2.0 ** (self.num_crashes - 1))


@contextlib.contextmanager
def held(slot: Slot) -> Iterator[None]:
    """Nobody starts it meanwhile."""
    slot.is_changing = True
    try:
        yield
    finally:
        slot.is_changing = False


class Supervisor:
    """Belongs to one event loop. `server`: the ASGI application behind the doors; set before `start`."""

    def __init__(
        self, access: Access, models: Models, *, home: Path | None = None, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self.access, self.models, self.idle_seconds = access, models, idle_seconds
        self.home = home or settings().home
        self.apps = Apps(self.home)
        self.keys = AppKeys(access.database, self.home)
        self.server: ASGIApp | None = None
        self._slots: dict[str, Slot] = {}
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # life

    async def start(self) -> None:
        self._looking = asyncio.create_task(self._look_again_and_again())

    async def close(self) -> None:
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*(self.stop(name) for name in list(self._slots)))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_again_and_again(self) -> None:
        with contextlib.suppress(LLMasOSError, OSError):
            await self._revoke_of_gone()
        while True:
            try:
                await self._look()
            except Exception:  # whatever it is: the others are looked after, and it is tried again
                _log.exception("installed applications could not be looked after")
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        """Stop what is idle, gone or of another version; start what works without being asked."""
        there = {app.name: app for app in await asyncio.to_thread(self.apps.list)}
        for slot in list(self._slots.values()):
            found, now = slot.running, time.monotonic()
            if slot.lock.locked():
                continue
            if slot.name not in there:
                await self._forget(slot)
            elif found is not None and not found.num_running:
                app = there[slot.name]
                if found.order.app.version != app.version or await self._has_other_values(app, found):
                    if not found.num_running and slot.running is found:
                        await self.stop(slot.name)
                elif (
                    now - found.last_used > self.idle_seconds
                    and not found.documents.is_always_on
                    and not await found.is_working()
                    and slot.running is found
                    and found.last_used < now  # nobody has asked it meanwhile
                ):
                    slot.log.add("it is idle and is stopped until it is asked again")
                    await self.stop(slot.name)
        for name, app in there.items():
            slot = self.slot(name)
            if app.manifest is None or slot.is_stopped or slot.is_changing or slot.running or slot.pause:
                continue
            if (await self.documents(app)).is_always_on:
                with contextlib.suppress(LLMasOSError):  # it is in its log, and tried again after its pause
                    await self.running(name)

    async def _has_other_values(self, app: Installed, found: Running) -> bool:
        """Whether somebody has set others beside the server: it reads them when it starts. Its jobs are waited for."""
        try:
            kept = await asyncio.to_thread(values.values_of, self.apps, app)
        except LLMasOSError:  # it goes on with what it has
            return False
        return kept != found.order.values and not await found.is_working()

    async def _revoke_of_gone(self) -> None:
        """Keys of applications that were uninstalled while no server ran."""
        there = {app.name for app in await asyncio.to_thread(self.apps.list)}
        for name in await asyncio.to_thread(self.keys.names):
            if name not in there and not await asyncio.to_thread(self.apps.has, name):  # it may just have come
                await self.revoke(name, _ACTOR)

    async def _forget(self, slot: Slot) -> None:
        """It was uninstalled by somebody else, unless it has come back meanwhile."""
        async with self.changing(slot.name):
            if await asyncio.to_thread(self.apps.has, slot.name):
                return
            await self.stop(slot.name)
            await self.revoke(slot.name, _ACTOR)
            if slot.num_waiting == 1:  # nobody but us
                self._slots.pop(slot.name, None)

    # one application

    def slot(self, name: str) -> Slot:
        if name not in self._slots:
            self._slots[name] = Slot(name, log.AppLog(log.path_of(self.home, name)))
        return self._slots[name]

    def at_work(self) -> list[tuple[str, Running]]:
        """Those that run, by name."""
        return [(slot.name, slot.running) for slot in self._slots.values() if slot.running is not None]

    async def installed(self, name: str) -> Installed:
        """Raises NotFoundError, FormatError."""
        try:
            check_app_name(name)
        except InvalidInputError as e:
            raise NotFoundError(f"No application {name[:80]!r} is installed.") from e
        return await asyncio.to_thread(self.apps.get, name)

    async def installed_or_damaged(self, name: str) -> Installed:
        """Raises NotFoundError."""
        found = await asyncio.to_thread(self.apps.list)
        if (app := next((one for one in found if one.name == name), None)) is None:
            raise NotFoundError(f"No application {name[:80]!r} is installed.", hint="GET /llmasos/v1/apps lists them.")
        return app

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Running]:
        """The application for one call; it is started if it does not run. Raises NotFoundError, AppFailedError,
        AppBusyError, and what `Running.begin` raises."""
        found = await self.running(name)
        if found.num_running >= found.terms.concurrency:
            raise AppBusyError(
                f"{name} answers {found.num_running} calls already, the most it takes at once.", retry_after=1
            )
        found.num_running += 1
        found.num_calls += 1
        found.last_used = time.monotonic()
        try:
            yield found
        finally:
            found.num_running -= 1
            found.last_used = time.monotonic()

    async def running(self, name: str) -> Running:
        slot = self._slots.get(name)
        if slot is not None and slot.running is not None and not slot.is_changing:
            return slot.running
        app = await self.installed(name)
        slot = self.slot(name)
        if slot.is_changing:
            raise AppFailedError(f"{name} is being changed.", hint="Try again in a moment.", retry_after=2)
        if slot.is_stopped:
            raise AppFailedError(f"{name} was stopped.", hint=f"`llmasos app start {name}` starts it.")
        if slot.starting is None and slot.pause:
            reason = slot.last_exit.reason if slot.last_exit else "exited"
            raise AppFailedError(
                f"{name} has ended {slot.num_crashes} times in a row ({reason}) and is not started again yet.",
                hint=f"`llmasos app logs {name}` has what it said.",
                retry_after=max(1, round(slot.pause)),
            )
        return await self.begin(slot, app)

    async def begin(self, slot: Slot, app: Installed) -> Running:
        """Start it, or wait for who does; whoever stops waiting does not stop it."""
        if self._closed:
            raise AppFailedError("The server is stopping.", retry_after=5)
        if slot.running is not None:
            return slot.running
        if slot.starting is None:
            slot.starting = asyncio.create_task(self._begin(slot, app))
            slot.starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(slot.starting)

    async def _begin(self, slot: Slot, app: Installed) -> Running:
        if self.server is None or not running.is_supported():
            raise UnsupportedError("Applications can't run here: this system has no Unix sockets for them.")
        found: Running | None = None
        try:
            order = await self._order(slot, app)
            found = slot.begun = Running(order, self.server, slot.log)
            if self._closed:
                await found.end("stopped")
                raise AppFailedError("The server is stopping.", retry_after=5)
            await found.begin()
        except BaseException as e:
            slot.starting = slot.begun = None
            slot.last_exit = (found.exit if found is not None else None) or slot.last_exit
            was_stopped = found is not None and found.why_ended == "stopped"
            if not was_stopped and not isinstance(e, (InvalidInputError, NotFoundError, DiskFullError)):
                slot.crashed(0.0)
            slot.log.add(f"it could not be started: {e}")
            raise
        slot.starting, slot.begun, slot.running, slot.retry_at = None, None, found, None
        slot.documents = app.version, found.documents
        await asyncio.to_thread(running.keep_documents, self.home, app, found.documents)
        self._keep(self._watch(slot, found))
        return found

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, slot: Slot, found: Running) -> None:
        await found.wait()
        if slot.running is found:
            slot.running = None
        slot.last_exit = found.exit
        if found.why_ended != "stopped":
            slot.crashed(time.monotonic() - found.began)

    async def _order(self, slot: Slot, app: Installed) -> Order:
        manifest = app.manifest
        assert manifest is not None
        kept = await asyncio.to_thread(values.values_of, self.apps, app)
        missing = [name for name, one in manifest.config.items() if one.required and kept.get(name) is None]
        if missing:
            raise InvalidInputError(
                f"{app.name} needs a value for {', '.join(missing)}.",
                hint=f"llmasos app config {app.name} {missing[0]}=…",
                param="config",
            )
        python = await asyncio.to_thread(environment.ensure, self.home, app)
        allowed = await rights_of(manifest, self.models, self.home)
        key_id, text = await self.issue(app.name, allowed)
        return Order(
            app=app,
            home=self.home,
            data=self.apps.data(app.name),
            python=python,
            tenant=Tenant(app.name, key_id, tuple(manifest.permissions.knowledge)),
            key=text,
            config=values.path_of(self.apps, app.name) if kept else None,
            values=kept,
        )

    async def stop(self, name: str, *, hold: bool = False) -> None:
        """`hold`: until somebody starts it."""
        slot = self.slot(name)
        slot.is_stopped = slot.is_stopped or hold
        if slot.starting is not None:
            if slot.begun is not None:  # else its packages are being fetched, which can't be broken off
                await slot.begun.end("stopped")
            await asyncio.gather(slot.starting, return_exceptions=True)
        if slot.running is not None:
            found = slot.running
            slot.running = None
            found.why_ended = "stopped"
            await found.end()

    async def restart(self, name: str) -> Running:
        """Start it anew, whatever it was at. Raises as `running` does."""
        await self.stop(name)
        slot = self.slot(name)
        slot.is_stopped, slot.num_crashes, slot.retry_at = False, 0, None
        return await self.begin(slot, await self.installed(name))

    async def ended_badly(self, found: Running) -> None:
        """A call took too long: whether it still answers at all; if not, it is ended."""
        if not found.is_over and not await found.is_healthy():
            found.log.add("it no longer answers")
            await found.end("health")

    def check_later(self, found: Running) -> None:
        self._keep(self.ended_badly(found))

    # keys

    async def issue(self, name: str, allowed: Mapping[str, Any]) -> tuple[str, str]:
        """Id and text of its key, made if there is none in force."""
        found = await self.keys.issue(name, allowed)
        await self.access.directory.refresh()
        return found

    async def revoke(self, name: str, actor: str) -> None:
        await self.keys.revoke(name, actor)
        await self.access.directory.refresh()

    # what is kept beside its versions

    async def documents(self, app: Installed) -> Documents:
        """What this version said of itself when it was started last, here or when it was installed; nothing if it
        never was."""
        slot = self.slot(app.name)
        if slot.documents[0] != app.version or not slot.documents[1].app:  # they may have come meanwhile
            slot.documents = app.version, await asyncio.to_thread(running.kept_documents, self.home, app)
        return slot.documents[1]

    async def learnt(self, app: Installed) -> Documents:
        """`documents`; one that has said nothing yet is started for it. Raises as `running` does."""
        if not (found := await self.documents(app)).app:
            found = (await self.running(app.name)).documents
        return found

    @contextlib.asynccontextmanager
    async def alone(self, name: str) -> AsyncIterator[Slot]:
        """One at a time changes it, from the first look to the last. It answers calls meanwhile."""
        slot = self.slot(name)
        slot.num_waiting += 1
        try:
            async with slot.lock:
                yield slot
        finally:
            slot.num_waiting -= 1

    @contextlib.asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[Slot]:
        """`alone`, and nobody starts it."""
        async with self.alone(name) as slot:
            with held(slot):
                yield slot

    def retry_moment(self, slot: Slot) -> datetime | None:
        return datetime.now(UTC) + timedelta(seconds=slot.pause) if slot.pause else None
