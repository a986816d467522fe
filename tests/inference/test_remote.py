"""RemoteLLM against fake providers: both protocols, as values (MockTransport) and over a real loopback connection."""

import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from llmasos.errors import NetworkError, OfflineError, ProviderError, UnsupportedError
from llmasos.inference import generate_text
from llmasos.inference.llm import LLM
from llmasos.inference.remote import RemoteLLM, is_remote
from llmasos.inference.request import SamplingParams

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL_TEXT = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
PROVIDERS = ["openai", "anthropic"]


def sse(*events: dict[str, object] | str) -> bytes:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events]
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


class FakeProvider:
    """An API in OpenAI's or Anthropic's protocol. It answers `<the last user text>!`, and with a tool call when it is
    given tools. Keeps the bodies and headers it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[tuple[int, dict[str, str], bytes]] = []

    def handle(self, path: str, headers: dict[str, str], raw: bytes) -> tuple[int, dict[str, str], bytes]:
        body = json.loads(raw)
        self.bodies.append(body)
        self.headers.append({k.lower(): v for k, v in headers.items()})
        if self.failures:
            return self.failures.pop(0)
        make = {
            "chat/completions": self.chat,
            "messages": self.messages,
            "completions": self.text,
            "embeddings": self.embed,
        }
        answer = make[path.removeprefix("/v1/")](body)
        kind = "text/event-stream" if isinstance(answer, bytes) else "application/json"
        return 200, {"content-type": kind}, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def chat(self, body):
        text = body["messages"][-1]["content"] + "!"
        base = {"id": "c", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        call = {"id": "t", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        n = body.get("n", 1)
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            reason = "stop"
            if body.get("tools"):
                message, reason = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
            logprobs = None
            if body.get("logprobs"):
                top = [{"token": "x", "logprob": -0.1}] * body["top_logprobs"]
                logprobs = {"content": [{"token": "x", "logprob": -0.1, "top_logprobs": top}]}
            choices = [
                {"index": i, "message": message, "finish_reason": reason, "logprobs": logprobs} for i in range(n)
            ]
            return base | {"object": "chat.completion", "choices": choices, "usage": usage}

        def chunk(delta, reason=None):
            choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
            return base | {"object": "chat.completion.chunk", "choices": choices}

        if "call" in text:
            head = {"index": 0, "id": "t", "type": "function", "function": {"name": "add", "arguments": ""}}
            pieces = [{"index": 0, "function": {"arguments": part}} for part in ('{"a"', ": 1}")]
            deltas = [chunk({"tool_calls": [one]}) for one in (head, *pieces)]
            return sse(*deltas, chunk({}, "tool_calls"), "[DONE]")
        return sse(
            chunk({"role": "assistant", "content": ""}),
            *(chunk({"content": c}) for c in text),
            chunk({}, "stop"),
            "[DONE]",
        )

    def messages(self, body):
        text = body["messages"][-1]["content"][0]["text"] + "!"
        usage = {"input_tokens": 3, "output_tokens": 2}
        message = {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "usage": usage}
        call = {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}
        if not body.get("stream"):
            content, reason = [{"type": "text", "text": text}], "end_turn"
            if body.get("tools"):
                content, reason = [call], "tool_use"
            return message | {"content": content, "stop_reason": reason}
        events = [{"type": "message_start", "message": message | {"content": []}}, {"type": "ping"}]
        if "call" in text:
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"a"', ": 1}")]
            block, reason = call | {"input": {}}, "tool_use"
        else:
            deltas = [{"type": "text_delta", "text": c} for c in text]
            block, reason = {"type": "text", "text": ""}, "end_turn"
        events += [{"type": "content_block_start", "index": 0, "content_block": block}]
        events += [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
        events += [{"type": "content_block_stop", "index": 0}]
        events += [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 2}}]
        return sse(*events, {"type": "message_stop"})

    def text(self, body):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        logprobs = None
        if "logprobs" in body:
            logprobs = {
                "tokens": ["a"],
                "token_logprobs": [-0.5],
                "top_logprobs": [{"a": -0.5, "b": -1}],
                "text_offset": [0],
            }
        texts = [f" after {prompt}" for prompt in prompts for _ in range(body.get("n", 1))]
        base = {"id": "c", "created": 1, "model": body["model"], "object": "text_completion"}

        def answer(index, text, reason):
            return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

        if body.get("stream"):
            pieces = [base | {"choices": [answer(0, c, None)]} for c in texts[0]]
            return sse(*pieces, base | {"choices": [answer(0, "", "length")]}, "[DONE]")
        choices = [answer(i, text, "length") for i, text in enumerate(texts)]
        return base | {"choices": list(reversed(choices)), "usage": {"completion_tokens": 4}}

    def embed(self, body):
        data = [{"object": "embedding", "index": i, "embedding": [3.0, 4.0]} for i in range(len(body["input"]))]
        return {"object": "list", "data": data, "model": body["model"]}

    def transport(self) -> httpx.MockTransport:
        def handler(request: httpx.Request) -> httpx.Response:
            status, headers, content = self.handle(request.url.path, dict(request.headers), request.content)
            return httpx.Response(status, headers=headers, content=content)

        return httpx.MockTransport(handler)

    def llm(self, name: str, **options) -> RemoteLLM:
        options = {"api_key": "secret", "transport": self.transport(), "async_transport": self.transport()} | options
        return RemoteLLM(name, **options)


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def live(provider: FakeProvider):
    """Base URL of the fake provider behind a real socket."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            status, headers, content = provider.handle(self.path, dict(self.headers), raw)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_it_has_the_public_methods_of_llm_with_the_same_parameters() -> None:
    for name, method in inspect.getmembers(LLM, callable):
        if name.startswith("_") or name in ("from_pretrained", "load", "start", "check", "params"):
            continue
        ours = inspect.signature(getattr(RemoteLLM, name)).parameters
        takes_options = any(p.kind is p.VAR_KEYWORD for p in ours.values())
        theirs = {n for n, p in inspect.signature(method).parameters.items() if p.kind is not p.VAR_KEYWORD}
        missing = theirs - set(ours) - {"cancelled"}
        assert not missing or (takes_options and missing == {"max_length"}), f"{name} lacks {missing}"


@pytest.mark.parametrize("api", PROVIDERS)
async def test_every_door_answers_in_both_protocols(provider: FakeProvider, api: str) -> None:
    with provider.llm(f"{api}:m") as llm:
        assert llm.generate("hi") == llm.generate_text("hi") == llm.chat("hi") == "hi!"
        assert llm.generate(["a", "b"], echo=True) == ["aa!", "bb!"]
        assert "".join(c.text for c in llm.stream("hey")) == "hey!"
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
        assert llm.chat(messages) == "".join(c.text for c in llm.stream(messages)) == "hi!"
        *_, last = llm.stream_complete("hey", SamplingParams(max_tokens=5))
        assert last.finish_reason == "stop"
        [output] = llm.complete("hi", SamplingParams(temperature=0.5))
        assert (output.text, output.prompt, output.metrics.num_output_tokens) == ("hi!", "hi", 2)
        assert llm.complete_chat(messages, SamplingParams()).outputs[0].finish_reason == "stop"
        assert await llm.agenerate("hi") == await llm.achat("hi") == "hi!"
        assert await llm.agenerate_text(["a", "b"]) == ["a!", "b!"]
        assert [c.text async for c in llm.astream("hey")][:4] == ["h", "e", "y", "!"]
        assert "".join([c.text async for c in llm.astream_complete("hey", SamplingParams())]) == "hey!"
        assert [o.text for o in await llm.acomplete(["a", "b"], SamplingParams())] == ["a!", "b!"]
        assert (await llm.acomplete_chat(messages, SamplingParams())).text == "hi!"


@pytest.mark.parametrize("api", PROVIDERS)
async def test_tool_calls_pass_through_whole_and_streamed(provider: FakeProvider, api: str) -> None:
    with provider.llm(f"{api}:m") as llm:
        for output in (
            llm.complete_chat("add", SamplingParams(), tools=[TOOL]),
            await llm.acomplete_chat("add", SamplingParams(), tools=[TOOL]),
        ):
            [completion] = output.outputs
            [call] = completion.tool_calls
            assert (call.id, call.function.name, json.loads(call.function.arguments)) == ("t", "add", {"a": 1})
            assert completion.text == CALL_TEXT and completion.finish_reason == "stop"
        assert llm.chat("add", tools=[TOOL]) == CALL_TEXT
        assert "".join(c.text for c in llm.stream("call")) == CALL_TEXT
        assert "".join([c.text async for c in llm.astream("call")]) == CALL_TEXT
    sent = provider.bodies[0]["tools"]
    assert sent == [TOOL] if api == "openai" else sent[0]["name"] == "add"


@pytest.mark.parametrize("api", PROVIDERS)
async def test_a_real_connection_works_like_the_mock(provider: FakeProvider, live: str, api: str) -> None:
    with RemoteLLM(f"{api}+{live}#m", api_key="k") as llm:
        assert llm.chat("hi") == await llm.achat("hi") == "hi!"
        messages = [{"role": "user", "content": "hey"}]
        assert "".join(c.text for c in llm.stream(messages)) == "hey!"
        assert "".join([c.text async for c in llm.astream(messages)]) == "hey!"
    assert {b["model"] for b in provider.bodies} == {"m"}
    key = {"openai": ("authorization", "Bearer k"), "anthropic": ("x-api-key", "k")}[api]
    assert all(headers[key[0]] == key[1] for headers in provider.headers)


async def test_a_server_of_ones_own_continues_text_and_token_ids(provider: FakeProvider, live: str) -> None:
    with RemoteLLM(f"{live}#m") as llm:
        assert llm.generate("one") == await llm.agenerate("one") == " after one"
        assert llm.generate(["a", "b"]) == [" after a", " after b"]
        outputs = llm.complete(["a", "b"], SamplingParams(n=2, logprobs=2))
        assert [[c.text for c in o.outputs] for o in outputs] == [[" after a"] * 2, [" after b"] * 2]
        assert outputs[0].outputs[0].logprobs[0].top == ((-1, "a", -0.5), (-1, "b", -1.0))
        assert llm.complete([1, 2], SamplingParams())[0].prompt_token_ids == (1, 2)
        assert "".join(c.text for c in llm.stream("one")) == " after one"
        assert "".join([c.text async for c in llm.astream_complete([7], SamplingParams())]) == " after 7"
        assert llm.embed("x") == await llm.aembed("x") == [0.6, 0.8]
        assert llm.embed(["x", "y"], normalize=False) == [[3.0, 4.0], [3.0, 4.0]]


def test_every_parameter_that_the_api_knows_is_sent_under_its_name(provider: FakeProvider) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 3, "stop": "END",
        "logit_bias": {5: 1.0}, "logprobs": 2, "n": 2, "max_tokens": 7,
    }  # fmt: skip
    provider.llm("openai:m").chat("hi", **options)
    provider.llm("openai:m").complete_chat("hi", SamplingParams(**options))
    expected = options | {"logprobs": True, "top_logprobs": 2, "stop": ["END"], "logit_bias": {"5": 1.0}}
    expected["max_completion_tokens"] = expected.pop("max_tokens")
    for body in provider.bodies:
        assert body == expected | {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_without_options_the_apis_own_defaults_hold(provider: FakeProvider) -> None:
    provider.llm("openai:m").chat("hi")
    provider.llm("openai:m").complete_chat("hi", SamplingParams())
    assert provider.bodies[0] == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert provider.bodies[1]["temperature"] == 1.0
    provider.llm("anthropic:m").chat("hi", top_k=5, stop=["a"])
    assert {k: provider.bodies[2][k] for k in ("top_k", "stop_sequences", "max_tokens")} == {
        "top_k": 5,
        "stop_sequences": ["a"],
        "max_tokens": 4096,
    }


@pytest.mark.parametrize(
    ("name", "options", "param"),
    [
        ("openai:m", {"top_k": 5}, "top_k"),
        ("openai:m", {"num_beams": 4}, "num_beams"),
        ("openai:m", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("openai:m", {"max_length": 10}, "max_length"),
        ("anthropic:m", {"seed": 1}, "seed"),
        ("anthropic:m", {"n": 2}, "n"),
        ("anthropic:m", {"logit_bias": {1: 1.0}}, "logit_bias"),
        ("groq:m", {"logprobs": 1}, "logprobs"),
        ("http://127.0.0.1:1/v1#m", {"include_stop": True}, "include_stop"),
    ],
)
def test_a_parameter_that_the_api_does_not_know_is_refused_by_name(
    provider: FakeProvider, name: str, options: dict[str, object], param: str
) -> None:
    llm = provider.llm(name)
    for door in (llm.generate, llm.chat, llm.stream):
        with pytest.raises(UnsupportedError, match=param) as caught:
            door("hi", **options)
        assert caught.value.param == param
    if param != "max_length":
        with pytest.raises(UnsupportedError, match=param):
            llm.complete("hi", SamplingParams(**options))
    assert provider.bodies == []


def test_generate_text_takes_a_remote_model_and_max_length_stays_a_refusal(provider: FakeProvider) -> None:
    llm = provider.llm("http://127.0.0.1:1/v1#m")
    assert generate_text(llm, "hi", max_tokens=3) == " after hi"
    assert llm.chat("hi", max_length=None) == "hi!"
    assert provider.bodies[0]["max_tokens"] == 3
    with pytest.raises(UnsupportedError, match=r"max_length=9.*Use max_tokens") as caught:
        generate_text(llm, "hi", max_length=9)
    assert caught.value.param == "max_length"


@pytest.mark.parametrize("param", ["device", "dtype", "quantization"])
def test_how_a_model_behind_an_api_is_computed_can_not_be_chosen(param: str) -> None:
    name = "http://127.0.0.1:1/v1#m"
    with pytest.raises(UnsupportedError, match=f"{param}='odd'") as caught:
        LLM.from_pretrained(name, **{param: "odd"})
    assert caught.value.param == param
    with LLM.from_pretrained(name, **{param: "auto"}) as llm:
        assert isinstance(llm, RemoteLLM)


async def test_what_no_api_gives_is_refused_by_name(provider: FakeProvider) -> None:
    llm = provider.llm("anthropic:m")
    for name, call in {
        "score": lambda: llm.score("x"),
        "chat_prompt": lambda: llm.chat_prompt([]),
        "tokenizer": lambda: llm.tokenizer,
        "context_length": lambda: llm.context_length,
        "embed": lambda: llm.embed("x"),
        "prompt": lambda: llm.complete([1, 2], SamplingParams()),
        "pooling": lambda: provider.llm("openai:m").embed("x", pooling="cls"),
        "truncate": lambda: provider.llm("openai:m").embed("x", truncate=True),
    }.items():
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert caught.value.param == name
    with pytest.raises(UnsupportedError):
        list(llm.stream_complete([1, 2], SamplingParams()))
    with pytest.raises(UnsupportedError):
        await llm.ascore("x")
    assert provider.bodies == []


def test_the_providers_message_and_status_are_in_the_error(provider: FakeProvider) -> None:
    provider.failures = [(401, {}, b'{"error": {"message": "Incorrect API key", "type": "x"}}')]
    with pytest.raises(ProviderError, match=r"openai answered 401: Incorrect API key.*OPENAI_API_KEY") as caught:
        provider.llm("openai:m").chat("hi")
    assert caught.value.status == 401 and "secret" not in str(caught.value)
    provider.failures = [
        (400, {}, b'{"type": "error", "error": {"type": "invalid_request_error", "message": "bad model"}}')
    ]
    with pytest.raises(ProviderError, match="anthropic answered 400: bad model"):
        list(provider.llm("anthropic:m").stream("hi"))


def test_a_busy_provider_is_asked_again(provider: FakeProvider) -> None:
    provider.failures = [(429, {"retry-after": "0"}, b""), (529, {"retry-after": "0"}, b"")]
    assert provider.llm("anthropic:m").chat("hi") == "hi!"
    assert len(provider.bodies) == 3


def test_errors_inside_a_stream_and_a_cut_stream_are_errors(provider: FakeProvider) -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    start = {"type": "message_start", "message": {"id": "m", "model": "m"}}
    provider.failures = [(200, {}, sse(start, overloaded)), (200, {}, sse(start))]
    with pytest.raises(ProviderError, match="Overloaded"):
        list(provider.llm("anthropic:m").stream("hi"))
    with pytest.raises(NetworkError, match="before the answer was complete"):
        list(provider.llm("anthropic:m").stream("hi"))


async def test_offline_mode_allows_only_loopback(
    provider: FakeProvider, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(OfflineError, match="openai"):
        provider.llm("openai:m").chat("hi")
    with pytest.raises(OfflineError):
        await provider.llm("anthropic:m").achat("hi")
    assert provider.bodies == []
    assert RemoteLLM(f"{live}#m").chat("hi") == "hi!"


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ProviderError, match="OPENAI_API_KEY"):
        LLM.from_pretrained("openai:gpt-4.1")


def test_from_pretrained_gives_a_remote_model_for_a_provider_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    llm = LLM.from_pretrained("openai:gpt-4.1")
    assert isinstance(llm, RemoteLLM) and llm.model == "gpt-4.1" and is_remote(llm.name)
    assert not llm.is_encoder and llm.has_chat_template


def test_a_password_in_the_address_is_used_and_not_shown(provider: FakeProvider) -> None:
    llm = provider.llm("http://u:PASSWORD@127.0.0.1:1/v1#m")
    assert llm.chat("hi") == "hi!"
    assert llm.name == "http://127.0.0.1:1/v1#m" and "PASSWORD" not in repr(llm)
