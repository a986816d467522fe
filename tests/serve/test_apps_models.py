"""Applications that chat, over every API that answers conversations."""

import json
import sys
import time
from collections.abc import Iterator

import pytest
from access_world import REQUIRED
from app_world import World, events_of, package_of, running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")

ECHO = '''
import time
from collections.abc import Iterator
from llmasos import Application
from llmasos.apps import Message, Session
from llmasos.errors import InvalidInputError

app = Application(title="Echo")


@app.chat
def echo(messages: list[Message], session: Session, max_tokens: int = 99) -> Iterator[str]:
    """Repeat."""
    said = messages[-1]["content"]
    if "refuse" in said:
        raise InvalidInputError("I do not say that.", hint="Say something else.", param="messages")
    if "fail" in said:
        raise ValueError("secret")
    if "call" in said:
        yield {"content": "Wait.", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
        return
    for word in said.split()[:max_tokens]:
        yield word + " "
        if word == "late":
            raise ValueError("secret")
        if word == "slowly":
            time.sleep(0.2)


@app.route("/hello")
def hello() -> str:
    """Greet."""
    return "hello"
'''
MUTE = '''
from llmasos import Application

app = Application(title="Mute")


@app.route("/hello")
def hello() -> str:
    """Greet."""
    return "hello"
'''
WORDS = "one two three"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    with running(folder, REQUIRED) as found:
        boss = found.key("boss", scopes=["inference", "manage"])
        found.other = found.key("other", apps=["nothing"])
        found.install(package_of(folder, ECHO, name="echo"), **boss)
        found.install(package_of(folder, MUTE, name="mute"), **boss)
        found.boss = boss
        found.client.headers.update(found.key("ann"))
        yield found


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def anthropic(text: str, **more: object) -> dict[str, object]:
    return {"model": "app/echo", "max_tokens": 50, "messages": turn(text), **more}


def test_anthropic_whole_and_streamed(world: World) -> None:
    whole = world.client.post("/v1/messages", json=anthropic(WORDS)).json()
    assert whole["content"] == [{"type": "text", "text": WORDS + " "}]
    assert (whole["model"], whole["stop_reason"]) == ("app/echo", "end_turn")
    assert whole["usage"]["input_tokens"] > 0 and whole["usage"]["output_tokens"] > 0
    events = events_of(world.client.post("/v1/messages", json=anthropic(WORDS, stream=True)).text)
    kinds = [one["type"] for one in events if one["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    texts = [one["delta"]["text"] for one in events if one["type"] == "content_block_delta"]
    assert texts == ["one ", "two ", "three "], "as it comes"
    assert events[-2]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    cut = world.client.post("/v1/messages", json=anthropic(WORDS, max_tokens=1)).json()
    assert cut["content"][0]["text"] == "one "


def test_anthropic_is_told_which_sequence_ended_it(world: World) -> None:
    asked = anthropic(WORDS, stop_sequences=["four", "two"])
    whole = world.client.post("/v1/messages", json=asked).json()
    assert whole["content"][0]["text"] == "one "
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "two")
    events = events_of(world.client.post("/v1/messages", json=asked | {"stream": True}).text)
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "two"}


def test_anthropic_errors_are_the_applications_own(world: World) -> None:
    for stream in (False, True):
        refused = world.client.post("/v1/messages", json=anthropic("refuse", stream=stream))
        assert refused.status_code == 400
        assert refused.json()["error"] == {
            "type": "invalid_request_error",
            "message": "I do not say that. Say something else.",
            "details": {"error_code": "invalid_input", "param": "messages"},
        }
        failed = world.client.post("/v1/messages", json=anthropic("fail", stream=stream))
        assert failed.status_code == 500 and "secret" not in failed.text
    late = world.client.post("/v1/messages", json=anthropic("one late", stream=True))
    assert late.status_code == 200 and late.text.count("event: error") == 1 and "secret" not in late.text
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    refused = world.client.post("/v1/messages", json=anthropic("one", tools=tools))
    assert refused.status_code == 400 and "'tools'" in refused.json()["error"]["message"]


def test_calls_of_tools_are_those_of_each_api(world: World) -> None:
    for stream in (False, True):
        answer = world.client.post("/v1/messages", json=anthropic("call", stream=stream))
        if not stream:
            text, call = answer.json()["content"]
            assert (text["text"], call["name"], call["input"]) == ("Wait.", "f", {"a": 1})
            assert answer.json()["stop_reason"] == "tool_use"
        else:
            assert '"partial_json":"{\\"a\\": 1}"' in answer.text.replace(": ", ":").replace('":1', '": 1')
    body = {"model": "app/echo", "messages": turn("call"), "stream": False}
    [called] = world.client.post("/api/chat", json=body).json()["message"]["tool_calls"]
    assert called["function"]["arguments"] == {"a": 1}
    output = world.client.post("/v1/responses", json={"model": "app/echo", "input": "call"}).json()["output"]
    assert [one["type"] for one in output] == ["message", "function_call"]
    assert json.loads(output[1]["arguments"]) == {"a": 1}


def test_ollama_whole_and_streamed(world: World) -> None:
    for name in ("app/echo", "app/echo:latest"):
        body = {"model": name, "messages": turn(WORDS)}
        whole = world.client.post("/api/chat", json=body | {"stream": False}).json()
        assert whole["message"]["content"] == WORDS + " " and whole["done"] and whole["model"] == name
        lines = [json.loads(line) for line in world.client.post("/api/chat", json=body).text.splitlines()]
        assert [one["message"]["content"] for one in lines] == ["one ", "two ", "three ", ""]
        assert lines[-1]["done_reason"] == "stop" and lines[-1]["eval_count"] > 0
    body = {"model": "app/echo", "messages": turn("refuse"), "stream": False}
    assert world.client.post("/api/chat", json=body).status_code == 400
    generated = world.client.post("/api/generate", json={"model": "app/echo", "prompt": WORDS, "stream": False}).json()
    assert generated["response"] == WORDS + " "
    raw = world.client.post("/api/generate", json={"model": "app/echo", "prompt": "x", "raw": True, "stream": False})
    assert raw.status_code == 400 and "answers conversations" in raw.text
    cut = {"model": "app/echo", "messages": turn(WORDS), "stream": False, "options": {"num_predict": 2}}
    assert world.client.post("/api/chat", json=cut).json()["message"]["content"] == "one two "


def test_responses_whole_streamed_and_in_the_background(world: World) -> None:
    whole = world.client.post("/v1/responses", json={"model": "app/echo", "input": WORDS}).json()
    assert whole["output"][0]["content"][0]["text"] == WORDS + " " and whole["status"] == "completed"
    assert whole["usage"]["input_tokens"] > 0
    again = {"model": "app/echo", "input": "four", "previous_response_id": whole["id"]}
    assert world.client.post("/v1/responses", json=again).json()["output"][0]["content"][0]["text"] == "four "
    events = events_of(world.client.post("/v1/responses", json={**again, "input": WORDS, "stream": True}).text)
    deltas = [one["delta"] for one in events if one["type"] == "response.output_text.delta"]
    assert deltas == ["one ", "two ", "three "] and events[-1]["type"] == "response.completed"
    for stream in (False, True):
        refused = world.client.post("/v1/responses", json={"model": "app/echo", "input": "refuse", "stream": stream})
        assert refused.status_code == 400 and refused.json()["error"]["message"].startswith("I do not say that.")
    begun = world.client.post("/v1/responses", json={"model": "app/echo", "input": WORDS, "background": True}).json()
    assert begun["status"] == "queued"
    for _ in range(200):
        found = world.client.get(f"/v1/responses/{begun['id']}").json()
        if found["status"] not in ("queued", "in_progress"):
            break
        time.sleep(0.02)
    assert found["output"][0]["content"][0]["text"] == WORDS + " "


ASKS = [
    ("/v1/chat/completions", {"messages": turn("x")}),
    ("/v1/messages", {"max_tokens": 5, "messages": turn("x")}),
    ("/api/chat", {"messages": turn("x")}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/responses", {"input": "x", "background": True}),
]


@pytest.mark.parametrize(("path", "body"), ASKS)
def test_only_those_that_chat_and_only_for_who_may(world: World, path: str, body: dict[str, object]) -> None:
    def ask(model: str, **headers: str) -> tuple[int, str]:
        answer = world.client.post(path, json={"model": model, **body}, headers=headers)
        return answer.status_code, answer.text

    status, text = ask("app/none")
    background = body.get("background")
    assert background or (status == 404 and "not installed" in text), text
    status, text = ask("app/mute")
    assert background or (status == 404 and "does not chat" in text), text
    status, text = ask("app/echo", **world.other)
    assert status == 403 and "may not use the application" in text
    assert ask("app/../x")[0] in (400, 403, 404) or background


def test_they_are_listed_with_the_models_of_each_api(world: World) -> None:
    def names(path: str, **headers: str) -> list[str]:
        found = world.client.get(path, headers=headers).json()
        return [one.get("id") or one["name"] for one in found.get("data") or found["models"]]

    for path, headers in (("/v1/models", {}), ("/v1/models", {"anthropic-version": "2023-06-01"}), ("/api/tags", {})):
        assert names(path, **headers)[-1] in ("app/echo", "app/echo:latest"), path
        assert not [one for one in names(path, **headers, **world.other) if one.startswith("app/")]
    shown = world.client.post("/api/show", json={"model": "app/echo"}).json()
    assert shown["capabilities"] == ["completion"]
    headers = {"anthropic-version": "2023-06-01"}
    assert world.client.get("/v1/models/app/echo", headers=headers).json()["display_name"] == "app/echo"
    assert world.client.get("/v1/models/app/none", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"messages": turn("x")}),
        ("/v1/responses/input_tokens", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/api/embed", {"input": "x"}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/llmasos/v1/tasks/keywords", {"text": "x"}),
        ("/llmasos/v1/agents/runs", {"input": "x"}),
    ],
)
def test_what_an_application_does_not_do_is_refused_by_name(world: World, path: str, body: dict[str, object]) -> None:
    answer = world.client.post(path, json={"model": "app/echo", **body})
    assert answer.status_code == 400 and "answers conversations" in answer.text, answer.text


def test_who_leaves_ends_the_applications_stream(world: World) -> None:
    body = anthropic(" ".join(["slowly"] * 100), stream=True)
    with world.client.stream("POST", "/v1/messages", json=body) as answer:
        next(answer.iter_lines())
    for _ in range(200):
        use = world.client.get("/llmasos/v1/apps/echo", headers=world.boss).json()["use"]
        if use["running_calls"] == 0:
            break
        time.sleep(0.02)
    assert use["running_calls"] == 0


def test_one_that_was_installed_beside_the_server_is_a_model_at_once(world: World) -> None:
    from llmasos.serve.apps.trial import install_checked
    from llmasos.store.packages import Apps

    def ask(name: str) -> str:
        body = {"model": f"app/{name}", "max_tokens": 9, "messages": turn(WORDS)}
        answer = world.client.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["content"][0]["text"]
        return text

    apps = Apps(world.home)
    tried, untried = (str(package_of(world.folder, ECHO, name=name)) for name in ("tried", "untried"))
    install_checked(apps, lambda apps: apps.install(tried, accept=True))
    names = [one["id"] for one in world.client.get("/v1/models").json()["data"]]
    assert "app/tried" in names and ask("tried") == WORDS + " "
    apps.install(untried, accept=True)
    assert ask("untried") == WORDS + " ", "it is started to learn whether it chats"
