"""The official `anthropic` client against a real server on a loopback port, with a fake and with a real model."""

import anthropic
import pytest
from fake_llm import FakeLLM, live_server

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def fake():
    return FakeLLM()


@pytest.fixture(scope="module")
def fake_url(fake):
    with live_server(fake) as url:
        yield url.removesuffix("/v1")


@pytest.fixture(scope="module")
def real_url(tiny_llm):
    with live_server(tiny_llm) as url:
        yield url.removesuffix("/v1")


@pytest.fixture(params=["fake", "tiny"])
def served(request):
    """(client, model name) for the fake and for the real model."""
    url = request.getfixturevalue("fake_url" if request.param == "fake" else "real_url")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client, request.param


def test_a_message(served) -> None:
    client, name = served
    message = client.messages.create(model=name, messages=HI, max_tokens=5, extra_body={"temperature": 0})
    assert message.type == "message" and message.role == "assistant" and message.model == name
    assert message.id.startswith("msg_") and message._request_id.startswith("req_")
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason in ("end_turn", "max_tokens") and message.stop_sequence is None
    assert 0 < message.usage.output_tokens <= 5 and message.usage.input_tokens > 0


def test_a_streamed_message_equals_the_whole_one(served) -> None:
    client, name = served
    fields = {"model": name, "messages": HI, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    total = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in (whole, final)]
    assert total[0] == total[1]


def test_count_tokens_counts_what_a_message_uses(served) -> None:
    client, name = served
    fields = {"model": name, "messages": HI, "system": "Be brief."}
    counted = client.messages.count_tokens(**fields)
    message = client.messages.create(**fields, max_tokens=1)
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_models(served) -> None:
    client, name = served
    assert [model.id for model in client.models.list()] == [name]
    model = client.models.retrieve(name)
    assert model.display_name == name and model.max_input_tokens > 0 and model.created_at.year > 2020


def test_errors_are_the_clients_usual_exceptions(served) -> None:
    client, name = served
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", messages=HI, max_tokens=5)
    assert missing.value.type == "not_found_error" and missing.value.error_code == "model_not_found"
    assert missing.value.request_id.startswith("req_")
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.create(model=name, messages=[{"role": "user", "content": "word " * 3000}], max_tokens=5)
    assert long.value.error_code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="temprature"):
        client.messages.create(model=name, messages=HI, max_tokens=5, extra_body={"temprature": 1})
    with pytest.raises(anthropic.BadRequestError, match="container"):
        client.messages.create(model=name, messages=HI, max_tokens=5, container="c")
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0.*'image'"):
        image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        client.messages.create(model=name, messages=[{"role": "user", "content": [image]}], max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="web_search_20250305"):
        tool = {"type": "web_search_20250305", "name": "web_search"}
        client.messages.create(model=name, messages=HI, max_tokens=5, tools=[tool])
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude")


def test_an_exception_in_the_model_is_an_api_error_at_once_and_midway(fake_url: str) -> None:
    with anthropic.Anthropic(base_url=fake_url, api_key="none", max_retries=0) as client:

        def ask(text, **more):
            return {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 50, **more}

        with pytest.raises(anthropic.InternalServerError) as failed:
            client.messages.create(**ask("boom"))
        assert failed.value.type == "api_error" and failed.value.request_id in str(failed.value)
        assert "secret" not in str(failed.value)
        with pytest.raises(anthropic.InternalServerError), client.messages.stream(**ask("boom")) as stream:
            stream.until_done()
        texts = []
        with (
            pytest.raises(anthropic.APIStatusError, match="failed on this request") as late,
            client.messages.stream(**ask("boom late")) as stream,
        ):
            texts += stream.text_stream
        assert texts == ["b", "o"] and late.value.type == "api_error"
        assert client.messages.create(**ask("hi")).content[0].text == "hi!"


async def test_the_async_client_runs_many_requests_at_once(fake_url: str) -> None:
    import asyncio

    async with anthropic.AsyncAnthropic(base_url=fake_url, api_key="none") as client:

        async def one(i: int) -> str:
            messages = [{"role": "user", "content": f"p{i}"}]
            async with client.messages.stream(model="fake", messages=messages, max_tokens=20) as stream:
                return await stream.get_final_text()

        assert await asyncio.gather(*[one(i) for i in range(20)]) == [f"p{i}!" for i in range(20)]


def test_a_stop_sequence_is_named(fake_url: str) -> None:
    with anthropic.Anthropic(base_url=fake_url, api_key="none") as client:
        message = client.messages.create(
            model="fake", messages=[{"role": "user", "content": "one STOP two"}], max_tokens=50, stop_sequences=["STOP"]
        )
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")
        assert message.content[0].text == "one "


def test_an_answer_may_end_where_the_context_does(fake_url: str) -> None:
    with anthropic.Anthropic(base_url=fake_url, api_key="none") as client:
        messages = [{"role": "user", "content": "x" * 600}]
        cut = client.messages.create(model="fake", messages=messages, max_tokens=5000)
        assert cut.stop_reason == "model_context_window_exceeded"
        assert cut.usage.output_tokens == 1000 - len("user: ") - 600
        cut = client.messages.create(model="fake", messages=messages, max_tokens=10)
        assert cut.stop_reason == "max_tokens" and cut.content[0].text == "x" * 10
