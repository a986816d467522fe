"""The `openai` package."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from common import MODEL
from official.world import (
    CALLED,
    EMBEDDER,
    PLAIN,
    QUESTION,
    SIMILAR,
    TOOL,
    WEATHER,
    Server,
    ended,
    example,
    feature,
    is_nearer,
    weather,
)


@contextlib.contextmanager
def openai_client(server: Server) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@feature("openai", "models")
def _(server: Server) -> None:
    from openai import NotFoundError

    with openai_client(server) as client:
        assert [model.id for model in client.models.list()] == [MODEL, EMBEDDER]
        assert client.models.retrieve(MODEL).context_length == 8192
        try:
            client.chat.completions.create(model="gpt-4o", messages=QUESTION)
        except NotFoundError as e:
            assert e.code == "model_not_found" and MODEL in e.message, e.message
        else:
            raise AssertionError("a model that is not there answered")


@feature("openai", "chat")
def _(server: Server) -> None:
    with openai_client(server) as client:
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, **PLAIN)
        assert "Berlin" in answer.choices[0].message.content, answer
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@feature("openai", "streaming")
def _(server: Server) -> None:
    asked = {"model": MODEL, "messages": QUESTION, **PLAIN}
    with openai_client(server) as client:
        client.chat.completions.create(**asked)  # from here on the same part of the prompt is cached
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content, (text, whole)
        assert len(chunks) > 4 and chunks[-1].usage == whole.usage, (len(chunks), chunks[-1].usage, whole.usage)
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == text


@feature("openai", "tools")
def _(server: Server) -> None:
    other = {"type": "function", "function": {**WEATHER, "name": "get_time", "description": "Time in a city"}}
    asked = {"model": MODEL, "tools": [TOOL, other], "parallel_tool_calls": False, **CALLED}
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    with openai_client(server) as client:
        named = {"type": "function", "function": {"name": "get_time"}}
        [call] = _calls(client.chat.completions.create(messages=messages, tool_choice=named, **asked))
        assert call.function.name == "get_time"
        must = {**asked, "tools": [TOOL], "tool_choice": "required"}
        first = client.chat.completions.create(messages=messages, **must)
        [call] = _calls(first)
        assert first.choices[0].finish_reason == "tool_calls"
        assert json.loads(call.function.arguments) == {"city": "Paris"}, call
        pieces = [
            piece.function
            for chunk in client.chat.completions.create(messages=messages, stream=True, **must)
            for piece in chunk.choices[0].delta.tool_calls or ()
        ]
        assert pieces[0].name == "get_weather"
        assert json.loads("".join(piece.arguments or "" for piece in pieces)).keys() == {"city"}
        found = {"role": "tool", "tool_call_id": call.id, "content": weather("Paris")}
        messages += [first.choices[0].message, found]
        last = client.chat.completions.create(messages=messages, **asked, tool_choice="none")
        assert last.choices[0].message.content and not last.choices[0].message.tool_calls
        assert last.usage.prompt_tokens > 40


@feature("openai", "tools of its own accord")
def _(server: Server) -> None:
    messages: list[Any] = example()
    with openai_client(server) as client:
        first = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], **CALLED)
        [call] = _calls(first)
        assert json.loads(call.function.arguments) == {"city": "Paris"}, call
        found = {"role": "tool", "tool_call_id": call.id, "content": weather("Paris")}
        messages += [first.choices[0].message, found]
        last = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], **CALLED)
        assert "18 degrees" in last.choices[0].message.content, last


@feature("openai", "a call that is cut")
def _(server: Server) -> None:
    with openai_client(server) as client:
        for tokens in range(18, 40, 3):
            asked = {"model": MODEL, "messages": example()[-1:], "tools": [TOOL], "tool_choice": "required"}
            message = client.chat.completions.create(**asked, max_tokens=tokens, temperature=0).choices[0].message
            if message.tool_calls:
                assert "</" not in (message.content or ""), message


def _calls(answer: Any) -> Any:
    message = answer.choices[0].message
    assert message.tool_calls, f"called nothing: {message.content!r}"
    assert not message.content, message.content
    return message.tool_calls


@feature("openai", "json schema")
def _(server: Server) -> None:
    from pydantic import BaseModel

    class Country(BaseModel):
        name: str
        capital: str
        inhabitants: int

    messages: Any = [{"role": "user", "content": "Tell me about France as JSON."}]
    with openai_client(server) as client:
        asked = {"model": MODEL, "messages": messages, "temperature": 0}
        parsed = (
            client.chat.completions.parse(**asked, response_format=Country, max_tokens=100).choices[0].message.parsed
        )
        assert isinstance(parsed, Country) and parsed.name
        form: Any = {"type": "json_object"}
        text = client.chat.completions.create(**asked, response_format=form, max_tokens=100).choices[0]
        assert text.finish_reason == "length" or isinstance(json.loads(text.message.content), dict)


@feature("openai", "embeddings")
def _(server: Server) -> None:
    with openai_client(server) as client:
        found = client.embeddings.create(model=EMBEDDER, input=SIMILAR).data  # base64 on the wire
        floats = client.embeddings.create(model=EMBEDDER, input=SIMILAR, encoding_format="float").data
    assert [len(one.embedding) for one in found] == [384] * 3 and is_nearer([one.embedding for one in found])
    assert max(abs(a - b) for a, b in zip(found[0].embedding, floats[0].embedding, strict=True)) < 1e-6


@feature("openai", "files and batch")
def _(server: Server) -> None:
    def line(id: str, **body: Any) -> str:
        url, body = "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 8, **body}
        return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": body})

    lines = [line(f"q{i}", temperature=0) for i in range(4)]
    lines += [line("wrong", temperature=9)]
    with openai_client(server) as client:
        file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        assert client.files.content(file.id).text == "\n".join(lines)
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"show": "4"}
        )
        batch = ended(lambda: client.batches.retrieve(made.id))
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5, 4, 1), counts
        answers = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(one["custom_id"] for one in answers) == ["q0", "q1", "q2", "q3"]
        assert all(one["response"]["body"]["choices"][0]["message"]["content"] for one in answers)
        [failed] = [json.loads(one) for one in client.files.content(batch.error_file_id).text.splitlines()]
        assert failed["custom_id"] == "wrong" and failed["response"]["status_code"] == 400, failed
        assert made.id in [one.id for one in client.batches.list()] and batch.metadata == {"show": "4"}
        for id in (file.id, batch.output_file_id, batch.error_file_id):
            assert client.files.delete(id).deleted


@feature("openai", "responses with memory")
def _(server: Server) -> None:
    asked = {"model": MODEL, "max_output_tokens": 24, "temperature": 0}
    with openai_client(server) as client:
        first = client.responses.create(input="My name is Ada.", **asked)
        second = client.responses.create(input="What is my name?", previous_response_id=first.id, **asked)
        alone = client.responses.create(input="What is my name?", **asked)
        told = [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "What is my name?"},
        ]
        chat = client.chat.completions.create(model=MODEL, messages=told, **PLAIN)
        assert second.usage.input_tokens == chat.usage.prompt_tokens > alone.usage.input_tokens, second.usage
        assert client.responses.retrieve(second.id).output_text == second.output_text
        with client.responses.stream(input="And again?", previous_response_id=second.id, **asked) as stream:
            events = list(stream)
        kinds, third = [event.type for event in events], events[-1].response
        assert kinds[0] == "response.created" and third.output_text
        assert kinds[-1] in ("response.completed", "response.incomplete"), kinds[-1]
        assert third.usage.input_tokens > second.usage.input_tokens + second.usage.output_tokens
        flat = {"type": "function", **WEATHER}
        called = client.responses.create(input="Weather in Paris?", tools=[flat], tool_choice="required", **asked)
        [call] = [item for item in called.output if item.type == "function_call"][:1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": weather("Paris")}
        after = client.responses.create(input=[result], tools=[flat], previous_response_id=called.id, **asked)
        assert after.usage.input_tokens > called.usage.input_tokens and after.output
        client.responses.delete(first.id)


@feature("openai", "completions with logprobs")
def _(server: Server) -> None:
    prompt = "The capital of France is Paris"
    with openai_client(server) as client:
        scored = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, echo=True, logprobs=3, temperature=0
        )
        found = scored.choices[0].logprobs
        assert "".join(found.tokens).startswith(prompt) and found.token_logprobs[0] is None
        assert all(value <= 0 for value in found.token_logprobs[1:]) and len(found.top_logprobs[2]) >= 3
        wrong = client.completions.create(
            model=MODEL, prompt="The capital of France is the", max_tokens=1, echo=True, logprobs=0, temperature=0
        )
        assert found.token_logprobs[5] != wrong.choices[0].logprobs.token_logprobs[5]
        several = client.completions.create(model=MODEL, prompt=["One, two,", "A, B,"], max_tokens=4, n=2)
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
