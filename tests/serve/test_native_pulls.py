"""Pulls as jobs: progress, pause, going on, cancelling, restarts; with fake work, and with the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM, live_server
from store_web import tiny_gguf

from llmasos.client.http import Http, Target
from llmasos.client.native import Native, native_target
from llmasos.client.types.native import PullJob
from llmasos.client.types.ollama import OllamaProgress, OllamaPullRequest
from llmasos.errors import BusyError, InvalidInputError, NetworkError, NotFoundError, ProviderError
from llmasos.serve.jobs.room import KEPT, Jobs
from llmasos.serve.models import Models
from llmasos.serve.native.pulls import AT_ONCE, Pulls
from llmasos.serve.ollama.pulls import follow, wanted
from llmasos.serve.storage import Storage
from llmasos.store.database import Database

Report = Callable[[dict[str, Any]], None]


class Work:
    """Stands in for the process of a pull: it waits until it is let go, or fails."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.running = self.most = 0
        self.go: dict[str, asyncio.Event] = {}
        self.report: dict[str, Report] = {}
        self.error: Exception | None = None

    async def __call__(self, task: str, options: dict[str, Any], report: Report) -> dict[str, Any]:
        assert task == "pull"
        name = options["name"]
        self.asked.append(name)
        self.report[name] = report
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.setdefault(name, asyncio.Event()).wait()
            if self.error:
                raise self.error
            return {"name": name}
        finally:
            self.running -= 1

    def finish(self, name: str) -> None:
        self.go.setdefault(name, asyncio.Event()).set()


def progress(done: int, *, phase: str = "download", message: str = "") -> dict[str, Any]:
    return {"phase": phase, "file": "w", "done": done, "total": 100, "message": message}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def storage() -> AsyncIterator[Storage]:
    with Database.open() as database:
        yield Storage(database)


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_a_pull_moves_and_ends(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    job = await pulls.start("gpt2")
    assert (job.name, job.state) == ("gpt2", "waiting") and job.id.startswith("pull_")
    seen: list[PullJob] = []

    async def follow() -> None:
        async for one in pulls.follow(job.id):
            seen.append(one)

    following = asyncio.create_task(follow())
    await until(lambda: work.running)
    work.report["gpt2"](progress(40))
    await until(lambda: seen and seen[-1].done == 40)
    work.report["gpt2"](progress(0, phase="note", message="Trying another source."))
    await until(lambda: seen[-1].message)
    assert (seen[-1].state, seen[-1].done, seen[-1].total, seen[-1].file) == ("running", 40, 100, "w")
    work.finish("gpt2")
    await following
    assert seen[-1].state == "done"
    assert [one.state async for one in pulls.follow(job.id)] == ["done"]
    await pulls._jobs.close()


async def test_a_pull_is_paused_goes_on_and_is_cancelled(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    job = await pulls.start("gpt2")
    await until(lambda: work.running)
    work.report["gpt2"](progress(40))
    assert (await pulls.pause(job.id)).state == "paused"
    assert work.running == 0 and (await pulls.pause(job.id)).done == 40
    assert (await pulls.resume(job.id)).state == "waiting"
    await until(lambda: work.running)
    assert work.asked == ["gpt2", "gpt2"]
    partial = storage.home / "cache" / "partial"
    for folder in ("gpt2-01234567", "gpt2-medium-01234567", "gpt2-nothex00"):
        (partial / folder).mkdir(parents=True)
    assert (await pulls.cancel(job.id)).state == "cancelled"
    assert work.running == 0
    assert sorted(path.name for path in partial.iterdir()) == ["gpt2-medium-01234567", "gpt2-nothex00"]
    assert (await pulls.cancel(job.id)).state == "cancelled"
    for wrong in (pulls.resume, pulls.pause):
        with pytest.raises(BusyError, match="is cancelled"):
            await wrong(job.id)
    for unknown in (pulls.get, pulls.pause, pulls.resume, pulls.cancel):
        with pytest.raises(NotFoundError, match="'none'"):
            await unknown("none")


async def test_a_failed_pull_says_why_and_can_go_on(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    work.error = NetworkError("The hub did not answer.", hint="Try again.")
    work.finish("gpt2")
    job = await pulls.start("gpt2")
    await until(lambda: pulls._jobs._works[job.id].job.state == "failed")
    failed = await pulls.get(job.id)
    assert (failed.error, failed.error_code) == ("The hub did not answer. Try again.", "network")
    work.error = None
    assert (await pulls.start("gpt2")).id == job.id  # asked again, the same job goes on
    await until(lambda: pulls._jobs._works[job.id].job.state == "done")
    assert (await pulls.get(job.id)).error is None
    with pytest.raises(BusyError, match="is done"):
        await pulls.cancel(job.id)
    assert (await pulls.start("gpt2")).id != job.id
    await pulls._jobs.close()


async def test_one_model_is_pulled_once_however_often_it_is_asked_for(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    jobs = await asyncio.gather(*(pulls.start("gpt2") for _ in range(5)))
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(BusyError, match="being pulled from 'gpt2'"):
        await pulls.start("gpt2-medium", "gpt2")
    await until(lambda: work.running)
    assert work.asked == ["gpt2"]
    await pulls._jobs.close()


async def test_some_run_and_others_wait(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    names = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    for name in names:
        await pulls.start(name)
    await until(lambda: work.running == AT_ONCE)
    await asyncio.sleep(0.02)
    states = {job.name: job.state for job in await pulls.list()}
    assert [states[name] for name in names] == ["running", "running", "waiting", "waiting"]
    for name in names:
        work.finish(name)
    await until(lambda: all(live.job.state == "done" for live in pulls._jobs._works.values()))
    assert work.most == AT_ONCE
    assert [job.name for job in await pulls.list()] == names[::-1]


async def test_what_ran_when_the_server_ended_is_paused_after_a_restart(storage: Storage, work: Work) -> None:
    first = Pulls(Jobs(storage), run=work)
    ended, killed = await first.start("gpt2"), await first.start("gpt2-medium")
    await until(lambda: work.running == 2)
    work.report["gpt2"](progress(40))
    await first.pause(ended.id)
    # `first` is forgotten without a word, as after a kill -9
    second = Pulls(Jobs(storage), run=work)
    jobs = {job.id: job for job in await second.list()}
    assert (jobs[ended.id].state, jobs[ended.id].done) == ("paused", 40)
    assert jobs[killed.id].state == "paused"
    await second.resume(killed.id)
    work.finish("gpt2-medium")
    await until(lambda: second._jobs._works[killed.id].job.state == "done")
    elsewhere = Storage(storage._database, storage.home / "other")
    assert await Pulls(Jobs(elsewhere), run=work).list() == []
    await first._jobs.close()
    await second._jobs.close()


async def test_closing_pauses_what_runs(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    job = await pulls.start("gpt2")
    await until(lambda: work.running)
    await pulls._jobs.close()
    assert work.running == 0
    assert (await Pulls(Jobs(storage), run=work).get(job.id)).state == "paused"


async def test_only_the_latest_are_remembered(storage: Storage, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.serve.jobs.room.KEPT", 3)
    assert KEPT > 3
    pulls = Pulls(Jobs(storage), run=work)
    work.finish("gpt2")
    ids = []
    for _ in range(6):
        job = await pulls.start("gpt2")
        ids.append(job.id)
        await until(lambda job=job: pulls._jobs._works[job.id].job.state == "done")
    assert [job.id for job in await pulls.list()] == ids[:-4:-1]
    assert {job.id for job in await Pulls(Jobs(storage), run=work).list()} == set(ids[-3:])


async def test_failed_and_paused_pulls_are_forgotten_too_after_those_that_are_over(
    storage: Storage, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.serve.jobs.room.KEPT", 3)
    pulls = Pulls(Jobs(storage), run=work)
    work.error = NetworkError("The hub is away.")
    for i in range(5):
        work.finish(f"fails-{i}")
        job = await pulls.start("gpt2", f"fails-{i}")
        await until(lambda job=job: pulls._jobs._works[job.id].job.state == "failed")
    assert [job.name for job in await pulls.list()] == ["fails-4", "fails-3", "fails-2"]
    await pulls.pause((await pulls.start("gpt2", "pauses")).id)
    await pulls.cancel((await pulls.start("gpt2", "over")).id)
    await pulls.pause((await pulls.start("gpt2", "last")).id)
    assert [job.name for job in await pulls.list()] == ["last", "pauses", "fails-4"]
    assert {job.name for job in await Pulls(Jobs(storage), run=work).list()} == {"last", "pauses", "fails-4"}


# pulls that go on as long as somebody holds them: Ollama's


def ollamas(pulls: Pulls, model: str = "gpt2") -> AsyncGenerator[OllamaProgress, None]:
    return follow(wanted(OllamaPullRequest(model=model)), pulls, Models({"fake": FakeLLM()}))


async def begun(pulls: Pulls, work: Work) -> AsyncGenerator[OllamaProgress, None]:
    """A client of Ollama's that has seen a first progress of gpt2."""
    client = ollamas(pulls)
    assert (await anext(client)).status == "pulling manifest"
    upcoming = asyncio.ensure_future(anext(client))
    await until(lambda: work.running)
    work.report["gpt2"](progress(40))
    line = await upcoming
    assert (line.status, line.digest, line.completed, line.total) == ("pulling w", "w", 40, 100)
    return client


async def test_a_client_of_ollamas_follows_a_job(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    client = await begun(pulls, work)
    [job] = await pulls.list()
    assert (job.name, job.state) == ("gpt2", "running")
    for seen, status in (
        (progress(0, phase="note", message="Trying another source."), "Trying another source."),
        (progress(100, phase="check"), "verifying sha256 digest"),
    ):
        work.report["gpt2"](seen)
        assert (await anext(client)).status == status
    work.finish("gpt2")
    assert [line.status async for line in client][-1] == "success"
    await pulls._jobs.close()


async def test_a_pull_that_its_last_client_of_ollamas_leaves_is_paused(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    clients = [await begun(pulls, work), await begun(pulls, work)]
    [job] = await pulls.list()
    await clients[0].aclose()
    assert work.running == 1
    await clients[1].aclose()
    assert work.running == 0 and (await pulls.get(job.id)).state == "paused"
    again = await begun(pulls, work)
    assert work.asked == ["gpt2", "gpt2"] and len(await pulls.list()) == 1
    work.finish("gpt2")
    assert [line.status async for line in again][-1] == "success"


@pytest.mark.parametrize("first", ["ollama", "native"])
async def test_a_pull_that_was_started_as_well_goes_on_alone(storage: Storage, work: Work, first: str) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    native = [await pulls.start("gpt2")] if first == "native" else []
    client = await begun(pulls, work)
    job = native[0] if native else await pulls.start("gpt2")
    await client.aclose()
    assert work.running == 1 and (await pulls.get(job.id)).state == "running"
    client = await begun(pulls, work)
    await pulls.pause(job.id)
    with pytest.raises(BusyError, match="is paused"):
        await anext(client)
    assert work.asked == ["gpt2"]
    await pulls._jobs.close()


async def test_one_model_by_two_names_is_one_pull(storage: Storage, work: Work) -> None:
    pulls = Pulls(Jobs(storage), run=work)
    job = await pulls.start("gpt2")
    assert (await pulls.start("GPT2")).id == job.id
    await pulls._jobs.close()


@pytest.mark.parametrize("model", ["/etc", "./x", "~/x", "file:/etc/hosts"])
async def test_a_path_of_the_server_is_no_model(model: str, storage: Storage, work: Work) -> None:
    with pytest.raises((InvalidInputError, NotFoundError)):
        await Pulls(Jobs(storage), run=work).start(model)
    assert work.asked == []


# the real work


class SlowFiles:
    """A file server that holds back the last bytes of every body until it is told."""

    def __init__(self, body: bytes) -> None:
        self.body, self.go, self.ranges = body, threading.Event(), list[str]()
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked = self.headers.get("Range", "")
                start, _, stop = asked.removeprefix("bytes=").partition("-")
                first, last = int(start or 0), min(int(stop or len(files.body) - 1), len(files.body) - 1)
                piece = files.body[first : last + 1]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(piece)))
                self.send_header("ETag", '"1"')
                if asked:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(files.body)}")
                self.end_headers()
                if self.command == "HEAD":
                    return
                if not stop:  # a download: headers are read by whole ranges
                    files.ranges.append(asked)
                    half = len(piece) // 2
                    self.wfile.write(piece[:half])
                    files.go.wait(20)
                    piece = piece[half:]
                self.wfile.write(piece)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """The client hangs up in the middle: that is the test."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/tiny.gguf"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_a_real_pull_is_paused_in_the_middle_and_goes_on_from_there(tmp_path: Path, home: Path) -> None:
    body = tiny_gguf(tmp_path)
    files = SlowFiles(body)
    http = None
    try:
        with live_server(FakeLLM()) as url:
            http = Http(native_target(Target(url, "LLMasOS", max_retries=0)))
            client = Native(http)
            for job in client.pull(files.url, name="mine"):
                if job.phase == "download" and 0 < job.done < len(body):
                    break
            paused = client.pause_pull(job.id)
            assert paused.state == "paused" and paused.total == len(body)
            assert [one.id for one in client.pulls()] == [job.id] and client.models() == []
            files.go.set()
            assert client.resume_pull(job.id).state == "waiting"
            states = [one.state for one in client.follow_pull(job.id)]
            assert states[-1] == "done"
            assert files.ranges[0] == "" and files.ranges[-1].startswith("bytes=")  # the rest only
            [model] = client.models()
            assert (model.name, model.format, model.size) == ("mine", "gguf", len(body))
            with pytest.raises(ProviderError, match="has the SHA-256"):
                list(client.pull(files.url.replace("tiny.gguf", "x.bin.gguf") + "#sha256=" + "0" * 64, name="bad"))
    finally:
        if http is not None:
            http.close()
        files.close()
