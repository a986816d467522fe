"""The official `openai` client against a real server on a loopback port, with a fake and with a real model."""

import math

import openai
import pytest
from fake_llm import FakeLLM, live_server

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def fake_url():
    with live_server(FakeLLM()) as url:
        yield url


@pytest.fixture(scope="module")
def real_url(tiny_llm):
    with live_server(tiny_llm) as url:
        yield url


@pytest.fixture(params=["fake", "tiny"])
def served(request):
    """(client, model name) for the fake and for the real model."""
    url = request.getfixturevalue("fake_url" if request.param == "fake" else "real_url")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client, request.param


def test_models(served) -> None:
    client, name = served
    assert [m.id for m in client.models.list()] == [name]
    assert client.models.retrieve(name).owned_by == "llmasos"


def test_chat(served) -> None:
    client, name = served
    answer = client.chat.completions.create(model=name, messages=HI, max_tokens=5, temperature=0)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streaming_equals_the_whole_answer(served) -> None:
    client, name = served
    fields = {"model": name, "messages": HI, "max_tokens": 12, "temperature": 0, "n": 2, "seed": 1}
    whole = client.chat.completions.create(**fields)
    texts, ends, usage = {}, {}, None
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert ends == {c.index: c.finish_reason for c in whole.choices}
    assert usage.model_dump() == whole.usage.model_dump()


def test_chat_logprobs(served) -> None:
    client, name = served
    answer = client.chat.completions.create(
        model=name, messages=HI, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs))


def test_completions_with_text_token_ids_and_batches(served) -> None:
    client, name = served
    text = client.completions.create(model=name, prompt="The quick", max_tokens=6, temperature=0)
    batch = client.completions.create(model=name, prompt=["The quick", "fox"], max_tokens=6, temperature=0)
    assert batch.choices[0].text == text.choices[0].text and [c.index for c in batch.choices] == [0, 1]
    ids = client.completions.create(model=name, prompt=[70, 71], max_tokens=3, temperature=0)
    many = client.completions.create(model=name, prompt=[[70, 71], [72]], max_tokens=3, temperature=0)
    assert many.choices[0].text == ids.choices[0].text
    assert many.usage.prompt_tokens == 3
    streamed = client.completions.create(model=name, prompt="The quick", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_with_logprobs_scores_the_prompt(served, max_tokens: int) -> None:
    client, name = served
    answer = client.completions.create(
        model=name, prompt="The quick brown fox", max_tokens=max_tokens, echo=True, logprobs=1, temperature=0
    )
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert choice.text.startswith("The quick brown fox")
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert logprobs.token_logprobs[0] is None and all(x <= 0 for x in logprobs.token_logprobs[1:])
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(logprobs.tokens)
    assert answer.usage.completion_tokens == max_tokens or choice.finish_reason == "stop"


def test_stop_seed_and_logit_bias(served) -> None:
    client, name = served
    fields = {"model": name, "prompt": "The quick", "temperature": 1, "seed": 11, "max_tokens": 8}
    first = client.completions.create(**fields).choices[0]
    assert client.completions.create(**fields).choices[0].text == first.text
    if len(first.text) > 2:
        stop = first.text[1:3]
        stopped = client.completions.create(**fields, stop=[stop]).choices[0]
        assert stopped.text == first.text[: first.text.index(stop)] and stopped.finish_reason == "stop"
    forced = client.completions.create(**fields, logit_bias={"65": 100}, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens[:5])) == 1


def test_embeddings(served) -> None:
    client, name = served
    answer = client.embeddings.create(model=name, input=["The quick brown fox", "hi"])  # asks for base64, gives floats
    floats = client.embeddings.create(model=name, input=["The quick brown fox", "hi"], encoding_format="float")
    assert len(answer.data) == 2 and answer.usage.prompt_tokens > 2
    for a, b in zip(answer.data, floats.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-6)
        assert all(math.isfinite(x) for x in a.embedding)


def test_errors_are_the_clients_usual_exceptions(served) -> None:
    client, name = served
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as over:
        client.completions.create(model=name, prompt="x", max_tokens=5000)
    assert over.value.code == "context_length_exceeded" and "5000" in str(over.value)
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=name, messages=HI, extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=name, messages=HI, reasoning_effort="high")
    assert refused.value.param == "reasoning_effort"


def test_an_exception_in_the_model_is_a_500_and_the_server_stays_up(fake_url: str) -> None:
    with openai.OpenAI(base_url=fake_url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(model="fake", prompt="boom")
        request_id = failed.value.response.headers["x-request-id"]
        assert request_id in str(failed.value) and "secret" not in str(failed.value)
        with pytest.raises(openai.InternalServerError):
            list(client.completions.create(model="fake", prompt="boom", stream=True))
        texts = []
        with pytest.raises(openai.APIError, match="failed on this request"):
            for chunk in client.completions.create(model="fake", prompt="boom late", stream=True):
                texts.append(chunk.choices[0].text)
        assert texts == ["b", "o"]
        assert client.completions.create(model="fake", prompt="hi").choices[0].text == "hi!"


async def test_the_async_client_runs_many_requests_at_once(fake_url: str) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=fake_url, api_key="none") as client:
        requests = [client.completions.create(model="fake", prompt=f"p{i}") for i in range(20)]
        answers = await asyncio.gather(*requests)
    assert [a.choices[0].text for a in answers] == [f"p{i}!" for i in range(20)]
