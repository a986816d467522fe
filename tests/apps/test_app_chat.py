"""`@app.chat`: OpenAI's form of an application, with the official client; and which model an application gets."""

import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import served

from llmasos.apps import Application, ChatRequest, Message, Requirement
from llmasos.apps.place import Config
from llmasos.client.address import split_unix
from llmasos.client.types import ChatReply
from llmasos.errors import FormatError, InvalidInputError, NotFoundError, UnsupportedError
from llmasos.inference.remote import RemoteLLM
from llmasos.inference.request import Chunk, SamplingParams

ASK = {"model": "app/parrot", "messages": [{"role": "user", "content": "a b"}]}


def parrot(**options: Any) -> Application:
    app = Application(title="Parrot", **options)

    @app.chat
    def repeat(messages: list[Message], max_tokens: int = 10) -> Iterator[str]:
        """Say it again.

        Word by word.
        """
        for word in messages[-1]["content"].split(" ")[:max_tokens]:
            yield word + " "

    return app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(parrot()) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_gets_the_whole_answer_and_the_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, temperature=0.5)
    assert whole.choices[0].message.content == "a b "
    assert whole.choices[0].finish_reason == "stop" and whole.id.startswith("chatcmpl-")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens == 2
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert [c.choices[0].delta.content for c in chunks[:-1]] == ["", "a ", "b ", None]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 1
    assert len({c.id for c in chunks}) == 1


def test_it_is_the_model_app_and_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["app/parrot"]
    assert client.models.retrieve("app/parrot").object == "model"
    assert client.chat.completions.create(**ASK | {"model": "parrot"}).model == "parrot"
    for call in (lambda: client.models.retrieve("gpt"), lambda: client.chat.completions.create(**ASK | {"model": "x"})):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"


def test_the_document_says_how_it_chats() -> None:
    assert parrot().document()["chat"] == {
        "name": "repeat",
        "model": "app/parrot",
        "path": "/v1/chat/completions",
        "summary": "Say it again.",
        "description": "Word by word.",
        "fields": ["max_tokens"],
        "stream": True,
        "session": False,
    }
    assert Application().document()["chat"] is None
    assert Application().test_client().get("/v1/models").status_code == 404


def test_fields_that_ask_for_another_kind_of_answer_are_refused_and_its_own_are_given(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(**ASK, max_completion_tokens=1).choices[0].message.content == "a "
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for field in ({"tools": [tool]}, {"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASK, **field)
        assert caught.value.param == next(iter(field))
    plain = {"tools": [], "n": 1, "logprobs": False, "response_format": {"type": "text"}, "seed": 1}
    assert client.chat.completions.create(**ASK, **plain).choices


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "app/parrot"}, "messages"),
        ({**ASK, "messages": []}, "messages"),
        ({**ASK, "messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({**ASK, "colour": "red"}, "colour"),
        ({**ASK, "max_tokens": "many"}, "max_tokens"),
        ({**ASK, "service_tier": "flex"}, "service_tier"),
    ],
)
def test_wrong_requests_are_errors_in_openais_form(body: dict[str, Any], words: str) -> None:
    answer = parrot().test_client().post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert words in error["param"] and words in error["message"]


def test_a_body_that_is_no_json_is_refused() -> None:
    client = parrot().test_client()
    assert (
        client.post("/v1/chat/completions", content="{", headers={"content-type": "application/json"}).json()["error"][
            "code"
        ]
        == "malformed_json"
    )
    foreign = client.post("/v1/chat/completions", content="{}", headers={"content-type": "text/plain"})
    assert foreign.status_code == 415


@pytest.mark.parametrize("stop", ["b", ["zz", " b"], ["a b c"], "b "])
def test_stop_is_kept_for_it_across_pieces(client: openai.OpenAI, stop: Any) -> None:
    say = {**ASK, "messages": [{"role": "user", "content": "a b c d"}], "stop": stop}
    text = "a b c d "
    expected = text[: min(at for one in ([stop] if isinstance(stop, str) else stop) if (at := text.find(one)) >= 0)]
    assert client.chat.completions.create(**say).choices[0].message.content == expected
    chunks = list(client.chat.completions.create(**say, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    said = stop if isinstance(stop, str) else stop[-1]
    assert chunks[-1].choices[0].model_dump()["stop_reason"] == said
    whole = client.chat.completions.create(**say).choices[0]
    assert whole.finish_reason == "stop" and whole.model_dump()["stop_reason"] == said


def test_a_stop_text_that_does_not_come_holds_nothing_back(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stop=["b x", "  "]))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "a b "
    assert "stop_reason" not in chunks[-1].choices[0].model_dump()


@pytest.mark.parametrize(("reason", "said"), [("###", "###"), ("its own", None), (7, None)])
def test_a_function_that_stops_itself_says_at_what_by_its_models_chunks(reason: str | int, said: str | None) -> None:
    app = Application(title="Cut")

    @app.chat
    def cut(messages: list[Message], stop: str | list[str] | None = None) -> Iterator[Chunk]:
        yield Chunk(0, "a", finish_reason="stop", stop_reason=reason)

    body = {"model": "cut", "messages": ASK["messages"], "stop": ["!", "###"]}
    [choice] = app.test_client().post("/v1/chat/completions", json=body).json()["choices"]
    assert (choice["message"]["content"], choice.get("stop_reason")) == ("a", said)


def test_a_function_may_return_take_the_whole_request_and_its_parts_become_text() -> None:
    app, seen = Application(title="Whole"), []

    @app.chat
    async def answer(messages: list[Message], request: ChatRequest) -> str:
        seen.append((messages, request.temperature))
        return "yes"

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    body = {"model": "whole", "messages": [{"role": "user", "content": parts}, {"role": "user", "content": picture}]}
    client = app.test_client()
    answers = client.post("/v1/chat/completions", json=body | {"temperature": 0.25, "tool_choice": "auto"}).json()
    assert answers["choices"][0]["message"]["content"] == "yes"
    assert seen == [([{"role": "user", "content": "a\nb"}, {"role": "user", "content": picture}], 0.25)]
    events = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert [json.loads(e[6:])["choices"][0]["delta"].get("content") for e in events[:-2]] == ["", "yes", None]


def test_chunks_of_a_model_are_pieces_and_say_why_they_ended() -> None:
    app = Application(title="Chunks")

    @app.chat
    def answer(messages):
        return iter([Chunk(0, "a", (), (), None), Chunk(0, "b", (), (), "length")])

    body = app.test_client().post("/v1/chat/completions", json=ASK | {"model": "chunks"}).json()
    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("ab", "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_what_fails_before_the_first_piece_is_a_status_and_midway_an_event(streamed: bool) -> None:
    app, fails_at = Application(title="Fails"), 0

    @app.chat
    def answer(messages: list[Message]) -> Iterator[str]:
        for n in range(3):
            if n == fails_at:
                raise NotFoundError("The secret is gone.", hint="Look elsewhere.")
            yield "x"

    client = app.test_client()
    body = ASK | {"model": "fails", "stream": streamed}
    first = client.post("/v1/chat/completions", json=body)
    assert (first.status_code, first.json()["error"]["message"]) == (404, "The secret is gone. Look elsewhere.")
    fails_at = 1
    midway = client.post("/v1/chat/completions", json=body)
    if streamed:
        last = midway.text.split("\n\n")[-2]
        assert midway.status_code == 200 and json.loads(last[6:])["error"]["code"] == "model_not_found"
        assert "[DONE]" not in midway.text
    else:
        assert midway.status_code == 404


def test_what_is_no_text_is_a_failure_that_names_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = Application(title="Wrong")

    @app.chat
    def answer(messages: list[Message]):
        return {"a": 1}

    answers = app.test_client().post("/v1/chat/completions", json=ASK | {"model": "wrong"})
    assert answers.status_code == 500 and "err_" in answers.json()["error"]["message"]
    assert "A chat function gave a message with neither content nor tool_calls." in caplog.text


CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def test_a_message_with_calls_may_be_returned_or_yielded() -> None:
    app = Application(title="Caller")

    @app.chat
    def caller(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Iterator[Any]:
        yield "Let me "
        yield {"content": "look.", "reasoning_content": "They ask for the weather.", "tool_calls": [CALL]}
        yield {"tool_calls": [{"id": "mine", "type": "function", "function": {"name": "time"}}]}

    body = {"model": "caller", "messages": [{"role": "user", "content": "?"}], "stop": ["zzz"]}
    with app.test_client() as client:
        [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
        events = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me look.", "They ask for the weather.")
    assert choice["finish_reason"] == "tool_calls"
    first, second = message["tool_calls"]
    assert json.loads(first["function"]["arguments"]) == {"city": "Zürich"} and first["id"].startswith("call_")
    assert second == {"id": "mine", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather"), (1, "time")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("kind", [Message, dict[str, Any], str | Message, ChatReply])
def test_a_returned_message_is_an_answer(kind: Any) -> None:
    app = Application(title="Caller")

    def caller(messages: list[Message]) -> Any:
        return {"role": "assistant", "content": None, "tool_calls": [CALL]}

    caller.__annotations__["return"] = kind
    if kind is ChatReply:
        with pytest.raises(InvalidInputError, match="text, or a message"):
            app.chat(caller)
        return
    app.chat(caller)
    with app.test_client() as client:
        body = {"model": "caller", "messages": [{"role": "user", "content": "?"}]}
        [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("wrong", [{"content": 3}, {"tool_calls": [{}]}, {"role": "user", "content": "x"}])
def test_a_wrong_message_is_the_functions_failure(wrong: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    app = Application(title="Wrong")

    @app.chat
    def speak(messages: list[Message]) -> Message:
        return wrong  # type: ignore[return-value]

    with app.test_client() as client:
        answer = client.post(
            "/v1/chat/completions", json={"model": "wrong", "messages": [{"role": "user", "content": "?"}]}
        )
    assert answer.status_code == 500 and "A chat function gave a message whose" in caplog.text


async def test_a_client_that_leaves_ends_the_generator() -> None:
    app, closed, begun = Application(title="Long"), threading.Event(), threading.Event()

    @app.chat
    async def answer(messages: list[Message]) -> AsyncIterator[str]:
        import asyncio

        try:
            while True:
                begun.set()
                yield "x"
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    import asyncio

    with served(app) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            stream = await client.chat.completions.create(**ASK | {"model": "app/long"}, stream=True)
            async for _ in stream:
                break
            await stream.close()
            assert await asyncio.to_thread(closed.wait, 5)
            closed.clear(), begun.clear()
            whole = asyncio.create_task(client.chat.completions.create(**ASK | {"model": "app/long"}))
            assert await asyncio.to_thread(begun.wait, 5)
            whole.cancel()
            assert await asyncio.to_thread(closed.wait, 5)


def test_what_can_not_chat_is_refused() -> None:
    app = Application()
    with pytest.raises(InvalidInputError, match="no parameter `messages`"):
        app.chat(lambda question: "x")
    with pytest.raises(InvalidInputError, match=r"'colour' of .* is no field"):
        app.chat(lambda messages, colour: "x")

    def number(messages: list[Message]) -> int:
        return 1

    with pytest.raises(InvalidInputError, match="answers with text, or a message"):
        app.chat(number)
    app.chat(lambda messages: "x")
    with pytest.raises(InvalidInputError, match="chats already"):
        app.chat(lambda messages: "y")
    with pytest.raises(InvalidInputError, match="belongs to every application"):
        app.route("/v1/models")(lambda: 1)
    other = Application()
    other.route("/v1/models")(lambda: 1)
    with pytest.raises(InvalidInputError, match=r"belongs to @app.chat"):
        other.chat(lambda messages: "x")


# which model it gets


def served_models(socket_url: str, **more: Any) -> Application:
    """What a server of models looks like to an application."""
    app = Application(title="Server")

    @app.asgi.get("/v1/models")
    def models() -> dict[str, Any]:
        can = {"completion": True, "chat": True, "tools": False, "embeddings": True}
        names = {
            "small": (2048, can),
            "tools": (2048, can | {"tools": True}),
            "large": (8192, can),
            "app/x": (9999, can),
        }
        data = [
            {"id": name, "object": "model", "created": 1, "owned_by": "x", "context_length": n, "capabilities": c}
            for name, (n, c) in names.items()
        ]
        return {"object": "list", "data": data}

    @app.asgi.post("/v1/chat/completions")
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": f"I am {body['model']}."}}
        return {"id": "x", "created": 1, "model": body["model"], "choices": [choice | {"finish_reason": "stop"}]}

    return app


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("socket") / "server.sock")
    with served(served_models(path), path) as _:
        yield path


@pytest.mark.parametrize(
    ("llm", "name"),
    [
        ("large", "large"),
        (Requirement(), "small"),
        (Requirement(min_context=4096), "large"),
        (Requirement(capabilities=("tools",)), "tools"),
    ],
)
def test_under_a_server_the_model_is_one_of_its_own(
    socket_path: str, monkeypatch: pytest.MonkeyPatch, llm: Any, name: str
) -> None:
    monkeypatch.setenv("LLMASOS_SERVER", f"unix:{socket_path}")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    app = Application(llm=llm)
    with closing(app.llm) as found:
        assert isinstance(found, RemoteLLM) and app.model is found
        assert found.chat("Who are you?") == f"I am {name}."
    if isinstance(llm, str):
        for address in (f"unix:{socket_path}", f"unix:{socket_path}:/v1"):
            monkeypatch.setenv("LLMASOS_SERVER", address)
            with closing(Application(llm).llm) as found:
                assert found.chat("Who?") == f"I am {name}."


def test_a_requirement_that_nothing_meets_is_named(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_SERVER", f"unix:{socket_path}")
    with pytest.raises(NotFoundError, match=r"context of 99999 tokens.*small lacks 97951 tokens of context"):
        _ = Application(llm=Requirement(min_context=99999)).llm
    with pytest.raises(InvalidInputError, match="'fly' is none"):
        Requirement(capabilities=("fly",))
    with pytest.raises(UnsupportedError, match="no vision model is supported yet"):
        Requirement(capabilities=("tools", "vision"))
    with pytest.raises(InvalidInputError, match="'big' is no size"):
        Requirement(max_size="big")
    assert Requirement(max_size="2MB").max_bytes == 2 << 20


# httpcore leaves the socket to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_is_not_there_is_said(tmp_path: Path) -> None:
    from llmasos.client import Client
    from llmasos.errors import NetworkError

    with pytest.raises(NetworkError, match=r"none.sock could not be reached"):
        Client(f"unix:{tmp_path}/none.sock:/v1", max_retries=0).models()
    assert split_unix("unix:///a/b.sock:/v1") == split_unix("unix:/a/b.sock:/v1") == ("/a/b.sock", "/v1")
    for wrong in ("unix:a.sock", "unix:", "unix:/a:b", "unix:/a?b"):
        with pytest.raises(InvalidInputError, match="not the address of a Unix socket"):
            split_unix(wrong)


def test_here_a_requirement_is_met_by_an_installed_model(tiny_model: Path) -> None:
    from llmasos.store import pull

    card = pull(str(tiny_model))
    app = Application(llm=Requirement(min_context=16))
    assert app.llm.name == card.name
    with pytest.raises(NotFoundError, match=f"{card.name} lacks"):
        _ = Application(llm=Requirement(min_context=10**6)).llm
    with pytest.raises(NotFoundError, match=f"{card.name} lacks smaller files"):
        _ = Application(llm=Requirement(max_size=1)).llm


def test_usage_counts_with_the_applications_own_model(tiny_model: Path) -> None:
    app = Application(str(tiny_model), title="Tiny")

    @app.chat
    def answer(messages: list[Message], max_tokens: int = 5) -> Iterator[Chunk]:
        return app.llm.stream(messages, max_tokens=max_tokens, ignore_eos=True, temperature=0)

    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    whole = app.test_client().post("/v1/chat/completions", json=body).json()
    messages = body["messages"]
    expected = app.llm.complete_chat(messages, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["choices"][0]["finish_reason"] == "length"
    assert "estimated" not in whole["usage"]
    assert whole["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    app.llm.close()


def test_a_model_is_an_object_a_name_or_a_requirement_but_one() -> None:
    model = object()
    assert Application(model).llm is Application(model).model is model
    with pytest.raises(InvalidInputError, match="one model"):
        Application(model, llm="x")
    with pytest.raises(InvalidInputError, match="without a model"):
        _ = Application().llm


# where it lives

MANIFEST = """
[app]
name = "ask-me"
version = "1.0.0"
summary = "Asks"
license = "MIT"
[models]
main = "large"
[config.style]
type = "choice"
choices = ["short", "long"]
default = "short"
[config.token]
type = "secret"
required = true
[config.out]
type = "folder"
"""


def beside(folder: Path, title: str | None = None) -> Application:
    """An application that is defined in a file of `folder`."""
    scope: dict[str, Any] = {"__file__": str(folder / "my app.py")}
    exec(f"from llmasos.apps import Application\napp = Application(title={title!r})", scope)
    found = scope["app"]
    assert isinstance(found, Application)
    return found


def test_names_come_from_host_manifest_title_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert beside(tmp_path).name == "my-app"
    assert beside(tmp_path, "Große Frage 2").name == "gro-e-frage-2"
    assert beside(tmp_path, "问答").name == "my-app"
    assert beside(tmp_path, "2 for 1").name == "app-2-for-1"
    (tmp_path / "llmasos.toml").write_text(MANIFEST)
    assert beside(tmp_path, "Other").name == "ask-me"
    monkeypatch.setenv("LLMASOS_APP_NAME", "given")
    assert beside(tmp_path).name == "given"


def test_data_lie_in_the_home_or_where_the_host_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    assert beside(tmp_path / "x", "Ask").data == tmp_path / "apps-data" / "ask"
    assert (tmp_path / "apps-data" / "ask").is_dir()
    assert beside(tmp_path / "apps" / "ask" / "1.0.0").data == tmp_path / "apps" / "ask" / "data"
    monkeypatch.setenv("LLMASOS_APP_DATA", str(tmp_path / "own"))
    assert beside(tmp_path).data == tmp_path / "own"


def test_config_is_what_the_user_set_checked_by_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    values = tmp_path / "values.json"
    monkeypatch.setenv("LLMASOS_APP_CONFIG", str(values))
    app = beside(tmp_path)
    assert dict(app.config) == {}
    values.write_text('{"free": 1}')
    assert app.config.free == app.config["free"] == 1
    (tmp_path / "llmasos.toml").write_text(MANIFEST)
    app = beside(tmp_path)
    values.write_text('{"token": "s3cret", "out": "/tmp"}')
    assert dict(app.config) == {"style": "short", "token": "s3cret", "out": Path("/tmp")}
    assert "s3cret" not in repr(app.config)
    with pytest.raises(AttributeError, match=r"no setting 'x'. Known: style, token, out"):
        _ = app.config.x
    for text, words in (
        ("{}", "'token' has no value"),
        ('{"token": 1}', "'token' .* is no text"),
        ('{"token": "a", "style": "wide"}', "'style' .* is none of short, long"),
        ('{"token": "a", "colour": 1}', "'colour', which ask-me does not ask for"),
    ):
        values.write_text(text)
        with pytest.raises(InvalidInputError, match=words):
            _ = app.config
    for text in ("{", "[1]"):
        values.write_text(text)
        with pytest.raises(FormatError):
            _ = app.config
    assert repr(Config({"a": 1})) == "Config({'a': 1})"


def test_the_manifest_names_the_model(tmp_path: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_SERVER", f"unix:{socket_path}")
    (tmp_path / "llmasos.toml").write_text(MANIFEST)
    app = beside(tmp_path)
    with closing(app.llm) as found:
        assert found.model == "large"
    with closing(app.get_llm("main")) as main:
        assert main.chat("x") == "I am large."
    with pytest.raises(NotFoundError, match="has no 'reader'"):
        app.get_llm("reader")


def test_nothing_is_made_after_a_stop_text() -> None:
    app, made = Application(title="Endless"), []

    @app.chat
    def answer(messages: list[Message]) -> Iterator[str]:
        for n in range(1000):
            made.append(n)
            yield f"{n} "

    body = {"model": "endless", "messages": [{"role": "user", "content": "x"}], "stop": "3", "stream": True}
    text = app.test_client().post("/v1/chat/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n") and '"2 "' in text and '"content":"3' not in text
    assert len(made) < 100  # some are made ahead


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = ATOMS | st.lists(ATOMS, max_size=2) | st.dictionaries(st.sampled_from(["type", "role", "x"]), ATOMS, max_size=2)
FUZZED = Application(title="Fuzzed")
FUZZED.chat(lambda messages, temperature=1.0, response_format=None: "x")
FUZZED_CLIENT = FUZZED.test_client()


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), JSON, max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), JSON, max_size=3), max_size=2),
)
def test_any_request_is_answered_in_openais_form(fields: dict[str, Any], messages: list[Any]) -> None:
    body = {"model": "fuzzed", "messages": messages or ASK["messages"], **fields}
    text = json.dumps(body).encode()
    answer = FUZZED_CLIENT.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
