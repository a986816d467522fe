"""The API as raw HTTP, with a fake model: what the official client does not show."""

import json

import httpx
import pytest
from fake_llm import FakeLLM, asgi_client
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.inference.request import StructuredOutput, TokenLogprob
from llmasos.serve import create_app, render

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


async def post(path, body, llm=None, **options):
    async with asgi_client(llm or FakeLLM(), **options) as client:
        return (
            await client.post(path, json=body)
            if not isinstance(body, bytes)
            else await client.post(path, content=body, headers={"content-type": "application/json"})
        )


async def chat(llm=None, **fields):
    return await post("/v1/chat/completions", {"model": "fake", "messages": HI, **fields}, llm)


async def complete(llm=None, **fields):
    return await post("/v1/completions", {"model": "fake", "prompt": "hi", **fields}, llm)


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def error(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


async def test_a_chat_answer_has_every_documented_field() -> None:
    body = (await chat()).json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi!", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": len("user: hi"),
            "completion_tokens": 3,
            "total_tokens": len("user: hi") + 3,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_a_chat_stream_has_role_text_end_usage_and_done_in_this_order() -> None:
    response = await chat(stream=True, stream_options={"include_usage": True})
    *chunks, last = events(response)
    assert last == "[DONE]" and response.headers["cache-control"] == "no-cache"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({c["id"] for c in parsed}) == 1 and {c["object"] for c in parsed} == {"chat.completion.chunk"}
    deltas = [c["choices"][0]["delta"] for c in parsed[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "h"}, {"content": "i"}, {"content": "!"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in parsed[:-1]] == [None] * 4 + ["stop"]
    assert all(c["usage"] is None for c in parsed[:-1])
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"] == (await chat()).json()["usage"]


async def test_without_include_usage_no_chunk_speaks_of_usage() -> None:
    assert all("usage" not in json.loads(e) for e in events(await chat(stream=True))[:-1])


async def test_streamed_text_equals_the_whole_text_for_every_choice() -> None:
    fields = {"n": 3, "seed": 5, "temperature": 0.7, "stop": ["#2"], "logprobs": True}
    whole = (await chat(**fields)).json()["choices"]
    texts, tokens = {}, {}
    for chunk in events(await chat(stream=True, **fields))[:-1]:
        [choice] = json.loads(chunk)["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        tokens.setdefault(choice["index"], []).extend((choice.get("logprobs") or {"content": []})["content"])
    assert [texts[c["index"]] for c in whole] == [c["message"]["content"] for c in whole] == ["hi!5", "hi!5#1", "hi!5"]
    assert [tokens[c["index"]] for c in whole] == [c["logprobs"]["content"] for c in whole]


async def test_chat_logprobs_have_bytes_and_alternatives() -> None:
    first = (await chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"][0]
    assert first == {
        "token": "h",
        "logprob": -0.5,
        "bytes": [104],
        "top_logprobs": [
            {"token": "h", "logprob": -0.5, "bytes": [104]},
            {"token": "~", "logprob": -1.5, "bytes": [126]},
        ],
    }
    assert (await chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_name_a_token_by_what_it_adds_to_the_text(tiny_llm) -> None:
    async with asgi_client({"tiny": tiny_llm}) as client:
        fields = {
            "model": "tiny",
            "temperature": 0,
            "max_tokens": 4,
            "prompt": "The quick",
            "logprobs": 1,
            "echo": True,
        }
        [choice] = (await client.post("/v1/completions", json=fields)).json()["choices"]
        found = choice["logprobs"]
        assert " quick" in found["tokens"] and not any("Ġ" in token for token in found["tokens"])
        assert found["text_offset"][:3] == [sum(map(len, found["tokens"][:i])) for i in range(3)]


def test_an_alternative_beyond_the_tokenizer_has_no_text() -> None:
    padding = TokenLogprob(104, "h", -0.5, ((104, "h", -0.5), (9999, "", -0.9)))
    [position] = render.chat_logprobs(FakeLLM().tokenizer, [padding]).content
    assert [(top.token, top.bytes) for top in position.top_logprobs] == [("h", [104]), ("", [])]


async def test_a_body_that_is_no_json_object_says_what_to_send() -> None:
    async with asgi_client(FakeLLM()) as client:
        for content, kind in ((b"[]", "application/json"), (b'{"model": "fake"}', "text/plain")):
            answer = await client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
            assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


async def test_every_parameter_reaches_the_model() -> None:
    llm = FakeLLM()
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 7,
        "top_k": 3, "min_p": 0.05, "typical_p": 0.8, "repetition_penalty": 1.1, "ignore_eos": True,
        "num_beams": 2, "length_penalty": 0.5,
    }  # fmt: skip
    more = {"stop": "X", "stop_token_ids": [1], "logit_bias": {"65": -100}, "max_completion_tokens": 9}
    assert (await chat(llm, **fields, **more)).status_code == 200
    [params] = llm.params_seen
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.max_tokens) == (("X",), (1,), {65: -100.0}, 9)


async def test_labels_are_taken_and_change_nothing() -> None:
    llm = FakeLLM()
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "store": False}
    assert (await chat(llm, **labels)).json()["choices"] == (await chat(llm)).json()["choices"]
    assert llm.params_seen[0] == llm.params_seen[1] and llm.requests == [{}, {}]
    assert (await complete(llm, user="u", best_of=1, suffix="")).status_code == 200
    options = {"include_usage": False, "include_obfuscation": False}
    assert len(events(await chat(llm, stream=True, stream_options=options))) == 6
    found = error(await chat(llm, stream=True, stream_options={"include_obfuscation": True}))
    assert found["param"] == "include_obfuscation"


async def test_a_stop_string_is_named_where_the_stream_ends() -> None:
    *_, end, _ = events(await chat(stream=True, stop=["i"]))
    assert json.loads(end)["choices"][0]["finish_reason"] == "stop"
    assert json.loads(end)["choices"][0]["stop_reason"] == "i"


async def test_what_concerns_the_request_reaches_the_model_too() -> None:
    llm = FakeLLM()
    for fields in ({}, {"priority": -3, "cache_salt": "tenant"}, {"stream": True, "priority": 0}):
        assert (await chat(llm, **fields)).status_code == (await complete(llm, **fields)).status_code == 200
    assert llm.requests[::2] == llm.requests[1::2]
    assert llm.requests[::2] == [{}, {"priority": -3, "cache_salt": ":tenant"}, {"priority": 0}]
    assert error(await chat(cache_salt=""))["param"] == "cache_salt"
    assert error(await chat(priority=0.5))["param"] == "priority"


async def test_defaults_are_openais_unless_the_model_has_its_own() -> None:
    plain, own = FakeLLM(), FakeLLM(defaults={"temperature": 0.6, "top_k": 20})
    for llm in (plain, own):
        await chat(llm)
        await chat(llm, temperature=0)
        await complete(llm)
    assert [p.temperature for p in plain.params_seen] == [1.0, 0, 1.0]
    assert [(p.temperature, p.top_k) for p in own.params_seen] == [(0.6, 20), (0, 20), (0.6, 20)]
    assert [p.max_tokens for p in plain.params_seen] == [1000 - len("user: hi"), 1000 - len("user: hi"), 16]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            StructuredOutput(json=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json=SCHEMA)),
        ({"structured_outputs": {"regex": "[0-9]"}}, StructuredOutput(regex="[0-9]")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput(grammar='start: "a"')),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
    ],
)
async def test_the_form_of_the_output_reaches_the_model(fields, form) -> None:
    llm = FakeLLM()
    assert (await chat(llm, **fields)).status_code == 200
    if "structured_outputs" in fields:
        assert (await complete(llm, **fields)).status_code == 200
    assert {p.structured for p in llm.params_seen} == {form}


async def test_messages_reach_the_template_in_its_own_form() -> None:
    llm = FakeLLM()
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    assert (await chat(llm, messages=messages, tools=[TOOL])).status_code == 200
    [prompt] = llm.prompts
    assert prompt.startswith("tools: ['add']\nsystem: Be brief.\nuser: a\nb\nassistant: [{")
    assert "'arguments': {'a': 1}" in prompt
    await chat(llm, tools=[TOOL], tool_choice="none")
    assert llm.prompts[-1] == "user: hi"


async def test_what_the_assistant_refused_is_what_it_said() -> None:
    llm = FakeLLM()
    parts = [{"type": "refusal", "refusal": "Never."}]
    for message in ({"refusal": "Never."}, {"content": None, "refusal": "Never."}, {"content": parts}):
        assert (await chat(llm, messages=[*HI, {"role": "assistant", **message}, *HI])).status_code == 200
    assert llm.prompts == ["user: hi\nassistant: Never.\nuser: hi"] * 3


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "no json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "requi",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            "both given",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "json and regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON Schema"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "Unknown field"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "'f'"),
        ({"tools": [TOOL, TOOL]}, "tools", "'add'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "function"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "knows no reasoning_effort"),
        ({"tool_choice": "auto"}, "tool_choice", "without tools"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"service_tier": "flex"}, "service_tier", "'auto'"),
        ({"temprature": 1}, "temprature", "Unknown field"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unknown field"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "7"}, "max_tokens", "'7'"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": [1]}, "stop", "string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "257"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "wizard"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "no content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood", "Unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages.0.content.0",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "not Unicode"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "url": 1}]}]}, "messages.0.content.0", "video"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "messages.0.content.0",
            "'refusal'",
        ),
        ({"stop": "\ud800"}, "stop", "not Unicode"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name", "at least 1"),
        ({"stream": True, "num_beams": 2}, "num_beams", "Set stream: false"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools", "not Unicode"),
        ({"structured_outputs": {"choice": ["a", "\ud800"]}}, "structured_outputs", "not Unicode"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}},
            "response_format",
            "not Unicode",
        ),
    ],
)
async def test_what_is_wrong_in_a_chat_is_named(fields, param, word) -> None:
    body = json.dumps({"model": "fake", "messages": HI} | fields).encode()
    found = error(await post("/v1/chat/completions", body))
    assert found["param"] == param and word in found["message"] and found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"best_of": 2, "n": 3}, "best_of", "less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"suffix": "x"}, "suffix", "no tokens to fill in"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": [1, "a"]}, "prompt", "integer"),
        ({"prompt": [[1], [300]]}, "prompt", "300"),
        ({"prompt": [1, -1]}, "prompt", "-1"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo", "streamed"),
        ({"logprobs": True}, "logprobs", "integer"),
    ],
)
async def test_what_is_wrong_in_a_completion_is_named(fields, param, word) -> None:
    found = error(await complete(**fields))
    assert found["param"] == param and word in found["message"]


async def test_a_missing_field_bad_json_and_no_body_are_told_apart() -> None:
    assert error(await post("/v1/completions", {"model": "fake"}))["code"] == "missing_required_parameter"
    assert error(await post("/v1/completions", b'{"model": '))["code"] == "invalid_json"
    assert "JSON" in error(await post("/v1/completions", b""))["message"]
    assert error(await post("/v1/completions", b"[" * 100_000))["type"] == "invalid_request_error"
    async with asgi_client(FakeLLM()) as client:  # a web form can't send JSON without the browser asking first
        error(
            await client.post(
                "/v1/completions", content=b'{"model": "fake", "prompt": "x"}', headers={"content-type": "text/plain"}
            )
        )


async def test_too_long_a_prompt_is_400_with_the_counts() -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1200}]}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 1200}),
        ("/v1/completions", {"prompt": "x" * 995}),
        ("/v1/completions", {"prompt": "x" * 995, "stream": True}),
    ):
        found = error(await post(path, {"model": "fake", **body}))
        assert found["code"] == "context_length_exceeded" and "1000" in found["message"]


async def test_models_that_can_not_do_it_say_so() -> None:
    assert error(await chat(FakeLLM(template=False)))["code"] == "no_chat_template"
    encoder = FakeLLM()
    encoder.is_encoder = True
    refused = error(await chat(encoder))["message"]
    assert "makes embeddings and does not write text" in refused
    assert "/v1/embeddings" in refused and "GET /v1/models" in refused
    assert "/v1/embeddings" in error(await complete(encoder, stream=True))["message"]


async def test_a_request_has_a_bounded_number_of_prompts() -> None:
    assert error(await complete(prompt=["a"] * 2049))["param"] == "prompt"
    assert error(await complete(prompt=[[1]] * 2049, stream=True))["param"] == "prompt"
    for fields, param in (({"prompt": ["a"] * 5}, "prompt"), ({"prompt": "a", "n": 5}, "n")):
        for stream in (False, True):
            body = {"model": "fake", "stream": stream, **fields}
            found = error(await post("/v1/completions", body, FakeLLM(max_num_seqs=2), max_waiting=2))
            assert found["param"] == param and "takes 4 at a time" in found["message"]


async def test_an_unknown_model_is_404_and_lists_the_served_ones() -> None:
    for path, body in (
        ("chat/completions", {"messages": HI}),
        ("completions", {"prompt": "x"}),
        ("embeddings", {"input": "x"}),
    ):
        found = error(await post(f"/v1/{path}", {"model": "gpt-9", **body}), 404)
        assert found["code"] == "model_not_found" and found["param"] == "model" and "fake" in found["message"]


async def test_completions_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    for prompts in (["a", "b"], [[97], [98]]):
        body = (await complete(prompt=prompts, n=2, echo=True)).json()
        assert [(c["index"], c["text"]) for c in body["choices"]] == [
            (0, "aa!"),
            (1, "aa!#1"),
            (2, "bb!"),
            (3, "bb!#1"),
        ]
        assert body["usage"]["prompt_tokens"] == 2 and body["usage"]["completion_tokens"] == 12
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        texts = {}
        for chunk in events(await complete(prompt=prompts, n=2, echo=True, stream=True))[:-1]:
            [choice] = json.loads(chunk)["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == {c["index"]: c["text"] for c in body["choices"]}


async def test_a_list_of_numbers_is_one_prompt() -> None:
    assert [c["text"] for c in (await complete(prompt=[104, 111])).json()["choices"]] == ["ho!"]


async def test_echo_with_logprobs_scores_the_prompt_without_new_tokens() -> None:
    body = (await complete(prompt="abc", echo=True, logprobs=2, max_tokens=0)).json()
    [choice] = body["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5, "~": -1.5}, {"c": -0.5, "~": -1.5}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"]["completion_tokens"] == 0


async def test_completion_logprobs_always_hold_the_chosen_token_streamed_or_not() -> None:
    whole = (await complete(logprobs=0)).json()["choices"][0]["logprobs"]
    assert whole["top_logprobs"] == [{"h": -0.5}, {"i": -0.5}, {"!": -0.5}] and whole["text_offset"] == [0, 1, 2]
    streamed = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in events(await complete(logprobs=0, stream=True))[:-1]:
        for name, values in json.loads(chunk)["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == whole


async def test_best_of_keeps_the_likeliest_of_more() -> None:
    llm = FakeLLM()
    body = (await complete(llm, best_of=3, n=1)).json()
    assert [(c["index"], c["text"], c["logprobs"]) for c in body["choices"]] == [(0, "hi!", None)]
    assert llm.params_seen[0].n == 3 and body["usage"]["completion_tokens"] == len("hi!hi!#1hi!#2")
    likelier = FakeLLM()
    likelier._logprob = lambda id, count: TokenLogprob(id, chr(id), -0.1 if id in b"#1" else -0.5)
    body = (await complete(likelier, best_of=3, n=2, logprobs=0)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "hi!#1"), (1, "hi!#2")]


async def test_a_suffix_goes_behind_the_prompt_in_the_models_own_marks() -> None:
    llm = FakeLLM()
    llm.tokenizer.id = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3}.get
    assert (await complete(llm, prompt="ab", suffix="cd", echo=True)).json()["choices"][0]["text"].startswith("ab")
    assert llm.prompts == ["\x01ab\x02cd\x03"]
    assert error(await complete(llm, suffix="x", echo=True, logprobs=1))["param"] == "suffix"


async def embed(llm=None, **fields):
    return await post("/v1/embeddings", {"model": "fake", **fields}, llm)


async def test_embeddings_are_cut_only_where_the_model_was_trained_for_it() -> None:
    def model(matryoshka):
        llm = FakeLLM()
        llm.matryoshka = matryoshka
        return llm

    [found] = (await embed(model(True), input="abc", dimensions=2)).json()["data"]
    length = (9 + 0.25) ** 0.5
    assert found["embedding"] == pytest.approx([3 / length, 0.5 / length])
    assert (await embed(model((2,)), input="abc", dimensions=2)).status_code == 200
    for allowed in (False, (1, 3)):
        assert error(await embed(model(allowed), input="abc", dimensions=2))["param"] == "dimensions"
    assert "1, 3" in error(await embed(model((1, 3)), input="abc", dimensions=2))["message"]
    assert error(await embed(model(True), input="abc", dimensions=4))["param"] == "dimensions"


async def test_embeddings_take_every_form_of_input_and_count_its_tokens() -> None:
    for inputs, sizes in (("abc", [3]), (["abc", "d"], [3, 1]), ([97, 98], [2]), ([[97], [98, 99]], [1, 2])):
        body = (await embed(input=inputs)).json()
        assert [e["embedding"] for e in body["data"]] == [[float(n), 0.5, -0.25] for n in sizes]
        assert [e["index"] for e in body["data"]] == list(range(len(sizes)))
        assert body["usage"] == {"prompt_tokens": sum(sizes), "total_tokens": sum(sizes)}
    assert (await embed(input="abc", encoding_format="base64")).json()["data"][0]["embedding"] == "AABAQAAAAD8AAIC+"


async def test_embedding_input_that_can_not_be_honoured_is_refused() -> None:
    assert (await embed(input="x", dimensions=3)).status_code == 200
    assert error(await embed(input="x", dimensions=2))["param"] == "dimensions"
    for inputs in ([], "", ["a", ""], ["a"] * 2049, [300], [[97], []]):
        assert error(await embed(input=inputs))["param"] == "input"


async def test_models_are_listed_by_served_name_and_found_by_alias() -> None:
    llm = FakeLLM()
    async with asgi_client({"org/small": llm, "same": llm}, aliases={"gpt-4": "org/small"}) as client:
        body = (await client.get("/v1/models")).json()
        assert [m["id"] for m in body["data"]] == ["org/small", "same"] and body["object"] == "list"
        assert body["data"][0]["object"] == "model" and body["data"][0]["context_length"] == 1000
        assert (await client.get("/v1/models/org/small")).json()["id"] == "org/small"
        assert error(await client.get("/v1/models/none"), 404)["code"] == "model_not_found"
        answer = await client.post("/v1/chat/completions", json={"model": "gpt-4", "messages": HI})
        assert answer.json()["model"] == "gpt-4"


async def test_unknown_paths_and_methods_have_the_same_error_body() -> None:
    async with asgi_client(FakeLLM()) as client:
        assert error(await client.get("/v1/nothing"), 404)["code"] == "not_found"
        assert error(await client.get("/v1/completions"), 405)["code"] == "method_not_allowed"


async def test_openapi_describes_every_route_and_every_streamed_object() -> None:
    async with asgi_client(FakeLLM()) as client:
        schema = (await client.get("/openapi.json")).json()
    v1 = {f"/v1/{path}" for path in ("models", "models/{model}", "chat/completions", "completions", "embeddings")}
    v1 |= {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert v1 | {"/healthz", "/version", "/metrics"} <= set(schema["paths"])
    schemas = schema["components"]["schemas"]
    for path in ("chat/completions", "completions", "embeddings"):
        operation = schema["paths"][f"/v1/{path}"]["post"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        assert schemas[name]["examples"] and schemas[name]["additionalProperties"] is False
        assert {"200", "400", "404", "413", "500", "503"} <= set(operation["responses"]) and "422" not in operation[
            "responses"
        ]
        assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
    references = set(json.dumps(schema).split('"#/components/schemas/')[1:])
    assert {r.split('"')[0] for r in references} <= set(schemas)
    assert {"ChatCompletionChunk", "ErrorBody"} <= set(schemas)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["user", "text", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "n",
    "stop",
    "stream",
    "stream_options",
    "seed",
    "logit_bias",
    "tools",
    "tool_choice",
    "logprobs",
    "top_logprobs",
]
FIELDS += ["max_tokens", "echo", "temperature", "user", "response_format", "top_k", "num_beams", "messages", "prompt"]
FIELDS += ["structured_outputs", "input", "dimensions", "metadata", "x"]
APP = create_app(FakeLLM())


@settings(max_examples=150)
@given(
    st.sampled_from(["chat/completions", "completions", "embeddings"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
async def test_no_body_makes_the_server_fail(path, more) -> None:
    base = {"model": "fake", "messages": HI, "prompt": "hi", "input": "hi"}
    keep = {"chat/completions": "messages", "completions": "prompt", "embeddings": "input"}[path]
    body = json.dumps({"model": "fake", keep: base[keep]} | more).encode()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://127.0.0.1") as client:
        response = await client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
