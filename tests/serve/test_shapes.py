"""Errors come in the shape of the wire format that the request speaks."""

import contextlib
from pathlib import Path

import anthropic
import ollama
import pytest
from access_world import make_key
from fake_llm import FakeLLM, asgi_client, live_server

from llmasos.errors import InvalidInputError
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.problems import error_response
from llmasos.serve.shapes import ANTHROPIC, OLLAMA, OPENAI, Problem, shape_of
from llmasos.store.database import Database

VERSION = [(b"anthropic-version", b"2023-06-01")]


def scope(path, headers=()):
    return {"type": "http", "path": path, "headers": list(headers), "state": {"request_id": "req_1"}}


@pytest.mark.parametrize(
    ("path", "headers", "shape"),
    [
        ("/v1/messages", [], ANTHROPIC),
        ("/v1/messages/count_tokens", [], ANTHROPIC),
        ("/v1/messages2", [], OPENAI),
        ("/v1/models", [], OPENAI),
        ("/v1/models", VERSION, ANTHROPIC),
        ("/v1/models/a/b", VERSION, ANTHROPIC),
        ("/v1/chat/completions", VERSION, OPENAI),
        ("/api/chat", [], OLLAMA),
        ("/apis", [], OPENAI),
        ("/", [], OPENAI),
    ],
)
def test_the_path_tells_the_shape_and_for_models_a_header(path, headers, shape) -> None:
    assert shape_of(scope(path, headers)) is shape


async def test_documented_errors_have_the_shape_of_their_path() -> None:
    async with asgi_client(FakeLLM()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    for path, statuses in (
        ("/v1/completions", {"400", "404", "413", "500", "503"}),
        ("/v1/responses", {"400", "404", "413", "500", "503"}),
        ("/v1/messages", {"400", "404", "413", "500", "529"}),
        ("/api/chat", {"400", "404", "413", "500", "503"}),
    ):
        assert statuses <= set(paths[path]["post"]["responses"])
    for path, operations in paths.items():
        own = f"#/components/schemas/{shape_of(scope(path)).model.__name__}"
        for operation in operations.values():
            for status, described in operation["responses"].items():
                if status != "default" and int(status) >= 400 and path != "/readyz":
                    assert described["content"]["application/json"]["schema"] == {"$ref": own}, path


@pytest.mark.parametrize(
    ("status", "sent", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (401, 401, "authentication_error"),
        (403, 403, "permission_error"),
        (404, 404, "not_found_error"),
        (413, 413, "request_too_large"),
        (418, 418, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (500, 500, "api_error"),
        (503, 529, "overloaded_error"),
    ],
)
def test_anthropics_errors_have_its_types(status: int, sent: int, kind: str) -> None:
    response = error_response(scope("/v1/messages"), status, "No.", code="why", headers={"retry-after": "3"})
    assert response.status_code == sent and response.headers["retry-after"] == "3"
    body = ANTHROPIC.body(Problem(status, "No.", "field", "why", "req_1")).model_dump(exclude_unset=True)
    error = {"type": kind, "message": "No.", "details": {"error_code": "why", "param": "field"}}
    assert body == {"type": "error", "error": error, "request_id": "req_1"}


async def test_what_the_gate_refuses_is_said_in_the_requests_own_words() -> None:
    async with asgi_client(FakeLLM(), loopback_only=True, max_body_bytes=10) as client:
        foreign = {"host": "evil.example"}
        answer = await client.get("/v1/messages", headers=foreign)
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
        assert answer.json()["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
        answer = await client.get("/api/tags", headers=foreign)
        assert answer.status_code == 403 and "evil.example" in answer.json()["error"]
        answer = await client.get("/v1/chat/completions", headers=foreign)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "request-id" not in answer.headers


class Unenforceable(FakeLLM):
    async def astream_complete(self, prompt, params, **request):
        assert params.structured is not None
        raise InvalidInputError("grammar='ours' can't be enforced: no such type\n   1 | ours.", param="structured")
        yield


HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "objekt"}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
TOOL = {"name": "f", "strict": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (
            "/v1/chat/completions",
            {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format",
        ),
        ("/v1/chat/completions", {"messages": HI, "structured_outputs": {"json": SCHEMA}}, "structured_outputs"),
        ("/v1/chat/completions", {"messages": HI, "tools": [{"type": "function", "function": TOOL}]}, "tools"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": SCHEMA}}, "structured_outputs"),
        (
            "/v1/messages",
            {"messages": HI, "max_tokens": 5, "output_config": {"format": FORMAT}},
            "output_config.format",
        ),
        ("/api/chat", {"messages": HI, "format": SCHEMA}, "format"),
        ("/api/generate", {"prompt": "a", "format": SCHEMA, "raw": True}, "format"),
    ],
)
async def test_a_form_that_can_not_be_enforced_is_named_as_it_was_asked_for(path, fields, param, stream) -> None:
    async with asgi_client(Unenforceable()) as client:
        answer = await client.post(path, json={"model": "fake", "stream": stream, **fields})
    assert answer.status_code == 400
    body = answer.json()
    found = body["error"] if isinstance(body["error"], dict) else {"message": body["error"], **body}
    assert found["message"] == "The form of the output can't be enforced: no such type."
    assert found.get("details", found)["param"] == param


def test_keys_that_are_missing_weak_or_spent_are_the_official_clients_usual_exceptions(tmp_path: Path) -> None:
    hi = [{"role": "user", "content": "hi"}]
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Database.open(f"sqlite:///{tmp_path / 'keys.db'}"))
        one, many = make_key(database, requests_per_minute=1), make_key(database, "bob", models=["fake"])
        access = Access(database, Policy(require_key=True, exposed=True))
        url = stack.enter_context(live_server(FakeLLM(), access=access))
        base = url.removesuffix("/v1")

        def ask(key):
            with anthropic.Anthropic(base_url=base, api_key=key, max_retries=0) as client:
                return client.messages.create(model="fake", messages=hi, max_tokens=5)

        with pytest.raises(anthropic.AuthenticationError) as missing:
            ask("none")
        assert missing.value.type == "authentication_error" and missing.value.error_code == "invalid_api_key"
        assert ask(one).content[0].text == "hi!"
        with pytest.raises(anthropic.RateLimitError) as spent:
            ask(one)
        assert spent.value.type == "rate_limit_error" and int(spent.value.response.headers["retry-after"]) > 0
        with ollama.Client(base) as client, pytest.raises(ollama.ResponseError) as missing:
            client.chat("fake", hi)
        assert missing.value.status_code == 401
        with ollama.Client(base, headers={"authorization": f"Bearer {many}"}) as client:
            assert client.chat("fake:latest", hi).message.content == "hi!"
            for refused in (lambda: client.delete("fake"), lambda: client.pull("smollm2-135m-instruct")):
                with pytest.raises(ollama.ResponseError, match="manage") as weak:
                    refused()
                assert weak.value.status_code == 403
