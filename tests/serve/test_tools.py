"""Tools, reasoning and forms of answers over the wire, with a fake model that writes what a test wants."""

import json

import pytest
from fake_llm import FakeLLM, asgi_client

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]
HI = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {"name": "add", "arguments": '{"a": 1}'}


async def post(llm, **fields):
    async with asgi_client(llm) as client:
        return await client.post("/v1/chat/completions", json={"model": "fake", "messages": HI, **fields})


async def chat(llm, **fields):
    answer = await post(llm, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(llm, **fields):
    """The deltas put together as clients do, the finish reasons and the usage."""
    answer = await post(llm, stream=True, stream_options={"include_usage": True}, **fields)
    assert answer.status_code == 200, answer.text
    *chunks, done = [block.removeprefix("data: ") for block in answer.text.removesuffix("\n\n").split("\n\n")]
    assert done == "[DONE]"
    message, reasons, usage = {}, [], None
    for chunk in map(json.loads, chunks):
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
                    continue
                for call in value:
                    calls = message.setdefault("tool_calls", [])
                    if call["index"] == len(calls):
                        calls.append(
                            {"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}}
                        )
                    for key, text in call["function"].items():
                        calls[call["index"]]["function"][key] += text
    return message, reasons, usage


def error(answer):
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


async def test_a_call_is_read_out_of_the_text_whole_and_streamed() -> None:
    text = f'I add. \n{CALL}\n<tool_call>\n{{"name": "now"}}\n</tool_call>'
    body = await chat(FakeLLM(answers=[text]), tools=TOOLS)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I add."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [ADD, {"name": "now", "arguments": "{}"}]
    assert {call["type"] for call in calls} == {"function"} and len({call["id"] for call in calls}) == 2
    message, reasons, usage = await streamed(FakeLLM(answers=[text]), tools=TOOLS)
    assert reasons == ["tool_calls"] and message["content"] == "I add." and message["role"] == "assistant"
    assert [call["function"] for call in message["tool_calls"]] == [call["function"] for call in calls]
    assert usage == body["usage"]


async def test_a_call_alone_has_no_content_and_one_that_was_cut_ends_with_length() -> None:
    [choice] = (await chat(FakeLLM(answers=[CALL]), tools=TOOLS))["choices"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    [choice] = (await chat(FakeLLM(answers=[CALL]), tools=TOOLS, max_tokens=len(CALL) - 20))["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["name"] == "add"


async def test_without_tools_or_with_none_chosen_a_call_is_text() -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        [choice] = (await chat(FakeLLM(answers=[CALL]), **fields))["choices"]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]


async def test_the_choice_of_tools_becomes_a_grammar() -> None:
    named = {"type": "function", "function": {"name": "now"}}
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    seen = {}
    for name, fields in {
        "auto": {"tool_choice": "auto"},
        "required": {"tool_choice": "required"},
        "named": {"tool_choice": named},
        "some": {"tool_choice": some},
        "single": {"parallel_tool_calls": False},
        "strict": {"tools": [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]},
    }.items():
        llm = FakeLLM(answers=[CALL])
        await chat(llm, **{"tools": TOOLS, **fields})
        structured = llm.params_seen[0].structured
        seen[name] = structured and structured.grammar
        assert ("now" in llm.prompts[0].split("\n")[0]) == (name != "strict")
        assert ("add" in llm.prompts[0].split("\n")[0]) == (name not in ("named", "some"))
    assert seen["auto"] is None
    assert "add" in seen["required"] and "now" in seen["required"] and "TEXT" not in seen["required"].split("\n")[1]
    assert '"add"' not in seen["named"] and "now" in seen["named"] and "*" not in seen["named"].split("\n")[1]
    assert '"add"' not in seen["some"] and "*" in seen["some"].split("\n")[1]
    assert seen["single"].split("\n")[1] == "start: block | TEXT"
    assert seen["strict"].split("\n")[1] == "start: block* TEXT" and '"lenient": false' in seen["strict"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": "auto", "structured_outputs": {"grammar": 'start: "a"'}},
            "structured_outputs",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "num_beams": 2}, "num_beams"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_can_not_be_asked_of_tools_is_named(fields, param) -> None:
    assert error(await post(FakeLLM(), **fields))["param"] == param


async def test_a_template_without_a_place_for_tools_gets_them_in_the_system_message() -> None:
    def plain(*answers):
        return FakeLLM(takes_tools=False, chat_template="{{ messages }}", answers=answers)

    [call] = (await chat(plain(CALL), tools=TOOLS))["choices"][0]["message"]["tool_calls"]  # tool_choice is auto
    assert call["function"] == ADD
    llm = plain(CALL, "3.")
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    first = await chat(llm, messages=messages, tools=TOOLS, tool_choice="required")
    [call] = first["choices"][0]["message"]["tool_calls"]
    assert call["function"] == ADD
    assert llm.prompts[0].startswith("system: Be brief.\n\nYou can call functions.")
    assert '{"name": "add", "description": "Add.", "parameters": {"type": "object"}}' in llm.prompts[0]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": text} for text in ("3", "4")]
    messages += [first["choices"][0]["message"], *results]
    for fields in ({"tools": TOOLS, "tool_choice": "auto"}, {}, {"tools": TOOLS, "tool_choice": "none"}):
        llm.answers = ["3."]
        assert (await chat(llm, messages=messages, **fields))["choices"][0]["message"]["content"] == "3."
        assert f"assistant: {CALL}\nuser: <tool_response>\n3\n</tool_response>\n<tool_response>" in llm.prompts[-1]


REASONED = "<think>\nLet me see.\n</think>\n\nIt is 3."


def thinking(*answers):
    return FakeLLM(chat_template="{{ tools }} <think> <tool_call> {{ enable_thinking }}", answers=answers)


async def test_reasoning_is_a_field_of_its_own_under_both_names() -> None:
    body = await chat(thinking(REASONED))
    message = body["choices"][0]["message"]
    assert message["content"] == "It is 3."
    assert message["reasoning_content"] == message["reasoning"] == "Let me see."
    # from where it is known that they are: behind the mark
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(">\nLet me see.\n</think>")}
    streamed_message, reasons, usage = await streamed(thinking(REASONED))
    assert {k: v for k, v in streamed_message.items() if k != "role"} == {
        k: message[k] for k in message if message[k] and k != "role"
    }
    assert reasons == ["stop"] and usage == body["usage"]


async def test_reasoning_can_be_left_out() -> None:
    message = (await chat(thinking(REASONED), include_reasoning=False))["choices"][0]["message"]
    assert message["content"] == "It is 3." and "reasoning_content" not in message
    message, _, usage = await streamed(thinking(REASONED), include_reasoning=False)
    assert "reasoning" not in message and usage["completion_tokens_details"]["reasoning_tokens"] > 5


async def test_what_the_template_can_be_told_reaches_it() -> None:
    llm = thinking("a", "b", "c")
    await chat(llm, chat_template_kwargs={"enable_thinking": False})
    assert llm.variables == {"enable_thinking": False}
    await chat(llm, reasoning_effort="none")
    assert llm.variables == {"enable_thinking": False}
    found = error(await post(llm, reasoning_effort="low"))
    assert found["param"] == "reasoning_effort" and "enable_thinking" in found["message"]
    knows = FakeLLM(chat_template="{{ reasoning_effort }}")
    await chat(knows, reasoning_effort="low")
    assert knows.variables == {"reasoning_effort": "low"}


async def test_a_form_is_enforced_behind_reasoning_and_streams() -> None:
    llm = thinking('<think>hm</think>{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    message, _, _ = await streamed(llm, response_format=form)
    assert json.loads(message["content"]) == {"a": 1} and message["reasoning"] == "hm"
    assert "</think>" in llm.params_seen[0].structured.grammar
    plain = FakeLLM(answers=['{"a": 1}'])
    message, _, _ = await streamed(plain, response_format={"type": "json_object"})
    assert message["content"] == '{"a": 1}' and plain.params_seen[0].structured.json_object


async def test_log_probabilities_are_of_all_tokens_also_with_tools() -> None:
    text = f"ok {CALL}"
    for fields in ({}, {"tools": TOOLS}):
        whole = (await chat(FakeLLM(answers=[text]), logprobs=True, **fields))["choices"][0]["logprobs"]["content"]
        assert "".join(position["token"] for position in whole) == text
    answer = await post(FakeLLM(answers=[text]), logprobs=True, stream=True, tools=TOOLS)
    chunks = [json.loads(b.removeprefix("data: ")) for b in answer.text.split("\n\n") if b.startswith("data: {")]
    found = [p for c in chunks for p in (c["choices"][0].get("logprobs") or {"content": []})["content"]]
    assert "".join(position["token"] for position in found) == text


async def test_every_choice_has_calls_of_its_own() -> None:
    body = await chat(FakeLLM(answers=[CALL, "no", CALL]), tools=TOOLS, n=3)
    assert [choice["finish_reason"] for choice in body["choices"]] == ["tool_calls", "stop", "tool_calls"]
    assert body["choices"][1]["message"]["content"] == "no#1"


async def test_special_tokens_that_mark_calls_are_asked_for() -> None:
    llm = FakeLLM(answers=["x", "x"])
    llm.tokenizer.id = {"<tool_call>": 5, "</tool_call>": 256}.get
    await chat(llm, tools=TOOLS)
    await chat(llm)
    assert [params.shown_token_ids for params in llm.params_seen] == [(256,), ()]  # 5 is no special token


async def test_models_say_what_they_can() -> None:
    async with asgi_client(thinking()) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
    assert model["capabilities"] == {
        "completion": True, "chat": True, "tools": True, "reasoning": True, "embeddings": True,
    }  # fmt: skip
    assert model["max_model_len"] == model["context_length"] == 1000
