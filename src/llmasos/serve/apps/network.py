"""The way out for applications that were granted hosts: a proxy on a Unix socket, one for each application.

It takes `CONNECT host:port` and plain `GET http://host/`, as clients send it that know a proxy from HTTPS_PROXY. A host
is allowed by its name in the manifest, and then only at addresses of the public internet: a name is its owner's to
point at this machine or at others of its network, where doors stand open that no manifest names. A host that is granted
as an address, or as `localhost`, is reached wherever it is. What goes through is not looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from llmasos.apps.process import pump
from llmasos.settings import settings
from llmasos.store.packages.manifest import Grant

HEAD_BYTES, HEAD_SECONDS, CONNECT_SECONDS = 16 * 1024, 15.0, 20.0
AT_ONCE = 64


class Refused(Exception):
    """`status` and a sentence for the application."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class NetworkDoor:
    """`hosts`: as the manifest's `permissions.net` has them. `tell`: gets a line for the application's log about each
    host that was refused."""

    def __init__(self, hosts: Sequence[str], tell: Callable[[str], None]) -> None:
        self._granted = [Grant("net", host) for host in hosts]
        self._tell = tell
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def open(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._connected, path, limit=HEAD_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await self._serve(reader, writer)
        except Refused as e:
            self._tell(f"network: {e}")
            body = f"{e}\n".encode()
            head = f"HTTP/1.1 {e.status}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n"
            writer.write(f"{head}connection: close\r\n\r\n".encode() + body)
            with contextlib.suppress(OSError):
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            self._running.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        if len(self._running) > AT_ONCE:
            raise Refused("503 Service Unavailable", f"{AT_ONCE} connections are open already")
        method, _, rest = head.partition(b" ")
        target, _, rest = rest.partition(b" ")
        host, port, first = _asked(method.decode("latin-1"), target.decode("latin-1"), rest)
        there, back = await self._reach(host, port)
        try:
            if first:
                back.write(first)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(reader, back), pump(there, writer))
        finally:
            back.close()

    async def _reach(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        check_granted(self._granted, host, port)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                loop = asyncio.get_running_loop()
                found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
                addresses = [str(one[4][0]) for one in found]
                allowed = [one for one in addresses if is_literal(host) or is_public(one)]
                if not allowed:
                    raise Refused("403 Forbidden", f"{host} is {addresses[0]}, which is not on the public internet")
                return await asyncio.open_connection(allowed[0], port)
        except (OSError, TimeoutError) as e:
            raise Refused("502 Bad Gateway", f"{host}:{port} could not be reached: {e or 'no answer'}") from e


def _asked(method: str, target: str, rest: bytes) -> tuple[str, int, bytes]:
    """Host, port, and what to send first: of a request that is not CONNECT, the request as its server expects it."""
    try:
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused("400 Bad Request", "the address can't be read") from None
    host = f"[{host}]" if ":" in host else host.rstrip(".").lower()
    if method == "CONNECT" and host and port:
        return host, port, b""
    if parts.scheme != "http" or not host:
        raise Refused("400 Bad Request", "a proxy takes CONNECT host:port, or http://host/path")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    version, _, fields = rest.partition(b"\r\n")
    kept = [line for line in fields.split(b"\r\n") if line and not line.lower().startswith((b"proxy-", b"connection:"))]
    lines = [f"{method} {path} ".encode("latin-1") + version, *kept, b"connection: close"]
    return host, port or 80, b"\r\n".join(lines) + b"\r\n\r\n"


def check_granted(granted: Sequence[Grant], host: str, port: int) -> None:
    """Raises Refused."""
    if settings().offline and not is_literal(host):
        raise Refused("403 Forbidden", f"offline mode is on, so {host} was not asked")
    wanted = Grant("net", f"{host}:{port}")
    # a pattern is for the internet: what is on this machine or in its network has to be named
    if not any(one.covers(wanted) and not ("*" in one.value and is_literal(host)) for one in granted):
        raise Refused("403 Forbidden", f"{host}:{port} is none of the hosts that were granted")


def is_literal(host: str) -> bool:
    """Whether a host says itself where it is."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (mapped is None or is_public(str(mapped)))
