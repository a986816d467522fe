"""Generators as server-sent events: order, errors midway, clients that go away."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from llmasos.apps import Application, streams
from llmasos.errors import InvalidInputError


@pytest.fixture
def app() -> Application:
    return Application()


def events(text: str) -> list[tuple[str, Any]]:
    """(event, data) of each block of an event stream."""
    found = []
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


def test_a_generator_is_sent_as_events_that_end_with_done(app):
    @app.route("/count")
    def count(to: int) -> Iterator[dict[str, int]]:
        for n in range(to):
            yield {"n": n}

    for answer in (app.test_client().get("/count?to=2"), app.test_client().post("/count", json={"to": 2})):
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert events(answer.text) == [("message", {"n": 0}), ("message", {"n": 1}), ("done", {})]


def test_newlines_and_any_text_survive_the_event_format(app):
    pieces = ["a\n\nb", "\r\n", "data: x", "é\u2028🙂", ""]

    @app.route("/say")
    async def say() -> AsyncIterator[str]:
        for piece in pieces:
            yield piece

    assert [data for _, data in events(app.test_client().get("/say").text)][:-1] == pieces
    assert app.test_client().get("/say", headers={"Accept": "application/json"}).json() == "".join(pieces)


def test_a_client_that_asks_for_json_gets_everything_at_once(app):
    @app.route("/count")
    def count() -> Iterator[int]:
        yield from (1, 2)

    @app.route("/bare")
    def bare():
        yield from ("a", "b")

    for accept in (
        "application/json",
        "application/json, text/plain, */*",
        "text/event-stream;q=0.5, application/json",
    ):
        assert app.test_client().get("/count", headers={"Accept": accept}).json() == [1, 2]
        assert app.test_client().get("/bare", headers={"Accept": accept}).json() == "ab"
    for accept in ("*/*", "text/event-stream", "text/event-stream, application/json", "text/html", "a;q=x"):
        answer = app.test_client().get("/count", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith("text/event-stream"), accept


def test_a_function_may_hand_on_an_iterator(app):
    app.route("/plain")(lambda: iter(["a", "b"]))

    async def later():
        yield "c"

    app.route("/later")(lambda: later())
    assert events(app.test_client().get("/plain").text) == [("message", "a"), ("message", "b"), ("done", {})]
    assert events(app.test_client().get("/later").text) == [("message", "c"), ("done", {})]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_failure_midway_is_an_error_event_with_an_id(app, caplog, kind):
    @app.route("/plain")
    def plain() -> Iterator[int]:
        yield 1
        raise ValueError("secret")

    @app.route("/async")
    async def later() -> AsyncIterator[int]:
        yield 1
        raise ValueError("secret")

    first, (name, problem) = events(app.test_client().get(f"/{kind}").text)
    assert (first, name, problem["status"]) == (("message", 1), "error", 500)
    assert "secret" not in json.dumps(problem)
    assert problem["error_id"] in caplog.text
    assert "ValueError: secret" in caplog.text
    collected = app.test_client().get(f"/{kind}", headers={"Accept": "application/json"})
    assert (collected.status_code, collected.json()["code"]) == (500, "internal")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_failure_before_the_first_element_is_an_ordinary_error(app, kind):
    @app.route("/plain")
    def plain() -> Iterator[int]:
        raise InvalidInputError("n=3 is too much.")
        yield 1

    @app.route("/async")
    async def later() -> AsyncIterator[int]:
        raise InvalidInputError("n=3 is too much.")
        yield 1

    answer = app.test_client().get(f"/{kind}")
    assert (answer.status_code, answer.json()["message"]) == (400, "n=3 is too much.")


def test_an_element_that_breaks_the_annotation_ends_the_stream_and_closes_the_generator(app, caplog):
    closed = threading.Event()

    @app.route("/count")
    def count() -> Iterator[int]:
        try:
            yield 1
            yield "two"  # type: ignore[misc]
            yield from range(1000)
        finally:
            closed.set()

    assert [name for name, _ in events(app.test_client().get("/count").text)] == ["message", "error"]
    assert closed.wait(10)


def test_a_plain_generator_stays_in_one_thread(app):
    @app.route("/where")
    def where() -> Iterator[int]:
        lock = threading.RLock()
        with lock:
            for _ in range(50):
                yield threading.get_ident()

    seen = app.test_client().get("/where", headers={"Accept": "application/json"}).json()
    assert len(seen) == 50
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


def test_silence_is_filled_with_comments(app, monkeypatch):
    monkeypatch.setattr(streams, "PING_SECONDS", 0.01)

    @app.route("/slow")
    async def slow() -> AsyncIterator[str]:
        await asyncio.sleep(0.1)
        yield "late"

    text = app.test_client().get("/slow").text
    assert text.startswith(": waiting\n\n")
    assert text.endswith('data: "late"\n\nevent: done\ndata: {}\n\n')


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_client_that_goes_away_closes_the_generator(app, kind, accept):
    closed, produced = threading.Event(), []

    @app.route("/plain")
    def plain() -> Iterator[int]:
        try:
            while True:
                produced.append(1)
                yield 1
        finally:
            closed.set()

    @app.route("/async")
    async def later() -> AsyncIterator[int]:
        try:
            while True:
                produced.append(1)
                yield 1
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0.01)  # a clean-up that awaits is finished as well
            closed.set()

    gone, sent = asyncio.Event(), []

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == 5:
            gone.set()

    if accept == "application/json":
        asyncio.get_running_loop().call_later(0.1, gone.set)
    await asyncio.wait_for(app(_scope(f"/{kind}", accept), receive, send), 20)
    assert closed.is_set()
    assert app.num_running == 0
    assert produced
    assert not any(m["type"] == "http.response.body" and not m["more_body"] for m in sent), "no end is claimed"


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_an_error_while_closing_for_a_client_that_went_away_is_logged(app, caplog, kind):
    @app.route("/plain")
    def plain() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise ValueError("while closing")

    @app.route("/async")
    async def later() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            raise ValueError("while closing")

    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        gone.set()

    await asyncio.wait_for(app(_scope(f"/{kind}", "*/*"), receive, send), 20)
    assert "while closing" in caplog.text


async def test_a_slow_client_holds_the_generator_back(app):
    produced = []

    @app.route("/fast")
    def fast() -> Iterator[int]:
        for n in range(10_000):
            produced.append(n)
            yield n

    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.2)
            gone.set()

    await asyncio.wait_for(app(_scope("/fast", "*/*"), receive, send), 20)
    assert len(produced) < 100


def _scope(path: str, accept: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"accept", accept.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_progress_is_told_between_the_elements(kind: str) -> None:
    from llmasos.apps import report_progress

    app = Application()

    def plain() -> Iterator[int]:
        report_progress(0.25, "begun")
        yield 1
        report_progress(None, "half\nway")
        yield 2

    async def asynchronous() -> AsyncIterator[int]:
        for item in plain():
            yield item

    app.route("/x")(plain if kind == "plain" else asynchronous)
    text = app.test_client().get("/x").text
    assert sorted(text.strip().split("\n\n")) == sorted(
        [
            'event: progress\ndata: {"done": 0.25, "message": "begun"}',
            "data: 1",
            'event: progress\ndata: {"done": null, "message": "half\\nway"}',
            "data: 2",
            "event: done\ndata: {}",
        ]
    )
    assert app.test_client().get("/x", headers={"accept": "application/json"}).json() == [1, 2]


def test_a_flood_of_progress_holds_nothing_up() -> None:
    from llmasos.apps import report_progress

    app = Application()

    @app.route("/x")
    def x() -> Iterator[int]:
        for n in range(20_000):
            report_progress(n / 20_000)
        yield 7

    text = app.test_client().get("/x").text
    assert "data: 7\n\n" in text and text.endswith("event: done\ndata: {}\n\n")


def test_clients_pass_progress_over() -> None:
    from served import served

    from llmasos.apps import report_progress
    from llmasos.client import AppClient

    app = Application()

    @app.route("/x")
    def x() -> Iterator[int]:
        """X."""
        report_progress(0.5)
        yield 7

    with served(app) as url, AppClient(url) as client:
        assert list(client.stream("x")) == [7]
