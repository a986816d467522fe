"""`llmasos app test logs start ps`: what they say with a server and without one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from app_packages import write_app
from app_world import package_of, running
from cli_runner import Cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "LLMASOS_HOME": str(home / "home"), "LLMASOS_LANG": "en", "LLMASOS_OFFLINE": "1"}


def test_an_application_is_tried_before_it_is_packed(cli: Cli, tmp_path: Path) -> None:
    folder = write_app(tmp_path / "ask")
    done = cli("app", "test", str(folder), "--json")
    assert done.code == 0 and done.json["runs"] and done.json["routes"] == ["tell"], done.err
    (folder / "app.py").write_text("raise RuntimeError('not today')")
    failed = cli("app", "test", str(folder))
    assert failed.code != 0 and "not today" in failed.err
    refused = cli("app", "install", str(package_of(tmp_path, "1/0", name="zero")), "--yes")
    assert refused.code != 0 and "not installed" in refused.err and "ZeroDivisionError" in refused.err
    assert cli("app", "ls", "--json").json == []


APP = """
from llmasos import Application
app = Application(title="Ask")


@app.route("/hi")
def hi() -> str:
    \'\'\'Greet.\'\'\'
    return "one"
"""


def test_while_it_is_written_it_is_served_anew_after_each_change(tmp_path: Path) -> None:
    folder = write_app(tmp_path / "ask")
    file = folder / "app.py"
    file.write_text(APP)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "llmasos", "app", "dev", str(folder), "--port", str(port)]

    def until(wanted: str | None) -> None:
        """The route answers this; None: nobody does."""
        for _ in range(600):
            try:
                said = httpx.get(f"http://127.0.0.1:{port}/hi", trust_env=False).json()
            except httpx.HTTPError:
                said = None
            if said == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"not {wanted}: {log.read_text()}")

    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment(tmp_path)) as process:
        try:
            until("one")
            file.write_text(APP + "\n1 / 0\n")
            until(None)
            for _ in range(600):
                if "waiting for a change" in log.read_text():
                    break
                time.sleep(0.05)
            said = log.read_text()
            assert "ZeroDivisionError: division by zero" in said and "app.py" in said
            assert "llmasos/apps/loading.py" not in said, "its own lines are not the reader's"
            file.write_text(APP.replace("one", "two"))
            until("two")
        finally:
            process.terminate()
        assert process.wait(30) == 0
    until(None)


def test_a_port_that_is_taken_ends_it_at_once(cli: Cli, tmp_path: Path) -> None:
    folder = write_app(tmp_path / "ask")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = cli("app", "dev", str(folder), "--port", str(port))
    assert found.code == 8 and f"Port {port} is in use" in found.err and f"--port {port + 1}" in found.err


def test_without_a_server_it_is_said(cli: Cli) -> None:
    assert "No server answers" in cli("app", "ps", "--url", "http://127.0.0.1:9").err
    assert "There is no log of ask" in cli("app", "logs", "ask").err
    assert "--follow" in cli("app", "ps", "--follow").err
    assert cli("app", "start").code == 2


def test_those_on_a_server_are_seen_and_stopped(cli: Cli, tmp_path: Path) -> None:
    with running(tmp_path) as world:
        world.install(package_of(tmp_path))
        url = ("--url", str(world.client.base_url))
        shown = cli("app", "ps", *url).out
        assert "ask" in shown and "running" in shown
        assert "runs as process" in cli("app", "logs", "ask", *url).out
        assert cli("app", "stop", "ask", *url).code == 0
        assert cli("app", "ps", "--json", *url).json[0]["state"] == "stopped"
