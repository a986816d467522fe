"""The `ollama` package."""

from __future__ import annotations

import json
from typing import Any

from common import MODEL
from official.world import EMBEDDER, QUESTION, SIMILAR, Server, example, feature, is_nearer, weather


def ollama_client(server: Server) -> Any:
    from ollama import Client

    return Client(server.url)


@feature("ollama", "list, show, ps")
def _(server: Server) -> None:
    client = ollama_client(server)
    assert {f"{MODEL}:latest", f"{EMBEDDER}:latest"} <= {model.model for model in client.list().models}
    shown = client.show(MODEL)
    assert shown.details.quantization_level == "Q4_1" and "completion" in shown.capabilities
    assert "embedding" in client.show(EMBEDDER).capabilities
    assert {model.model for model in client.ps().models} == {f"{MODEL}:latest", f"{EMBEDDER}:latest"}


@feature("ollama", "chat")
def _(server: Server) -> None:
    from ollama import ResponseError

    client = ollama_client(server)
    answer = client.chat(MODEL, QUESTION, options={"temperature": 0, "num_predict": 24})
    assert answer.message.content and answer.done and answer.eval_count <= 24
    try:
        client.chat("llama3.2", QUESTION)
    except ResponseError as e:
        assert e.status_code == 404 and "llama3.2" in e.error, e
    else:
        raise AssertionError("a model that is not there answered")


@feature("ollama", "stream")
def _(server: Server) -> None:
    client, options = ollama_client(server), {"temperature": 0, "num_predict": 24}
    client.chat(MODEL, QUESTION, options=options)
    whole = client.chat(MODEL, QUESTION, options=options)
    pieces = list(client.chat(MODEL, QUESTION, options=options, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content and len(pieces) > 3
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@feature("ollama", "tools")
def _(server: Server) -> None:
    def get_weather(city: str) -> str:
        """Weather of a city

        Args:
          city: name of the city
        """
        return weather(city)

    messages: list[Any] = []
    for message in example():
        if message["role"] == "tool":
            messages.append({"role": "tool", "tool_name": "get_weather", "content": message["content"]})
            continue
        calls = [
            {"function": {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        messages.append({"role": message["role"], "content": message["content"], "tool_calls": calls or None})
    client, options = ollama_client(server), {"temperature": 0, "num_predict": 80}
    first = client.chat(MODEL, messages, tools=[get_weather], options=options).message
    assert first.tool_calls, first.content
    [call] = first.tool_calls
    assert call.function.name == "get_weather" and call.function.arguments == {"city": "Paris"}
    result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
    last = client.chat(MODEL, [*messages, first, result], tools=[get_weather], options=options)
    assert "18 degrees" in last.message.content, last.message


@feature("ollama", "json schema")
def _(server: Server) -> None:
    from pydantic import BaseModel

    class Capital(BaseModel):
        city: str

    client, options = ollama_client(server), {"temperature": 0, "num_predict": 60}
    answer = client.chat(MODEL, QUESTION, format=Capital.model_json_schema(), options=options)
    assert Capital.model_validate_json(answer.message.content).city


@feature("ollama", "generate")
def _(server: Server) -> None:
    client, options = ollama_client(server), {"temperature": 0, "num_predict": 4}
    answer = client.generate(MODEL, "The capital of France is", raw=True, options=options)
    assert "Paris" in answer.response and answer.done_reason == "length", answer


@feature("ollama", "embed")
def _(server: Server) -> None:
    found = ollama_client(server).embed(EMBEDDER, SIMILAR).embeddings
    assert [len(one) for one in found] == [384] * 3 and is_nearer(found)
