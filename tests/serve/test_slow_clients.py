"""Clients that hold a connection by doing little, over real sockets: each is let go, and the server goes on."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fake_llm import FakeLLM
from starlette.types import ASGIApp

from llmasos.apps import connection
from llmasos.apps.connection import BoundedHttp
from llmasos.apps.hosting import listen
from llmasos.serve import gate
from llmasos.serve.server import create_app

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def server(app: FakeLLM | ASGIApp, **options) -> Iterator[int]:
    """The port of a server with the connections of `hosting.run`."""
    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            create_app(app, **options) if isinstance(app, FakeLLM) else app,
            http=BoundedHttp,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=30,  # longer than any wait here: it is not what ends these connections
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
            assert httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/healthz").status_code == 200
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            found += piece
    return found


def trickle(client: socket.socket, data: bytes, *, every: float = 0.02) -> bytes:
    """Send `data` byte by byte for as long as the server takes it; then what it said."""
    client.settimeout(every)
    said = b""
    for i in range(len(data)):
        try:
            client.sendall(data[i : i + 1])
        except OSError:
            break
        try:
            piece = client.recv(65536)
        except TimeoutError:
            continue
        except ConnectionResetError:
            break
        if not piece:
            break
        said += piece
    else:
        raise AssertionError("the server took all of it")
    return said


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with server(FakeLLM()) as port:
        for start in (b"", b"\r\n", b"GET /healthz HT", HEAD):
            with connect(port) as client:
                client.sendall(start)
                assert rest_of(client).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_byte_by_byte_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with server(FakeLLM()) as port, connect(port) as client:
        assert trickle(client, b"GET /healthz HTTP/1.1\r\n" + b"X-Slow: 1\r\n" * 200).startswith(b"HTTP/1.1 408 ")


def test_empty_lines_between_requests_do_not_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with server(FakeLLM()) as port, connect(port) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert b"408" in trickle(client, b"\r\n" * 500)


def test_a_head_without_end_is_refused() -> None:
    with server(FakeLLM()) as port, connect(port) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        said = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                client.sendall(b"y" * 8192)
                time.sleep(0.01)
        said = rest_of(client)
        assert said.startswith(b"HTTP/1.1 431 ") or said == b""  # a reset may overtake it


def test_a_long_head_within_the_limit_is_served() -> None:
    with server(FakeLLM()) as port:
        response = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"x-long": "y" * 30_000})
        assert response.status_code == 200


def test_a_body_that_comes_too_slowly_is_answered_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with server(FakeLLM()) as port:
        with connect(port) as client:
            client.sendall(HEAD + b"Content-Length: 5000\r\n\r\n{")
            said = rest_of(client)
            assert said.startswith(b"HTTP/1.1 408 ") and b"too slowly" in said
        with connect(port) as client:  # some bytes buy no time to speak of
            client.sendall(HEAD + b"Content-Length: 5000\r\n\r\n")
            assert trickle(client, b" " * 5000).startswith(b"HTTP/1.1 408 ")


def test_a_large_body_may_take_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    body = b'{"model": "fake", "prompt": "hi"}' + b" " * 20_000
    with server(FakeLLM()) as port, connect(port) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        for start in range(0, len(body), 2500):  # over a second in all
            client.sendall(body[start : start + 2500])
            time.sleep(0.15)
        assert rest_of(client).startswith(b"HTTP/1.1 200 ")


def test_a_slow_answer_is_no_slow_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.1)
    with server(FakeLLM(delay=0.05)) as port:
        body = {"model": "fake", "prompt": "0123456789", "stream": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20)
        assert answer.text.endswith("[DONE]\n\n")


def test_a_body_that_goes_on_after_its_answer_does_not_keep_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.3)
    with server(FakeLLM(), max_body_bytes=1000) as port, connect(port) as client:
        client.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert trickle(client, b" " * 5000).startswith(b"HTTP/1.1 413 ")


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.3)
    ended = threading.Event()

    async def endless(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while scope["path"] != "/healthz" and (await sent(send)):
            pass
        await send({"type": "http.response.body", "body": b""})
        if scope["path"] != "/healthz":
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.set()

    async def sent(send) -> bool:
        began = time.monotonic()
        await send({"type": "http.response.body", "body": b" " * 2**20, "more_body": True})
        return time.monotonic() - began < 0.2  # it had to wait, until the connection was given up

    with server(endless) as port, connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(20)


def test_requests_sent_ahead_are_answered_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    body = b'{"model": "fake", "prompt": "0123456789"}'
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with server(FakeLLM(delay=0.05)) as port, connect(port) as client:
        client.sendall(one + one + one[:40])  # the third one's head never ends
        said = rest_of(client)
        assert said.count(b"HTTP/1.1 200 ") == 2 and said.count(b"HTTP/1.1 408 ") == 1


def test_a_hundred_slow_clients_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    with server(FakeLLM()) as port, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(port)) for _ in range(100)]
        for client in slow:
            client.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert all(rest_of(client).startswith(b"HTTP/1.1 408 ") for client in slow)
