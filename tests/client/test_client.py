import contextlib
import email.utils
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from both_clients import KINDS, items

from llmasos.client import AsyncClient, Client
from llmasos.client import http as client_http
from llmasos.errors import (
    AuthenticationError,
    BadRequestError,
    InvalidInputError,
    NetworkError,
    NotFoundError,
    OfflineError,
    PermissionDeniedError,
    ProviderError,
    ProviderNotFoundError,
    RateLimitError,
    UnavailableError,
)

CHAT = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    },
}
DONE = b"[DONE]"


class Server:
    """Answers requests with what `answers` yields, the last one for ever; keeps the requests."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, tuple):
            return httpx.Response(200, json=answer)
        status, headers, body = answer
        return httpx.Response(status, headers=headers, content=body)

    def client(self, **options) -> Client:
        return Client("http://127.0.0.1:1/v1", transport=httpx.MockTransport(self), **options)

    def async_client(self, **options) -> AsyncClient:
        return AsyncClient("http://127.0.0.1:1/v1", transport=httpx.MockTransport(self), **options)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were asked for, without waiting."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(client_http.time, "sleep", found.append)
    monkeypatch.setattr(client_http.asyncio, "sleep", sleep)
    return found


def events(*data: object) -> bytes:
    return b"".join(b"data: " + (d if isinstance(d, bytes) else json.dumps(d).encode()) + b"\n\n" for d in data)


def chunk(text: str, reason: str | None = None, index: int = 0) -> dict[str, object]:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def test_a_chat_gives_the_typed_answer_and_sends_only_what_was_given() -> None:
    server = Server(CHAT)
    answer = server.client(api_key="k").chat("Capital?", model="m", temperature=0, stop=None)
    assert answer.choices[0].message.content == "Paris"
    assert answer.usage is not None and answer.usage.prompt_tokens_details.cached_tokens == 2
    [request] = server.requests
    assert str(request.url) == "http://127.0.0.1:1/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    assert json.loads(request.content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Capital?"}],
        "temperature": 0,
    }


def test_a_stream_gives_chunks_until_done() -> None:
    server = Server((200, {}, events(chunk("Pa"), chunk("ris", "stop"), b"[DONE]")))
    texts = [c.choices[0].delta.content for c in server.client().stream_chat("?", model="m")]
    assert texts == ["Pa", "ris"]


def test_a_stream_that_breaks_off_is_an_error_after_its_text() -> None:
    server = Server((200, {}, events(chunk("Pa"))))
    stream = server.client().stream_chat("?", model="m")
    assert next(stream).choices[0].delta.content == "Pa"
    with pytest.raises(NetworkError, match="before the answer was complete"):
        next(stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ends", "done", "complete"), [((1, 0), (), False), ((1, 0, 2), (), True), ((1,), (DONE,), True)]
)
async def test_a_stream_of_several_choices_ends_when_each_of_them_has(kind, ends, done, complete) -> None:
    texts = [chunk("", "stop", index) for index in ends]
    for one in texts:  # of either kind
        del one["object"]
        one["choices"][0]["text"] = "x"
    server = Server((200, {}, events(*texts, *done)))
    client = server.client() if kind == "sync" else server.async_client()
    for stream in (client.stream_chat("?", model="m", n=3), client.stream_complete(["a", "b", "c"], model="m")):
        with contextlib.nullcontext() if complete else pytest.raises(NetworkError, match="before the answer was"):
            assert [piece.choices[0].index for piece in await items(stream)] == list(ends)


def test_an_error_inside_a_stream_is_raised_with_its_message() -> None:
    server = Server((200, {}, events(chunk("Pa"), {"error": {"message": "out of paper"}})))
    with pytest.raises(ProviderError, match="out of paper"):
        list(server.client().stream_chat("?", model="m"))


async def test_the_async_client_does_the_same(pauses: list[float]) -> None:
    server = Server((503, {}, b"busy"), CHAT)
    async with server.async_client() as client:
        assert (await client.chat("?", model="m")).choices[0].message.content == "Paris"
        server.answers = [(200, {}, events(chunk("Pa"), chunk("ris", "stop")))]
        assert [c.choices[0].delta.content async for c in client.stream_chat("?", model="m")] == ["Pa", "ris"]
        server.answers = [{"object": "list", "data": [{"id": "m"}]}]
        assert [m.id for m in await client.models()] == ["m"]
        server.answers = [(400, {}, b'{"error": {"message": "bad"}}')]
        with pytest.raises(ProviderError, match="bad"):
            await client.embed("x", model="m")
    assert len(pauses) == 1


def test_retries_honour_retry_after_then_double_then_give_up(pauses: list[float]) -> None:
    server = Server((429, {"retry-after": "7"}, b""), (500, {}, b""), (502, {}, b""), CHAT)
    assert server.client(max_retries=3).chat("?", model="m").choices[0].message.content == "Paris"
    assert pauses[0] == 7 and 0.75 <= pauses[1] <= 1 and 1.5 <= pauses[2] <= 2
    server = Server((429, {}, b'{"error": {"message": "slow down", "type": "x"}}'))
    with pytest.raises(ProviderError, match="429: slow down") as caught:
        server.client(max_retries=1).chat("?", model="m")
    assert caught.value.status == 429 and len(server.requests) == 2


def test_a_pause_longer_than_a_minute_is_left_to_the_caller(pauses: list[float]) -> None:
    server = Server((429, {"retry-after": "3600"}, b""))
    with pytest.raises(ProviderError):
        server.client().chat("?", model="m")
    assert pauses == [] and len(server.requests) == 1


def test_retry_after_may_be_a_date() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < client_http.retry_after({"retry-after": soon}) <= 30
    assert client_http.retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    assert client_http.retry_after({"retry-after": "soon"}) is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 507])
def test_what_would_fail_again_is_not_tried_again(status: int, pauses: list[float]) -> None:
    server = Server((status, {}, b'{"error": {"message": "no"}}'))
    with pytest.raises(ProviderError, match=f"{status}: no") as caught:
        server.client().chat("?", model="m")
    assert caught.value.status == status and len(server.requests) == 1


def test_a_server_that_is_not_there_is_retried_and_then_named(pauses: list[float]) -> None:
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:1 could not be reached"):
        server.client().chat("?", model="m")
    assert len(server.requests) == 3


def test_a_request_that_may_have_been_started_is_not_sent_twice(pauses: list[float]) -> None:
    for error, message in ((httpx.ReadTimeout("t"), "within 5 s"), (httpx.ReadError("cut"), "broke: cut")):
        server = Server(error)
        with pytest.raises(NetworkError, match=message):
            server.client(timeout=5).chat("?", model="m")
        assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<html>hello</html>", b'{"choices": 1}', b"[]", b"null", b'{"id": "x"}'])
def test_an_answer_of_another_form_is_a_typed_error(body: bytes) -> None:
    with pytest.raises(ProviderError):
        Server((200, {}, body)).client().chat("?", model="m")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "a"}}', "a"),
        ('{"error": "b"}', "b"),
        ('{"message": "c"}', "c"),
        ('{"detail": "d"}', "d"),
        ('{"error": {"type": "t"}}', '{"type": "t"}'),
        ("<h1>Bad\n Gateway</h1>", "<h1>Bad Gateway</h1>"),
        ("", ""),
    ],
)
def test_messages_are_found_in_every_usual_error_body(body: str, message: str) -> None:
    assert client_http.error_message(body) == message


def test_offline_mode_refuses_the_outside_and_allows_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    server = Server(CHAT)
    outside = Client("https://example.com/v1", transport=httpx.MockTransport(server))
    with pytest.raises(OfflineError, match=r"example\.com"):
        outside.chat("?", model="m")
    assert server.requests == []
    for host in ("127.0.0.1", "localhost", "[::1]"):
        with Client(f"http://{host}:1/v1", transport=httpx.MockTransport(server)) as client:
            client.chat("?", model="m")
    assert len(server.requests) == 3


def test_a_proxy_of_the_environment_is_not_used_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    assert client_http.Target("http://127.0.0.1:1/v1", "x").options()["trust_env"] is False
    assert client_http.Target("http://example.com/v1", "x").options()["trust_env"] is True


def test_importing_the_client_package_loads_neither_torch_nor_httpx() -> None:
    code = "import llmasos.client.providers, sys; sys.exit(bool({'torch', 'httpx', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "from llmasos.client import Client; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, ProviderNotFoundError),
        (409, ProviderError),
        (429, RateLimitError),
        (500, ProviderError),
        (503, UnavailableError),
    ],
)
def test_a_status_gives_its_own_type_with_all_that_the_server_told(status: int, kind: type[ProviderError]) -> None:
    body = b'{"error": {"message": "no", "type": "t", "param": "model", "code": "some_code"}}'
    server = Server((status, {"x-request-id": "r1", "retry-after": "3"}, body))
    with pytest.raises(kind) as caught:
        server.client(max_retries=0).chat("?", model="m")
    e = caught.value
    assert type(e) is kind
    assert (e.status, e.server_code, e.param, e.request_id, e.retry_after) == (status, "some_code", "model", "r1", 3)


def test_what_a_server_refuses_or_lacks_is_caught_like_what_a_local_model_does() -> None:
    for status, kind in ((400, InvalidInputError), (404, NotFoundError)):
        with pytest.raises(kind):
            Server((status, {}, b'{"error": {"message": "no"}}')).client().chat("?", model="m")


RESPONSE = {"id": "r1", "object": "response", "created_at": 1, "status": "completed", "model": "m", "output": []}


async def test_what_makes_something_is_asked_again_only_where_nothing_was_begun(pauses: list[float]) -> None:
    for status, count in ((500, 1), (502, 1), (504, 1), (503, 3), (429, 3)):
        server = Server((status, {}, b"no"))
        for make in (
            lambda c: c.responses.create("x", model="m"),
            lambda c: c.batches.create("f1", endpoint="/v1/completions"),
            lambda c: c.files.upload(b"x"),
            lambda c: c.access.create_key("x"),
            lambda c: list(c.responses.stream("x", model="m")),
        ):
            server.requests.clear()
            with pytest.raises(ProviderError):
                make(server.client())
            assert len(server.requests) == count, status
        server.requests.clear()
        with pytest.raises(ProviderError):
            await server.async_client().batches.create("f1", endpoint="/v1/completions")
        assert len(server.requests) == count, status
    server = Server((500, {}, b"no"), RESPONSE)
    assert server.client().responses.retrieve("r1").id == "r1"


async def test_an_upload_that_is_sent_again_is_whole(pauses: list[float], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"line\n" * 100_000)
    file = {"id": "f1", "object": "file", "bytes": 5, "created_at": 1, "filename": "a.jsonl", "purpose": "batch"}

    def server() -> Server:
        return Server((503, {}, b""), file)

    for sent in (path, str(path), path.read_bytes()):
        one = server()
        assert one.client().files.upload(sent).id == "f1"
        assert [request.content.count(b"line\n") for request in one.requests] == [100_000, 100_000]
    one = server()
    assert (await one.async_client().files.upload(path)).id == "f1"
    assert [request.content.count(b"line\n") for request in one.requests] == [100_000, 100_000]


def test_a_stream_is_asked_for_again_before_it_has_begun_and_never_after(pauses: list[float]) -> None:
    server = Server((503, {}, b""), (200, {}, events(chunk("Pa"))))
    stream = server.client().stream_chat("?", model="m")
    assert next(stream).choices[0].delta.content == "Pa"
    with pytest.raises(NetworkError):
        next(stream)
    assert len(server.requests) == 2


def test_a_model_that_dies_within_a_stream_is_told_from_other_errors() -> None:
    for code, kind in (("model_crashed", UnavailableError), ("internal_error", ProviderError)):
        error = {"error": {"message": "gone", "type": "server_error", "code": code, "param": None}}
        server = Server((200, {}, events(chunk("Pa"), error)))
        with pytest.raises(ProviderError, match="gone") as caught:
            list(server.client().stream_chat("?", model="m"))
        assert type(caught.value) is kind and caught.value.server_code == code


def test_ids_that_hold_anything_stay_one_part_of_the_path() -> None:
    server = Server((404, {}, b""))
    for ask in (
        lambda c: c.files.retrieve("../batches?x=1#"),
        lambda c: c.responses.delete("../batches?x=1#"),
        lambda c: c.access.revoke_key("../batches?x=1#"),
        lambda c: c.native.model("../batches?x=1#"),
    ):
        with pytest.raises(ProviderNotFoundError):
            ask(server.client())
    assert all(request.url.raw_path.endswith(b"/..%2Fbatches%3Fx%3D1%23") for request in server.requests)


def test_the_namespaces_ask_the_same_server_over_the_same_connections() -> None:
    server = Server({"object": "list", "data": []})
    with Client("http://127.0.0.1:1/base/v1/", api_key="k", transport=httpx.MockTransport(server)) as client:
        client.native.status(), client.access.keys(), client.files.list()
        assert client.native is client.native
    paths = [request.url.path for request in server.requests]
    assert paths == ["/base/llmasos/v1/status", "/base/llmasos/v1/keys", "/base/v1/files"]
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer k"}
