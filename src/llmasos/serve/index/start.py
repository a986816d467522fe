"""Whether an application starts and answers, tried in the sandbox as an installed one runs, with less: no network, no
variables, no models, nothing to write but a temporary folder."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmasos.apps.sandbox import enforced
from llmasos.apps.sandbox.python import NEEDED
from llmasos.apps.sandbox.report import missing
from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.serve.access.access import Tenant
from llmasos.serve.apps import environment
from llmasos.serve.apps.log import AppLog
from llmasos.serve.apps.running import Order, Running
from llmasos.store.packages.checks import Finding
from llmasos.store.packages.installed import Installed
from llmasos.store.packages.manifest import FileAccess, Manifest, Permissions, Resources

NAME = "start"
_SHOWN = 5


async def try_start(manifest: Manifest, folder: Path) -> Finding:
    """`folder` holds the package's files. An application whose start can't be tried here is skipped, and why."""
    lacking = [row.what for row in missing(await asyncio.to_thread(enforced)) if row.what in NEEDED]
    if lacking:
        return Finding(NAME, "skipped", (f"This system cannot keep a program from: {', '.join(lacking)}.",))
    if needs := [name for name, entry in manifest.config.items() if entry.required]:
        return Finding(NAME, "skipped", (f"It needs values that its user sets: {', '.join(needs)}.",))
    with tempfile.TemporaryDirectory(prefix="llmasos-check-") as name:
        home = Path(name).resolve()
        app = Installed(manifest.app.name, manifest.app.version, folder, (), _with_less(manifest))
        try:
            python = await asyncio.to_thread(environment.ensure, home, app)
        except UnsupportedError as e:
            return Finding(NAME, "skipped", (e.message,))
        return await _run(app, home, python)


async def _run(app: Installed, home: Path, python: Path) -> Finding:
    log = AppLog(home / "app.log")
    order = Order(app, home, home / "data", python, Tenant(app.name, "none"), "none")
    running = Running(order, _no_server, log)
    try:
        await running.begin()
    except LLMasOSError as e:
        return Finding(NAME, "failed", (e.message, *log.last(_SHOWN)))
    try:
        routes = running.documents.app.get("routes") or []
        chats = running.documents.chats
    finally:
        await running.end("check")
    if not routes and not chats:
        return Finding(NAME, "warning", ("It starts, and has no routes.",))
    return Finding(NAME, "passed", (f"{len(routes)} routes" + (" and a chat" if chats else ""),))


def _with_less(manifest: Manifest) -> Manifest:
    """What code that nobody has looked at yet may do."""
    less = Permissions(exec=manifest.permissions.exec, fs=FileAccess(read=[], write=[]))
    return manifest.model_copy(update={"permissions": less, "resources": Resources()})


async def _no_server(scope: Scope, receive: Receive, send: Send) -> None:
    error = {"error": {"message": "The package is only being checked.", "code": "checking"}}
    if scope["type"] == "http":
        await JSONResponse(error, 503)(scope, receive, send)
