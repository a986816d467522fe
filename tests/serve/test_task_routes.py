"""Tasks over HTTP: on the models of the server, with its keys and limits."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from access_world import REQUIRED, bearer, client_of, make_key
from fake_llm import FakeLLM, ObedientLLM, asgi_client

from llmasos import tasks
from llmasos.serve.access.access import Access
from llmasos.serve.server import create_app
from llmasos.store.database import Database

ROOT = "/llmasos/v1/tasks"
TEXT = "The quick brown fox jumps over the lazy dog."


async def post(llm: Any, name: str, **body: Any) -> httpx.Response:
    async with asgi_client(llm) as client:
        return await client.post(f"{ROOT}/{name}", json={"model": llm.name, **body})


async def test_the_list_has_every_task_with_its_schemas() -> None:
    async with asgi_client(FakeLLM()) as client:
        found = (await client.get(ROOT)).json()["data"]
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert found == [one.describe() for one in tasks.BUILT_IN.values()]
    names = {*tasks.BUILT_IN, "batch", "pipeline"}
    assert {path for path in paths if path.startswith(f"{ROOT}/")} == {f"{ROOT}/{name}" for name in names}


async def test_a_task_gives_the_same_as_in_python(tiny_llm: Any) -> None:
    for name, inputs in {
        "translate": {"text": "Fox.", "to": "French"},
        "classify": {"text": "A fox.", "labels": ["fox", "dog"]},
        "chat": {"message": "Hi", "max_tokens": 8},
        "embed": {"texts": ["fox", "dog"]},
        "rerank": {"query": "fox", "texts": ["dog", "fox"]},
    }.items():
        answer = await post(tiny_llm, name, **inputs)
        assert answer.status_code == 200, answer.text
        ours = tasks.TASKS[name](model=tiny_llm, **inputs).model_dump(mode="json")
        assert close(answer.json(), ours)


def close(a: Any, b: Any) -> bool:
    """Equal but for the last digits: batches are computed in another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return bool(a == pytest.approx(b, rel=1e-3, abs=1e-5)) if isinstance(a, float) else bool(a == b)


async def test_a_long_text_is_several_questions_of_one_request() -> None:
    llm = ObedientLLM(context_length=600)
    answer = await post(llm, "summarise", text="One sentence more. " * 100, words=20)
    assert answer.status_code == 200 and answer.json()["num_parts"] > 2
    assert len(llm.prompts) > answer.json()["num_parts"] and llm.num_running == 0


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("summarise", {"words": 20}, 400, "text"),
        ("summarise", {"text": "x", "wods": 20}, 400, "wods"),
        ("summarise", {"text": "x", "model": "none"}, 404, "none"),
        ("dance", {"text": "x"}, 404, ""),
        ("extract", {"text": "x", "into": []}, 400, "into"),
        ("extract", {"text": "x", "into": {"type": "nonsense"}}, 400, ""),
        ("classify", {"text": "x", "labels": ["a"]}, 400, "two labels"),
        ("chat", {"message": "\ud800"}, 400, ""),
    ],
)
async def test_wrong_requests_say_what_is_wrong(
    tiny_llm: Any, name: str, body: dict[str, Any], status: int, words: str
) -> None:
    async with asgi_client(tiny_llm) as client:
        content = json.dumps({"model": "tiny", **body})
        answer = await client.post(f"{ROOT}/{name}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and words in answer.text, answer.text


async def test_a_key_needs_the_scope_and_the_model() -> None:
    with Database.open("sqlite://") as database:
        good, manager = make_key(database), make_key(database, "bob", ("manage",))
        other = make_key(database, "eve", models=["other"])
        app = create_app({"fake": ObedientLLM(), "other": ObedientLLM("other")}, access=Access(database, REQUIRED))
        body = {"model": "fake", "text": TEXT}
        async with client_of(app) as client:
            codes = [
                (await client.post(f"{ROOT}/summarise", json=body, headers=bearer(key) if key else {})).status_code
                for key in ("", manager, other, good)
            ]
            assert (await client.get(ROOT, headers=bearer(manager))).status_code == 200
    assert codes == [401, 403, 403, 200]


async def test_code_is_run_in_the_sandbox_and_mended() -> None:
    wrong = json.dumps({"code": "import socket\nsocket.create_connection(('127.0.0.1', 1))"})
    llm = FakeLLM(answers=[wrong, json.dumps({"code": "def add(a, b): return a + b\nprint(add(1, 2))"})])
    answer = await post(llm, "write_code", instruction="add", tests="assert add(2, 2) == 4", max_tokens=200)
    found = answer.json()
    check = found["check"]
    assert (check["ok"], check["tries"], check["stdout"]) == (True, 2, "3\n"), answer.text
    assert found["code"].startswith("def add")
