"""app.run(): the specification's snippet in a process of its own, stopping, and what keeps it from starting."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llmasos.apps import Application
from llmasos.apps.server import LoopbackOnly
from llmasos.errors import InvalidInputError, ServerError

SNIPPET = """\
from llmasos import LLM, Application
model = LLM.from_pretrained("gpt2")
app = Application(model)
@app.route("/ask")
def ask(question):
    answer = model.generate_text(question, max_length=100)
    return answer
app.run()
"""
# The snippet runs as it is written: only the model behind LLM and the default port (8000 may be taken) are replaced.
STUB = """\
import runpy, sys
import llmasos
from llmasos.apps import Application
class LLM:
    @classmethod
    def from_pretrained(cls, name): return cls()
    def generate_text(self, prompt, *, max_length): return f"{prompt} and {max_length}"
llmasos.LLM = LLM
Application.run.__defaults__ = ("127.0.0.1", 0)
runpy.run_path(sys.argv[1])
assert "torch" not in sys.modules
print("after run")
"""


@contextlib.contextmanager
def running(script: str, tmp_path: Path, *, stub: bool = False) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the URL that it printed."""
    file = tmp_path / "app.py"
    file.write_text(script)
    command = [sys.executable, "-W", "error", *(["-c", STUB] if stub else []), str(file)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+:\d+", line)
            assert found, line + process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_snippet_of_the_specification_serves_and_a_signal_stops_it_cleanly(tmp_path, number):
    with running(SNIPPET, tmp_path, stub=True) as (process, url):
        assert httpx.get(f"{url}/ask", params={"question": "Why"}).json() == "Why and 100"
        assert httpx.post(f"{url}/ask", json={"question": "Who"}).json() == "Who and 100"
        assert httpx.post(f"{url}/ask", json={"qestion": "Who"}).status_code == 422
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == "after run\n"
    assert err == ""


STREAM = """
from llmasos import Application
import time
app = Application()
@app.on_stop
def bye(): print("hook", flush=True)
@app.route("/forever")
def forever():
    try:
        while True:
            yield "tick"
            time.sleep(0.02)
    finally:
        print("closed", flush=True)
@app.route("/broken")
def broken():
    raise ValueError("inside")
import llmasos.apps.server as server
server.GRACE_SECONDS = 1
app.run(port=0)
"""


def test_a_stream_in_flight_does_not_keep_the_process_alive(tmp_path):
    with running(STREAM, tmp_path) as (process, url):
        with httpx.stream("GET", f"{url}/forever", timeout=20) as stream:
            lines = stream.iter_lines()
            assert next(lines) == 'data: "tick"'
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.HTTPError):  # cut off after the grace time
                for _ in lines:
                    pass
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert sorted(out.split()) == ["closed", "hook"]
    assert "Traceback" not in err


def test_a_client_that_goes_away_and_a_failing_function_leave_the_server_up(tmp_path):
    with running(STREAM, tmp_path) as (process, url):
        with httpx.stream("GET", f"{url}/forever", timeout=20) as stream:
            assert next(stream.iter_lines()) == 'data: "tick"'
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
        problem = httpx.get(f"{url}/broken").json()
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert problem["error_id"] in err
    assert "ValueError: inside" in err


STUCK = """
from llmasos import Application
import time
app = Application()
@app.route("/stuck")
def stuck(): time.sleep(60)
import llmasos.apps.server as server
server.GRACE_SECONDS = 0
app.run(port=0)
"""


def test_a_function_that_does_not_end_is_named_and_can_be_left(tmp_path):
    with running(STUCK, tmp_path) as (process, url):
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{url}/stuck", timeout=0.5)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "Waiting for 1 running call(s); Ctrl-C leaves without them.\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_port_in_use_is_said_with_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is in use on 127.0.0.1") as caught:
            Application().run(port=port)
    assert "app.run(port=" in caught.value.hint


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_can_reach_needs_to_be_meant(host):
    with pytest.raises(ServerError, match="can be reached from other machines") as caught:
        Application().run(host, 0)
    assert "insecure=True" in caught.value.hint


def test_a_host_that_is_not_ours_and_a_port_that_is_none_are_refused():
    with pytest.raises(ServerError, match=r"203\.0\.113\.7"):
        Application().run("203.0.113.7", 0, insecure=True)
    for port in (-1, 65536, "8000", True):
        with pytest.raises(InvalidInputError, match="port="):
            Application().run(port=port)  # type: ignore[arg-type]


def test_another_name_pointed_at_this_machine_reaches_nothing(tmp_path):
    with running(STREAM, tmp_path) as (process, url):
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
            refused = httpx.get(f"{url}/healthz", headers={"host": host})
            assert refused.status_code == 403 and host in refused.json()["message"]
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            assert httpx.get(f"{url}/healthz", headers={"host": host}).status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0


async def test_a_websocket_of_another_name_is_closed():
    sent = []
    scope = {"type": "websocket", "headers": [(b"host", b"evil.example")]}

    async def send(message):
        sent.append(message)

    await LoopbackOnly(Application())(scope, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_run_inside_a_running_loop_says_what_to_do_instead():
    with pytest.raises(ServerError, match="event loop") as caught:
        Application().run(port=0)
    assert "uvicorn.Server" in caught.value.hint


def test_a_failing_start_hook_keeps_the_server_from_starting(capsys):
    app = Application(title="Mine")

    @app.on_start
    def start() -> None:
        raise ValueError("no database")

    with pytest.raises(ServerError, match="Mine could not start: ValueError: no database") as caught:
        app.run(port=0)
    assert isinstance(caught.value.__cause__, ValueError)
    assert capsys.readouterr().out == ""


def test_open_shows_the_page_in_a_browser(monkeypatch, capsys):
    import webbrowser

    app = Application()
    opened: list[str] = []

    def browser(url: str) -> bool:
        opened.append(url)
        assert httpx.get(url).status_code == 200
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(webbrowser, "open", browser)
    before = signal.getsignal(signal.SIGINT)
    app.run(port=0, open=True)
    assert opened[0].endswith("/docs")
    assert opened[0] in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_importing_the_room_is_light():
    code = (
        "import sys, llmasos; assert 'fastapi' not in sys.modules\n"
        "from llmasos import Application; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
