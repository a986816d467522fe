"""`llmasos app test logs start ps`: what they say with a server and without one."""

import sys
from pathlib import Path

import pytest
from app_packages import write_app
from app_world import package_of, running
from cli_runner import Cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")


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
