"""Commands that ask a running server: ps, load, unload, stop, log, top; and what they say where none runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cli_runner import Cli
from fake_llm import FakeLLM, live_server

from llmasos.apps.hosting import listen
from llmasos.cli import ps, top
from llmasos.cli.log import text_of
from llmasos.client.native import Native
from llmasos.client.types.native import LogLine, ModelStatus, ReplicaInfo, SystemInfo
from llmasos.errors import NetworkError

COMMANDS = (["ps"], ["load", "m"], ["unload", "m"], ["stop", "m"], ["log"], ["top", "--once"])


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("LLMASOS_API_KEY", raising=False)
    with live_server({"a": FakeLLM("a"), "b": FakeLLM("b")}) as found:
        monkeypatch.setenv("LLMASOS_URL", found.removesuffix("/v1"))
        yield found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_without_a_server_the_next_command_is_named(cli: Cli, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = cli(*command, "--url", f"http://127.0.0.1:{port}")
    assert result.code == 6
    assert f"No server answers at http://127.0.0.1:{port}" in result.err and "llmasos serve" in result.err
    as_json = cli(*command, "--url", f"http://127.0.0.1:{port}/v1/", "--json")
    assert as_json.json["error"]["code"] == "network" and as_json.err == ""


@pytest.mark.parametrize("wrong", ["ftp://host", "localhost:8000", "http://", ""])
def test_what_is_no_url_is_said(cli: Cli, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("ps", "--url", wrong) if wrong else cli("ps", "--url", "x")
    assert result.code == 2 and "not the URL of a server" in result.err
    monkeypatch.setenv("LLMASOS_URL", "nonsense")
    assert cli("ps").code == 2


def test_ps_lists_models_for_people_and_programs(cli: Cli, url: str) -> None:
    lines = cli("ps").out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["a", "ready"], ["b", "ready"]]
    assert [one["name"] for one in cli("ps", "--json").json] == ["a", "b"]
    assert cli("ps", "--url", url).out.splitlines()[1].split()[0] == "a"


def test_load_and_unload_answer_with_what_became_of_it(cli: Cli, url: str) -> None:
    assert "a is ready" in cli("load", "a", "--pin").err
    assert cli("load", "a", "--json").json["state"] == "ready"
    missing = cli("load", "none")
    assert missing.code == 3 and "none" in missing.err
    for command in ("unload", "stop"):
        refused = cli(command, "a")
        assert refused.code == 2 and "belongs to the program" in refused.err
        which = cli(command)
        assert which.code == 2 and "--all" in which.err and "Ctrl-C" in which.err
        assert cli(command, "a", "--all").code == 2


def test_log_prints_lines_and_objects(cli: Cli, url: str) -> None:
    httpx.post(f"{url}/completions", json={"model": "a", "prompt": "boom"}, headers={"x-request-id": "mine"})
    text = cli("log", "--level", "error").out
    assert "request mine failed" in text and "the secret cause" in text and "[mine]" in text
    objects = [json.loads(line) for line in cli("log", "--json", "--request", "mine").out.splitlines()]
    assert {one["request_id"] for one in objects} == {"mine"} and "error" in [one["level"] for one in objects]
    assert cli("log", "--request", "another").out == ""
    assert cli("log", "--level", "loud").code == 2
    assert cli("log", "--limit", "-1").code == 2


def test_a_log_line_does_not_command_the_terminal() -> None:
    fields = {"exception": "Traceback\n  \x1b[2Jbad"}
    now = datetime.now(UTC)
    line = LogLine(time=now, level="error", logger="x", message="a\x1b[31m\nb", request_id="r", fields=fields)
    text = text_of(line)
    assert "\x1b" not in text and text.count("\n") == 2 and "\\x1b[31m\\x0ab [r]" in text


def test_top_draws_once_and_gives_numbers(cli: Cli, url: str) -> None:
    text = cli("top", "--once", "--every", "0.1").out
    assert "LLMasOS" in text and "tokens/s" in text and re.search(r"^a +ready", text, re.MULTILINE)
    facts = cli("top", "--json", "--every", "0.1").json
    assert [one["name"] for one in facts["models"]] == ["a", "b"]
    assert facts["models"][0]["tokens_per_second"] == 0.0 and facts["system"]["devices"]
    assert cli("top", "--every", "0").code == 2


def status(name: str, **facts: object) -> ModelStatus:
    return ModelStatus.model_validate({"name": name, "reference": name, "state": "ready"} | facts)


def test_a_view_shows_rates_requests_and_why_a_model_is_gone() -> None:
    from rich.console import Console

    machine = {"name": "cpu", "kind": "x", "memory_total": 100, "memory_free": 40}
    now = datetime.now(UTC)
    system = SystemInfo.model_validate(
        dict.fromkeys(("version", "python", "torch", "platform", "home", "device", "dtype"), "x")
        | {"pid": 1, "started": now, "uptime_seconds": 3700, "disk_free": 1, "offline": False, "cpu_cores": 1}
        | {"cpu_percent": 50, "memory_rss": 1, "devices": [machine, {**machine, "name": "cuda:0", "memory_free": None}]}
    )
    request = {"id": "r1", "route": "POST /x", "model": "[red]m", "key": None, "state": "running", "age_seconds": 1.5}

    class Server:
        tokens = 0

        def status(self) -> list[ModelStatus]:
            self.tokens += 50
            gone = {"state": "absent", "why_evicted": "b needed the room"}
            return [status("a", num_generated_tokens=self.tokens, busy=2, waiting=3), status("old", **gone)]

        def system(self) -> SystemInfo:
            return system

        def requests(self) -> list[object]:
            from llmasos.client.types.native import RequestInfo

            return [RequestInfo.model_validate(request)]

    server = Server()
    first = top.look(server)  # type: ignore[arg-type]
    time.sleep(0.05)
    view = top.look(server, first)  # type: ignore[arg-type]
    assert first.rates == {} and 0 < view.rates["a"] <= 1000
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (rich closes nothing)
    console.print(top.picture(view))
    text = console.export_text()
    console.file.close()
    assert "2+3" in text and "b needed the room" in text and "[red]m" in text and "1 h 1 min" in text
    assert "1 requests run, 0 wait" in text and "cuda:0 100 B" in text


def test_how_long_a_model_stays_and_what_it_takes_is_said_in_words() -> None:
    now = datetime.now(UTC)
    assert ps.until(status("a", pinned=True)) == "pinned"
    assert ps.until(status("a", expires_at=now + timedelta(seconds=90))) in ("90 s", "89 s")
    assert ps.until(status("a", expires_at=now + timedelta(seconds=600))) in ("10 min", "9 min")
    assert ps.until(status("a")) == "for ever" and ps.until(status("a", busy=1)) == "in use"
    assert ps.until(status("a", state="loading")) == "-"
    assert ps.memory(status("a", predicted_bytes={"cpu": 2000})) == "~2.0 kB"
    assert ps.memory(status("a", measured_bytes={"cpu": 1000, "cuda:0": 1000})) == "2.0 kB"
    two = [ReplicaInfo(device="cuda:0", state="ready"), ReplicaInfo(device="cuda:1", state="ready")]
    assert ps.devices(status("a", replicas=two)) == "cuda:0, cuda:1 x2" and ps.devices(status("a")) == "-"
    assert ps.remark(status("a", last_error="it broke", why_evicted="x")) == "it broke"
    long = [ReplicaInfo(device="cpu", state="ready", step_seconds=75.3)]
    assert ps.remark(status("a", replicas=long)) == "a step of its engine has been running for 75 s"


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({"phase": "download", "done": 1000, "total": 4000}, "downloading 1.0 kB / 4.0 kB (25 %)"),
        ({"phase": "check", "done": 1000}, "checking 1.0 kB"),
        ({"phase": "load", "seconds": 2.2, "expected_seconds": 9.6}, "reading its weights, 2 s of about 10 s"),
        ({"phase": "start", "expected_seconds": 0.2}, "starting its process, 0 s of about 1 s"),
        ({"phase": "room"}, "waiting for room in memory"),
        ({"phase": "plan"}, "reading its headers"),
    ],
)
def test_how_far_a_load_is_is_said_in_words(progress: dict[str, object], words: str) -> None:
    assert ps.remark(status("a", state="loading", loading=progress, last_error="earlier")) == words


def test_load_shows_how_far_it_is_while_it_waits(
    cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = threading.Event()

    def load(self: Native, model: str, *, pin: bool | None = None) -> ModelStatus:
        assert looked.wait(20)
        return status(model, load_seconds=1.0)

    def look(self: Native) -> list[ModelStatus]:
        shown = capsys.readouterr().err
        if "reading its weights, 2 s of about 10 s" in shown:
            looked.set()
        return [status("A", state="loading", loading={"phase": "load", "seconds": 2, "expected_seconds": 10})]

    monkeypatch.setattr(Native, "load", load)
    monkeypatch.setattr(Native, "status", look)
    monkeypatch.setattr(ps, "LOOK_S", 0.001)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "a is ready" in cli("load", "a").err


def test_top_leaves_at_q_and_goes_on_when_the_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    pressed = iter(["", "", "q"])

    @contextlib.contextmanager
    def keys() -> Iterator[object]:
        yield lambda seconds: next(pressed)

    looks: list[int] = []

    def look(native: object, before: top.View) -> top.View:
        looks.append(1)
        if len(looks) == 1:
            raise NetworkError("It is away.")
        return before

    monkeypatch.setattr(top, "keys", keys)
    monkeypatch.setattr(top, "look", look)
    monkeypatch.setattr(top, "picture", lambda view: "the view")
    top._live(None, top.View(0, None, [], [], {}), 0.1)  # type: ignore[arg-type]
    assert len(looks) == 2


def test_a_port_in_use_and_a_wrong_file_are_said_before_anything_is_loaded(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = cli("serve", str(tiny_model), "--port", str(port))
    assert result.code == 8 and f"Port {port} is in use" in result.err and f"--port {port + 1}" in result.err
    file = tmp_path / "mine.toml"
    file.write_text("prot = 80")
    wrong = cli("serve", "--config", str(file))
    assert wrong.code == 2 and "mine.toml" in wrong.err and "'prot'" in wrong.err and "port" in wrong.err
    assert cli("serve", "--config", str(tmp_path / "none.toml")).code == 3
    assert cli("serve", "--log-format", "xml").code == 2


def test_a_server_of_processes_from_its_start_to_its_stop(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    psutil = pytest.importorskip("psutil")
    (tmp_path / "serve.toml").write_text('log_format = "json"\n[engine]\nmax_num_seqs = 4\n')
    (home / "models").mkdir(parents=True)
    (home / "models" / "other").symlink_to(tiny_model)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llmasos", "serve", str(tiny_model), "--config", str(tmp_path / "serve.toml")]
    errors = (tmp_path / "stderr").open("w+")
    with subprocess.Popen([*command, "--port", str(port), "--dtype", "float32"], stderr=errors) as server:
        try:
            base, name = f"http://127.0.0.1:{port}", tiny_model.name
            monkeypatch.setenv("LLMASOS_URL", base)
            ready = _until_ready(base, server)
            assert ready <= {"ready", "not ready"}
            body = {"model": name, "prompt": "The quick", "max_tokens": 4, "ignore_eos": True}
            answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 4
            [model] = cli("ps", "--json").json
            assert (model["name"], model["state"], model["expires_at"]) == (name, "ready", None)
            [replica] = model["replicas"]
            assert psutil.pid_exists(replica["pid"]) and model["measured_bytes"]["cpu"] > 10**7
            assert not _has_torch(server.pid)
            # another one of the library, by the native API
            assert cli("load", "other").code == 0, errors
            assert {one["name"] for one in cli("ps", "--json").json} == {name, "other"}
            assert cli("unload", "--all").code == 0
            assert not psutil.pid_exists(replica["pid"])
            assert {one["state"] for one in cli("ps", "--json").json} == {"absent"}
            missing = cli("load", "nothing")
            assert missing.code == 3 and "not installed" in missing.err
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(30)
    errors.seek(0)
    text = errors.read()
    errors.close()
    assert code == 0 and "Traceback" not in text, text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert any(line.get("route") == "POST /v1/completions" and line.get("output_tokens") == 4 for line in lines)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tiny_model) in (p.info["cmdline"] or [])]


def _until_ready(base: str, server: subprocess.Popen[bytes]) -> set[str]:
    seen: set[str] = set()
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            answer = httpx.get(f"{base}/readyz")
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        seen.add(answer.json()["status"])
        if answer.status_code == 200:
            return seen
        assert answer.json()["reasons"]["models"].startswith("loading")
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def _has_torch(pid: int) -> bool:
    maps = Path(f"/proc/{pid}/maps")
    return maps.exists() and "libtorch" in maps.read_text()


def test_a_model_that_can_not_be_loaded_ends_the_server_with_its_reason(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    (folder / "model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "llmasos", "serve", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 4, done.stderr
    assert "NoSuchModel" in done.stderr and "Traceback" not in done.stderr and "Serving" not in done.stderr


def test_console_names_the_page_of_a_server_that_answers(cli: Cli, url: str) -> None:
    assert cli("console", "--no-open").out == f"{url.removesuffix('/v1')}/console/\n"
    assert cli("console", "--url", "http://127.0.0.1:9").code == 6
