"""What systemd and its like want of a service: a word when it is ready, a sign of life, a socket to take over.

Protocols: sd_notify(3) and sd_listen_fds(3). The variables are set by the service manager, for this process alone.
Nothing happens where they are not set.
"""

from __future__ import annotations

import asyncio
import os
import socket

_FIRST_DESCRIPTOR = 3


def notify(state: str) -> None:
    """Tell the service manager, e.g. `READY=1`. One that does not listen is no reason to stop."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address)
    except OSError:
        pass


async def sign_of_life() -> None:
    """Twice per watchdog period, as long as the event loop turns."""
    period = os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit() or int(period) == 0 or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(period) / 2e6)


def activated_socket() -> socket.socket | None:
    """The listening socket that the service manager has opened for this process (socket activation)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    return socket.socket(fileno=_FIRST_DESCRIPTOR)
