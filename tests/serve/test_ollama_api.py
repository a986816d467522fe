"""Ollama's API as raw HTTP, with a fake model: what the official client does not show."""

import asyncio
import json
import math
from datetime import UTC, datetime

import httpx
import ollama
import pytest
from fake_llm import FakeLLM, live_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmasos.client.types.native import ModelStatus
from llmasos.client.types.ollama import OllamaChatRequest
from llmasos.errors import InvalidInputError, LLMasOSError, NetworkError
from llmasos.inference.request import Chunk, RequestMetrics, StructuredOutput
from llmasos.serve import create_app
from llmasos.serve.backing import InProcess
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.models import Models
from llmasos.serve.native import worker
from llmasos.serve.ollama.names import seconds, spellings
from llmasos.serve.ollama.request import read
from llmasos.serve.server import assemble
from llmasos.store import Library, import_model

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
SWITCH = "{% if enable_thinking %}<think>{% endif %} <tool_call> {{ tools }}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PLAIN = FakeLLM()


def client_of(llm):
    """One application for each model: making one takes longer than most tests."""
    if not hasattr(llm, "app"):
        llm.app = create_app(llm)
    return httpx.AsyncClient(transport=httpx.ASGITransport(llm.app), base_url="http://127.0.0.1")


async def post(path, body, llm=PLAIN):
    async with client_of(llm) as client:
        return await client.post(path, json=body)


async def chat(llm=PLAIN, **fields):
    return await post("/api/chat", {"model": "fake", "messages": HI, **fields}, llm)


async def generate(llm=PLAIN, **fields):
    return await post("/api/generate", {"model": "fake", "prompt": "hi", **fields}, llm)


def lines(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def error(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert isinstance(body["error"], str) and set(body) <= {"error", "code", "param"}
    return body


def timeless(line):
    """Without what differs from one time to the other."""
    return {key: value for key, value in line.items() if key != "created_at" and not key.endswith("_duration")}


# --- answers


async def test_chat_streams_by_default_one_object_per_line() -> None:
    found = lines(await chat())
    assert all(line["created_at"].endswith("Z") for line in found)
    assert [timeless(line) for line in found] == [
        *(
            {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False}
            for text in ("h", "i", "!")
        ),
        {
            "model": "fake",
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": len("user: hi"),
            "eval_count": 3,
        },
    ]


async def test_a_whole_answer_is_one_object() -> None:
    answer = await chat(stream=False)
    assert answer.headers["content-type"] == "application/json"
    assert timeless(answer.json()) == {
        "model": "fake",
        "message": {"role": "assistant", "content": "hi!"},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": len("user: hi"),
        "eval_count": 3,
    }
    cut = (await generate(stream=False, options={"num_predict": 2})).json()
    assert (cut["response"], cut["done_reason"], cut["eval_count"]) == ("hi", "length", 2)


async def test_durations_are_measured() -> None:
    last = lines(await chat(FakeLLM(delay=0.05)))[-1]
    assert last["prompt_eval_duration"] >= 0.05e9 and last["eval_duration"] >= 0.1e9
    assert last["load_duration"] >= 0 and last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"]


async def test_log_probabilities_come_with_their_tokens() -> None:
    found = lines(await chat(logprobs=True, top_logprobs=2))
    assert [line["logprobs"][0]["token"] for line in found[:3]] == ["h", "i", "!"]
    assert found[0]["logprobs"] == [
        {
            "token": "h",
            "logprob": -0.5,
            "bytes": [104],
            "top_logprobs": [
                {"token": "h", "logprob": -0.5, "bytes": [104]},
                {"token": "~", "logprob": -1.5, "bytes": [126]},
            ],
        }
    ]
    for raw in (False, True):
        whole = (await generate(logprobs=True, stream=False, raw=raw)).json()
        assert [entry["token"] for entry in whole["logprobs"]] == ["h", "i", "!"]
    assert "logprobs" not in lines(await chat())[0]


async def test_a_call_of_a_tool_comes_whole_and_its_result_finds_it() -> None:
    llm = FakeLLM(answers=[CALL + CALL, CALL, "3"])
    found = lines(await chat(llm, tools=[TOOL]))
    called = [line["message"]["tool_calls"] for line in found if "tool_calls" in line["message"]]
    assert [[call["function"]["index"] for call in calls] for calls in called] == [[0], [1]]
    assert called[0][0]["function"] == {"index": 0, "name": "add", "arguments": {"a": 1, "b": [2]}}
    assert found[-1]["done_reason"] == "stop" and "".join(line["message"]["content"] for line in found).strip() == ""
    whole = (await chat(llm, tools=[TOOL], stream=False)).json()["message"]
    assert whole["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": [2]}
    history = [*HI, whole, {"role": "tool", "content": "3", "tool_name": "add"}]
    assert (await chat(llm, tools=[TOOL], messages=history, stream=False)).json()["message"]["content"] == "3"
    seen = llm.chat_seen[-1]
    assert seen[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": [2]}}
    assert seen[2]["tool_call_id"] == whole["tool_calls"][0]["id"] and seen[2]["name"] == "add"


async def test_arguments_that_are_cut_off_stay_as_text_with_a_warning() -> None:
    cut = CALL[: CALL.index("]")]
    body = (await chat(FakeLLM(answers=[CALL]), tools=[TOOL], stream=False, options={"num_predict": len(cut)})).json()
    assert body["message"]["tool_calls"][0]["function"]["arguments"] == {"INVALID_JSON": '{"a": 1, "b": [2'}
    assert body["done_reason"] == "length" and "no JSON object" in body["warnings"][0]


def messages_of(*messages):
    body = {"model": "fake", "messages": list(messages)}
    asked = read(OllamaChatRequest.model_validate_json(json.dumps(body)), "fake")
    return [message.model_dump(exclude_none=True) for message in asked.messages]


def called(name, **more):
    return {"function": {"name": name, "arguments": {}}, **more}


def test_results_without_ids_belong_to_the_calls_in_their_order() -> None:
    found = messages_of(
        *HI,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [called("a"), called("b"), called("a")]},
        {"role": "tool", "content": "1", "tool_name": "a"},
        {"role": "tool", "content": "2", "tool_name": "a"},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4", "tool_name": "lost"},
    )
    ids = [call["id"] for call in found[1]["tool_calls"]]
    assert len(set(ids)) == 3 and found[1]["reasoning_content"] == "hm"
    assert [message["tool_call_id"] for message in found[2:5]] == [ids[0], ids[2], ids[1]]
    assert [message["name"] for message in found[2:]] == ["a", "a", "b", "lost"]
    with pytest.raises(InvalidInputError, match="tool_name"):
        messages_of(*HI, {"role": "tool", "content": "1"})


def test_results_with_ids_find_their_calls() -> None:
    calls = [called("a", id="x"), called("a", id="y", type="function")]
    found = messages_of(
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "y", "tool_name": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    )
    assert [message["tool_call_id"] for message in found[1:]] == ["y", "x"]


async def test_options_reach_the_model() -> None:
    llm = FakeLLM()
    options = {
        "temperature": 0.5,
        "top_k": 3.0,  # a whole number, as clients without integers write it
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.8,
        "seed": 7,
        "num_predict": 9.0,
        "stop": ["a", "b"],
        "repeat_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    }
    for ask in (chat, generate):
        assert (await ask(llm, options=options, format=SCHEMA)).status_code == 200
    assert (await generate(llm, options=options, format=SCHEMA, raw=True)).status_code == 200
    for params in llm.params_seen:
        found = {name: getattr(params, name) for name in options if hasattr(params, name)}
        assert found == {k: v for k, v in options.items() if k not in ("num_predict", "repeat_penalty")} | {
            "stop": ("a", "b")
        }
        assert (params.max_tokens, params.repetition_penalty) == (9, 1.1)
        assert params.structured == StructuredOutput(json=SCHEMA)
    assert (await chat(llm, options={"seed": -1, "num_predict": -1}, format="json")).status_code == 200
    last = llm.params_seen[-1]
    assert (last.seed, last.max_tokens) == (None, 1000 - len("user: hi"))
    assert last.structured == StructuredOutput(json_object=True)
    assert (await chat(llm, options={"num_predict": 5000})).status_code == 200  # what the context holds


async def test_options_without_an_effect_are_named_in_warnings() -> None:
    options = {"num_gpu": 1, "num_thread": 4, "mirostat": 2, "repeat_last_n": 64, "num_ctx": 4096, "num_keep": 5}
    last = lines(await chat(options=options, truncate=True, shift=True, keep_alive="5m"))[-1]
    assert {warning.split(" ")[0] for warning in last["warnings"]} == {
        *(f"options.{name}" for name in options),
        "truncate",
        "shift",
        "keep_alive",
    }
    assert any("4096" in warning and "1000" in warning for warning in last["warnings"])
    harmless = {"num_gpu": -1, "mirostat": 0, "repeat_last_n": -1, "num_ctx": 1000, "tfs_z": 1.0}
    assert "warnings" not in lines(await chat(options=harmless, truncate=False, shift=False))[-1]


async def test_thinking_is_switched_where_the_template_can() -> None:
    llm = FakeLLM(chat_template=SWITCH, answers=["<think>\nhm\n</think>\n\nyes"] * 3)
    found = lines(await chat(llm, think=True))
    assert "".join(line["message"].get("thinking", "") for line in found) == "hm"
    assert "".join(line["message"]["content"] for line in found) == "yes"
    assert llm.variables == {"enable_thinking": True}
    whole = (await generate(llm, think="high", stream=False)).json()
    assert (whole["thinking"], whole["response"]) == ("hm", "yes") and "no levels" in whole["warnings"][0]
    assert (await chat(llm, think=False)).status_code == 200
    assert llm.variables == {"enable_thinking": False}
    assert "does not think" in error(await chat(think=True))["error"]
    assert (await chat(think=False)).status_code == 200


async def test_raw_and_models_without_a_template_get_the_prompt_as_it_is() -> None:
    llm, base = FakeLLM(), FakeLLM(template=False)
    assert (await generate(llm, raw=True, stream=False)).json()["response"] == "hi!"
    assert (await generate(base, stream=False)).json()["response"] == "hi!"
    assert (llm.prompts, base.prompts) == (["hi"], ["hi"])
    await generate(llm, system="Be brief.")
    assert llm.prompts[-1] == "system: Be brief.\nuser: hi"
    assert error(await generate(raw=True, system="Be brief."))["param"] == "system"
    assert "no chat template" in error(await chat(base))["error"]
    assert "holds 1000" in error(await generate(raw=True, prompt="x" * 1000))["error"]


async def test_without_a_question_the_model_is_loaded_or_asked_to_go() -> None:
    for found in ((await chat(messages=[])), (await post("/api/chat", {"model": "fake"}))):
        [line] = lines(found)
        assert timeless(line) == {
            "model": "fake",
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "load",
        }
    assert (await generate(prompt="", stream=False)).json()["done_reason"] == "load"
    assert "belongs to the program" in error(await generate(prompt="", keep_alive=0))["error"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("0", 0),
        (0, 0),
        (90, 90),
        (-1, math.inf),
        ("-1", math.inf),
        ("-1m", math.inf),
        ("+2s", 2),
        ("5 minutes", None),
        ("", None),
        ("m5", None),
    ],
)
def test_durations(text, expected) -> None:
    assert seconds(text) == (pytest.approx(expected) if expected is not None else None)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["AA=="]}]}, "images"),
        ("chat", {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        ("chat", {"tools": [{"type": "web", "function": {"name": "a"}}]}, "tools.0.type"),
        ("chat", {"options": {"temprature": 1}}, "options.temprature"),
        ("chat", {"options": {"temperature": 3}}, "options.temperature"),
        ("chat", {"options": {"top_k": 1.5}}, "options.top_k"),
        ("chat", {"options": {"stop": ["a"] * 17}}, "options.stop"),
        ("chat", {"keep_alive": "soon"}, "keep_alive"),
        ("chat", {"format": "yaml"}, "format"),
        ("chat", {"think": "hard"}, "think"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"temperature": 1}, "temperature"),
        ("generate", {"images": ["AA=="]}, "images"),
        ("generate", {"template": "{{ .Prompt }}"}, "template"),
        ("generate", {"suffix": "b"}, "suffix"),
        ("generate", {"context": [1]}, "context"),
        ("generate", {"width": 10}, "width"),
        ("embed", {"input": ["a"], "dimensions": 2}, "dimensions"),
        ("pull", {"insecure": True}, "insecure"),
        ("pull", {"username": "me"}, "username"),
        ("show", {"options": {"a": 1}}, "options"),
    ],
)
async def test_what_is_wrong_or_not_supported_is_refused_by_name(path: str, fields, param: str) -> None:
    basic = {"chat": {"messages": HI}, "generate": {"prompt": "hi"}}.get(path, {})
    found = error(await post(f"/api/{path}", {"model": "fake", **basic, **fields}))
    assert found["param"] == param or found["param"].startswith(param + ".")


async def test_fields_that_clients_send_empty_ask_for_nothing() -> None:
    empty = {"suffix": "", "template": "", "system": "", "context": [], "images": [], "format": "", "options": None}
    assert (await generate(**empty, keep_alive=None)).status_code == 200
    shown = {"name": "fake", "model": "", "system": "", "template": "", "options": None, "verbose": False}
    assert (await post("/api/show", shown)).status_code == 200


async def test_bodies_are_json_whatever_their_content_type_but_not_from_web_pages() -> None:
    body = json.dumps({"model": "fake", "messages": HI}).encode()
    form = {"content-type": "application/x-www-form-urlencoded"}  # what `curl -d` says
    async with client_of(PLAIN) as client:
        assert lines(await client.post("/api/chat", content=body, headers=form))
        assert lines(await client.post("/api/chat", content=body))
        for page in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert (await client.post("/api/chat", content=body, headers=form | page)).status_code == 400
        assert "not valid JSON" in error(await client.post("/api/chat", content=b"{", headers=form))["error"]


async def test_what_clients_look_for_first() -> None:
    async with client_of(PLAIN) as client:
        assert (await client.get("/")).text == "Ollama is running"
        for path in ("/", "/api/version", "/api/tags"):
            assert (await client.head(path)).status_code == 200
        version = (await client.get("/api/version")).json()
        assert [int(part) for part in version["version"].split(".")] >= [0, 6, 4] and version["llmasos"]
        for path in ("/api/create", "/api/copy", "/api/push", "/api/blobs/sha256:00"):
            assert error(await client.post(path, json={}), 501)["code"] == "not_implemented"
        assert error(await client.get("/api/nothing"), 404)["code"] == "not_found"


# --- names, models


def test_names_have_several_spellings() -> None:
    assert list(spellings("a")) == ["a"]
    assert list(spellings("a:latest")) == ["a:latest", "a"]
    assert list(spellings("qwen3:0.6b")) == ["qwen3:0.6b", "qwen3-0.6b"]
    assert "hf:owner/repo:Q4_K_M" in spellings("hf.co/owner/repo:Q4_K_M")


async def test_a_tag_may_be_a_part_of_the_name() -> None:
    llm = FakeLLM("qwen3-0.6b")
    for name in ("qwen3-0.6b", "qwen3-0.6b:latest", "qwen3:0.6b"):
        assert lines(await chat(llm, model=name))[0]["model"] == name
    assert error(await chat(llm, model="qwen3:4b"), 404)["code"] == "model_not_found"


async def test_embeddings_are_cut_only_on_demand_and_that_is_said() -> None:
    class Embedder(FakeLLM):
        async def aembed(self, texts, **options):
            self.options = options
            return [[len(text) * 1.0, 0.5] for text in texts]

    llm = Embedder(context_length=10)
    body = {"model": "fake", "input": ["short", "x" * 11]}
    assert "holds 10" in error(await post("/api/embed", body, llm))["error"]
    cut = (await post("/api/embed", body | {"truncate": True}, llm)).json()
    assert llm.options == {"truncate": True} and cut["prompt_eval_count"] == 15
    assert cut["warnings"] == ["input 1 was cut: it has 11 tokens, and the context holds 10."]
    short = (await post("/api/embed", {"model": "fake", "input": "short", "options": {"num_thread": 2}}, llm)).json()
    assert llm.options == {} and len(short["embeddings"]) == 1 and "num_thread" in short["warnings"][0]
    assert (await post("/api/embed", {"model": "fake", "input": []}, llm)).json()["embeddings"] == []
    assert (await post("/api/embeddings", {"model": "fake"}, llm)).json() == {"embedding": []}


async def test_models_are_described_from_the_headers_of_their_files(tiny_model) -> None:
    card = import_model(tiny_model, name="fake")
    llm = FakeLLM(defaults={"temperature": 0.6, "top_k": 20}, chat_template=SWITCH)
    async with client_of(llm) as client:
        [listed] = (await client.get("/api/tags")).json()["models"]
        [running] = (await client.get("/api/ps")).json()["models"]
        shown = (await client.post("/api/show", json={"model": "fake"})).json()
    assert (listed["name"], listed["size"], len(listed["digest"])) == ("fake:latest", card.size, 64)
    details = listed["details"]
    assert (details["format"], details["family"], details["families"]) == ("safetensors", "llama", ["llama"])
    assert details["quantization_level"] == "F32" and details["parameter_size"].endswith("K")
    assert running["details"] == shown["details"] == details and running["expires_at"] > "2100"
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == details["context_length"]
    assert info["general.parameter_count"] > 1000 and shown["template"] == SWITCH
    assert {"completion", "tools", "thinking"} == set(shown["capabilities"])
    parameters = dict(line.split() for line in shown["parameters"].splitlines())
    assert parameters == {"num_ctx": "1000", "temperature": "0.6", "top_k": "20"}


async def test_a_model_that_is_deleted_is_gone_from_the_disk(tiny_model, home) -> None:
    import_model(tiny_model, name="other")
    async with client_of(PLAIN) as client:
        gone = await client.request("DELETE", "/api/delete", json={"model": "other:latest"})
        assert gone.status_code == 200 and Library().list() == []
        missing = await client.request("DELETE", "/api/delete", json={"name": "other"})
        assert error(missing, 404)["code"] == "not_found"
        for path in ("../x", "/etc", "a/b"):
            wrong = await client.request("DELETE", "/api/delete", json={"model": path})
            assert wrong.status_code in (400, 404)
        import_model(tiny_model, name="fake")
        kept = await client.request("DELETE", "/api/delete", json={"model": "fake"})
        assert "belongs to the program" in error(kept)["error"] and Library().has("fake")


# --- models that come and go


class Coming(InProcess):
    """Notes how long requests want their model to stay."""

    def __init__(self, llms):
        super().__init__(llms)
        self.stays = []

    def lease(self, name, *, keep_alive, sticky):
        self.stays.append(keep_alive)
        return super().lease(name, keep_alive=keep_alive, sticky=sticky)


class Residents:
    """Knows of one model in memory."""

    def __init__(self):
        self.unloaded = []

    def status(self):
        bytes_ = {"cpu": 100, "cuda:0": 1000}
        until = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
        loaded = {"state": "ready", "measured_bytes": bytes_, "context_length": 64, "expires_at": until}
        return [
            ModelStatus(name="fake", reference="fake", **loaded),
            ModelStatus(name="other", reference="other", state="absent"),
        ]

    async def unload(self, name, *, force):
        self.unloaded.append((name, force))

    async def removed(self, name):
        raise AssertionError(f"{name} was not deleted")


def hosted(caller=ANYONE):
    """A client in the name of `caller`, the backing, the residents."""
    backing, residents = Coming({"fake": FakeLLM()}), Residents()
    app = assemble(Models(backing), residents=residents)

    async def as_caller(scope, receive, send):
        scope["state"] = {"caller": caller}
        await app(scope, receive, send)

    client = httpx.AsyncClient(transport=httpx.ASGITransport(as_caller), base_url="http://127.0.0.1")
    return client, backing, residents


async def test_keep_alive_goes_to_the_lease() -> None:
    client, backing, residents = hosted()
    async with client:
        for keep_alive in ("5m", -1, 0, None):
            body = {"model": "fake", "messages": HI, "keep_alive": keep_alive}
            assert "warnings" not in lines(await client.post("/api/chat", json=body))[-1]
        for path, more in (("generate", {}), ("embed", {"input": "a"}), ("embeddings", {"prompt": "a"})):
            assert (await client.post(f"/api/{path}", json={"model": "fake", "keep_alive": 7, **more})).is_success
        assert backing.stays == [300, math.inf, 0, None, 7, 7, 7] and residents.unloaded == []
        [line] = lines(await client.post("/api/generate", json={"model": "fake:latest", "keep_alive": 0}))
    assert line["done_reason"] == "unload" and residents.unloaded == [("fake", False)]


async def test_only_who_manages_the_server_has_a_say_in_what_stays() -> None:
    client, backing, residents = hosted(Caller(key_id="k", scopes=frozenset({"inference"})))
    async with client:
        answer = lines(await client.post("/api/chat", json={"model": "fake", "messages": HI, "keep_alive": -1}))
        assert "scope manage" in answer[-1]["warnings"][0] and backing.stays == [None]
        refused = await client.post("/api/generate", json={"model": "fake", "keep_alive": 0})
        assert "'manage'" in error(refused, 403)["error"] and residents.unloaded == []


async def test_keys_see_and_use_their_own_models() -> None:
    client, _, _ = hosted(Caller(key_id="k", models=("other-*",)))
    async with client:
        assert (await client.get("/api/tags")).json() == (await client.get("/api/ps")).json() == {"models": []}
        for path in ("chat", "generate", "show"):
            assert error(await client.post(f"/api/{path}", json={"model": "fake"}), 403)


async def test_ps_tells_memory_and_how_long() -> None:
    client, _, _ = hosted()
    async with client:
        [running] = (await client.get("/api/ps")).json()["models"]
    assert (running["size"], running["size_vram"], running["context_length"]) == (1100, 1000, 64)
    assert running["expires_at"] == "2031-02-03T04:05:06Z"


# --- pulls


def report(phase, **fields):
    return {"phase": phase, "file": "", "done": 0, "total": None, "message": "", **fields}


REPORTS = [
    report("note", message="asking the hub"),
    report("download", file="model.gguf", done=10, total=100),
    report("download", file="model.gguf", done=100, total=100),
    report("check", file="model.gguf", done=100, total=100),
    report("done", message="m is installed"),
]


@pytest.fixture
def pulling(monkeypatch: pytest.MonkeyPatch):
    """What pulls are asked to fetch; they report REPORTS."""
    asked = []

    async def run(task, options, on_progress):
        asked.append((task, options))
        for one in REPORTS:
            on_progress(one)
            await asyncio.sleep(0)
        return {"name": options["name"]}

    monkeypatch.setattr(worker, "run", run)
    return asked


@pytest.fixture
async def pull():
    """Asks a server of this test's own, whose home is the test's: jobs are remembered."""
    app = create_app(FakeLLM())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        yield lambda model, **fields: client.post("/api/pull", json={"model": model, **fields})


async def test_a_pull_tells_its_progress_and_ends_with_success(pulling, pull) -> None:
    found = lines(await pull("smollm2-135m-instruct:latest"))
    assert pulling == [("pull", {"model": "smollm2-135m-instruct", "name": "smollm2-135m-instruct"})]
    assert found[0] == {"status": "pulling manifest"} and found[-1] == {"status": "success"}
    assert "serves only what it was started with" in found[-2]["status"]
    whole = await pull("hf.co/acme/tiny:Q4_K_M", stream=False)
    assert whole.json() == {"status": "success"} and pulling[-1][1]["model"] == "hf:acme/tiny:Q4_K_M"


def test_the_official_client_pulls(pulling) -> None:
    with live_server(FakeLLM()) as url, ollama.Client(url.removesuffix("/v1")) as client:
        statuses = [part.status for part in client.pull("smollm2-135m-instruct", stream=True)]
        assert statuses[0] == "pulling manifest" and statuses[-1] == "success"
        assert client.pull("smollm2-135m-instruct").status == "success"
        with pytest.raises(ollama.ResponseError, match="no model 'nothing-like-it'") as missing:
            client.pull("nothing-like-it")
        assert missing.value.status_code == 404


async def test_paths_of_the_servers_machine_are_not_pulled(pulling, pull, tiny_model) -> None:
    for path in (str(tiny_model), f"file:{tiny_model}"):
        assert "path of the server's machine" in error(await pull(path))["error"]
    assert pulling == []


async def test_a_pull_that_fails_says_so_on_its_last_line(pull, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(task, options, on_progress):
        raise NetworkError("The hub is away.", hint="Try again.")

    monkeypatch.setattr(worker, "run", run)
    found = lines(await pull("smollm2-135m-instruct"))
    assert found == [{"status": "pulling manifest"}, {"error": "The hub is away. Try again.", "code": "network"}]
    assert error(await pull("smollm2-135m-instruct", stream=False), 502)


def test_a_pull_that_its_client_leaves_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    stopped = threading.Event()

    async def run(task, options, on_progress):
        on_progress(REPORTS[1])
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    monkeypatch.setattr(worker, "run", run)
    with live_server(FakeLLM()) as url, ollama.Client(url.removesuffix("/v1")) as client:
        parts = client.pull("smollm2-135m-instruct", stream=True)
        assert [next(parts).status, next(parts).status] == ["pulling manifest", "pulling model.gguf"]
        parts.close()
        assert stopped.wait(10)


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
def test_any_split_of_the_models_text_gives_the_same_answer(pieces, cuts) -> None:
    SPLIT.text, SPLIT.cuts = "".join(pieces), ()

    async def both():
        whole = (await chat(SPLIT, tools=[TOOL], stream=False)).json()
        SPLIT.cuts = cuts
        return whole, lines(await chat(SPLIT, tools=[TOOL]))

    whole, found = asyncio.run(both())
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    for key in ("content", "thinking"):
        assert "".join(line["message"].get(key, "") for line in found) == whole["message"].get(key, "")
    calls = [call["function"] for line in found for call in line["message"].get("tool_calls", ())]
    assert calls == [call["function"] for call in whole["message"].get("tool_calls", ())]
    assert found[-1]["eval_count"] == whole["eval_count"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | st.text(max_size=3) | st.just("5m"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*OllamaChatRequest.model_fields, *OllamaChatRequest.UNSUPPORTED, "name", "other"])


@settings(max_examples=150)
@given(fields=st.dictionaries(FIELDS, JSON_VALUES, max_size=4))
def test_no_body_makes_anything_but_a_request_or_an_error_for_people(fields) -> None:
    body = {"model": "fake", "messages": HI} | fields
    try:
        asked = read(OllamaChatRequest.model_validate_json(json.dumps(body)), "fake")
        if not asked.is_empty:
            asked.chat()
    except (LLMasOSError, ValueError):
        pass
