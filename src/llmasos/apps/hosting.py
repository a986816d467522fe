"""One process, one address, a clean stop: how applications and `llmasos serve` are run.

Ctrl-C, SIGTERM and SIGHUP (its terminal was closed) end a server in order: no new requests, some seconds for those in
flight, and `run` returns. A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from llmasos.apps.connection import BoundedHttp
from llmasos.client.http import is_loopback
from llmasos.errors import InvalidInputError, ServerError

Spelling = Callable[[str, Any], str]
"""How an option is written by whoever reads a hint."""


def as_flag(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def check_exposure(host: str, *, insecure: bool, spelling: Spelling = as_flag) -> None:
    """Raises ServerError for an address that others can reach, unless that is wanted: there are no keys yet."""
    if not is_loopback(host) and not insecure:
        raise ServerError(
            f"host {host!r} can be reached from other machines, and nobody is asked for a key.",
            hint=f"Use {spelling('host', '127.0.0.1')}, or {spelling('insecure', True)} "
            "if everyone who can reach it may use it.",
        )


def listen(host: str, port: int, *, spelling: Spelling = as_flag) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises InvalidInputError for what is no port, and ServerError that
    says why the address can't be had."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise InvalidInputError(f"port={port!r} is not a whole number from 0 to 65535 (0: any free one).", param="port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise _unusable(host, port, e, spelling) from e
    # IPv4 first, where `localhost` is both: it is what other programs try.
    family, kind, protocol, _, address = min(found, key=lambda f: f[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        if not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            # Without it a server can't come back for a minute; on Windows it would let two share a port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        listener.close()
        raise _unusable(host, port, e, spelling) from e
    return listener


def _unusable(host: str, port: int, e: Exception, spelling: Spelling) -> ServerError:
    number = e.errno if isinstance(e, OSError) else None
    if number == errno.EADDRINUSE:
        return ServerError(
            f"Port {port} is in use on {host}.",
            hint=f"Stop what uses it, or choose another: {spelling('port', port % 65535 + 1)}.",
        )
    if number == errno.EACCES:
        return ServerError(
            f"Port {port} may not be used by this user.", hint=f"Choose one above 1023: {spelling('port', 8000)}."
        )
    return ServerError(f"The address {host}:{port} can't be used: {e}.", hint=f"Try {spelling('host', '127.0.0.1')}.")


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def foreign_host(scope: Scope) -> str | None:
    """What to answer a request whose Host header is no loopback name; None if it is one.

    A web page whose own name was pointed at 127.0.0.1 (DNS rebinding) could otherwise reach an open server through its
    visitor's browser.
    """
    header = Headers(scope=scope).get("host", "")
    name = header if header.endswith("]") else header.rpartition(":")[0] or header
    return None if is_loopback(name) else f"The host {header!r} is not this machine's loopback name."


class Stop:
    """Ends the server that `run` was given it for, from inside its event loop: as a signal would."""

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None

    def watch(self, server: uvicorn.Server) -> None:
        self._server = server

    def __call__(self) -> None:
        if self._server is not None:
            self._server.should_exit = True


def run(
    app: ASGIApp,
    listener: socket.socket,
    *,
    grace: int,
    ready: Callable[[], None],
    stopping: Callable[[], None] = lambda: None,
    stop: Stop | None = None,
    lifespan: Literal["on", "off"] = "off",
) -> None:
    """Serve `app` until a signal; requests in flight then get `grace` seconds. `ready` is called before the first one,
    `stopping` in the event loop as soon as the server is told to stop.

    Raises SystemExit if the application's own start-up fails.
    """
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        log_config=None,  # logging stays as the program has set it up
        access_log=False,
        lifespan=lifespan,
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    server = _Server(config, ready, stopping)
    if stop is not None:
        stop.watch(server)
    try:
        server.run(sockets=[listener])
    finally:
        logger.setLevel(level)


class _Server(uvicorn.Server):
    """Returns after a signal instead of raising it again: a server that was asked to stop has not failed."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._stopping = ready, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            handled.append(signal.SIGHUP)
        before: Mapping[int, Any] = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn logs a traceback for each request that it cuts off; what fails while stopping has logs of its own.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)
