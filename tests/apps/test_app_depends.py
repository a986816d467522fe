"""Dependencies, sessions, background functions: what is given to a function beside its inputs."""

import asyncio
import functools
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import fastapi
import httpx
import pytest
from fastapi.security import HTTPBearer
from served import served
from starlette.requests import Request

from llmasos.apps import Application, Depends, Message, Session, report_progress
from llmasos.apps.sessions import MAX_BYTES, SessionStore, local_id
from llmasos.errors import BusyError, InvalidInputError, ServerError, UnsupportedError

log: list[str] = []


@pytest.fixture(autouse=True)
def clear() -> None:
    log.clear()


def connection() -> Iterator[sqlite3.Connection]:
    """A connection belongs to its thread, so this fails where the function runs in another."""
    with closing(sqlite3.connect(":memory:")) as made:
        made.execute("CREATE TABLE notes (text)")
        log.append("open")
        yield made
        made.execute("SELECT 1")
    log.append("closed")


async def clock() -> AsyncIterator[str]:
    log.append("begin")
    yield "now"
    log.append("end")


async def word(prefix: str = "a") -> str:
    return f"{prefix}-word"


Db = Annotated[sqlite3.Connection, Depends(connection)]
Clock = Annotated[str, Depends(clock)]


@pytest.fixture(scope="module")
def app() -> Application:
    app = Application(title="Depends")

    @app.route("/plain")
    def plain(db: Db, now: Clock, said: Annotated[str, Depends(word)], text: str = "x") -> list[str]:
        db.execute("INSERT INTO notes VALUES (?)", (text,))
        return [now, said, *(row[0] for row in db.execute("SELECT text FROM notes"))]

    @app.route("/stream")
    def stream(db: Db, now: Clock, fail: bool = False) -> Iterator[str]:
        for n in range(3):
            db.execute("INSERT INTO notes VALUES (?)", (n,))
            yield str(n)
            if fail:
                raise ValueError("no")

    @app.route("/async")
    async def coroutine(now: Clock, said: Annotated[str, Depends(word)]) -> str:
        return now + said

    @app.route("/async-stream")
    async def async_stream(now: Clock) -> AsyncIterator[str]:
        yield now
        log.append("yielded")
        yield now

    @app.route("/returned")
    def returned(db: Db) -> Iterator[int]:
        return iter([1, 2])

    return app


@pytest.fixture(scope="module")
def client(app: Application) -> Any:
    return app.test_client()


def test_what_a_function_needs_is_made_before_and_cleaned_up_after(client: Any) -> None:
    assert client.post("/plain", json={"text": "hello"}).json() == ["now", "a-word", "hello"]
    assert log == ["open", "begin", "end", "closed"]


def test_inputs_of_dependencies_are_inputs_of_the_route(app: Application, client: Any) -> None:
    schema = app.document()["routes"][0]["input"]
    assert list(schema["properties"]) == ["prefix", "text"]
    assert client.get("/plain?prefix=z&text=y").json() == ["now", "z-word", "y"]
    assert client.get("/plain?other=z").status_code == 422


@pytest.mark.parametrize("path", ["/stream", "/async-stream", "/returned", "/async"])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_every_kind_of_function_has_them_until_its_end(client: Any, path: str, accept: str) -> None:
    assert client.get(path, headers={"accept": accept}).status_code == 200
    expected = {
        "/stream": ["open", "begin", "end", "closed"],
        "/async-stream": ["begin", "yielded", "end"],
        "/async": ["begin", "end"],
    }
    if path in expected:
        assert log == expected[path]
    else:
        assert log[0] == "open"


def test_a_failure_reaches_the_dependencies(client: Any) -> None:
    events = client.get("/stream", params={"fail": "true"}).text
    assert "event: error" in events
    assert log == ["open", "begin"]  # neither went on after its yield: the failure went through them


@pytest.mark.parametrize("kind", ["plain", "generator", "async", "async generator"])
def test_a_dependency_that_hides_a_failure_is_found_out(kind: str) -> None:
    import contextlib

    def hides() -> Iterator[int]:
        with contextlib.suppress(ValueError):
            yield 1

    app = Application()
    Hidden = Annotated[int, Depends(hides)]

    def plain(x: Hidden) -> int:
        raise ValueError("no")

    def generator(x: Hidden) -> Iterator[int]:
        yield 1
        raise ValueError("no")

    async def coroutine(x: Hidden) -> int:
        raise ValueError("no")

    async def async_generator(x: Hidden) -> AsyncIterator[int]:
        yield 1
        raise ValueError("no")

    function = {"plain": plain, "generator": generator, "async": coroutine, "async generator": async_generator}[kind]
    app.route("/x")(function)
    answer = app.test_client().get("/x", headers={"accept": "application/json"})
    assert (answer.status_code, "hidden its failure" in answer.json()["message"]) == (500, True)


def test_one_is_made_once_per_call_unless_it_is_not_to_be_kept() -> None:
    app, made = Application(), []

    def number() -> int:
        made.append(1)
        return len(made)

    def twice(n: Annotated[int, Depends(number)]) -> int:
        return n * 2

    @app.route("/x")
    def x(
        a: Annotated[int, Depends(number)],
        b: Annotated[int, Depends(twice)],
        c: Annotated[int, Depends(number, use_cache=False)],
    ) -> list[int]:
        return [a, b, c]

    client = app.test_client()
    assert [client.get("/x").json(), client.get("/x").json()] == [[1, 2, 2], [3, 6, 4]]


def test_classes_objects_defaults_and_fastapis_own_security(client: Any) -> None:
    app = Application()

    @dataclass
    class Page:
        limit: int = 10
        offset: int = 0

    class Times:
        def __init__(self, by: int) -> None:
            self.by = by

        def __call__(self, n: int) -> int:
            return n * self.by

    @app.route("/x")
    def x(
        page: Annotated[Page, Depends()],
        n: Annotated[int, Depends(Times(3))],
        m: int = fastapi.Depends(functools.partial(Times(2), 4)),
    ) -> list[int]:
        return [page.limit, page.offset, n, m]

    @app.route("/secret", dependencies=[Depends(HTTPBearer())])
    def secret() -> str:
        return "told"

    @app.route("/host")
    def host(request: Request) -> str:
        return str(request.url.hostname)

    client = app.test_client()
    assert client.get("/x?n=2&limit=5").json() == [5, 0, 6, 8]
    assert client.get("/x").status_code == 422
    assert client.get("/secret").status_code in (401, 403)
    assert client.get("/secret", headers={"authorization": "Bearer x"}).json() == "told"
    assert client.get("/host").json() == "testserver"


async def test_other_surfaces_have_them_too_but_no_request(app: Application) -> None:
    assert json.loads(await app.call(app.find("plain"), {"text": "t"})) == ["now", "a-word", "t"]
    other = Application()

    @other.route("/host")
    def host(request: Request) -> str:
        return ""

    with pytest.raises(UnsupportedError, match="HTTP request, which this call is not"):
        await other.call(other.find("host"), {})


def test_tests_put_others_in_their_place(app: Application, client: Any) -> None:
    def fake(text: str, extra: int = 3) -> list[Any]:
        return Fake(text, extra)

    class Fake:
        def __init__(self, *facts: Any) -> None:
            self.facts = facts

        def execute(self, *_: Any) -> Any:
            return [[str(self.facts)]]

    app.dependency_overrides = {connection: fake, clock: lambda: "never"}
    try:
        assert client.get("/plain?text=t").json() == ["never", "a-word", "('t', 3)"]
        assert log == []
        assert client.get("/plain").status_code == 400  # the override wants a text
    finally:
        app.dependency_overrides = {}


def test_what_can_not_be_a_dependency_is_refused() -> None:
    app = Application()

    def one(x: Annotated[int, Depends(lambda: 1)], n: int) -> int:
        return n

    def other(a: Annotated[int, Depends(one)], n: int = 3) -> int:
        return n

    def circle(x: Any = None) -> int:
        return 1

    nothing, number = Depends(), Depends(5)  # type: ignore[arg-type]
    circle.__annotations__["x"] = Annotated[int, Depends(circle)]
    for function, words in (
        (other, "want 'n' differently"),
        (circle, "circle needs circle"),
        (lambda x=nothing: x, "is no dependency"),
        (lambda x=number: x, "is no dependency"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            app.route("/x")(function)


async def test_cleaning_up_happens_when_the_client_leaves() -> None:
    app, closed, begun = Application(), threading.Event(), threading.Event()

    def held() -> Iterator[int]:
        try:
            yield 1
        finally:
            closed.set()

    @app.route("/x")
    def x(n: Annotated[int, Depends(held)]) -> Iterator[int]:
        while True:
            begun.set()
            yield n

    @app.route("/y")
    async def y(n: Annotated[int, Depends(held)]) -> AsyncIterator[int]:
        while True:
            begun.set()
            yield n
            await asyncio.sleep(0.001)

    import httpx

    with served(app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            for path in ("/x", "/y"):
                async with client.stream("GET", path) as response:
                    async for _ in response.aiter_bytes():
                        break
                assert await asyncio.to_thread(closed.wait, 5), path
                closed.clear()


# sessions


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    app = Application(title="Counter")

    @app.route("/count")
    def count(session: Session, by: int = 1, fail: bool = False) -> int:
        session["n"] = session.get("n", 0) + by
        session.setdefault("seen", []).append(by)  # a change inside a value is seen, too
        if fail:
            raise ValueError("no")
        return session["n"]

    @app.route("/stream")
    async def stream(session: Session) -> AsyncIterator[list[int]]:
        session["said"] = "hello"
        yield session.get("seen", [])
        yield [len(session)]

    @app.route("/odd")
    def odd(session: Session, kind: str) -> None:
        session["x"] = {"object": object(), "large": "x" * MAX_BYTES, "nan": float("nan")}[kind]

    @app.route("/forget", methods=["POST"])
    def forget(session: Session) -> None:
        session.clear()

    @app.chat
    def chat(messages: list[Message], session: Session) -> str:
        session["turns"] = session.get("turns", 0) + 1
        return str(session["turns"])

    return app


def test_a_session_is_a_clients_by_cookie_and_by_header(counter: Application) -> None:
    with counter.test_client() as client:
        first = client.get("/count")
        id = first.headers["llmasos-session"]
        assert "HttpOnly; SameSite=Lax" in first.headers["set-cookie"] and "llmasos-session-counter" in str(
            client.cookies
        )
        second = client.get("/count?by=5")
        assert second.json() == 6 and "llmasos-session" not in second.headers
        assert client.get("/stream", headers={"accept": "application/json"}).json() == [[1, 5], [3]]
        client.cookies.clear()
        assert client.get("/count").json() == 1
        client.cookies.clear()
        assert client.get("/count", headers={"LLMasOS-Session": id}).json() == 7
        for guess in ("alice", "x" * 129, "local:me" * 3, "a" * 15 + "/"):
            assert client.get("/count", headers={"LLMasOS-Session": guess}).status_code == 400
        client.post("/forget", headers={"LLMasOS-Session": id})
        assert client.get("/count", headers={"LLMasOS-Session": id}).json() == 1


def test_a_stream_tells_its_client_of_a_new_session(counter: Application) -> None:
    turn = {"model": "counter", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with counter.test_client() as client:
        for call in (
            lambda: client.get("/stream"),
            lambda: client.get("/stream", headers={"accept": "application/json"}),
            lambda: client.post("/v1/chat/completions", json=turn),
        ):
            client.cookies.clear()
            first = call()
            assert first.status_code == 200 and len(first.headers["llmasos-session"]) >= 16
            assert first.headers["set-cookie"].startswith("llmasos-session-counter=")
            assert "llmasos-session" not in call().headers


def test_a_call_that_fails_changes_nothing(counter: Application) -> None:
    with counter.test_client() as client:
        client.get("/count")
        assert client.get("/count?fail=true").status_code == 500
        assert client.get("/count").json() == 2
        for kind, words in (("object", "can't be kept as JSON"), ("nan", "JSON"), ("large", "at most 1,048,576")):
            answer = client.get("/odd", params={"kind": kind})
            assert answer.status_code == 400 and words in answer.json()["message"]
        assert client.get("/count").json() == 3


def test_jobs_chats_and_command_lines_have_sessions(counter: Application) -> None:
    with counter.test_client() as client:
        job = client.post("/count", json={"by": 4}, headers={"prefer": "respond-async"})
        client.get(job.headers["location"] + "/events")
        assert client.get("/count").json() == 5
        body = {"model": "counter", "messages": [{"role": "user", "content": "x"}]}
        texts = [
            client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] for _ in "ab"
        ]
        assert texts == ["1", "2"]
    document = counter.document()
    assert [route["session"] for route in document["routes"]] == [True] * 4 and document["chat"]["session"]


async def test_a_session_of_this_machine_is_named(counter: Application) -> None:
    route = counter.find("count")
    results = [json.loads(await counter.call(route, {}, session=name)) for name in ("me", "me", "you")]
    assert results == [1, 2, 1] and json.loads(await counter.call(route, {})) == 1
    with pytest.raises(InvalidInputError, match="empty or too long"):
        local_id("")


def test_sessions_expire_and_the_oldest_make_room(tmp_path: Path) -> None:
    from contextlib import contextmanager

    store = SessionStore(lambda: tmp_path, most=3)

    def put(id: str) -> None:
        with contextmanager(store.scope)(id) as session:
            session["x"] = id

    def values(id: str) -> dict[str, Any]:
        with contextmanager(store.scope)(id) as session:
            return dict(session)

    for id in "abcd":
        put(id)
    assert [values(id) for id in "abcd"] == [{}, {"x": "b"}, {"x": "c"}, {"x": "d"}]
    store.lifetime = -1
    assert values("d") == {}
    put("e")
    with closing(sqlite3.connect(tmp_path / "sessions.sqlite3")) as connection:
        assert connection.execute("SELECT count(*) FROM session_values").fetchone() == (1,)
    assert (tmp_path / "sessions.sqlite3").stat().st_mode & 0o77 == 0


def test_calls_at_once_write_what_each_has_changed(tmp_path: Path) -> None:
    from contextlib import contextmanager

    store = SessionStore(lambda: tmp_path)

    def put(n: int) -> None:
        with contextmanager(store.scope)("s") as session:
            session[str(n)] = n

    threads = [threading.Thread(target=put, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextmanager(store.scope)("s") as session:
        assert sorted(session.values()) == list(range(12))


@pytest.mark.parametrize("kind", ["plain", "generator", "coroutine", "stream"])
async def test_calls_of_one_session_take_turns(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    app = Application(title="Turns")

    @app.route("/plain")
    def plain(session: Session) -> int:
        seen = session.get("n", 0)
        time.sleep(0.005)
        session["n"] = seen + 1
        return seen

    @app.route("/generator")
    def generator(session: Session) -> Iterator[int]:
        seen = session.get("n", 0)
        yield seen
        time.sleep(0.005)
        session["n"] = seen + 1

    @app.route("/coroutine")
    async def coroutine(session: Session) -> int:
        seen = session.get("n", 0)
        await asyncio.sleep(0.005)
        session["n"] = seen + 1
        return seen

    @app.route("/stream")
    async def stream(session: Session) -> AsyncIterator[int]:
        seen = session.get("n", 0)
        yield seen
        await asyncio.sleep(0.005)
        session["n"] = seen + 1

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        headers = {"llmasos-session": "s" * 20, "accept": "application/json"}
        answers = await asyncio.gather(*(client.get(f"/{kind}", headers=headers) for _ in range(12)))
        other = await client.get(f"/{kind}", headers=headers | {"llmasos-session": "t" * 20})
    found = [one.json() for one in answers]
    assert sorted(one[0] if isinstance(one, list) else one for one in found) == list(range(12))
    assert other.json() in (0, [0])
    assert not app.sessions._turns


async def test_a_call_that_does_not_get_its_turn_is_refused(
    counter: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.apps.sessions.TURN_SECONDS", 0.02)
    route, name = counter.find("count"), local_id("me")
    async with asynccontextmanager(counter.sessions.turn)(name):
        with pytest.raises(BusyError, match="Another call of this session"):
            await counter.call(route, {}, session="me")
    assert await counter.call(route, {}, session="me") == b"1"


async def test_a_session_belongs_to_the_key_that_names_it(counter: Application) -> None:
    from llmasos.apps.process import Mounted

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Mounted(counter, "/apps/counter")), base_url="http://a"
    ) as client:

        async def count(key: str | None) -> int:
            named = {} if key is None else {"llmasos-client": key}
            found: int = (await client.get("/count", headers={"llmasos-session": "s" * 20, **named})).json()
            return found

        assert [await count(key) for key in ("a", "a", "b", None, "a", None)] == [1, 2, 1, 1, 3, 2]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(counter), base_url="http://a") as client:
        headers = {"llmasos-session": "s" * 20, "llmasos-client": "a"}
        assert (await client.get("/count", headers=headers)).json() == 3, "only the server says who it is"


# in the background


def test_a_function_goes_on_in_the_background_as_a_job() -> None:
    app, go = Application(), threading.Event()

    def work(n: int, *, fail: bool = False) -> dict[str, int]:
        assert go.wait(5)
        report_progress(0.5, "half")
        if fail:
            raise ValueError("no")
        return {"n": n}

    @app.route("/from-thread")
    def from_thread(fail: bool = False) -> str:
        return app.background(work, 1, fail=fail).id

    @app.route("/from-loop")
    async def from_loop() -> str:
        async def soon() -> str:
            return "done"

        return app.background(soon).id

    with app.test_client() as client:
        ids = [client.get(path).json() for path in ("/from-thread", "/from-thread?fail=true", "/from-loop")]
        go.set()
        over = [client.get(f"/jobs/{id}/events").text.split("\n\n")[-3] for id in ids]
        jobs = [json.loads(event.removeprefix("data: ")) for event in over]
    assert [(job["route"], job["state"], job["result"]) for job in jobs] == [
        ("work", "done", {"n": 1}),
        ("work", "failed", None),
        ("soon", "done", "done"),
    ]
    with pytest.raises(ServerError, match="does not run"):
        Application().background(work, 1)
