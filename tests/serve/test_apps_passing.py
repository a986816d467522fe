"""Answers of applications on their way to whoever asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llmasos.serve.apps.proxy import AppEndedError, _Passing

ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntext", b"text"),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ntext\r\n0\r\n\r\n", b"text"),
    "empty": (b"HTTP/1.1 303 See Other\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", b""),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n", b""),
    "reset": (b"HTTP/1.1 205 Reset Content\r\ncontent-length: 4\r\n\r\ntext", b"text"),
}
FOUND: Any = SimpleNamespace(terms=SimpleNamespace(timeout=10.0))


async def never() -> dict[str, Any]:
    return await asyncio.Future()


async def answered(client: httpx.AsyncClient, port: int, found: Any = FOUND) -> list[dict[str, Any]]:
    answer = await client.send(client.build_request("GET", f"http://127.0.0.1:{port}/"), stream=True)
    stack, sent, is_free = contextlib.AsyncExitStack(), [], []
    stack.callback(is_free.append, True)
    stack.push_async_callback(answer.aclose)

    async def send(message: Any) -> None:
        sent.append({**message, "is_free": bool(is_free)})

    nobody: Any = None
    await _Passing(nobody, found, answer, stack, "/")({}, never, send)
    return sent


@contextlib.asynccontextmanager
async def application(answer: bytes, *, ends: bool = False) -> AsyncIterator[tuple[int, list[Any]]]:
    """Its port, and its connections so far."""
    connections: list[Any] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(answer)
                if ends:
                    break
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(served, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], connections
        await asyncio.gather(*connections)


@pytest.mark.parametrize("kind", ANSWERS)
async def test_calls_share_a_connection_and_are_over_before_their_last_bytes(kind: str) -> None:
    answer, body = ANSWERS[kind]
    async with application(answer) as (port, connections), httpx.AsyncClient() as client:
        for _ in range(5):
            head, *pieces = await answered(client, port)
            assert (head["type"], pieces[-1]["more_body"], pieces[-1]["is_free"]) == (
                "http.response.start",
                False,
                True,
            )
            assert b"".join(piece["body"] for piece in pieces) == body
            assert head["is_free"] == (not body), "a head that is all waits for the place, another one for nothing"
        assert len(connections) == 1


async def test_an_application_that_ends_in_its_answer_is_said_to_have_ended() -> None:
    async def end() -> None: ...

    named = SimpleNamespace(app=SimpleNamespace(name="one"))
    found = SimpleNamespace(terms=FOUND.terms, wait=end, exit=None, order=named)
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\ntext"
    async with application(answer, ends=True) as (port, _), httpx.AsyncClient() as client:
        with pytest.raises(AppEndedError, match="one broke the connection off"):
            await answered(client, port, found)
