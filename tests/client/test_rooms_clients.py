"""`client.tasks`, `jobs` and `knowledge` of both clients. Packages: tests/serve/test_hosted_index.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from both_clients import KINDS, got, items
from fake_llm import FakeLLM, live_server

from llmasos.errors import BadRequestError, ProviderError, ProviderNotFoundError

SAID = json.dumps({"answer": "Boil it.", "passages": [1]})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("LLMASOS_API_KEY", raising=False)
        answering = FakeLLM("answering", answers=[SAID] * 8)
        with live_server({"fake": FakeLLM(), "slow": FakeLLM("slow", delay=0.02), "answering": answering}) as found:
            yield found


@contextlib.asynccontextmanager
async def opened(kind: str, url: str) -> Any:
    client = KINDS[kind](url, max_retries=0)
    try:
        yield client
    finally:
        await got(client.close())


@pytest.mark.parametrize("kind", KINDS)
async def test_tasks_and_their_jobs(kind: str, url: str) -> None:
    async with opened(kind, url) as client:
        assert "summarise" in [one.name for one in await got(client.tasks.list())]
        assert (await got(client.tasks.run("chat", model="fake", message="Hi")))["text"] == "Hi!"
        job = await got(client.tasks.batch("chat", model="fake", lines=["a", "b"], parallel=1))
        seen = await items(client.jobs.follow(job.id))
        assert seen[-1].state == "done" and seen[-1].result["done"] == 2
        assert (await got(client.jobs.wait(job.id))).result == seen[-1].result
        steps = [{"id": "a", "task": "chat", "inputs": {"message": "${inputs.x}"}}]
        run = await got(client.tasks.pipeline({"steps": steps}, {"x": "Ho"}, model="fake"))
        assert (await got(client.jobs.wait(run.id))).result["output"]["text"] == "Ho!"
        slow = await got(client.tasks.batch("chat", model="slow", lines=["a"] * 50))
        assert (await got(client.jobs.pause(slow.id))).state == "paused"
        assert (await got(client.jobs.resume(slow.id))).can_pause
        assert (await got(client.jobs.cancel(slow.id))).state == "cancelled"
        assert (await got(client.jobs.get(slow.id))).state == "cancelled"
        listed = [one.id for one in await got(client.jobs.list(kind="task_batch"))]
        assert listed[:2] == [slow.id, job.id] and run.id not in listed
        failing = await got(client.tasks.pipeline({"steps": [{**steps[0], "inputs": {"message": ""}}]}, model="fake"))
        with pytest.raises(ProviderError, match="Step a: chat: message is empty"):
            await got(client.jobs.wait(failing.id))
        with pytest.raises(ProviderNotFoundError):
            await got(client.jobs.get("none"))
        with pytest.raises(BadRequestError):
            await got(client.tasks.batch("chat", model="fake"))


@pytest.mark.parametrize("kind", KINDS)
async def test_knowledge(kind: str, url: str, tmp_path: Path) -> None:
    (tmp_path / "jam.txt").write_text("Jam needs fruit.")
    async with opened(kind, url) as client:
        room = client.knowledge
        assert (await got(room.create(kind, model="fake"))).documents == 0
        assert (await got(room.add(kind, "drinks/tea & more.md", b"# Tea\n\nBoil the water."))).state == "added"
        assert (await got(room.add(kind, "jam.txt", tmp_path / "jam.txt"))).title == "jam"
        assert [one.path for one in await got(room.documents(kind))] == ["drinks/tea & more.md", "jam.txt"]
        assert (await got(room.search(kind, "boil water", k=1, mode="text")))[0].path == "drinks/tea & more.md"
        answer = await got(room.ask(kind, "boil water", model="answering", mode="text"))
        assert (answer.answer, answer.citations) == ("Boil it.", [1])
        events = await items(room.stream_ask(kind, "boil water", model="answering", mode="text"))
        assert [events[0].type, events[-1].type, events[-1].answer] == ["passages", "done", answer]
        assert "".join(one.text for one in events if one.type == "delta") == "Boil it."
        assert await got(room.remove(kind, "jam.txt")) is None
        assert (await got(room.get(kind))).documents == 1 and kind in [one.name for one in await got(room.list())]
        await got(room.delete(kind))
        with pytest.raises(ProviderNotFoundError):
            await got(room.get(kind))
