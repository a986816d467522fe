"""What is told of an installed application."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from llmasos.apps.sandbox.watch import disk_of
from llmasos.client.types.apps import AppGrant, AppInfo, AppLimits, AppState, AppUse
from llmasos.serve.apps import values
from llmasos.serve.apps.installing import rows_for
from llmasos.serve.apps.running import Running
from llmasos.serve.apps.supervisor import Slot, Supervisor
from llmasos.serve.apps.terms import terms_of
from llmasos.store.packages import Installed, grants
from llmasos.store.packages.manifest import Manifest


async def info_of(supervisor: Supervisor, app: Installed, *, whole: bool) -> AppInfo:
    """`whole`: with what is only for those who manage the server."""
    slot, manifest = supervisor.slot(app.name), app.manifest
    found = AppInfo(name=app.name, version=app.version, versions=list(app.versions), state=_state(slot, app))
    found.error = app.error or None
    if manifest is None:
        return found
    documents = await supervisor.documents(app)
    found.summary, found.license = manifest.app.summary, manifest.app.license
    found.title = str(documents.app.get("title") or app.name)[:200]
    found.model = f"app/{app.name}" if documents.chats else None
    found.permissions = [AppGrant(kind=one.kind, value=one.value) for one in grants(manifest)]
    found.models = {
        k: v if isinstance(v, str) else v.model_dump(exclude_defaults=True) for k, v in manifest.models.items()
    }
    found.limits = limits_of(manifest)
    found.retry_at = supervisor.retry_moment(slot)
    found.num_crashes = slot.num_crashes
    if found.error is None and slot.pause and slot.last_exit is not None:
        found.error = f"It has ended: {slot.last_exit.reason}."
    if app.record is not None:
        found.installed = datetime.fromisoformat(app.record.installed)
        found.publisher = app.record.key_id
    if whole:
        running = slot.running
        found.source = app.record.source if app.record else None
        found.last_exit, found.key_id = slot.last_exit, await asyncio.to_thread(supervisor.keys.id_of, app.name)
        found.config = await asyncio.to_thread(values.shown, supervisor.apps, app)
        found.enforced = running.enforced() if running else await asyncio.to_thread(rows_for, manifest)
        found.use = await asyncio.to_thread(_use, running) if running else None
    return found


def _state(slot: Slot, app: Installed) -> AppState:
    if app.error:
        return "damaged"
    if slot.running is not None:
        return "running"
    if slot.starting is not None:
        return "starting"
    if slot.is_stopped:
        return "stopped"
    return "waiting" if slot.pause else "idle"


def limits_of(manifest: Manifest) -> AppLimits:
    terms = terms_of(manifest)
    names = ("memory", "cores", "processes", "open_files", "file_size", "disk")
    held: dict[str, Any] = {name: getattr(terms.limits, name) for name in names}
    return AppLimits(**held, timeout=terms.timeout, concurrency=terms.concurrency)


def _use(running: Running) -> AppUse:
    taken = running.process.use()
    return AppUse(
        pid=running.process.pid,
        started=running.started,
        memory=taken.memory,
        cpu_seconds=round(taken.cpu_seconds, 2),
        processes=taken.processes,
        disk=disk_of([running.order.data], ()),
        calls=running.num_calls,
        running_calls=running.num_running,
    )
