import asyncio
import enum
import json
import threading
from typing import Annotated, Literal

import httpx
import pytest
from both_clients import KINDS, got
from pydantic import BaseModel, Field

from llmasos.client import Tool, tool
from llmasos.client.join import ChatJoiner
from llmasos.client.types import ChatCompletionChunk
from llmasos.errors import InvalidInputError, ToolError, ToolLimitError, ToolLoopError


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


class Place(BaseModel):
    city: str
    country: str = "CH"


def weather(place: Place, days: Annotated[int, Field(ge=1)] = 1, unit: Unit = Unit.C, model_name: str | None = None):
    """Tell the weather.

    Of one place, for some days.

    Args:
        place: Where,
            exactly.
        days (int): How many.
        unknown: Not a parameter.

    Returns:
        Text.
    """
    return f"{place.city} {place.country} {days} {unit.name} {model_name}"


def test_a_typed_function_is_described_by_its_name_docstring_and_types() -> None:
    found = tool(weather).definition
    assert found["type"] == "function" and found["function"]["name"] == "weather"
    assert found["function"]["description"] == "Tell the weather.\n\nOf one place, for some days."
    parameters = found["function"]["parameters"]
    assert parameters["required"] == ["place"] and parameters["additionalProperties"] is False
    assert list(parameters["properties"]) == ["place", "days", "unit", "model_name"]
    assert parameters["properties"]["days"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "How many.",
    }
    assert parameters["properties"]["place"]["description"] == "Where, exactly."
    assert "title" not in json.dumps(parameters)


def test_a_parameter_may_be_called_title_or_as_pydantic_calls_its_own() -> None:
    def keep(title: str, schema: int, copy: Literal["a", "b"] = "a"):
        return None

    one = tool(keep)
    assert list(one.parameters["properties"]) == ["title", "schema", "copy"]
    assert one.arguments is not None
    assert one.arguments('{"title": "t", "schema": 2}') == {"title": "t", "schema": 2, "copy": "a"}


@pytest.mark.parametrize(
    "function", [lambda x: x, lambda *x: x, lambda **x: x], ids=["without a type", "of any number", "of any names"]
)
def test_a_function_that_can_not_be_described_is_refused_when_it_is_given(function) -> None:
    with pytest.raises(InvalidInputError, match="tool"):
        tool(function)


def test_a_type_that_json_can_not_carry_is_refused() -> None:
    def call(back: threading.Thread):
        return None

    with pytest.raises(InvalidInputError, match="can't be described"):
        tool(call)


class Model:
    """A server whose model asks for `calls` at first and answers with their results, joined by |, when it has them."""

    def __init__(self, *calls: tuple[str, str], forever: bool = False) -> None:
        self.calls, self.forever = calls, forever
        self.bodies: list[dict] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        results = [m["content"] for m in body["messages"] if m["role"] == "tool"]
        message: dict = {"role": "assistant", "content": " | ".join(results)}
        if self.forever or not results:
            calls = [
                {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(self.calls)
            ]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        head = {"id": "1", "created": 1, "model": "m"}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return httpx.Response(200, json={**head, "object": "chat.completion", "choices": [choice]})
        pieces = [{"content": c} for c in message["content"] or ""]
        for i, call in enumerate(message.get("tool_calls", [])):
            name = {"index": i, "id": call["id"], "type": "function", "function": {"name": call["function"]["name"]}}
            pieces.append({"tool_calls": [name]})
            pieces += [
                {"tool_calls": [{"index": i, "function": {"arguments": c}}]} for c in call["function"]["arguments"]
            ]
        choices = [{"index": 0, "delta": piece, "finish_reason": None} for piece in pieces]
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
        chunks = [{**head, "object": "chat.completion.chunk", "choices": [choice]} for choice in choices]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return httpx.Response(200, content=text.encode())

    def client(self, kind: str):
        return KINDS[kind]("http://127.0.0.1:1/v1", transport=httpx.MockTransport(self))


BOTH = pytest.mark.parametrize("kind", KINDS)
TWO = (
    ("weather", '{"place": {"city": "Bern"}, "days": 2}'),
    ("weather", '{"place": {"city": "Oslo", "country": "NO"}}'),
)


@BOTH
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_model_gets_the_results_of_its_calls_and_answers(kind: str, streamed: bool) -> None:
    model, chunks = Model(*TWO), []
    more = {"on_chunk": chunks.append} if streamed else {}
    run = await got(model.client(kind).run_tools("Weather?", model="m", tools=[weather], temperature=0.5, **more))
    assert run.text == "Bern CH 2 C None | Oslo NO 1 C None" and run.steps == 2
    assert [m["role"] for m in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["tool_call_id"] for m in run.messages[2:4]] == ["c0", "c1"]
    assert bool(chunks) is streamed
    assert [body["temperature"] for body in model.bodies] == [0.5, 0.5]
    assert model.bodies[1]["messages"] == run.messages[:4]


@BOTH
async def test_calls_of_one_answer_run_at_once(kind: str) -> None:
    together = threading.Barrier(2, timeout=10)

    def meet(name: str):
        together.wait()
        return {"met": name}

    run = await got(
        Model(("meet", '{"name": "a"}'), ("meet", '{"name": "b"}')).client(kind).run_tools("x", model="m", tools=[meet])
    )
    assert run.text == '{"met":"a"} | {"met":"b"}'


async def test_coroutine_functions_run_in_the_loop_and_are_refused_by_the_blocking_client() -> None:
    async def wait(seconds: float) -> int:
        await asyncio.sleep(seconds)
        return 7

    model = Model(("wait", '{"seconds": 0}'))
    assert (await model.client("async").run_tools("x", model="m", tools=[wait])).text == "7"
    with pytest.raises(ToolError, match="AsyncClient"):
        model.client("sync").run_tools("x", model="m", tools=[wait])


@BOTH
async def test_what_the_model_got_wrong_is_told_to_it(kind: str) -> None:
    calls = [("rain", "{}"), ("weather", "{oops"), ("weather", '{"days": 0}'), ("note", "[1]"), ("note", "")]
    note = Tool("note", "Note.", {"type": "object"}, lambda **given: given)
    run = await got(Model(*calls).client(kind).run_tools("x", model="m", tools=[weather, note]))
    unknown, broken, wrong, listed, empty = run.text.split(" | ")
    assert unknown == "Error: there is no tool 'rain'; there are: weather, note."
    assert broken.startswith("Error: the arguments are wrong: Invalid JSON")
    assert "place: Field required" in wrong and "days: Input should be greater" in wrong
    assert listed == "Error: the arguments are wrong: they are not a JSON object." and empty == "{}"


@BOTH
async def test_limits_and_failures_are_typed_and_have_the_conversation(kind: str) -> None:
    def fail(x: int):
        raise KeyError("no wind")

    model = Model(("weather", '{"place": {"city": "Bern"}}'), forever=True)
    with pytest.raises(ToolLimitError, match="after 3 answers") as limit:
        await got(model.client(kind).run_tools("x", model="m", tools=[weather], max_steps=3))
    assert len(model.bodies) == 3 and [m["role"] for m in limit.value.messages][-1] == "assistant"
    with pytest.raises(ToolError, match="fail failed: 'no wind'") as failed:
        await got(Model(("fail", '{"x": 1}')).client(kind).run_tools("x", model="m", tools=[fail]))
    assert isinstance(failed.value.__cause__, KeyError) and len(failed.value.messages) == 2
    assert isinstance(failed.value, ToolLoopError)
    for wrong in ({"tools": [weather, weather]}, {"tools": [], "max_steps": 0}):
        with pytest.raises(InvalidInputError):
            await got(model.client(kind).run_tools("x", model="m", **wrong))


async def test_a_tool_that_fails_ends_those_that_still_run() -> None:
    ended = []

    async def slow(x: int):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(x)
            raise

    async def fail(x: int):
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ToolError, match="no"):
        await (
            Model(("slow", '{"x": 1}'), ("fail", '{"x": 2}'))
            .client("async")
            .run_tools("x", model="m", tools=[slow, fail])
        )
    await asyncio.sleep(0)
    assert ended == [1]


def test_joined_chunks_have_the_choices_in_order_with_logprobs_and_usage() -> None:
    joiner = ChatJoiner()
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    token = {"token": "a", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    for choices, usage in (
        ([{"index": 1, "delta": {"role": "assistant", "content": "b"}, "finish_reason": None}], None),
        ([{"index": 0, "delta": {"content": "a", "reasoning_content": "h"}, "logprobs": {"content": [token]}}], None),
        ([{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": [token]}}], None),
        ([{"index": 1, "delta": {}, "finish_reason": "length"}], None),
        ([], {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
    ):
        joiner.add(ChatCompletionChunk.model_validate({**head, "choices": choices, "usage": usage}))
    whole = joiner.whole()
    assert whole.object == "chat.completion" and whole.usage is not None and whole.usage.total_tokens == 3
    assert [(c.index, c.message.content, c.finish_reason) for c in whole.choices] == [
        (0, "aa", "stop"),
        (1, "b", "length"),
    ]
    assert whole.choices[0].message.reasoning_content == "h"
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content) == 2
