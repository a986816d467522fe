"""`app.run()`: an application on one address, a page in the browser, an orderly stop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import webbrowser
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from llmasos.apps import hosting, problems
from llmasos.client.http import is_loopback
from llmasos.errors import ServerError

if TYPE_CHECKING:
    from llmasos.apps.application import Application

GRACE_SECONDS = 5
"""How long requests in flight may go on after the signal to stop."""
_BRIEFLY_SECONDS = 1.0


def serve(app: Application, host: str, port: int, *, open: bool, insecure: bool) -> None:
    """Serve until a signal. Raises InvalidInputError and ServerError before the first request, never later."""
    _check_loop()
    hosting.check_exposure(host, insecure=insecure, spelling=_as_argument)
    with hosting.listen(host, port, spelling=_as_argument) as listener:
        url = hosting.url_of(host, listener.getsockname()[1])

        def ready() -> None:
            print(f"{app.title}: {url} (try it at {url}/docs, Ctrl-C stops)", flush=True)
            if open:
                threading.Thread(target=webbrowser.open, args=(f"{url}/docs",), daemon=True).start()

        guarded = LoopbackOnly(app) if is_loopback(host) else app
        try:
            hosting.run(guarded, listener, grace=GRACE_SECONDS, ready=ready, lifespan="on")
        except SystemExit:  # how uvicorn says that the start-up failed
            reason = app.start_error
            raise ServerError(f"{app.title} could not start: {type(reason).__name__}: {reason}.") from reason
    _wait_for_functions(app)


def _as_argument(name: str, value: Any) -> str:
    return f"app.run({name}={value!r})"


class LoopbackOnly:
    """ASGI middleware: requests that name another host are refused (see hosting.foreign_host)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = hosting.foreign_host(scope) if scope["type"] in ("http", "websocket") else None
        if message is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            body = problems.problem(403, "forbidden_host", message, hint="Use the address that app.run() printed.")
            await problems.response(body)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": message})


def _check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ServerError(
        "app.run() needs an event loop of its own, and one is running already (a notebook, an async function).",
        hint="Call it from a thread, or: await uvicorn.Server(uvicorn.Config(app)).serve().",
    )


def _wait_for_functions(app: Application) -> None:
    """A function in a thread can't be interrupted; say so instead of hanging without a word."""
    deadline = time.monotonic() + _BRIEFLY_SECONDS
    while app.num_running and time.monotonic() < deadline:
        time.sleep(0.01)  # a stream that was cut off ends at its next element
    if not app.num_running:
        return
    print(f"Waiting for {app.num_running} running call(s); Ctrl-C leaves without them.", flush=True)
    try:
        while app.num_running:
            time.sleep(0.05)
    except KeyboardInterrupt:
        os._exit(130)
