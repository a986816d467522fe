"""Anthropic's API as raw HTTP, with a fake model: what the official client does not show."""

import asyncio
import json

import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fake_llm import FakeLLM, asgi_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llmasos.client.types.anthropic import MessagesRequest
from llmasos.errors import LLMasOSError
from llmasos.inference.request import Chunk, RequestMetrics, StructuredOutput
from llmasos.serve import anthropic, create_app
from llmasos.serve.anthropic.request import chat_request

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
SWITCH = "{% if enable_thinking %}<think>{% endif %} <tool_call> {{ tools }}"
ALWAYS = "<think>\n"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VERSION = {"anthropic-version": "2023-06-01"}
EVENTS = TypeAdapter(RawMessageStreamEvent)


PLAIN = FakeLLM()


def client_of(llm):
    """One application for each model: making one takes longer than most tests."""
    if not hasattr(llm, "app"):
        llm.app = create_app(llm)
    return httpx.AsyncClient(transport=httpx.ASGITransport(llm.app), base_url="http://127.0.0.1")


async def ask(llm=PLAIN, **fields):
    async with client_of(llm) as client:
        return await client.post("/v1/messages", json={"model": "fake", "messages": HI, "max_tokens": 500, **fields})


def events(response):
    """What the official client would read, each checked against its types."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENTS.validate_python(event)
        found.append(event)
    return found


def added_up(found):
    """The message of a stream, put together as Anthropic's documents say."""
    message = found[0]["message"]
    inputs = {}
    for event in found:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
            else:
                block[kind] += delta[kind]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def error(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    return body["error"]


async def test_a_message_has_every_documented_field() -> None:
    body = (await ask()).json()
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "hi!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("user: hi") - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 3,
            "output_tokens_details": {"thinking_tokens": 0},
            "service_tier": "standard",
        },
    }


async def test_a_stream_has_exactly_the_documented_events_in_their_order() -> None:
    response = await ask(stream=True)
    found = events(response)
    assert [event["type"] for event in found] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert found[2]["content_block"] == {"type": "text", "text": ""}
    assert [event["delta"]["text"] for event in found[3:6]] == ["h", "i", "!"]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert response.headers["cache-control"] == "no-cache"


async def test_an_empty_answer_is_a_message_without_content() -> None:
    llm = FakeLLM(answers=["STOP", "STOP"])
    assert (await ask(llm, stop_sequences=["STOP"])).json()["content"] == []
    found = events(await ask(llm, stop_sequences=["STOP"], stream=True))
    assert [event["type"] for event in found] == ["message_start", "ping", "message_delta", "message_stop"]
    assert found[2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "STOP"}


async def test_a_call_of_a_tool_and_its_result() -> None:
    llm = FakeLLM(answers=[CALL, f"Let me see.\n{CALL}", "3"])
    first = (await ask(llm, tools=[TOOL])).json()
    [call] = first["content"]
    assert first["stop_reason"] == "tool_use"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"a": 1, "b": [2]})
    streamed = added_up(events(await ask(llm, tools=[TOOL], stream=True)))
    assert [block["type"] for block in streamed["content"]] == ["text", "tool_use"]
    assert streamed["content"][1]["input"] == call["input"] and streamed["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "3"}]}
    history = [
        *HI,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    last = (await ask(llm, tools=[TOOL], messages=history)).json()
    assert last["content"] == [{"type": "text", "text": "3"}] and last["stop_reason"] == "end_turn"
    seen = llm.chat_seen[-1]
    assert [message["role"] for message in seen] == ["user", "assistant", "tool", "user"]
    assert seen[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": [2]}}
    assert seen[2]["tool_call_id"] == call["id"] and seen[2]["name"] == "add" and seen[2]["content"] == "3"


async def test_a_call_that_max_tokens_cuts_off_keeps_its_text() -> None:
    cut = CALL[: CALL.index("]")]
    body = (await ask(FakeLLM(answers=[CALL]), tools=[TOOL], max_tokens=len(cut))).json()
    assert body["stop_reason"] == "max_tokens"
    assert body["content"][0]["input"] == {"INVALID_JSON": '{"a": 1, "b": [2'}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None)),
        ({"type": "auto"}, ("auto", None)),
        ({"type": "any"}, ("required", None)),
        ({"type": "none"}, ("none", None)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
        ({"type": "auto", "disable_parallel_tool_use": False}, ("auto", None)),
        ({"type": "tool", "name": "add"}, ("add", None)),
    ],
)
def test_tool_choices_have_openais_counterparts(choice, expected) -> None:
    fields = {} if choice is None else {"tool_choice": choice}
    request = translated(tools=[TOOL], **fields)
    found = request.tool_choice
    assert (found if isinstance(found, str) else found.function.name, request.parallel_tool_calls) == expected
    assert request.tools[0].function.parameters == TOOL["input_schema"]


def translated(**fields):
    body = {"model": "fake", "messages": HI, "max_tokens": 5, **fields}
    return chat_request(MessagesRequest.model_validate_json(json.dumps(body)))


def test_turns_of_one_role_are_one_and_blocks_keep_their_order() -> None:
    document = {
        "type": "document",
        "title": "Notes",
        "context": "From May.",
        "source": {"type": "text", "media_type": "text/plain", "data": "It rained."},
    }
    request = translated(
        system=[{"type": "text", "text": "A", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        messages=[
            {"role": "user", "content": "one"},
            {"role": "user", "content": [document, {"type": "text", "text": "two"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "I "},
                    {"type": "text", "text": "call"},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                    {"type": "tool_use", "id": "t2", "name": "sub", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t2"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                ],
            },
            {"role": "user", "content": "go on"},
        ],
    )
    found = [message.model_dump(exclude_none=True) for message in request.messages]
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert found[0]["content"] == "A"
    assert [part["text"] for part in found[1]["content"]] == ["one", "Notes\nFrom May.\nIt rained.", "two"]
    assert found[2]["content"] == "I call" and found[2]["reasoning_content"] == "hm"
    assert [call["id"] for call in found[2]["tool_calls"]] == ["t1", "t2"]
    assert [(m["tool_call_id"], m["name"], m["content"]) for m in found[3:5]] == [
        ("t2", "sub", ""),
        ("t1", "add", "Error: no"),
    ]
    assert found[5]["content"] == "go on"
    assert request.continue_final_message is None


async def test_a_last_turn_of_the_assistant_is_continued() -> None:
    class Continuing(FakeLLM):
        def chat_prompt(self, messages, tools=None, *, continue_final_message=False, variables=None):
            self.continues = continue_final_message
            return super().chat_prompt(messages, tools)

    llm = Continuing()
    prefill = [*HI, {"role": "assistant", "content": "So"}]
    assert (await ask(llm, messages=prefill)).json()["content"][0]["text"] == "assistant: So!"
    assert llm.continues
    call = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
    refused = await ask(llm, messages=[*HI, {"role": "assistant", "content": [call]}], tools=[TOOL])
    assert "results are missing" in error(refused)["message"]


async def test_every_parameter_reaches_the_model() -> None:
    llm = FakeLLM()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["a", "b"], "max_tokens": 7}
    neutral = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "speed": "standard",
        "container": None,
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "tool_choice": {"type": "none"},
        "mcp_servers": [],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }
    assert (await ask(llm, **fields, **neutral)).status_code == 200
    [params] = llm.params_seen
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 3, 7)
    assert params.stop == ("a", "b") and params.structured == StructuredOutput(json=SCHEMA)


async def test_thinking_is_told_to_templates_that_have_a_switch_for_it() -> None:
    answers = ["<think>\nhm\n</think>\n\nyes"]
    llm = FakeLLM(chat_template=SWITCH, answers=answers * 3)
    budget = {"type": "enabled", "budget_tokens": 100}
    body = (await ask(llm, thinking=budget)).json()
    assert llm.variables == {"enable_thinking": True}
    assert [block["type"] for block in body["content"]] == ["thinking", "text"]
    assert body["content"][0]["thinking"] == "hm" and len(body["content"][0]["signature"]) == 64
    assert body["content"][1]["text"] == "yes" and body["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert body["warnings"] == ["thinking.budget_tokens has no effect: thinking is bounded by max_tokens."]
    Message.model_validate(body)
    hidden = added_up(events(await ask(llm, thinking={**budget, "display": "omitted"}, stream=True)))
    assert hidden["content"][0] == {**body["content"][0], "thinking": ""}
    assert hidden["content"][1] == body["content"][1] and hidden["warnings"] == body["warnings"]
    assert (await ask(llm, thinking={"type": "disabled"})).status_code == 200
    assert llm.variables == {"enable_thinking": False}
    assert "warnings" not in (await ask(FakeLLM(chat_template=SWITCH))).json()


async def test_thinking_that_can_not_be_had_or_left_is_refused() -> None:
    budget = {"type": "enabled", "budget_tokens": 100}
    plain, always = PLAIN, FakeLLM(chat_template=ALWAYS)
    assert "does not think" in error(await ask(plain, thinking=budget))["message"]
    assert "always thinks" in error(await ask(always, thinking={"type": "disabled"}))["message"]
    assert (await ask(plain, thinking={"type": "disabled"})).status_code == 200
    assert (await ask(plain, thinking={"type": "adaptive"})).status_code == 200
    assert (await ask(always, thinking=budget)).status_code == 200
    for llm in (plain, always):
        assert (await ask(llm, thinking={"type": "between_tools"})).status_code == 400
    wrong = error(await ask(always, thinking={"type": "enabled", "budget_tokens": 500}))
    assert wrong["details"]["param"] == "thinking.budget_tokens"


async def test_effort_is_told_to_templates_that_know_it_and_a_warning_elsewhere() -> None:
    llm = FakeLLM(chat_template="{{ reasoning_effort }}")
    assert "warnings" not in (await ask(llm, output_config={"effort": "low"})).json()
    assert llm.variables == {"reasoning_effort": "low"}
    [warning] = (await ask(FakeLLM(), output_config={"effort": "low"})).json()["warnings"]
    assert warning.startswith("output_config.effort has no effect")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [PDF]}]}, "messages.0.content.0.source"),
        ({"messages": [*HI, {"role": "assistant", "content": [IMAGE]}]}, "messages.1.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "messages.0.content.0.tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "a", "input": {}}]}]},
            "messages.0.content.0",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"betas": ["b"]}, "betas"),
    ],
)
async def test_what_is_wrong_or_not_supported_is_refused_by_name(fields, param: str) -> None:
    found = error(await ask(**fields))
    assert found["type"] == "invalid_request_error"
    assert found["details"]["param"].startswith(param) and "hint" not in found


async def test_max_tokens_is_required_and_the_body_must_be_json() -> None:
    async with client_of(PLAIN) as client:
        missing = await client.post("/v1/messages", json={"model": "fake", "messages": HI})
        assert error(missing)["details"] == {"error_code": "missing_required_parameter", "param": "max_tokens"}
        bad = await client.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
        assert error(bad)["details"] == {"error_code": "invalid_json"}
        long = await client.post("/v1/messages", json={"model": "none", "messages": HI, "max_tokens": 5})
        assert error(long, 404)["type"] == "not_found_error"


async def test_too_many_waiting_requests_are_an_overload() -> None:
    llm = FakeLLM(delay=0.05, max_num_seqs=1)
    async with asgi_client(llm, max_waiting=0) as client:
        body = {"model": "fake", "messages": HI, "max_tokens": 9, "stream": True}
        answers = await asyncio.gather(*[client.post("/v1/messages", json=body) for _ in range(3)])
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused and len(refused) < 3
    for answer in refused:
        assert error(answer, 529)["type"] == "overloaded_error" and answer.headers["retry-after"]


async def test_models_have_anthropics_shape_for_its_clients_and_openais_for_others() -> None:
    async with asgi_client({name: FakeLLM(name) for name in "abc"}) as client:
        first = (await client.get("/v1/models?limit=2", headers=VERSION)).json()
        assert [model["id"] for model in first["data"]] == ["a", "b"] and first["has_more"] is True
        assert (first["first_id"], first["last_id"]) == ("a", "b")
        rest = (await client.get("/v1/models?after_id=b", headers=VERSION)).json()
        assert [model["id"] for model in rest["data"]] == ["c"] and rest["has_more"] is False
        before = (await client.get("/v1/models?before_id=c&limit=1", headers=VERSION)).json()
        assert [model["id"] for model in before["data"]] == ["b"] and before["has_more"] is True
        assert error(await client.get("/v1/models?after_id=x", headers=VERSION))["details"]["param"] == "after_id"
        assert (await client.get("/v1/models/b", headers=VERSION)).json()["type"] == "model"
        assert (await client.get("/v1/models/b")).json()["object"] == "model"
        assert error(await client.get("/v1/models/x", headers=VERSION), 404)["type"] == "not_found_error"


async def test_a_silent_stream_begins_after_a_while_and_has_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anthropic, "PATIENCE", 0.02)
    found = events(await ask(FakeLLM(delay=0.1), stream=True))
    kinds = [event["type"] for event in found]
    assert kinds.count("ping") > 3 and added_up(found)["content"][0]["text"] == "hi!"
    late = events(await ask(FakeLLM(delay=0.1), stream=True, messages=[{"role": "user", "content": "boom late"}]))
    assert late[-1]["type"] == "error" and late[-1]["error"]["type"] == "api_error"


# --- any split of the model's text


class SplitLLM(FakeLLM):
    """Answers `text`, cut at `cuts`."""

    text, cuts = "", ()

    async def astream_complete(self, prompt, params, **request):
        ends = sorted({min(cut, len(self.text)) for cut in self.cuts} | {len(self.text)})
        for start, end in zip([0, *ends], ends, strict=False):
            yield Chunk(0, self.text[start:end], tuple(range(start, end)))
        yield Chunk(0, "", (), (), "stop", None, RequestMetrics(0.1, 0.1, len(self.text), num_cached_tokens=1))


SPLIT = SplitLLM(chat_template=SWITCH)
PIECES = st.sampled_from([CALL, "<think>\nwhy\n</think>\n", "Text, {ünïcode} <b> & so on. ", "\n", "<tool", "</think>"])


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(PIECES, max_size=4), cuts=st.lists(st.integers(0, 200), max_size=30))
def test_any_split_of_the_models_text_gives_the_same_message(pieces, cuts) -> None:
    llm = SPLIT
    llm.text, llm.cuts = "".join(pieces), ()

    async def both():
        whole = (await ask(llm, tools=[TOOL])).json()
        llm.cuts = cuts
        found = events(await ask(llm, tools=[TOOL], stream=True))
        return whole, found, (await ask(llm, tools=[TOOL])).json()

    whole, found, split = asyncio.run(both())
    for message in (added_up(found), split):
        for block in [*message["content"], *whole["content"]]:
            block.pop("id", None)
        assert message["content"] == whole["content"]
        assert (message["stop_reason"], message["stop_sequence"]) == (whole["stop_reason"], whole["stop_sequence"])
        assert message["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    kinds = [event["type"] for event in found]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole["content"])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*MessagesRequest.model_fields, *MessagesRequest.UNSUPPORTED, "other"])


@settings(max_examples=150)
@given(fields=st.dictionaries(FIELDS, JSON_VALUES, max_size=4))
def test_no_body_makes_anything_but_a_request_or_an_error_for_people(fields) -> None:
    body = {"model": "fake", "messages": HI, "max_tokens": 5} | fields
    try:
        request = MessagesRequest.model_validate_json(json.dumps(body))
        chat_request(request)
    except (LLMasOSError, ValueError):
        pass
