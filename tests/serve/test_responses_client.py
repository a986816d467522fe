"""The Responses API through the official `openai` client, with a fake and with a real model; every event strictly."""

import json
import time

import httpx
import openai
import pytest
from fake_llm import FakeLLM, live_server
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)
THINKS = "{{ tools }} <tool_call> <think>"
ADD = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
OURS = {"store", "name"}
"""Fields that OpenAI's servers send as well and this version of its client does not list."""


def extras(value, path=""):
    """Fields that the official types do not know."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            if name not in OURS:
                yield f"{path}.{name}"
        for name in type(value).model_fields:
            yield from extras(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from extras(one, f"{path}.{i}")


def strict_events(url, **fields):
    """The events of a stream as the official types have them, read strictly."""
    with httpx.stream("POST", f"{url}/responses", json={"stream": True, **fields}, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        blocks = answer.read().decode().removesuffix("\n\n").split("\n\n")
    events = []
    for block in blocks:
        kind, data = block.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert kind == f"event: {event.type}" and not list(extras(event))
        events.append(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


@pytest.fixture(scope="module")
def llm():
    return FakeLLM(chat_template=THINKS)


@pytest.fixture(scope="module")
def url(llm):
    # a home of the module's own: the server outlives the test that starts it
    with live_server(llm) as url:
        yield url


@pytest.fixture(scope="module", autouse=True)
def home_of_the_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tiny_url(tiny_llm):
    with live_server(tiny_llm) as url:
        yield url


@pytest.mark.parametrize("name", ["fake", "tiny"])
def test_a_text_is_answered_and_streamed_alike(name: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("url" if name == "fake" else "tiny_url")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        fields = {"model": name, "input": "hi", "max_output_tokens": 9, "temperature": 0, "instructions": "Be nice."}
        whole = client.responses.create(**fields)
        assert whole.status in ("completed", "incomplete") and whole.output[0].type == "message"
        with client.responses.stream(**fields) as stream:
            final = stream.get_final_response() if name == "fake" else None
            events = [] if final else list(stream)
        streamed = final or events[-1].response
        assert streamed.output_text == whole.output_text
        assert streamed.usage == whole.usage and whole.usage.output_tokens <= 9
        assert client.responses.retrieve(whole.id) == whole


def test_every_event_of_a_text_has_its_place_and_parses_strictly(url: str) -> None:
    events = strict_events(url, model="fake", input="hi")
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[2].item.content == [] and events[2].item.status == "in_progress"
    assert events[7].text == "hi!" == events[-1].response.output_text
    assert events[9].item == events[-1].response.output[0]


def test_reasoning_text_and_calls_are_items_of_their_own(url: str, llm: FakeLLM) -> None:
    llm.answers.append(f"<think>\nlet me see\n</think>\n\nI add.{CALL}")
    events = strict_events(url, model="fake", input="hi", tools=[ADD])
    done = [event.item for event in events if event.type == "response.output_item.done"]
    reasoning, message, call = done
    assert reasoning.type == "reasoning" and reasoning.content[0].text.strip() == "let me see"
    assert message.content[0].text.strip() == "I add."
    assert (call.name, json.loads(call.arguments), call.status) == ("add", {"a": 2}, "completed")
    assert events[-1].response.output == done
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    kinds = {event.type for event in events}
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= kinds
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_summary_that_is_asked_for_is_the_reasoning(url: str, llm: FakeLLM) -> None:
    llm.answers.append("<think>\nhm\n</think>\nyes")
    fields = {"model": "fake", "input": "hi", "include": ["reasoning.encrypted_content"]}
    events = strict_events(url, **fields, reasoning={"summary": "auto"})
    item = events[-1].response.output[0]
    assert item.summary[0].text.strip() == "hm" and item.content is None and item.encrypted_content
    kinds = [event.type for event in events]
    assert "response.reasoning_summary_part.done" in kinds and "response.reasoning_text.delta" not in kinds


def test_sealed_reasoning_can_be_given_back(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.answers.append("<think>\nsecret thought\n</think>\nyes")
    first = client.responses.create(
        model="fake", input="hi", store=False, include=["reasoning.encrypted_content"], reasoning={"summary": "auto"}
    )
    item = first.output[0].model_dump(exclude={"summary", "content"}) | {"summary": []}
    llm.chat_seen.clear()
    again = [{"role": "user", "content": "hi"}, item, {"role": "user", "content": "and?"}]
    client.responses.create(model="fake", input=again, store=False)
    assert llm.chat_seen[-1][1]["reasoning_content"].strip() == "secret thought"
    item["encrypted_content"] = "gAAAA-of-another"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="fake", input=again)
    assert wrong.value.param == "input.1.encrypted_content"


def test_tools_go_round(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.answers.append(CALL)
    first = client.responses.create(model="fake", input="add 2", tools=[ADD], tool_choice="auto")
    [call] = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    llm.chat_seen.clear()
    second = client.responses.create(model="fake", input=[output], previous_response_id=first.id, tools=[ADD])
    assert second.status == "completed"
    user, assistant, tool = llm.chat_seen[-1]
    assert user["content"] == "add 2" and assistant["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert tool["role"] == "tool" and tool["content"] == "4" and tool["tool_call_id"] == call.call_id
    stateless = [{"role": "user", "content": "add 2"}, call.model_dump(exclude_none=True), output]
    client.responses.create(model="fake", input=stateless, tools=[ADD], store=False)
    assert llm.chat_seen[-1] == llm.chat_seen[-2]


def test_choices_of_tools_are_kept(client: openai.OpenAI, llm: FakeLLM) -> None:
    other = ADD | {"name": "other"}
    for choice in ("required", {"type": "function", "name": "add"}):
        llm.answers.append(CALL)
        response = client.responses.create(model="fake", input="x", tools=[ADD, other], tool_choice=choice)
        assert response.output[0].name == "add" and llm.params_seen[-1].structured is not None
    llm.answers.append(CALL)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    client.responses.create(model="fake", input="x", tools=[ADD, other], tool_choice=allowed)
    assert "other" not in str(llm.params_seen[-1].structured)


def test_a_chain_remembers_and_instructions_do_not_carry_over(client: openai.OpenAI, llm: FakeLLM) -> None:
    first = client.responses.create(model="fake", input="one", instructions="Be brief.")
    second = client.responses.create(model="fake", input="two", previous_response_id=first.id)
    third = client.responses.create(model="fake", input="three", previous_response_id=second.id, instructions="Sing.")
    assert [(m["role"], m["content"]) for m in llm.chat_seen[-1]] == [
        ("system", "Sing."),
        ("user", "one"),
        ("assistant", "one!"),
        ("user", "two"),
        ("assistant", "two!"),
        ("user", "three"),
    ]
    assert third.previous_response_id == second.id
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    ResponseItemList.model_validate(items.model_dump(), strict=True)
    assert [item.content[0].text for item in items] == ["one", "one!", "two", "two!", "three"]
    newest = client.responses.input_items.list(third.id, limit=1)
    assert newest.data[0].content[0].text == "three" and newest.has_more


def test_an_item_can_be_referred_to(client: openai.OpenAI, llm: FakeLLM) -> None:
    first = client.responses.create(model="fake", input="one")
    reference = {"type": "item_reference", "id": first.output[0].id}
    client.responses.create(model="fake", input=[reference, {"role": "user", "content": "more"}])
    assert [m["content"] for m in llm.chat_seen[-1]] == ["one!", "more"]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="fake", input=[{"type": "item_reference", "id": "msg_nowhere"}])
    assert wrong.value.param == "input.0.id"


def test_what_is_not_stored_is_nowhere(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="fake", input="more", previous_response_id=response.id)
    assert wrong.value.param == "previous_response_id" and response.id in str(wrong.value)


def test_a_deleted_response_is_gone_and_so_is_the_way_on_from_it(client: openai.OpenAI) -> None:
    first = client.responses.create(model="fake", input="one")
    second = client.responses.create(model="fake", input="two", previous_response_id=first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).output_text == "two!"
    with pytest.raises(openai.BadRequestError, match=first.id):
        client.responses.create(model="fake", input="three", previous_response_id=second.id)


def test_a_schema_is_parsed_by_the_client(tiny_url: str) -> None:
    class Answer(BaseModel):
        good: bool

    with openai.OpenAI(base_url=tiny_url, api_key="none", max_retries=0) as client:
        answer = client.responses.parse(
            model="tiny", input="Is it good?", text_format=Answer, temperature=0, max_output_tokens=30
        )
        assert isinstance(answer.output_parsed, Answer)
        free = client.responses.create(
            model="tiny", input="x", text={"format": {"type": "json_object"}}, temperature=0, max_output_tokens=5
        )
        assert free.output_text.lstrip().startswith("{")
        assert free.status == "incomplete" and free.incomplete_details.reason == "max_output_tokens"
        assert free.output[0].status == "incomplete"


def test_logprobs_are_included_when_asked_for(url: str) -> None:
    include = ["message.output_text.logprobs"]
    events = strict_events(url, model="fake", input="hi", include=include, top_logprobs=2)
    [message] = events[-1].response.output
    logprobs = message.content[0].logprobs
    assert [one.token for one in logprobs] == ["h", "i", "!"] and len(logprobs[0].top_logprobs) == 2
    deltas = [event.logprobs[0].token for event in events if event.type == "response.output_text.delta"]
    assert deltas == ["h", "i", "!"]


def test_tokens_of_an_input_are_counted(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="fake", input="hi", instructions="Be nice.")
    response = client.responses.create(model="fake", input="hi", instructions="Be nice.")
    assert counted.input_tokens == response.usage.input_tokens


def test_a_failure_after_the_first_event_is_a_failed_response(url: str, client: openai.OpenAI) -> None:
    events = strict_events(url, model="fake", input="boom late")
    assert [event.type for event in events][-2:] == ["response.output_item.done", "response.failed"]
    failed = events[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error" and "secret" not in failed.error.message
    assert client.responses.retrieve(failed.id).status == "failed"


def test_a_background_response_goes_on_alone(llm: FakeLLM, client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="wait for it", background=True)
    assert response.status == "queued" and response.background
    done = wait(client, response.id)
    assert done.status == "completed" and done.output_text == "wait for it!"
    Response.model_validate_json(done.model_dump_json(), strict=True)
    assert client.responses.cancel(response.id).status == "completed"
    more = client.responses.create(model="fake", input="and?", previous_response_id=response.id)
    assert more.output_text == "and?!"


def wait(client, id, status=("queued", "in_progress")):
    until = time.monotonic() + 20
    while (response := client.responses.retrieve(id)).status in status:
        assert time.monotonic() < until
        time.sleep(0.01)
    return response


def test_background_streams_can_be_left_and_taken_up_again(url: str, client: openai.OpenAI) -> None:
    whole = strict_events(url, model="fake", input="a long text", background=True)
    id = whole[0].response.id
    assert [event.type for event in whole[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert whole[-1].type == "response.completed"
    with client.responses.retrieve(id, stream=True, starting_after=4) as stream:
        rest = list(stream)
    assert [event.sequence_number for event in rest] == list(range(5, len(whole)))
    assert rest == whole[5:]
    with client.responses.retrieve(id, stream=True, starting_after=len(whole)) as stream:
        assert list(stream) == []
    plain = client.responses.create(model="fake", input="x")
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(plain.id, stream=True)


def test_a_background_response_is_cancelled_and_keeps_what_it_has() -> None:
    llm = FakeLLM(delay=0.05)
    with live_server(llm) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.responses.create(model="fake", input="x" * 400, background=True, stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        id = client.responses.create(model="fake", input="y" * 400, background=True).id
        [cancelled] = [client.responses.cancel(id)]
        assert cancelled.status == "cancelled"
        assert client.responses.retrieve(id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="fake", input="more", previous_response_id=id)
        with pytest.raises(openai.BadRequestError, match="background"):
            client.responses.cancel(client.responses.create(model="fake", input="z").id)


def test_a_conversation_holds_what_was_said(client: openai.OpenAI, llm: FakeLLM) -> None:
    conversation = client.conversations.create(
        metadata={"topic": "x"}, items=[{"type": "message", "role": "user", "content": "before"}]
    )
    assert conversation.metadata == {"topic": "x"}
    response = client.responses.create(model="fake", input="now", conversation=conversation.id)
    assert response.conversation.id == conversation.id
    client.responses.create(model="fake", input="later", conversation={"id": conversation.id})
    assert [m["content"] for m in llm.chat_seen[-1]] == ["before", "now", "now!", "later"]
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [item.content[0].text for item in items] == ["before", "now", "now!", "later", "later!"]
    added = client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "aside"}])
    assert client.conversations.items.retrieve(added.data[0].id, conversation_id=conversation.id).role == "user"
    client.conversations.items.delete(added.data[0].id, conversation_id=conversation.id)
    assert client.conversations.update(conversation.id, metadata={"topic": "y"}).metadata == {"topic": "y"}
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "high"}, "model": "plain"}, "reasoning.effort"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"background": True, "store": False}, "store"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.0.call_id"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "previous_response_id"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"temprature": 1}, "temprature"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(url: str, fields, param: str) -> None:
    body = {"model": "fake", "input": "hi"} | fields
    if body["model"] == "plain":
        with live_server(FakeLLM("plain", chat_template="")) as plain:
            answer = httpx.post(f"{plain}/responses", json=body)
    else:
        answer = httpx.post(f"{url}/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_model_that_is_not_there_is_a_404(client: openai.OpenAI) -> None:
    for more in ({}, {"stream": True}, {"background": True}):
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="gpt-9", input="hi", **more)
        assert missing.value.code == "model_not_found"
