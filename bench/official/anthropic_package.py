"""The `anthropic` package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from common import MODEL
from official.world import QUESTION, WEATHER, Server, feature, weather

SURE: dict[str, Any] = {"extra_body": {"temperature": 0}}
"""Newer versions of the package have no field for it."""


@contextlib.contextmanager
def anthropic_client(server: Server) -> Iterator[Any]:
    from anthropic import Anthropic

    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@feature("anthropic", "messages")
def _(server: Server) -> None:
    from anthropic import NotFoundError

    with anthropic_client(server) as client:
        answer = client.messages.create(model=MODEL, messages=QUESTION, system="Be brief.", **SURE, max_tokens=24)
        assert answer.content[0].text and answer.stop_reason in ("end_turn", "max_tokens")
        count = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.").input_tokens
        usage = answer.usage
        assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0), (count, usage)
        try:
            client.messages.create(model="claude", messages=QUESTION, max_tokens=4)
        except NotFoundError as e:
            assert e.body["error"]["type"] == "not_found_error", e.body
        else:
            raise AssertionError("a model that is not there answered")


@feature("anthropic", "stream")
def _(server: Server) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, **SURE}
    with anthropic_client(server) as client:
        client.messages.create(**asked)
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert "".join(pieces) == whole.content[0].text == final.content[0].text and len(pieces) > 2
        assert final.usage.output_tokens == whole.usage.output_tokens


@feature("anthropic", "tools")
def _(server: Server) -> None:
    tool = {"name": "get_weather", "description": "Weather of a city", "input_schema": WEATHER["parameters"]}
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    with anthropic_client(server) as client:
        asked = {"model": MODEL, "tools": [tool], "max_tokens": 80, **SURE}
        first = client.messages.create(messages=messages, tool_choice=choice, **asked)
        [call] = [part for part in first.content if part.type == "tool_use"]
        assert call.input == {"city": "Paris"} and first.stop_reason == "tool_use", first
        with client.messages.stream(messages=messages, tool_choice=choice, **asked) as stream:
            final = stream.get_final_message()
        assert final.content[0].input.keys() == {"city"}, final
        result = {"type": "tool_result", "tool_use_id": call.id, "content": weather("Paris")}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        last = client.messages.create(messages=messages, tool_choice={"type": "none"}, **asked)
        assert last.content[0].text
