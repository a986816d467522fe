"""Whether an installed application starts and answers, tried without a server: in its sandbox, where no model answers
it. For the command line, and for an index that checks what it is sent."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.types import Receive, Scope, Send

from llmasos.client.types.apps import AppEnforcement
from llmasos.errors import LLMasOSError
from llmasos.serve.access.access import Tenant
from llmasos.serve.apps import environment, running
from llmasos.serve.apps.installing import UnhealthyError, put_back
from llmasos.serve.apps.log import AppLog
from llmasos.serve.apps.running import Documents, Order, Running
from llmasos.store.packages import Apps, Installed


@dataclass(frozen=True)
class Trial:
    """`error`: why it does not run; None: it does. `unsure`: it asked for models at its start, which only a server has,
    or this system can't run it, so `error` may say nothing of it."""

    documents: Documents = Documents()
    enforced: tuple[AppEnforcement, ...] = ()
    error: LLMasOSError | None = None
    unsure: bool = False


class _Nobody:
    """The server's place where there is none."""

    def __init__(self) -> None:
        self.was_asked = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.was_asked = True
        body = json.dumps({"error": {"message": "No server runs: this is a trial.", "code": "trial"}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def try_out(apps: Apps, app: Installed) -> Trial:
    """Start it and look. Its data folder is a temporary one. Raises UnsupportedError for packages that are not to be
    had."""
    python = environment.ensure(apps.home, app)
    if not running.is_supported():
        return Trial(unsure=True)
    needs = app.manifest.config.values() if app.manifest else ()
    if any(entry.required and entry.default is None for entry in needs):
        return Trial(unsure=True)
    return asyncio.run(_try_out(apps.home, app, python))


async def _try_out(home: Path, app: Installed, python: Path) -> Trial:
    nobody = _Nobody()
    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        folder = Path(name).resolve()
        (folder / "data").mkdir()
        order = Order(app=app, home=home, data=folder / "data", python=python, tenant=Tenant(app.name, ""), key="trial")
        found = Running(order, nobody, AppLog(folder / "log"))
        try:
            await found.begin()
        except LLMasOSError as e:
            return Trial(error=e, unsure=nobody.was_asked)
        rows = tuple(found.enforced())
        await found.end()
        return Trial(found.documents, rows)


def install_checked(apps: Apps, work: Callable[[Apps], Installed]) -> tuple[Installed, Trial]:
    """`work` installs or updates; the application is tried, and if it does not run, what was there before is there
    again. Raises UnhealthyError, and what `work` raises."""
    known = {one.name: (one.version, set(one.versions)) for one in apps.list()}
    had_data = {one for one in known if apps.data(one).exists()}
    app = work(apps)
    before, there = known.get(app.name, (None, set[str]()))
    if app.version in there:
        return app, Trial(unsure=True)  # it was here, and was tried when it came
    try:
        trial = try_out(apps, app)
        if trial.error is not None and not trial.unsure:
            raise trial.error
        running.keep_documents(apps.home, app, trial.documents)
    except LLMasOSError as e:
        put_back(apps, app, before, is_new=True, had_data=app.name in had_data)
        raise UnhealthyError(
            f"{app.name} {app.version} does not run, so it is not installed: {e.message}", hint=e.hint
        ) from e
    return app, trial
