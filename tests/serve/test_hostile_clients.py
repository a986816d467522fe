"""Bodies and names that are made to hold the server, to read its disk or to write into its answers."""

import asyncio
import json
from pathlib import Path

import pytest
from access_world import bearer, guarded, make_key
from fake_llm import FakeLLM, asgi_client
from pydantic import ValidationError

from llmasos.client.types import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from llmasos.client.types.base import MOST_FIELDS
from llmasos.errors import ContextOverflowError, InvalidInputError
from llmasos.serve import prepare
from llmasos.serve.native import worker
from llmasos.serve.native.library import PLANS_AT_ONCE
from llmasos.store.database import Database

DEEP = b"[" * 10_000 + b"]" * 10_000
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("field", ["prompt", "messages", "input"])
def test_a_long_list_ends_at_its_first_wrong_entry(field: str) -> None:
    kind = {"prompt": CompletionRequest, "messages": ChatCompletionRequest, "input": EmbeddingRequest}[field]
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "fake", field: [1.5] * 5000})
    assert caught.value.error_count() <= 4  # one per form that the field may have


def test_an_entry_s_own_lists_end_at_their_first_wrong_entry_too() -> None:
    parts = [{"type": "text", "text": 1}] * 5000
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "a", "messages": [{"role": "user", "content": parts}] * 50})
    assert caught.value.error_count() <= 4


@pytest.mark.parametrize("where", [None, "logit_bias", "metadata"])
async def test_an_object_of_very_many_fields_is_refused_as_a_whole(where: str | None) -> None:
    many = {f"x{i}": "wrong" for i in range(MOST_FIELDS + 1)}
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]} | ({where: many} if where else many)
    async with asgi_client(FakeLLM()) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert f"at most {MOST_FIELDS}" in answer.json()["error"]["message"]


def test_a_prompt_that_is_far_too_long_is_refused_by_its_beginning() -> None:
    llm = FakeLLM(context_length=100)
    seen: list[int] = []
    encode = llm.tokenizer.encode
    llm.tokenizer.encode = lambda text, **options: seen.append(len(text)) or encode(text, **options)
    body = CompletionRequest(model="fake", prompt="a" * 1_000_000)
    with pytest.raises(ContextOverflowError, match="more than 1599 tokens"):
        prepare.completion_prompts(llm, body)
    assert seen == [1600]
    assert len(prepare.encode_prompt(llm, "a" * 101, "prompt")) == 101  # counted to its end: the error has the number


def test_far_too_many_token_ids_are_not_looked_at_one_by_one() -> None:
    with pytest.raises(ContextOverflowError, match="has 2000 tokens"):
        prepare.completion_prompts(FakeLLM(), CompletionRequest(model="fake", prompt=[-1] * 2000))


async def test_json_that_breaks_parsers_is_a_clients_error() -> None:
    deep = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    async with asgi_client(FakeLLM()) as client:
        for path in ("/v1/completions", "/v1/messages", "/api/chat", "/v1/responses", "/llmasos/v1/plan"):
            for body in (DEEP, deep, b'{"n": ' + b"9" * 5000 + b"}", b'{"model": "\xff"}', b"\x00"):
                answer = await client.post(path, content=body, headers=JSON)
                assert (answer.status_code, bool(answer.json()["error"])) == (400, True), (path, body[:20])


async def test_no_client_makes_the_server_read_its_disk() -> None:
    async with asgi_client(FakeLLM()) as client:
        for path in ("/llmasos/v1/pulls", "/llmasos/v1/plan", "/api/pull"):
            for model in ("file:/etc/passwd", "/etc/passwd", "../..", "file:///etc", "hf:../../x", "pypi:../x"):
                assert (await client.post(path, json={"model": model})).status_code == 400, (path, model)


async def test_only_a_key_that_manages_makes_the_server_fetch_an_address() -> None:
    with Database.open("sqlite://") as database:
        access, client = guarded(database)
        key = make_key(database)
        async with client:
            for path in ("/llmasos/v1/pulls", "/llmasos/v1/plan", "/api/pull"):
                body = {"model": "http://169.254.169.254/model.gguf"}
                assert (await client.post(path, json=body, headers=bearer(key))).status_code == 403
        await access.close()


async def test_nothing_a_client_sends_becomes_a_header(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="llmasos")
    broken = "a\r\nset-cookie: b=c"
    async with asgi_client(FakeLLM()) as client:
        for answer in (
            await client.get("/v1/models/a%0d%0aset-cookie:%20b=c"),
            await client.post("/v1/completions", json={"model": broken, "prompt": "a"}),
            await client.get("/v1/files/a%0d%0aset-cookie:%20b=c/content"),
            await client.get("/healthz", headers={"x-request-id": "a\tset-cookie: b=c"}),
        ):
            assert "set-cookie" not in answer.headers
            assert not any("\r" in value or "\n" in value for value in answer.headers.values())
            assert "b=c" not in answer.headers["x-request-id"]
    lines = [record.getMessage() for record in caplog.records if record.name == "llmasos.access"]
    assert len(lines) == 4 and not any("\r" in line or "\n" in line for line in lines)


async def test_plans_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0

    async def run(task: str, options: dict) -> dict:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        raise InvalidInputError("No.")

    monkeypatch.setattr(worker, "run", run)
    async with asgi_client(FakeLLM()) as client:
        asked = [client.post("/llmasos/v1/plan", json={"model": "hf:a/b"}) for _ in range(6)]
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {400}
    assert most == PLANS_AT_ONCE


def test_every_operation_documents_its_errors_in_its_own_words() -> None:
    from llmasos.serve.server import create_app

    paths = create_app(FakeLLM()).openapi()["paths"]
    found = {path: json.dumps(o["responses"]["default"]) for path, all_ in paths.items() for o in all_.values()}
    assert "/AnthropicErrorBody" in found["/v1/messages"]
    assert "/OllamaErrorBody" in found["/api/chat"]
    assert "/ErrorBody" in found["/v1/batches"]


async def test_references_to_items_are_counted_as_what_they_stand_for(home: Path) -> None:
    async with asgi_client(FakeLLM()) as client:
        made = (await client.post("/v1/responses", json={"model": "fake", "input": "hi"})).json()
        body = {"model": "fake", "input": [{"role": "user", "content": "a"}, {"id": made["output"][0]["id"]}]}
        counted = await client.post("/v1/responses/input_tokens", json=body)
        plain = await client.post("/v1/responses/input_tokens", json=body | {"input": body["input"][:1]})
        assert counted.json()["input_tokens"] > plain.json()["input_tokens"]
        wrong = await client.post("/v1/responses/input_tokens", json=body | {"input": [{"id": "nothing"}]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input.0.id")
