"""Long answers and long requests: the same as short ones, made and read where they hold nobody up."""

import json
import threading

import pytest
from fake_llm import FakeLLM, asgi_client
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llmasos.client.types import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatReply,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    Embedding,
    EmbeddingList,
    TextCompletion,
    TopLogprob,
)
from llmasos.client.types.ollama import OllamaEmbedResponse
from llmasos.serve import body, render

NUMBERS = [i / 7 for i in range(3000)]
TOP = TopLogprob(token="é\n", logprob=-0.5, bytes=[195, 169])
LONG = " " * body.LONG


@pytest.mark.parametrize(
    "answer",
    [
        EmbeddingList(
            data=[Embedding(index=0, embedding=NUMBERS), Embedding(object="embedding", index=1, embedding="AAAA")],
            model="m",
        ),
        EmbeddingList(data=[], model="m", more={"unknown": [1, None]}),
        OllamaEmbedResponse.model_construct(model="m", embeddings=[NUMBERS, [], [float("nan"), float("inf")]]),
        TextCompletion(
            id="1",
            created=1,
            model="m",
            usage=None,
            choices=[
                CompletionChoice(
                    index=0,
                    text='"',
                    logprobs=CompletionLogprobs(tokens=["a"] * 1025, top_logprobs=[None, *[{"a": -0.5}] * 1024]),
                )
            ],
        ),
        ChatCompletion(
            id="1",
            created=1,
            model="m",
            choices=[
                ChatChoice(
                    index=0,
                    message=ChatReply(content=None),
                    logprobs=ChatLogprobs(content=[ChatTokenLogprob(token="a", logprob=-1, top_logprobs=[TOP])] * 3),
                )
            ],
        ),
        EmbeddingList.model_construct(),
    ],
)
def test_an_answer_in_pieces_is_what_one_call_writes(answer: BaseModel) -> None:
    assert render.body(answer).decode() == render.dump(answer)


async def test_long_answers_are_made_and_written_outside_the_event_loop(monkeypatch) -> None:
    where = set()

    def noting(function):
        def noted(*args):
            where.add((function.__name__, threading.current_thread() is threading.main_thread()))
            return function(*args)

        return noted

    for name in ("_pieces", "embedding_base64", "chat_logprobs", "completion_logprobs"):
        monkeypatch.setattr(render, name, noting(getattr(render, name)))
    async with asgi_client(FakeLLM()) as client:
        for path, fields in (
            ("embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
            ("completions", {"prompt": "a", "echo": True, "logprobs": 1}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
        ):
            assert (await client.post(f"/v1/{path}", json={"model": "fake", **fields})).status_code == 200
    names = ("_pieces", "embedding_base64", "chat_logprobs", "completion_logprobs")
    assert where == {(name, False) for name in names}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/completions", '{"model": "fake", "prompt": "a", "max_tokens": 2}'),
        ("/v1/completions", '{"model": "fake", "prompt": "\\ud800"}'),
        ("/v1/completions", '{"model": "fake", "prompt": 1}'),
        ("/v1/chat/completions", '{"model": "fake", "messages": [{"role": "user", "content": "a"}], "audio": {}}'),
        ("/v1/chat/completions", '{"model": "fake", "messages": [{"role": "user", "content": "a"}], "x": 1}'),
        ("/v1/embeddings", '{"model": "fake", "input": ["a", "b"]'),
        ("/v1/embeddings", '{"model": "fake", "input": NaN}'),
        ("/v1/embeddings", "[1]"),
        ("/v1/embeddings", "[" * 300 + "]" * 300),
        ("/v1/responses", '{"model": "fake", "input": "a", "store": false, "max_output_tokens": 0}'),
        ("/v1/messages", '{"model": "fake", "messages": []}'),
        ("/api/embed", '{"name": "fake", "input": "a", "dimensions": true}'),
    ],
)
async def test_a_long_body_is_answered_as_a_short_one(monkeypatch, path: str, text: str) -> None:
    read, mains = body.read, []

    def noting(*args):
        mains.append(threading.current_thread() is threading.main_thread())
        return read(*args)

    monkeypatch.setattr(body, "read", noting)
    headers = {"content-type": "application/json", "x-request-id": "1"}
    async with asgi_client(FakeLLM()) as client:
        short, long = [
            await client.post(path, content=content.encode(), headers=headers) for content in (text, text + LONG)
        ]
    assert mains == [False]
    assert long.status_code == short.status_code
    found, expected = long.json(), short.json()
    for one in (found, expected):
        one.pop("id", None), one.pop("created", None)
    assert found == expected


async def test_a_long_response_request_is_honoured() -> None:
    async with asgi_client(FakeLLM(answers=["yes"] * 2)) as client:
        asked = {"model": "fake", "input": "a", "store": False, "metadata": {"a": "b"}}
        answer = await client.post(
            "/v1/responses", content=json.dumps(asked) + LONG, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200 and answer.json()["metadata"] == {"a": "b"}


class Anything(BaseModel):
    model_config = {"extra": "allow"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "text",
    [
        *("1e400", "-0", "-0.0", "1E+2", "0.1", "18446744073709551616", "1" * 40, "NaN", "-Infinity"),
        *('"\\ud83d\\ude00"', '"\\ud83d"', '"\\u0000"', "\ufeff1", '"\x7f"', " 1 "),
        *('{"a": 1, "a": 2}', "[" * 900 + "]" * 900),
    ],
)
def test_the_faster_parser_reads_odd_json_as_the_usual_one_does(text: str) -> None:
    data = f'["{chr(0xE9)}", {text}]'.encode()
    assert repr(outcome(lambda: body.read(data, Anything))) == repr(outcome(lambda: json.loads(data)))


def outcome(work):
    try:
        return work()
    except ValueError as e:
        return e


@given(json_values, st.booleans())
def test_the_faster_parser_reads_what_the_usual_one_reads(value: object, is_ascii: bool) -> None:
    text = json.dumps([value], ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            body.read(text, Anything)
        return
    assert body.read(text, Anything) == expected
