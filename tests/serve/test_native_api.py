"""The server's own API over HTTP: models, pins, plans, requests, logs, the machine, what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fake_llm import FakeLLM, asgi_client, live_server
from fastapi.openapi.models import OpenAPI

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.native import AsyncNative, Native, native_target
from llmasos.client.types.native import ModelStatus, RequestInfo
from llmasos.errors import BadRequestError, ProviderNotFoundError, StoreError
from llmasos.serve.native import worker
from llmasos.serve.server import create_app
from llmasos.store.database import Database

ROOT = "/llmasos/v1"


@contextlib.contextmanager
def native(url: str) -> Iterator[Native]:
    http = Http(native_target(Target(url, "LLMasOS", max_retries=0)))
    yield Native(http)
    http.close()


@contextlib.asynccontextmanager
async def running(llm: FakeLLM, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The application with its lifespan."""
    app = create_app(llm, **options)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield client


def install(model: Path, home: Path, name: str) -> None:
    shutil.copytree(model, home / "models" / name)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# models


def test_models_of_the_disk_are_listed_shown_and_removed(tiny_model: Path, home: Path) -> None:
    install(tiny_model, home, "mine")
    (home / "models" / "broken").mkdir()
    with live_server(FakeLLM()) as url, native(url) as client:
        found = {one.name: one for one in client.models()}
        assert found["mine"].format == "safetensors" and found["mine"].size > 1000 and found["mine"].state == "absent"
        assert found["broken"].error
        assert client.model("mine") == found["mine"]
        with pytest.raises(ProviderNotFoundError, match="nothing"):
            client.model("nothing")
        removed = client.remove("mine")
        assert removed.name == "mine" and removed.freed_bytes > 1000
        assert [one.name for one in client.models()] == ["broken"]


def test_a_name_can_not_leave_the_library(home: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with live_server(FakeLLM()) as url:
        base = url.removesuffix("/v1")
        for name in ("..", "..%2Foutside", "%2e%2e%2Foutside", ".", "a%2Fb", "con", "..%5Coutside", "%00"):
            answer = httpx.delete(f"{base}{ROOT}/models/{name}")
            assert answer.status_code in (400, 404, 405), name
    assert (tmp_path / "outside").is_dir()


def test_the_catalogue_is_searched_and_knows_what_is_here(tiny_model: Path, home: Path) -> None:
    install(tiny_model, home, "gpt2")
    with live_server(FakeLLM()) as url, native(url) as client:
        found = {one.name: one for one in client.catalog("gpt2")}
        assert found["gpt2"].installed and found["gpt2"].upstream == "openai-community/gpt2"
        assert not found["gpt2-medium"].installed
        assert len(client.catalog()) > len(found)


async def test_models_of_a_program_are_ready_and_stay() -> None:
    async with asgi_client({"a": FakeLLM("a"), "b": FakeLLM("b")}) as client:
        listed = (await client.get(f"{ROOT}/status")).json()["data"]
        assert [(one["name"], one["state"], one["pinned"]) for one in listed] == [
            ("a", "ready", True),
            ("b", "ready", True),
        ]
        loaded = await client.post(f"{ROOT}/load", json={"model": "a"})
        assert ModelStatus.model_validate(loaded.json()).context_length == 1000
        for path, body in (("unload", {"model": "a"}), ("pin", {"model": "a", "pinned": False})):
            refused = await client.post(f"{ROOT}/{path}", json=body)
            assert refused.status_code == 400 and "belongs to the program" in refused.json()["error"]["message"]
        for path in ("load", "unload", "pin"):
            assert (await client.post(f"{ROOT}/{path}", json={"model": "c"})).status_code == 404


async def test_wrong_bodies_are_answered_with_the_field() -> None:
    cases = [
        ("load", {}, "model"),
        ("load", {"model": "a", "colour": 1}, "colour"),
        ("load", {"model": 1}, "model"),
        ("unload", {"model": "a", "force": "yes"}, "force"),
        ("plan", {"model": "a", "context": 0}, "context"),
        ("plan", {"model": "a", "concurrency": 0}, "concurrency"),
        ("pulls", {"model": ""}, "model"),
        ("pulls", {"model": "gpt2", "name": "../x"}, "name"),
        ("pulls", {"model": "/etc"}, "model"),
        ("plan", {"model": "/etc"}, None),
        ("uploads", {"name": "../x"}, "name"),
        ("uploads", {"name": ".hidden"}, "name"),
    ]
    async with asgi_client(FakeLLM()) as client:
        for path, body, param in cases:
            answer = await client.post(f"{ROOT}/{path}", json=body)
            assert answer.status_code in (400, 404), (path, body, answer.text)
            if param is not None and answer.status_code == 400:
                assert answer.json()["error"]["param"] == param, (path, body, answer.text)
        for query in ("limit=-1", "limit=many", "level=loud"):
            answer = await client.get(f"{ROOT}/logs?{query}")
            assert answer.status_code == 400 and answer.json()["error"]["param"] == query.partition("=")[0]


# what runs in a process of its own


def test_a_plan_is_made_without_loading_torch_here(tiny_model: Path, home: Path) -> None:
    install(tiny_model, home, "mine")
    with live_server(FakeLLM()) as url, native(url) as client:
        plan = client.plan("mine", context=64, concurrency=2)
        assert plan.fits and plan.installed and (plan.context, plan.concurrency) == (64, 2)
        assert plan.memory_bytes == plan.weights_bytes + plan.kv_cache_bytes + plan.activation_bytes
        assert {file.path for file in plan.files} >= {"config.json", "model.safetensors"}
        with pytest.raises(BadRequestError, match="99999"):
            client.plan("mine", context=99999)
        with pytest.raises(BadRequestError, match="path of the server's machine"):
            client.plan(str(tiny_model))


async def test_an_error_of_a_worker_keeps_its_type_and_one_that_dies_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.errors import NotFoundError, ServerError

    with pytest.raises(NotFoundError, match="no model 'nothing-like-it'"):
        await worker.run("plan", {"model": "nothing-like-it"})
    with pytest.raises(ServerError, match="KeyError"):
        await worker.run("no such task", {})


async def test_a_worker_that_is_cancelled_is_no_more(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    before = {child.pid for child in psutil.Process().children()}
    task = asyncio.create_task(worker.run("machine", {}))
    await until(lambda: {child.pid for child in psutil.Process().children()} - before)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_a_worker_is_gone_though_it_is_cancelled_again_and_takes_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does that stops: its requests first, then all that is left."""
    psutil = pytest.importorskip("psutil")
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('{\"progress\": {}}', flush=True)\ntime.sleep(600)\n"
    )
    stub.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(stub))
    before = {child.pid for child in psutil.Process().children()}
    ready = asyncio.Event()
    task = asyncio.create_task(worker.run("plan", {}, lambda _: ready.set()))
    await ready.wait()
    [pid] = {child.pid for child in psutil.Process().children()} - before
    assert os.getsid(pid) == pid  # Ctrl-C in a terminal reaches the server only
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(pid)


def test_the_machine_is_described(home: Path) -> None:
    home.mkdir()
    with live_server(FakeLLM()) as url, native(url) as client:
        system = client.system()
        assert system.devices[0].name == "cpu" and (system.devices[0].memory_free or 0) > 0
        assert system.home == str(home) and system.uptime_seconds >= 0 and system.memory_rss > 10**6


# requests


def _begun(request: RequestInfo, num_tokens: int) -> bool:
    return request.state == "running" and request.num_output_tokens >= num_tokens


async def test_requests_in_flight_are_listed_and_can_be_cancelled() -> None:
    llm = FakeLLM(delay=0.01)
    body = {"model": "fake", "prompt": "x" * 400, "max_tokens": 400}
    with live_server(llm) as url:
        http = AsyncHttp(native_target(Target(url, "LLMasOS", max_retries=0)))
        client = AsyncNative(http)
        async with httpx.AsyncClient(timeout=30) as openai:
            for stream in (False, True):
                asking = asyncio.create_task(
                    openai.post(f"{url}/completions", json=body | {"stream": stream}, headers={"x-request-id": "one"})
                )
                while not (listed := await client.requests()) or not _begun(listed[0], 3 if stream else 0):
                    await asyncio.sleep(0.01)
                [request] = listed
                assert (request.id, request.model, request.route) == ("one", "fake", "POST /v1/completions")
                assert request.num_prompt_tokens == 400 and request.age_seconds > 0 and request.state == "running"
                assert (await client.cancel_request("one")).cancelled
                answer = await asking
                assert answer.status_code == (200 if stream else 499)
                assert "request_cancelled" in answer.text and "[DONE]" not in answer.text
                await until(lambda: llm.num_running == 0)
                assert await client.requests() == []
            with pytest.raises(ProviderNotFoundError, match="'one'"):
                await client.cancel_request("one")
            assert (await openai.post(f"{url}/completions", json=body | {"prompt": "hi"})).status_code == 200
        await http.close()
    assert llm.num_tokens < 500


# logs


@pytest.fixture
def heard() -> Iterator[None]:
    """The package's loggers at `info`, as `llmasos serve` sets them."""
    logger = logging.getLogger("llmasos")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


async def test_a_request_leaves_one_line_with_its_facts_and_never_its_body(heard: None) -> None:
    async with running(FakeLLM()) as client:
        body = {"model": "fake", "prompt": "the secret prompt", "max_tokens": 5}
        headers = {"authorization": "Bearer the-secret-key", "x-request-id": "mine"}
        await client.post("/v1/completions", json=body, headers=headers)
        await client.get("/v1/nothing/the-path?the-secret-query=1")
        await client.get("/healthz")
        lines = (await client.get(f"{ROOT}/logs")).json()["data"]
        [line] = [line for line in lines if line["request_id"] == "mine"]
        facts = line["fields"]
        assert (facts["route"], facts["status"], facts["model"]) == ("POST /v1/completions", 200, "fake")
        assert (facts["prompt_tokens"], facts["output_tokens"], facts["finish_reasons"]) == (17, 5, ["length"])
        assert facts["seconds"] > 0 and line["level"] == "info"
        assert any(line["fields"].get("status") == 404 for line in lines)
        assert not any(line["fields"].get("route") == "GET /healthz" for line in lines)
        assert "secret" not in json.dumps(lines)
        one = (await client.get(f"{ROOT}/logs?request_id=mine")).json()["data"]
        assert one == [line]
        assert len((await client.get(f"{ROOT}/logs?limit=1")).json()["data"]) == 1
        assert (await client.get(f"{ROOT}/logs?level=error")).json()["data"] == []


async def test_a_failure_is_in_the_log_under_its_request(heard: None) -> None:
    async with running(FakeLLM()) as client:
        await client.post("/v1/completions", json={"model": "fake", "prompt": "boom"}, headers={"x-request-id": "bad"})
        [error, access] = (await client.get(f"{ROOT}/logs?request_id=bad")).json()["data"]
        assert error["level"] == "error" and "the secret cause" in error["fields"]["exception"]
        assert access["fields"]["status"] == 500


async def test_logs_can_be_followed(heard: None) -> None:
    with live_server(FakeLLM()) as url:
        http = AsyncHttp(native_target(Target(url, "LLMasOS", max_retries=0)))
        client, log = AsyncNative(http), logging.getLogger("llmasos.test")
        await client.requests()  # it is up
        log.info("the past")
        lines = client.logs(follow=True, level="info", limit=5)
        while (await anext(lines)).message != "the past":
            pass
        log.debug("nobody hears this")
        log.warning("what comes", extra={"fields": {"n": 1}})
        line = await anext(lines)
        while line.message != "what comes":
            line = await anext(lines)
        assert (line.level, line.fields) == ("warning", {"n": 1})
        await lines.aclose()
        await http.close()


# what it says of itself


async def test_it_is_ready_unless_it_stops() -> None:
    app = create_app(FakeLLM())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        async with app.router.lifespan_context(app):
            assert (await client.get("/readyz")).json() == {"status": "ready", "reasons": {}}
        stopping = await client.get("/readyz")
        assert stopping.status_code == 503 and stopping.json()["reasons"] == {"server": "stopping"}
        assert (await client.get("/healthz")).status_code == 200


async def test_it_is_not_ready_without_its_database() -> None:
    with Database.open() as database:
        app = create_app(FakeLLM(), database=database)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            assert (await client.get("/readyz")).status_code == 200

            @contextlib.contextmanager
            def broken(**_: object) -> Iterator[None]:
                raise StoreError("The database is away.")
                yield

            database.session = broken  # type: ignore[method-assign,assignment]
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert answer.json() == {"status": "not ready", "reasons": {"database": "The database is away."}}


async def test_it_says_where_everything_is() -> None:
    async with asgi_client(FakeLLM()) as client:
        found = (await client.get("/.well-known/llmasos.json")).json()
        for path in (found["openapi"], found["health"], found["ready"], found["metrics"], found["guide"]):
            assert (await client.get(path)).status_code == 200, path
        guide = (await client.get("/llms.txt")).text
        assert guide.startswith("# LLMasOS") and "http://127.0.0.1/v1" in guide


async def test_the_openapi_document_is_valid_and_every_body_has_a_type() -> None:
    async with asgi_client(FakeLLM()) as client:
        document = (await client.get("/openapi.json")).json()
    OpenAPI.model_validate(document)
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for reference in _references(schema):
            assert reference.removeprefix("#/components/schemas/") in schemas, (name, reference)
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation.get("summary") and operation.get("tags"), where
            assert "HTTPValidationError" not in json.dumps(operation), where
            good = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
            assert good, where
            for answer in good:
                typed = [media.get("schema") for media in answer.get("content", {}).values()]
                assert all(schema != {} for schema in typed) or not path.startswith(("/v1", "/llmasos")), where
            for reference in _references(operation):
                assert reference.removeprefix("#/components/schemas/") in schemas, (where, reference)
    assert {"ChatCompletionChunk", "LogLine", "PullJob", "ModelStatus"} <= schemas.keys()


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(found := schema.get("$ref"), str):
            yield found
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
