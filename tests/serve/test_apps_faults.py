"""What goes wrong around installed applications: at the same time, too slowly, on purpose."""

import asyncio
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from app_world import ASK, World, package_of, running
from fake_llm import FakeLLM

from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.serve.apps import environment, supervisor
from llmasos.serve.apps.log import AppLog
from llmasos.serve.apps.running import MOST_DOCUMENT, Running
from llmasos.serve.apps.supervisor import Supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("faults")) as found:
        yield found


def wheel(path: Path, name: str, files: dict[str, str]) -> None:
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{one},,\n" for one in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for one, text in files.items():
            archive.writestr(one, text)


def test_nothing_of_a_package_runs_when_it_is_installed(world: World, tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    wheel(
        tmp_path / "sly-1.0-py3-none-any.whl",
        "sly",
        {"sly/__init__.py": "WORD = 1\n", "sly.pth": f"import os; open({str(sign)!r}, 'w').close()\n"},
    )
    files = {
        "requirements.lock": b"sly==1.0\n",
        "wheels/sly-1.0-py3-none-any.whl": (tmp_path / "sly-1.0-py3-none-any.whl").read_bytes(),
    }
    code = ASK + '\n@app.route("/sly")\ndef sly() -> int:\n    import sly\n    return sly.WORD\n'
    world.install(package_of(tmp_path, code, name="sly", files=files))
    assert world.client.get("/apps/sly/sly").json() == 1
    assert not sign.exists()
    folder = environment.folder_of(world.home, "sly", "1.0.0")
    assert list(folder.rglob("sly/__pycache__/__init__*.pyc")), "it can't write byte code itself"


@pytest.mark.parametrize("installer", environment._INSTALLERS, ids=" ".join)
def test_what_would_have_to_be_built_is_refused(
    world: World, tmp_path: Path, installer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign, source = tmp_path / "ran", tmp_path / "odd-1.0"
    source.mkdir()
    head = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(head + '[project]\nname = "odd"\nversion = "1.0"\n')
    (source / "backend.py").write_text(f"open({str(sign)!r}, 'w').close()\n")
    with tarfile.open(tmp_path / "odd-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "odd-1.0")
    monkeypatch.setattr(environment, "_INSTALLERS", (installer,))
    monkeypatch.setenv("LLMASOS_OFFLINE", "0")
    lock = f"odd @ {(tmp_path / 'odd-1.0.tar.gz').as_uri()}\n".encode()
    path = package_of(tmp_path, name="odd", files={"requirements.lock": lock})
    answer = world.client.put("/llmasos/v1/apps?accept=true", content=path.read_bytes())
    assert answer.status_code == 422 and "has to be built" in answer.json()["error"]["message"], answer.text
    assert not sign.exists()


def test_packages_that_take_too_long_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.store.packages import Apps
    from llmasos.store.packages.requirements import parse_lock

    def slow(command: list[str], **options: object) -> object:
        raise subprocess.TimeoutExpired(command, 1)

    app = Apps(tmp_path).install(str(package_of(tmp_path)), accept=True)
    monkeypatch.setattr(environment, "_runs", lambda command: True)
    monkeypatch.setattr(environment.subprocess, "run", slow)
    monkeypatch.setenv("LLMASOS_OFFLINE", "0")
    with pytest.raises(UnsupportedError, match="were not there after 600 s"):
        environment._install(tmp_path, app, parse_lock(b"httpx==99"))


ODD = """
from llmasos import Application
from llmasos.apps import File
app = Application(title="Odd")


@app.asgi.middleware("http")
async def odd(request, call_next):
    from starlette.responses import Response, StreamingResponse

    def flood():
        while True:
            yield b" " * 65536

    path = request.url.path.rpartition("/apps/odd")[2]
    if path == "/healthz":
        return StreamingResponse(flood())
    if path == "/app.json":
        return Response(rb'{"title": "\\ud83d", "chat": {}, "routes": []}', media_type="application/json")
    if path == "/openapi.json":
        return Response(b'{"paths": {"/a": {"get": {"x": 1e999}}}}', media_type="application/json")
    if path == "/jobs":
        return StreamingResponse(flood(), media_type="application/json")
    return await call_next(request)
"""


def test_one_that_says_too_much_or_nonsense_harms_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    origin = httpx.Response.aiter_raw

    async def counted(self: httpx.Response, *args: object) -> object:
        nonlocal read
        async for piece in origin(self, *args):
            read += len(piece)
            yield piece

    monkeypatch.setattr(httpx.Response, "aiter_raw", counted)
    world.install(package_of(world.folder, ODD, name="odd"))
    assert world.client.get("/llmasos/v1/apps").status_code == 200
    assert world.client.get("/llmasos/v1/apps/openapi.json").json()["openapi"] == "3.1.0"
    assert world.info("odd")["title"] == "odd"
    assert world.client.get("/llmasos/v1/jobs").json()["data"] == []
    assert read < 2 * MOST_DOCUMENT, "its health was not read to the end"
    world.client.delete("/llmasos/v1/apps/odd?data=true")


def test_two_installs_at_once_do_not_undo_each_other(world: World) -> None:
    slow_and_broken = "import time\ntime.sleep(1.0)\nraise RuntimeError('no')\n"
    bad = package_of(world.folder, slow_and_broken, name="twice", version="1.0.0").read_bytes()
    good = package_of(world.folder, name="twice", version="2.0.0").read_bytes()
    answers: dict[str, int] = {}

    def install(name: str, data: bytes) -> None:
        answers[name] = world.client.put("/llmasos/v1/apps?accept=true", content=data).status_code

    threads = [threading.Thread(target=install, args=one) for one in (("bad", bad), ("good", good))]
    threads[0].start()
    for _ in range(200):
        if (world.home / "apps" / "twice" / "current").exists():
            break
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert answers == {"bad": 422, "good": 201}
    assert world.info("twice")["version"] == "2.0.0"


def test_after_an_update_that_does_not_run_the_old_one_answers_at_once(world: World) -> None:
    world.install(package_of(world.folder, name="steady"))
    bad = package_of(world.folder, "raise RuntimeError('no')", name="steady", version="2.0.0")
    assert world.client.put("/llmasos/v1/apps?accept=true", content=bad.read_bytes()).status_code == 422
    assert world.client.post("/apps/steady/echo", json={"value": {"a": 1}}).json() == {"a": 1}
    assert world.info("steady")["num_crashes"] == 0


async def test_what_was_uninstalled_by_others_is_forgotten_and_what_came_back_is_not(tmp_path: Path) -> None:
    there: set[str] = set()
    revoked: list[str] = []

    class Shelf:
        def list(self) -> list[object]:
            return []

        def has(self, name: str) -> bool:
            return name in there

    class Ends(Supervisor):
        async def revoke(self, name: str, actor: str) -> None:
            revoked.append(name)

    found = Ends.__new__(Ends)
    found.home, found.idle_seconds, found._slots, found._closed = tmp_path, 1.0, {}, False
    found.apps = Shelf()  # type: ignore[assignment]
    found.slot("gone"), found.slot("back")
    there.add("back")
    await found._look()
    assert list(found._slots) == ["back"] and revoked == ["gone"]
    waiting = asyncio.create_task(found._look())
    there.clear()
    async with found.alone("back"):
        await waiting  # somebody changes it just now: it is left alone
    assert list(found._slots) == ["back"]
    await found._look()
    assert not found._slots


async def test_a_call_that_comes_while_its_jobs_are_asked_for_is_not_broken_off(tmp_path: Path) -> None:
    class Idle:
        num_running, last_used, num_calls = 0, 0.0, 0
        documents, is_over = type("D", (), {"is_always_on": False})(), False
        terms = type("T", (), {"concurrency": 4})()
        order = type("O", (), {"app": type("A", (), {"version": "1.0.0"})(), "values": {}})()
        ended = False

        async def is_working(self) -> bool:
            async with found.use("ask"):
                pass  # a call came and went
            return False

        async def end(self, why: str | None = None) -> None:
            self.ended = True

    found = Supervisor.__new__(Supervisor)
    found.home, found.idle_seconds, found._slots, found._closed = tmp_path, 1.0, {}, False
    app = type("App", (), {"name": "ask", "version": "1.0.0", "manifest": None})()
    found.apps = type("Shelf", (), {"list": lambda self: [app], "root": tmp_path})()
    slot = found.slot("ask")
    slot.running = idle = Idle()
    await found._look()
    assert not idle.ended and slot.running is idle


HANGS = "import time\ntime.sleep(100)\n"


def test_who_stops_a_server_does_not_wait_for_an_application_that_hangs(tmp_path: Path) -> None:
    import psutil

    def at_work() -> set[int]:
        found = psutil.Process().children(recursive=True)
        return {one.pid for one in found if "llmasos.apps.process" in one.cmdline()}

    before = at_work()
    with running(tmp_path) as world:
        answers: list[httpx.Response] = []
        data = package_of(tmp_path, HANGS, name="hangs").read_bytes()
        install = threading.Thread(
            target=lambda: answers.append(world.client.put("/llmasos/v1/apps?accept=true", content=data))
        )
        install.start()
        for _ in range(500):
            if at_work() - before:
                break
            time.sleep(0.02)
        began = time.monotonic()
        assert world.act("hangs", "stop").status_code == 200
        install.join()
        assert answers[0].status_code == 422 and "stopped" in answers[0].json()["error"]["message"]
        assert time.monotonic() - began < supervisor.running.START_SECONDS / 2
    assert at_work() <= before


async def test_one_that_is_stopped_before_its_process_is_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmasos.serve.access.access import Tenant
    from llmasos.serve.apps.running import Order
    from llmasos.store.packages import Apps

    app = Apps(tmp_path).install(str(package_of(tmp_path)), accept=True)
    python = await asyncio.to_thread(environment.ensure, tmp_path, app)
    order = Order(app=app, home=tmp_path, data=tmp_path / "data", python=python, tenant=Tenant("ask", ""), key="k")
    found = Running(order, lambda *_: None, AppLog(tmp_path / "log"))  # type: ignore[arg-type]
    launch, go = found._launch, threading.Event()

    def waits(rooms: object) -> object:
        go.wait()
        return launch(rooms)  # type: ignore[arg-type]

    monkeypatch.setattr(found, "_launch", waits)
    begin = asyncio.create_task(found.begin())
    await asyncio.sleep(0.05)
    await found.end("stopped")
    go.set()
    with pytest.raises(LLMasOSError, match="was stopped before it had started"):
        await begin
    assert found.is_over and not found.process.running and not found._folder.exists()


ASKS = '\n@app.route("/long")\ndef long() -> str:\n    """Ask for long."""\n'
ASKS += "    return app.llm.chat('x' * 200, max_tokens=500)\n"


def test_who_leaves_a_plain_function_frees_the_model_that_it_asked(tmp_path: Path) -> None:
    llm = FakeLLM("fake", delay=0.05)
    more = '[models]\ndefault = "fake"\n[permissions]\nmodels = ["default"]\n'
    with running(tmp_path, llms=llm) as world:
        world.install(package_of(tmp_path, ASK + ASKS, more=more))
        url = world.client.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(f"GET /apps/ask/long HTTP/1.1\r\nhost: {url.host}\r\n\r\n".encode())
            for _ in range(1000):
                if llm.num_running:
                    break
                time.sleep(0.01)
        for _ in range(1000):
            if llm.num_cancelled:
                break
            time.sleep(0.01)
        assert llm.num_cancelled == 1 and llm.num_tokens < 150
        assert world.client.post("/apps/ask/echo", json={"value": {}}).json() == {}
