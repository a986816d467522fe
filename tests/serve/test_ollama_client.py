"""The official `ollama` client against a real server on a loopback port, with a fake and with a real model."""

import math

import ollama
import pytest
from fake_llm import FakeLLM, live_server

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def fake_url():
    with live_server(FakeLLM()) as url:
        yield url.removesuffix("/v1")


@pytest.fixture(scope="module")
def real_url(tiny_llm):
    with live_server(tiny_llm) as url:
        yield url.removesuffix("/v1")


@pytest.fixture
def fake_client(fake_url: str):
    with ollama.Client(fake_url) as client:
        yield client


@pytest.fixture
def real_client(real_url: str):
    with ollama.Client(real_url) as client:
        yield client


@pytest.fixture(params=["fake", "tiny"])
def served(request):
    """(client, model name) for the fake and for the real model."""
    return request.getfixturevalue("fake_client" if request.param == "fake" else "real_client"), request.param


def measured(answer, num_tokens) -> None:
    assert answer.done and answer.done_reason in ("stop", "length")
    assert 0 < answer.eval_count <= num_tokens and answer.prompt_eval_count > 0
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(part >= 0 for part in parts) and answer.total_duration == sum(parts) > 0


def test_chat(served) -> None:
    client, name = served
    answer = client.chat(name, HI, options={"num_predict": 5, "temperature": 0})
    assert answer.model == name and answer.message.role == "assistant" and answer.message.content
    measured(answer, 5)


@pytest.mark.parametrize("method", ["chat", "generate"])
def test_a_stream_adds_up_to_the_whole_answer(served, method: str) -> None:
    client, name = served

    def ask(**more):
        options = {"num_predict": 12, "temperature": 0}
        return getattr(client, method)(name, HI if method == "chat" else "hi", options=options, **more)

    def text(one):
        return one.message.content if method == "chat" else one.response

    whole, parts = ask(), list(ask(stream=True))
    assert "".join(map(text, parts)) == text(whole) and [part.done for part in parts[:-1]] == [False] * (len(parts) - 1)
    assert parts[-1].eval_count == whole.eval_count and parts[-1].done_reason == whole.done_reason
    measured(parts[-1], 12)


def test_json_and_a_schema(real_client: ollama.Client) -> None:
    client = real_client
    for method, asked in (("chat", HI), ("generate", "hi")):
        answer = getattr(client, method)("tiny", asked, format=SCHEMA, options={"num_predict": 60, "seed": 1})
        text = answer.message.content if method == "chat" else answer.response
        assert text.replace(" ", "") in ('{"a":true}', '{"a":false}'), text
    raw = client.generate("tiny", "hi", raw=True, format=SCHEMA, options={"num_predict": 60, "seed": 1})
    assert raw.response.replace(" ", "") in ('{"a":true}', '{"a":false}')


def test_embed(served) -> None:
    client, name = served
    both = client.embed(name, ["The quick brown fox", "hi"])
    one = client.embed(name, "The quick brown fox")
    assert len(both.embeddings) == 2 and both.prompt_eval_count > one.prompt_eval_count > 0
    assert list(both.embeddings[0]) == pytest.approx(list(one.embeddings[0]), abs=1e-5)
    assert all(math.isfinite(x) for x in one.embeddings[0])
    older = client.embeddings(name, "The quick brown fox")
    assert list(older.embedding) == pytest.approx(list(one.embeddings[0]), abs=1e-5)


def test_list_show_and_ps(served) -> None:
    client, name = served
    assert [model.model for model in client.list().models] == [f"{name}:latest"]
    assert [model.model for model in client.ps().models] == [f"{name}:latest"]
    assert client.ps().models[0].context_length > 0
    shown = client.show(name)
    assert "completion" in shown.capabilities and "num_ctx" in shown.parameters
    assert client.chat(f"{name}:latest", HI, options={"num_predict": 2}).message.content is not None


def test_errors_are_the_clients_usual_exceptions(served) -> None:
    client, name = served
    with pytest.raises(ollama.ResponseError, match=r"'llama3\.2' is not served here") as missing:
        client.chat("llama3.2", HI)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="tokens") as long:
        client.generate(name, "word " * 3000)
    assert long.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="temprature") as unknown:
        client.chat(name, HI, options={"temprature": 1})
    assert unknown.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="images"):
        client.generate(name, "hi", images=[b"\x89PNG"])
    with pytest.raises(ollama.ResponseError, match="does not think"):
        client.chat(name, HI, think=True)
    for refused in (
        lambda: client.create("mine", from_=name),
        lambda: client.copy(name, "mine"),
        lambda: client.push(name),
    ):
        with pytest.raises(ollama.ResponseError, match="not a part of this server") as not_here:
            refused()
        assert not_here.value.status_code == 501


def test_an_exception_in_the_model_is_an_error_at_once_and_midway(fake_client: ollama.Client) -> None:
    client = fake_client
    with pytest.raises(ollama.ResponseError, match="failed on this request") as failed:
        client.chat("fake", [{"role": "user", "content": "boom"}])
    assert failed.value.status_code == 500 and "secret" not in str(failed.value)
    texts = []
    with pytest.raises(ollama.ResponseError, match="failed on this request"):
        for part in client.chat("fake", [{"role": "user", "content": "boom late"}], stream=True):
            texts.append(part.message.content)
    assert texts == ["b", "o"]


async def test_the_async_client_runs_many_requests_at_once(fake_url: str) -> None:
    import asyncio

    client = ollama.AsyncClient(fake_url)

    async def one(i: int) -> str:
        parts = [part async for part in await client.generate("fake", f"p{i}", stream=True)]
        return "".join(part.response for part in parts)

    assert await asyncio.gather(*[one(i) for i in range(20)]) == [f"p{i}!" for i in range(20)]
    await client.close()
