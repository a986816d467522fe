"""Clients that leave before their answer: what becomes of the function that was making it."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest

from llmasos.apps import Application, Depends, Message, Session, check_cancelled, is_cancelled
from llmasos.client import leaving
from llmasos.client.leaving import CallCancelledError
from llmasos.inference.remote import RemoteLLM

log: list[str] = []
begun, go = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    log.clear()
    begun.clear()
    go.clear()
    yield
    go.set()


class Caller:
    """A request whose client leaves when it is told."""

    def __init__(self, app: Application, path: str, *, method: str = "GET", headers: tuple[Any, ...] = ()) -> None:
        self.left, self.sent = asyncio.Event(), list[dict[str, Any]]()
        self._asked = False
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": list(headers),
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
            "client": None,
            "server": ("a", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def leave(self) -> None:
        await asyncio.to_thread(begun.wait, 10)
        self.left.set()
        await asyncio.wait_for(self.task, 10)


async def test_an_async_function_is_cancelled_once_and_cleans_up() -> None:
    app = Application()

    async def opened() -> AsyncIterator[str]:
        yield "x"
        log.append("closed")

    async def held() -> AsyncIterator[str]:
        try:
            yield "y"
        finally:
            await asyncio.sleep(0)
            log.append("released")

    @app.route("/wait")
    async def wait(a: Annotated[str, Depends(held)]) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append(f"cancelled {is_cancelled()}")
            await asyncio.sleep(0.001)  # it is cancelled once, so it may clean up
            log.append("clean")
        return "never"

    caller = Caller(app, "/wait")
    await caller.leave()
    assert log == ["cancelled True", "clean", "released"]
    assert caller.sent[0]["status"] == 499


async def test_what_a_thread_was_making_for_it_is_cleaned_up() -> None:
    app = Application()

    def slow() -> Iterator[str]:
        begun.set()
        assert go.wait(10)
        log.append("made")
        yield "x"
        log.append("released")

    def held() -> Iterator[str]:
        try:
            yield from slow()
        finally:
            log.append("closed")

    @app.route("/wait")
    async def wait(a: Annotated[str, Depends(held)]) -> str:
        log.append("called")
        return a

    caller = Caller(app, "/wait")
    await asyncio.to_thread(begun.wait, 10)
    caller.left.set()
    await asyncio.sleep(0.01)
    go.set()
    await asyncio.wait_for(caller.task, 10)
    assert log == ["made", "closed"]


async def test_a_function_in_a_thread_is_told() -> None:
    app = Application()

    @app.route("/look")
    def look() -> str:
        begun.set()
        while not is_cancelled():
            time.sleep(0.001)
        log.append("seen")
        return "nobody reads this"

    @app.route("/check")
    def check() -> str:
        begun.set()
        while True:
            check_cancelled()
            time.sleep(0.001)

    await Caller(app, "/look").leave()
    assert log == ["seen"]
    begun.clear()
    await Caller(app, "/check").leave()
    assert app.num_running == 0


async def test_who_stays_notices_nothing() -> None:
    app = Application()

    @app.route("/plain")
    def plain() -> bool:
        return is_cancelled()

    @app.route("/fails")
    async def fails() -> None:
        raise ValueError("no")

    @app.route("/exits")
    async def exits() -> None:
        sys.exit(3)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        assert (await client.get("/plain")).json() is False
        assert (await client.get("/fails")).status_code == 500
        assert (await client.get("/exits")).status_code == 500
        assert (await client.get("/plain")).status_code == 200
    assert not is_cancelled()
    check_cancelled()


async def test_what_it_waits_for_at_a_model_ends() -> None:
    app = Application()
    ended = asyncio.Event()

    async def silent(request: httpx.Request) -> httpx.Response:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append("the request ended")
        raise AssertionError

    model = RemoteLLM("http://model/v1#m", async_transport=httpx.MockTransport(silent))

    @app.route("/ask")
    def ask() -> str:
        try:
            return model.chat("x")
        except CallCancelledError:
            log.append("the call ended")
            raise

    @app.route("/tell")
    def tell() -> Iterator[str]:
        yield model.chat("x")

    @app.chat
    def chat(messages: list[Message]) -> str:
        return model.chat("x")

    for path in ("/ask", "/tell"):
        begun.clear()
        log.clear()
        await Caller(app, path).leave()
        assert log[0] == "the request ended"
    assert not ended.is_set()
    model.close()


async def test_jobs_that_are_cancelled_are_told_too() -> None:
    app, seen = Application(), threading.Event()

    @app.route("/work", methods=["POST"])
    def work() -> str:
        begun.set()
        while not is_cancelled():
            time.sleep(0.001)
        seen.set()
        return "x"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        job = (await client.post("/work", json={}, headers={"prefer": "respond-async"})).json()
        await asyncio.to_thread(begun.wait, 10)
        assert not seen.is_set()
        gone = await client.delete(f"/jobs/{job['id']}")
        assert gone.json()["state"] == "cancelled"
        assert await asyncio.to_thread(seen.wait, 10)
    await app.settle()


async def test_who_waits_for_the_turn_of_its_session_may_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    app = Application(title="Turns")

    @app.route("/first")
    def first(session: Session) -> str:
        begun.set()
        assert go.wait(10)
        return "first"

    @app.route("/second")
    def second(session: Session) -> str:
        log.append("second")
        return "second"

    name = ((b"llmasos-session", b"s" * 20),)
    before = Caller(app, "/first", headers=name)
    await asyncio.to_thread(begun.wait, 10)
    waits = Caller(app, "/second", headers=name)
    for _ in range(1000):
        if any(turn.num_wanted == 2 for turn in app.sessions._turns.values()):
            break
        await asyncio.sleep(0.002)
    await waits.leave()
    assert log == [] and before.sent == []
    go.set()
    await before.task
    assert before.sent[0]["status"] == 200 and not app.sessions._turns


def test_a_token_calls_once_and_at_once_if_it_is_over() -> None:
    token, calls = leaving.Token(), []
    with token.calling(lambda: calls.append("a")):
        token.cancel()
        token.cancel()
    with token.calling(lambda: calls.append("b")):
        assert calls == ["a", "b"]
    other = leaving.Token()
    with other.calling(lambda: calls.append("c")):
        pass
    other.cancel()
    assert calls == ["a", "b"]
    with token.active(), pytest.raises(CallCancelledError), leaving.ending(lambda: calls.append("d")):
        pass
    assert calls[-1] == "d"


def test_a_stream_of_a_model_ends_for_who_has_left() -> None:
    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            log.append("closed")

    token = leaving.Token()
    assert list(leaving.heeding(items())) == list(range(10))
    log.clear()
    with token.active():
        found = leaving.heeding(items())
        assert next(found) == 0
        token.cancel()
        with pytest.raises(CallCancelledError):
            next(found)
    assert log == ["closed"]
    with contextlib.closing(leaving.heeding(items())) as again:
        next(again)
