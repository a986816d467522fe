"""Agents over HTTP, through the clients: runs, approval, functions of the client, streams, keys kept apart."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM, live_server

from llmasos.apps.agent import traces
from llmasos.client import AsyncClient, Client
from llmasos.errors import BadRequestError, NotFoundError, ProviderError
from llmasos.serve.storage import Storage
from llmasos.store.database import Database


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def llm() -> FakeLLM:
    return FakeLLM(context_length=100_000)


@pytest.fixture(scope="module")
def url(llm: FakeLLM) -> Iterator[str]:
    with live_server(llm, database=Database.open("sqlite://")) as found:
        yield found


@pytest.fixture
def client(url: str, llm: FakeLLM) -> Iterator[Client]:
    with Client(url, max_retries=0) as found:
        yield found
    llm.answers.clear()


def weather(city: str) -> dict[str, object]:
    """Tell the temperature."""
    return {"city": city, "degrees": 18}


def test_a_function_of_the_client_is_run_by_the_client(client: Client, llm: FakeLLM) -> None:
    llm.answers += [call("weather", city="Bern"), "18 degrees."]
    run = client.agents.run("How warm?", model="fake", tools=[weather])
    assert (run.state, run.text, run.num_answers) == ("done", "18 degrees.", 2)
    assert run.messages[-2]["content"] == '{"city":"Bern","degrees":18}'
    assert client.agents.get(run.id) == run
    assert client.agents.runs()[0].id == run.id and client.agents.runs()[0].input == "How warm?"
    client.agents.delete(run.id)
    with pytest.raises(NotFoundError):
        client.agents.get(run.id)


def test_a_run_that_waits_is_gone_on_with_once(client: Client, llm: FakeLLM) -> None:
    llm.answers += [call("weather", city="Bern"), "I don't know."]
    definition = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    run = client.agents.run("How warm?", model="fake", tools=[definition])
    assert run.state == "requires_action" and run.waiting()[0].name == "weather"
    id = run.pending[0]
    for wrong in ({}, {id: True}, {id: {"result": "1"}, "other": True}):
        with pytest.raises(BadRequestError):
            client.agents.go_on(run, wrong)
    assert client.agents.get(run.id).state == "requires_action"
    events = list(client.agents.stream_on(run, {id: {"result": "no idea", "is_error": True}}))
    assert events[-1].run is not None and events[-1].run.text == "I don't know."
    with pytest.raises(ProviderError) as refused:
        client.agents.go_on(run, {id: {"result": "18"}})
    assert refused.value.status == 409 or isinstance(refused.value, BadRequestError)


def test_events_come_as_they_happen(client: Client, llm: FakeLLM) -> None:
    llm.answers += [call("keywords", text="Tea and jam.", num=1), '{"keywords": ["Tea"]}', "Tea."]
    events = list(client.agents.stream("What is it about?", model="fake", tools=["task:keywords"]))
    kinds = [event.type for event in events]
    assert kinds[0] == "run.started" and kinds[-1] == "run.done"
    assert "".join(event.text or "" for event in events if event.type == "answer.delta").endswith("Tea.")
    done = next(event.call for event in events if event.type == "call.done")
    assert done is not None and not done.is_error and json.loads(done.result or "") == {"keywords": ["Tea"]}


async def test_the_asynchronous_client_does_the_same(url: str, llm: FakeLLM) -> None:
    async def aweather(city: str) -> str:
        """Tell the temperature."""
        return f"18 in {city}"

    llm.answers += [call("aweather", city="Rom"), "18."]
    async with AsyncClient(url) as client:
        run = await client.agents.run("How warm?", model="fake", tools=[aweather])
        assert (run.state, run.messages[-2]["content"]) == ("done", "18 in Rom")
        llm.answers += ["Hello."]
        kinds = [event.type async for event in client.agents.stream("Hi", model="fake")]
        assert kinds[-1] == "run.done"
        assert "task:summarise" in [one.source for one in await client.agents.tools()]


def test_a_conversation_is_gone_on_with_listed_and_found(client: Client, llm: FakeLLM) -> None:
    id = client.conversations.create(metadata={"title": "Tea"}).id
    llm.answers += ["Boil the water."]
    client.agents.run("How do I make black tea?", model="fake", conversation=id)
    llm.answers += ["70 degrees."]
    client.agents.run("And green tea?", model="fake", conversation=id)
    assert "Boil the water." in llm.prompts[-1]
    [found] = client.agents.conversations("boil water")
    assert (found.id, found.title, found.num_messages) == (id, "Tea", 4) and "Boil" in found.snippet
    assert client.agents.conversations()[0].id == id
    assert client.agents.conversations("coffee") == []
    client.conversations.delete(id)
    assert client.agents.conversations("boil water") == []


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"tools": ["shell"]}, 400, "There is no tool 'shell'"),
        ({"tools": ["knowledge:nothing"]}, 404, "There is no knowledge base 'nothing'"),
        ({"tools": ["mcp:nothing"]}, 404, "There is no MCP server 'nothing'"),
        ({"tools": ["task:summarise", "task:summarise"]}, 400, "Two tools have the same name"),
        ({"model": "other"}, 404, "'other' is not served"),
        ({"conversation": "conv_none"}, 404, "There is no conversation"),
        ({"input": []}, 400, "input"),
        ({"limits": {"steps": 0}}, 400, "steps"),
        ({"limits": {"stepz": 1}}, 400, "stepz"),
        ({"output": {"type": "nonsense"}}, 400, "form of the output"),
    ],
)
def test_what_is_wrong_is_named(url: str, fields: dict[str, Any], status: int, words: str) -> None:
    body = {"model": "fake", "input": "Hi", **fields}
    answer = httpx.post(f"{url.removesuffix('/v1')}/llmasos/v1/agents/runs", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.text


def test_a_limit_is_a_state_and_not_an_error(client: Client, llm: FakeLLM) -> None:
    llm.answers += [call("task", x=1)] * 2
    run = client.agents.run("Hi", model="fake", tools=["task:keywords"], limits={"steps": 2})
    assert run.state == "stopped" and run.stop is not None and run.stop.reason == "steps"


def test_a_run_that_waits_can_be_cancelled(client: Client, llm: FakeLLM) -> None:
    llm.answers += [call("weather", city="Bern")]
    definition = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    run = client.agents.run("How warm?", model="fake", tools=[definition])
    assert client.agents.cancel(run.id).state == "cancelled"
    with pytest.raises(ProviderError):
        client.agents.cancel(run.id)


def test_runs_of_a_server_that_has_ended_are_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    llm = FakeLLM(context_length=100_000, answers=[call("weather", city="Bern")] * 4)
    definition = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with Database.open(f"sqlite:///{tmp_path}/db.sqlite") as database:
        storage = Storage(database)
        with live_server(llm, database=database) as url, Client(url, max_retries=0) as client:
            ids = [client.agents.run("How warm?", model="fake", tools=[definition]).id for _ in range(4)]
            workers = [(storage.place, "gone"), (storage.place, storage.server), ("another", "gone"), ()]
            with database.session() as session:
                for id, worker in zip(ids, workers, strict=True):
                    traces.take(session, id, None, lambda _: None, worker=worker)
        with live_server(llm, database=database) as url, Client(url, max_retries=0) as client:
            for _ in range(500):
                runs = [client.agents.get(id) for id in ids]
                if runs[0].state != "running":
                    break
                time.sleep(0.01)
            assert [run.state for run in runs] == ["failed", "running", "running", "failed"]
            assert {one.id: one.state for one in client.agents.runs()} == {run.id: run.state for run in runs}
            error = runs[0].error
            assert error is not None and error.code == "server_ended" and not runs[0].pending
            assert not hasattr(runs[1], "worker")
        asyncio.run(storage.close())
