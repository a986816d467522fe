"""What a service manager is told, and the socket that it hands over."""

from __future__ import annotations

import asyncio
import configparser
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmasos.serve import systemd

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="service managers of this kind are Unix's")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listener


def test_a_manager_that_listens_is_told_and_another_is_no_error(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd.notify("READY=1")
    assert manager.recv(100) == b"READY=1"
    manager.close()
    systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "@no-such-abstract-socket")
    systemd.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")


async def test_signs_of_life_come_twice_a_period(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    await asyncio.wait_for(systemd.sign_of_life(), 10)  # no watchdog: nothing to do
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    await asyncio.wait_for(systemd.sign_of_life(), 10)  # another process's
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    living = asyncio.create_task(systemd.sign_of_life())
    for _ in range(3):
        assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
    living.cancel()
    manager.close()


def test_a_socket_is_taken_over_only_by_the_process_that_it_is_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for pid, expected in (("os.getpid()", str(listener.getsockname()[1])), ("1", "None")):
            code = (
                f"import os; os.dup2({listener.fileno()}, 3)\n"
                f"os.environ.update(LISTEN_PID=str({pid}), LISTEN_FDS='1')\n"
                "from llmasos.serve.systemd import activated_socket\n"
                "found = activated_socket(); print(found and found.getsockname()[1])"
            )
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, pass_fds=[listener.fileno()]
            )
            assert done.stdout.strip() == expected, done.stderr


def test_the_unit_names_what_there_is() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(Path(__file__).parents[2] / "deploy" / "llmasos.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and "llmasos serve --config" in service["ExecStart"]
    assert set(unit) >= {"Unit", "Service", "Install"}
