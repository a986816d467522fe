"""An installed application in a process of its own: what the server starts in the sandbox.

    python -m llmasos.apps.process /path/to/app.py[:name]

Standard input is a listening Unix socket, which the server has made: HTTP comes from there, and nobody else can reach
it. Standard output and error are its log. What it is told besides stands in variables (`settings.app_host`):

    LLMASOS_SERVER      unix:PATH of the socket where the server answers it, with LLMASOS_API_KEY as its key
    LLMASOS_APP_NAME    LLMASOS_APP_DATA, the folder that it may write in and begins in    LLMASOS_APP_CONFIG
    LLMASOS_APP_PROXY   PATH of a socket that takes CONNECT, where it may reach hosts; absent: none
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llmasos.apps import clients

STACK_BYTES = 1 << 20
"""Of a thread: the limit on memory counts all of a stack, whatever of it is used."""
GRACE_SECONDS = 5
_CHUNK = 1 << 16


def main() -> None:
    threading.stack_size(STACK_BYTES)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "mcp", "uvicorn.error"):  # a line for each request, and for each start
        logging.getLogger(name).setLevel(logging.WARNING)
    listener = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    if proxy := os.environ.get("LLMASOS_APP_PROXY"):
        _offer_proxy(proxy)
    try:
        _serve(sys.argv[1], listener)
    except Exception as e:
        from llmasos.errors import LLMasOSError

        if not isinstance(e, LLMasOSError):
            raise
        sys.exit(str(e))


def _serve(reference: str, listener: socket.socket) -> None:
    from llmasos.apps import hosting
    from llmasos.apps.loading import load_application
    from llmasos.settings import app_host

    application = load_application(reference)
    mounted = Mounted(application, f"/apps/{app_host().name}")
    try:
        hosting.run(mounted, listener, grace=GRACE_SECONDS, ready=lambda: None, lifespan="on")
    except SystemExit:  # how uvicorn says that the start-up failed
        reason = application.start_error
        sys.exit(f"It could not start: {type(reason).__name__}: {reason}.")
    # a function in a thread can't be interrupted, and would be waited for
    sys.stdout.flush()
    os._exit(0)


class Mounted:
    """ASGI middleware: the application is at `root` for those who ask for it, and the server says for whom it asks."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self._app, self._root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asks = clients.current.set(Headers(scope=scope).get(clients.CLIENT))
        try:
            scope = {**scope, "root_path": self._root, "path": self._root + scope["path"]}
            await self._app(scope, receive, send)
        finally:
            clients.current.reset(asks)


def _offer_proxy(path: str) -> None:
    """Clients of HTTP know proxies by addresses of TCP only: one on this process's own loopback leads to the socket."""
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except PermissionError:  # this system gives it no network of its own
        return
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ[name] = os.environ[name.lower()] = url
    bridge = threading.Thread(target=lambda: asyncio.run(_bridge(listener, path)), name="llmasos-proxy", daemon=True)
    bridge.start()


async def _bridge(listener: socket.socket, path: str) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_unix_connection(path)
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
            back.close()
        writer.close()

    async with await asyncio.start_server(connected, sock=listener) as server:
        await server.serve_forever()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All that is read is written, and then the end."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()


if __name__ == "__main__":
    main()
