"""Knowledge bases over HTTP: made, filled, searched with the served encoder, deleted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from fake_llm import FakeLLM

from llmasos.apps.knowledge import KnowledgeBase
from llmasos.serve.server import create_app

ROOT = "/llmasos/v1/knowledge"


class Letters(FakeLLM):
    """Its vectors count letters."""

    async def aembed(self, texts, **options):
        await super().aembed(texts, **options)
        return [[float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


@contextlib.asynccontextmanager
async def serving(llm: FakeLLM) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(llm))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


async def test_a_base_is_made_filled_searched_and_deleted(home: Path) -> None:
    async with serving(Letters()) as client:
        made = await client.post(ROOT, json={"name": "notes", "model": "fake"})
        assert made.status_code == 201 and made.json()["documents"] == 0
        url = f"{ROOT}/notes/documents"
        tea = await client.put(f"{url}/drinks/tea.md", content=b"# Tea\n\nBoil the water.")
        assert tea.json()["state"] == "added" and tea.json()["title"] == "Tea"
        assert (await client.put(f"{url}/jazz.txt", content=b"Jazz and blues.")).json()["chunks"] == 1
        again = await client.put(f"{url}/drinks/tea.md", content=b"# Tea\n\nBoil the water.")
        assert again.json()["state"] == "unchanged"
        for mode in ("vector", "text", "hybrid"):
            answer = await client.post(f"{ROOT}/notes/search", json={"query": "boil water tea", "k": 1, "mode": mode})
            [found] = answer.json()["data"]
            assert (found["path"], found["citation"]) == ("drinks/tea.md", "drinks/tea.md, Tea"), mode
        assert [one["path"] for one in (await client.get(url)).json()["data"]] == ["drinks/tea.md", "jazz.txt"]
        [base] = (await client.get(ROOT)).json()["data"]
        assert base == (await client.get(f"{ROOT}/notes")).json() and base["dimensions"] == 26
        assert KnowledgeBase.open("notes").model == "fake"
        assert (await client.delete(f"{url}/jazz.txt")).status_code == 204
        assert (await client.delete(f"{url}/jazz.txt")).status_code == 404
        assert (await client.delete(f"{ROOT}/notes")).status_code == 204
        assert (await client.get(ROOT)).json()["data"] == []


async def test_wrong_requests_are_told_what_is_wrong(home: Path) -> None:
    async with serving(Letters()) as client:
        await client.post(ROOT, json={"name": "notes", "model": "fake"})
        cases = [
            (await client.post(ROOT, json={"name": "notes", "model": "fake"}), 409, "already"),
            (await client.post(ROOT, json={"name": "../x", "model": "fake"}), 400, "name of a knowledge base"),
            (await client.post(ROOT, json={"name": "x"}), 404, "all-minilm-l6-v2"),
            (await client.get(f"{ROOT}/none"), 404, "no knowledge base"),
            (await client.put(f"{ROOT}/notes/documents/a.exe", content=b"x"), 400, "no kind"),
            (await client.put(f"{ROOT}/notes/documents/a.txt", content=b"\0\xff"), 422, "UTF-8"),
            (await client.post(f"{ROOT}/notes/search", json={"query": " "}), 400, "empty"),
            (await client.post(f"{ROOT}/notes/search", json={"query": "x", "k": 0}), 400, "k"),
        ]
        for answer, status, word in cases:
            assert answer.status_code == status and word in answer.text, answer.text
        assert not (home / "x").exists()


async def test_a_client_that_leaves_adds_nothing(home: Path) -> None:
    llm = Letters(delay=0.01)
    async with serving(llm) as client:
        await client.post(ROOT, json={"name": "notes", "model": "fake"})
        text = "\n\n".join(f"Paragraph {i} of a long, long text that goes on and on." * 3 for i in range(150))
        sending = asyncio.ensure_future(client.put(f"{ROOT}/notes/documents/long.txt", content=text.encode()))
        while not llm.prompts:
            await asyncio.sleep(0.001)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert (await client.get(f"{ROOT}/notes")).json()["documents"] == 0
