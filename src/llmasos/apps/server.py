"""`app.run()`: one process, one address, a clean stop.

Ctrl-C and SIGTERM end it in order: no new requests, a few seconds for those in flight, stop hooks, and `run` returns. A
second Ctrl-C leaves at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from llmasos.errors import InvalidInputError, ServerError

if TYPE_CHECKING:
    from llmasos.apps.application import Application

GRACE_SECONDS = 5
"""How long requests in flight may go on after the signal to stop."""
_BRIEFLY_SECONDS = 1.0


def serve(app: Application, host: str, port: int, *, open: bool, insecure: bool) -> None:
    """Serve until a signal. Raises InvalidInputError and ServerError before the first request, never later."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise InvalidInputError(f"port={port!r} is not a whole number from 0 to 65535 (0: any free one).", param="port")
    _check_loop()
    with _bind(host, port, insecure=insecure) as listener:
        url = _url(host, listener.getsockname()[1])

        def ready() -> None:
            print(f"{app.title}: {url} (try it at {url}/docs, Ctrl-C stops)", flush=True)
            if open:
                threading.Thread(target=webbrowser.open, args=(f"{url}/docs",), daemon=True).start()

        config = uvicorn.Config(
            app,
            log_config=None,  # the application's own logging stays as it is
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        _Server(config, ready).run_until_signal(app, listener)
    _wait_for_functions(app)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    def run_until_signal(self, app: Application, listener: socket.socket) -> None:
        logger = logging.getLogger("uvicorn.error")
        level = logger.level
        try:
            self.run(sockets=[listener])
        except SystemExit:  # how uvicorn says that the start-up failed
            reason = app.start_error
            raise ServerError(f"{app.title} could not start: {type(reason).__name__}: {reason}.") from reason
        finally:
            logger.setLevel(level)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: a wished stop is no failure (exit status 0)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn logs a traceback for each request that it cuts off; stop hooks log their own failures.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def _check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ServerError(
        "app.run() needs an event loop of its own, and one is running already (a notebook, an async function).",
        hint="Call it from a thread, or: await uvicorn.Server(uvicorn.Config(app)).serve().",
    )


def _bind(host: str, port: int, *, insecure: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as e:
        raise ServerError(f"host={host!r} is not an address of this machine: {e}.", hint='Use host="127.0.0.1".') from e
    # IPv4 first, where `localhost` is both: it is what other programs try.
    family, kind, protocol, _, address = min(found, key=lambda f: f[0] != socket.AF_INET)
    if not insecure and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ServerError(
            f"host={host!r} can be reached from other machines, and an application asks nobody for a key.",
            hint="Keep 127.0.0.1, or pass insecure=True if everyone who can reach it may use it.",
        )
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        listener.close()
        raise _bind_error(e, host, port) from e
    return listener


def _bind_error(error: OSError, host: str, port: int) -> ServerError:
    if error.errno == errno.EADDRINUSE:
        return ServerError(
            f"Port {port} of {host} is in use by another program.",
            hint=f"Stop it, or take another port: app.run(port={port % 65535 + 1}); port=0 takes any free one.",
        )
    if error.errno == errno.EACCES:
        return ServerError(
            f"Port {port} may not be opened by this user.", hint="Take one above 1023: app.run(port=8000)."
        )
    return ServerError(f"{host} port {port} can't be opened: {error.strerror or error}.")


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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
