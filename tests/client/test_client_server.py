"""Both clients against our real server, over a socket."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from both_clients import KINDS, got, items
from fake_llm import FakeLLM, live_server

from llmasos.errors import (
    AuthenticationError,
    BadRequestError,
    NetworkError,
    PermissionDeniedError,
    ProviderError,
    ProviderNotFoundError,
)
from llmasos.serve.access import registry
from llmasos.serve.access.open import open_access
from llmasos.serve.native import worker
from llmasos.store.database import Database


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fakes() -> dict[str, FakeLLM]:
    return {"fake": FakeLLM("fake"), "slow": FakeLLM("slow", delay=0.02)}


@pytest.fixture
def url(fakes: dict[str, FakeLLM]) -> Iterator[str]:
    with live_server(fakes) as url:
        yield url


@pytest.fixture
async def client(kind: str, url: str):
    found = KINDS[kind](url, max_retries=0)
    yield found
    await got(found.close())


async def test_models_chat_completions_and_embeddings(client) -> None:
    assert [m.id for m in await got(client.models())] == ["fake", "slow"]
    assert (await got(client.model("fake"))).context_length == 1000
    answer = await got(client.chat("Hello", model="fake"))
    assert answer.choices[0].message.content == "Hello!" and answer.usage.completion_tokens == 6
    chunks = await items(client.stream_chat("Hello", model="fake"))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello!"
    assert (await got(client.complete("ab", model="fake", echo=True))).choices[0].text == "abab!"
    pieces = await items(client.stream_complete([97, 98], model="fake"))
    assert "".join(c.choices[0].text for c in pieces) == "ab!"
    vectors = await got(client.embed(["abc", "a"], model="fake"))
    assert [row.embedding for row in vectors.data] == [[3, 0.5, -0.25], [1, 0.5, -0.25]]


async def test_rerank_score_and_tokens(client) -> None:
    ranking = await got(client.rerank("pets", ["a", "a long text"], model="fake", top_n=1))
    assert len(ranking.results) == 1 and ranking.method in ("cosine", "cross-encoder")
    scores = await got(client.score("pets", ["a", "b"], model="fake"))
    assert [one.index for one in scores.data] == [0, 1]
    tokens = await got(client.tokenize("Hi", model="fake", return_token_strs=True))
    assert (tokens.tokens, tokens.count, tokens.token_strs) == ([72, 105], 2, ["H", "i"])
    assert await got(client.detokenize(tokens.tokens, model="fake")) == "Hi"
    messages = [{"role": "user", "content": "Hi"}]
    assert await got(client.count_tokens(messages, model="fake")) == len("user: Hi")


async def test_a_model_calls_typed_functions(client) -> None:
    def weather(city: str, days: int = 1) -> dict[str, object]:
        """Tell the weather."""
        return {"city": city, "days": days}

    def call(city: str) -> str:
        return f'<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}</tool_call>'

    for more in ({}, {"on_chunk": lambda chunk: None}):
        run = await got(client.run_tools(call("Bern") + call("Oslo"), model="fake", tools=[weather], **more))
        assert run.text == 'tool: {"city":"Oslo","days":1}!' and run.steps == 2
        assert [m["role"] for m in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]


async def test_errors_have_their_type_and_what_the_server_told(client) -> None:
    with pytest.raises(ProviderNotFoundError) as missing:
        await got(client.chat("x", model="none"))
    assert missing.value.server_code == "model_not_found" and missing.value.request_id
    with pytest.raises(BadRequestError) as wrong:
        await got(client.chat("x", model="fake", temperature=9))
    assert wrong.value.param == "temperature"
    with pytest.raises(BadRequestError) as long:
        await got(client.complete("x", model="fake", max_tokens=5000))
    assert long.value.server_code == "context_length_exceeded"
    with pytest.raises(ProviderError) as failed:
        await items(client.stream_chat("boom late", model="fake"))
    assert failed.value.server_code == "internal_error" and failed.value.status == 0


async def test_leaving_a_stream_ends_the_request(client, kind: str, fakes: dict[str, FakeLLM]) -> None:
    stream = client.stream_chat("a long tale that nobody hears", model="slow")
    if kind == "sync":
        next(stream), stream.close()
    else:
        await anext(stream), await stream.aclose()
    deadline = time.monotonic() + 10
    while fakes["slow"].num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fakes["slow"].num_cancelled == 1 and fakes["slow"].num_tokens < 20


async def test_responses_are_remembered_streamed_and_forgotten(client) -> None:
    first = await got(client.responses.create("Hello", model="fake"))
    assert first.output_text == "Hello!" and first.status == "completed"
    second = await got(client.responses.create("More", model="fake", previous_response_id=first.id))
    assert second.previous_response_id == first.id
    assert (await got(client.responses.retrieve(second.id))).output_text == "More!"
    asked = await got(client.responses.input_items(second.id))
    assert len(asked.data) == 3
    events = await items(client.responses.stream("Hello", model="fake"))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello!"
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "Hello!"
    assert (await got(client.responses.delete(first.id))).deleted
    with pytest.raises(ProviderNotFoundError):
        await got(client.responses.retrieve(first.id))
    assert await got(client.responses.count_tokens("Hello", model="fake")) > 4


async def test_a_background_response_is_followed_awaited_and_cancelled(client, kind: str) -> None:
    stream = client.responses.stream("Hello there", model="slow", background=True)
    if kind == "sync":
        first = next(stream)
        stream.close()
    else:
        first = await anext(stream)
        await stream.aclose()
    events = await items(client.responses.follow(first.response.id, starting_after=first.sequence_number))
    assert events[0].sequence_number == first.sequence_number + 1
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "Hello there!"
    waiting = await got(client.responses.create("Hello", model="slow", background=True))
    assert waiting.status in ("queued", "in_progress")
    assert (await got(client.responses.wait(waiting.id, interval=0.01))).output_text == "Hello!"
    long = await got(client.responses.create("x" * 200, model="slow", background=True))
    assert (await got(client.responses.cancel(long.id))).status == "cancelled"


async def test_a_conversation_grows_with_its_responses(client) -> None:
    message = {"type": "message", "role": "user", "content": "Be kind."}
    made = await got(client.conversations.create([message], metadata={"team": "blue"}))
    response = await got(client.responses.create("Hello", model="fake", conversation=made.id))
    assert response.conversation == {"id": made.id}
    found = await got(client.conversations.items(made.id, order="asc"))
    assert [item["role"] for item in found.data] == ["user", "user", "assistant"]
    more = await got(client.conversations.add_items(made.id, [message]))
    assert (await got(client.conversations.item(made.id, more.data[0]["id"])))["content"] == more.data[0]["content"]
    assert (await got(client.conversations.delete_item(made.id, more.data[0]["id"]))).id == made.id
    assert (await got(client.conversations.items(made.id, limit=1))).has_more
    assert (await got(client.conversations.update(made.id, {"team": "red"}))).metadata == {"team": "red"}
    assert (await got(client.conversations.retrieve(made.id))).metadata == {"team": "red"}
    assert (await got(client.conversations.delete(made.id))).deleted


async def test_a_response_that_fails_midway_is_an_error_or_says_so(client) -> None:
    with pytest.raises(ProviderError):
        events = await items(client.responses.stream("boom late", model="fake"))
        assert events[-1].type == "response.failed"
        raise ProviderError(events[-1].response.error.message)


async def test_the_servers_own_api(client) -> None:
    assert {m.name for m in await got(client.native.status())} == {"fake", "slow"}
    assert await got(client.native.models()) == []
    assert any(m.name == "gpt2" for m in await got(client.native.catalog("gpt2")))
    assert await got(client.native.pulls()) == []
    with pytest.raises(ProviderNotFoundError):
        await got(client.native.model("none"))
    assert await items(client.native.logs(limit=5)) is not None


async def test_a_running_request_is_seen_and_cancelled(client, kind: str, url: str) -> None:
    from llmasos.client import Client

    ended: list[Exception] = []

    def ask() -> None:
        with Client(url, max_retries=0) as other:
            try:
                other.chat("x" * 300, model="slow")
            except ProviderError as e:
                ended.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    running = []
    while not running and time.monotonic() < deadline:
        running = [r for r in await got(client.native.requests()) if r.model == "slow"]
    assert (await got(client.native.cancel_request(running[0].id))).cancelled
    thread.join(10)
    assert len(ended) == 1 and ended[0].server_code == "request_cancelled"


@pytest.fixture
def guarded(fakes: dict[str, FakeLLM]) -> Iterator[tuple[str, str]]:
    """A server that wants keys, and one that may manage it."""
    with Database.open("") as database, database.session() as session:
        _, key = registry.create(session, {"name": "boss", "scopes": ["inference", "manage"]}, actor="local:test")
    with open_access("", "127.0.0.1", require_key=True) as access, live_server(fakes, access=access) as url:
        yield url, key


async def test_keys_are_made_changed_counted_and_revoked(kind: str, guarded: tuple[str, str]) -> None:
    url, key = guarded
    for wrong in ("", "sk-llmasos-wrong"):
        stranger = KINDS[kind](url, api_key=wrong, max_retries=0)
        with pytest.raises(AuthenticationError):
            await got(stranger.models())
        await got(stranger.close())
    boss = KINDS[kind](url, api_key=key, max_retries=0)
    soon = datetime.now(UTC) + timedelta(hours=1)
    made = await got(boss.access.create_key("ci", models=["fake"], tokens_per_day=1000, expires=soon))
    assert made.key.startswith("sk-llmasos-") and made.expires is not None
    worker = KINDS[kind](url, api_key=made.key, max_retries=0)
    await got(worker.chat("Hello", model="fake"))
    with pytest.raises(PermissionDeniedError):
        await got(worker.access.keys())
    assert {k.name for k in await got(boss.access.keys())} == {"boss", "ci"}
    changed = await got(boss.access.update_key(made.id, name="tests", tokens_per_day=None))
    assert (changed.name, changed.tokens_per_day) == ("tests", None)
    assert (await got(boss.access.key(made.id))).name == "tests"
    [used] = await got(worker.access.usage())
    assert (used.model, used.requests, used.output_tokens) == ("fake", 1, 6)
    assert (await got(boss.access.usage(key=made.id, since="2020-01-01", model="fake"))) == [used]
    assert (await got(boss.access.revoke_key(made.id))).state == "revoked"
    with pytest.raises(AuthenticationError):
        await got(worker.chat("Hello", model="fake"))
    log = await got(boss.access.audit(limit=1))
    assert log.data[0].action == "key.revoke" and log.has_more
    await got(worker.close())
    await got(boss.close())


async def test_wrong_fields_of_a_key_are_refused_before_they_are_sent(kind: str) -> None:
    from llmasos.errors import InvalidInputError

    client = KINDS[kind]("http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(InvalidInputError, match="scopes"):
        await got(client.access.create_key("x", scopes=["everything"]))
    with pytest.raises(NetworkError):
        await got(client.access.create_key("x"))
    await got(client.close())


async def test_files_are_sent_listed_fetched_and_deleted(client, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    content = b"".join(b'{"line": %d}\n' % i for i in range(50_000))
    path.write_bytes(content)
    sent = await got(client.files.upload(path, purpose="user_data"))
    assert (sent.filename, sent.bytes, sent.purpose) == ("in.jsonl", len(content), "user_data")
    with path.open("rb") as file:
        again = await got(client.files.upload(file, filename="again.jsonl", purpose="user_data"))
    small = await got(client.files.upload(b"{}", filename="小.jsonl"))
    assert (await got(client.files.retrieve(small.id))).filename == "小.jsonl"
    page = await got(client.files.list(purpose="user_data", limit=1, order="asc"))
    assert [f.id for f in page.data] == [sent.id] and page.has_more
    rest = await got(client.files.list(purpose="user_data", after=page.last_id, order="asc"))
    assert [f.id for f in rest.data] == [again.id] and not rest.has_more
    assert await got(client.files.content(again.id)) == content
    assert await got(client.files.download(sent.id, tmp_path / "out.jsonl")) == len(content)
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert (await got(client.files.delete(sent.id))).deleted
    with pytest.raises(ProviderNotFoundError):
        await got(client.files.content(sent.id))


def batch_lines(model: str, texts: list[str]) -> bytes:
    requests = (
        {
            "custom_id": text,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": text}]},
        }
        for text in texts
    )
    return "\n".join(map(json.dumps, requests)).encode()


async def test_a_batch_is_made_awaited_and_cancelled(client) -> None:
    file = await got(client.files.upload(batch_lines("fake", ["a", "b"])))
    made = await got(client.batches.create(file.id, endpoint="/v1/chat/completions", metadata={"team": "blue"}))
    assert made.completion_window == "24h"
    done = await got(client.batches.wait(made.id, interval=0.01))
    assert done.status == "completed" and done.request_counts.completed == 2 and done.metadata == {"team": "blue"}
    answers = [json.loads(line) for line in (await got(client.files.content(done.output_file_id))).splitlines()]
    texts = {a["custom_id"]: a["response"]["body"]["choices"][0]["message"]["content"] for a in answers}
    assert texts == {"a": "a!", "b": "b!"}
    slow = await got(client.files.upload(batch_lines("slow", ["x" * 300])))
    running = await got(client.batches.create(slow.id, endpoint="/v1/chat/completions"))
    assert [b.id for b in (await got(client.batches.list(limit=1))).data] == [running.id]
    await got(client.batches.cancel(running.id))
    assert (await got(client.batches.wait(running.id, interval=0.01))).status == "cancelled"


@pytest.fixture
def worker_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of its own would do is done by this one, which has torch already."""

    async def run(task, options, on_progress=lambda _: None):
        return await asyncio.to_thread(worker.TASKS[task], options, on_progress)

    monkeypatch.setattr(worker, "run", run)


async def test_models_are_sent_planned_and_removed(client, tiny_model: Path, worker_here: None) -> None:
    sent = await got(client.native.upload(tiny_model, name="mine"))
    assert (sent.name, sent.format) == ("mine", "safetensors")
    assert [m.name for m in await got(client.native.models())] == ["mine"]
    assert (await got(client.native.model("mine"))).size == sent.size
    assert (await got(client.native.plan("mine", context=64))).context == 64
    assert (await got(client.native.remove("mine"))).freed_bytes > 0
    with pytest.raises(ProviderNotFoundError):
        await got(client.native.plan("mine"))


async def test_models_of_a_program_stay_as_they_are(client) -> None:
    assert (await got(client.native.load("fake"))).state == "ready"
    with pytest.raises(BadRequestError):
        await got(client.native.unload("fake"))
    with pytest.raises(BadRequestError):
        await got(client.native.pin("fake", False))


async def test_a_pull_that_fails_says_why(client) -> None:
    with pytest.raises(ProviderError, match="none-of-this-name"):
        await items(client.native.pull("none-of-this-name"))
