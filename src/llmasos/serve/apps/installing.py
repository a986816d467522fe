"""Applications installed, updated, rolled back and uninstalled while the server runs. One counts as installed when it
has started and answered; if it does not, what was there before is there again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmasos.apps.sandbox import Policy, enforced
from llmasos.client.types.apps import AppEnforcement, AppGrant, AppSheet
from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.serve.apps import environment
from llmasos.serve.apps.supervisor import Slot, Supervisor, held
from llmasos.serve.apps.terms import terms_of
from llmasos.store.library import discard
from llmasos.store.packages import Apps, Index, Installed, NotAcceptedError, Request, check_app_name, indexes
from llmasos.store.packages.manifest import Manifest, grants
from llmasos.store.packages.unpack import open_package

Accept = Callable[[Request], bool]


class SheetError(LLMasOSError):
    """Nobody has accepted what is asked. `sheet` has it."""

    http_status = 409
    code = "not_accepted"

    def __init__(self, sheet: AppSheet, message: str) -> None:
        super().__init__(message, hint="Show the sheet, then send the request again with its `accept`.")
        self.sheet = sheet


class UnhealthyError(LLMasOSError):
    """It was installed and does not start, so it is not there."""

    http_status = 422
    code = "unhealthy"


def rows_for(manifest: Manifest) -> list[AppEnforcement]:
    """What this system holds an application of this manifest to. Blocking: a program that does nothing is started."""
    asked = manifest.permissions
    policy = Policy(
        net="loopback" if asked.net else "none",
        sockets=(Path(sys.executable),),  # any: it is granted one
        exec=asked.exec,
        gpu=asked.gpu,
        limits=terms_of(manifest).limits,
    )
    return [AppEnforcement(what=row.what, by=list(row.by), why=row.why) for row in enforced(policy)]


def sheet_of(request: Request) -> AppSheet:
    """Blocking, as `rows_for`."""
    facts, manifest = request.sheet, request.manifest
    publisher = request.publisher.key_id if request.publisher else None
    asked = [AppGrant(kind=one.kind, value=one.value) for one in request.asked]
    decided: dict[str, Any] = {
        **{name: facts[name] for name in ("name", "version", "summary", "license", "models", "resources", "config")},
        "previous": request.previous,
        "publisher": publisher,
        "source": request.source,
        "yanked": request.yanked,
        "asked": asked,
        "permissions": [AppGrant(kind=one.kind, value=one.value) for one in grants(manifest)],
    }
    text = json.dumps(decided, default=lambda one: one.model_dump(), sort_keys=True)
    return AppSheet(**decided, enforced=rows_for(manifest), accept=hashlib.sha256(text.encode()).hexdigest())


def accepting(answer: str | bool) -> Accept:
    """`answer`: a sheet's `accept`, or whether to accept whatever is asked."""

    def accept(request: Request) -> bool:
        return answer if isinstance(answer, bool) else answer == sheet_of(request).accept

    return accept


class Installing:
    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor, self.apps = supervisor, supervisor.apps

    async def install(
        self, reference: str, index: Sequence[str], answer: str | bool, trust: str | None, *, source: str | None = None
    ) -> Installed:
        """Raises SheetError, UnhealthyError, and what `Apps.install` raises."""
        if reference.endswith(".llmapp"):
            name = await asyncio.to_thread(_name_of, Path(reference))
            asked: Sequence[Index] = ()
        else:
            name = check_app_name(reference.partition("==")[0].rpartition("/")[2])  # without its owner
            asked = await asyncio.to_thread(indexes, tuple(index))
        accept = accepting(answer)
        return await self._change(
            name, lambda apps: apps.install(reference, asked, accept=accept, trust=trust, source=source)
        )

    async def update(self, name: str, index: Sequence[str], answer: str | bool, trust: str | None) -> Installed:
        await self.supervisor.installed(name)
        asked, accept = await asyncio.to_thread(indexes, tuple(index)), accepting(answer)
        return await self._change(name, lambda apps: apps.update(name, asked, accept=accept, trust=trust))

    async def rollback(self, name: str, version: str | None) -> Installed:
        return await self._change(name, lambda apps: apps.rollback(name, version))

    async def uninstall(self, name: str, *, data: bool, actor: str) -> tuple[str, ...]:
        await asyncio.to_thread(self.apps.versions, name)
        async with self.supervisor.changing(name):
            await self.supervisor.stop(name)
            gone = await asyncio.to_thread(uninstall, self.apps, name, data)
            await self.supervisor.revoke(name, actor)
        return gone

    async def _change(self, name: str, work: Callable[[Apps], Installed]) -> Installed:
        async with self.supervisor.alone(name) as slot:
            before = await asyncio.to_thread(_current, self.apps, name)
            there = set(await asyncio.to_thread(_versions, self.apps, name))
            had_data = self.apps.data(name).exists() if before or there else False
            was_stopped = slot.is_stopped
            try:
                app = await asyncio.to_thread(work, self.apps)
            except NotAcceptedError as e:
                raise SheetError(await asyncio.to_thread(sheet_of, e.request), e.message) from e
            with held(slot):
                try:
                    await self._check(slot, app)
                except LLMasOSError as e:
                    is_new = app.version not in there
                    await asyncio.to_thread(put_back, self.apps, app, before, is_new, had_data)
                    if before is None:
                        await self.supervisor.revoke(app.name, "server")
                    slot.is_stopped, slot.num_crashes, slot.retry_at = was_stopped, 0, None  # not the old one's fault
                    raise UnhealthyError(
                        f"{app.name} {app.version} does not run, so it is not installed: {e.message}", hint=e.hint
                    ) from e
            return app

    async def _check(self, slot: Slot, app: Installed) -> None:
        await self.supervisor.stop(app.name)
        await asyncio.to_thread(environment.ensure, self.supervisor.home, app)
        slot.is_stopped, slot.num_crashes, slot.retry_at = False, 0, None
        try:
            await self.supervisor.begin(slot, app)
        except InvalidInputError as e:
            if e.param != "config":  # it can't run before its user has set what it needs
                raise


def _name_of(path: Path) -> str:
    with open_package(path) as package:
        return package.manifest.app.name


def _current(apps: Apps, name: str) -> str | None:
    try:
        return apps.get(name).version
    except LLMasOSError:
        return None


def _versions(apps: Apps, name: str) -> tuple[str, ...]:
    try:
        return apps.versions(name)
    except LLMasOSError:
        return ()


def put_back(apps: Apps, app: Installed, before: str | None, is_new: bool, had_data: bool) -> None:
    if before is None:
        uninstall(apps, app.name, data=not had_data)
        return
    if before != app.version:
        apps.rollback(app.name, before)
        if is_new:
            discard(app.folder)
            shutil.rmtree(environment.folder_of(apps.home, app.name, app.version), ignore_errors=True)


def uninstall(apps: Apps, name: str, data: bool = False) -> tuple[str, ...]:
    """All versions with their environments, and with `data` its folder and its settings. Blocking."""
    gone = apps.uninstall(name, data=data)
    environment.remove(apps.home, name)
    folder = apps.root / name
    if data:
        (folder / "config.json").unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return gone
