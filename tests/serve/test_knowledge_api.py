"""Knowledge bases over HTTP: made, filled, searched with the served encoder, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import json
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


async def filled(client: httpx.AsyncClient) -> None:
    await client.post(ROOT, json={"name": "notes", "model": "fake"})
    for name, text in {"tea.md": b"# Tea\n\nBoil the water.", "jazz.txt": b"Jazz and blues."}.items():
        await client.put(f"{ROOT}/notes/documents/{name}", content=text)


async def test_a_question_is_answered_with_citations_whole_and_in_pieces(home: Path) -> None:
    said = json.dumps({"answer": 'Boil it: "well" ✓.', "passages": [1, 1, 2]})
    llm = Letters(answers=[said, said])
    llm.scores_pairs = True
    async with serving(llm) as client:
        await filled(client)
        body = {"question": "boil water tea", "model": "fake", "k": 2}
        answer = (await client.post(f"{ROOT}/notes/ask", json=body)).json()
        assert (answer["answer"], answer["citations"]) == ('Boil it: "well" ✓.', [1, 2])
        assert [one["citation"] for one in answer["passages"]] == ["tea.md, Tea", "jazz.txt"]
        streamed = await client.post(f"{ROOT}/notes/ask", json={**body, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert events[0] == {"type": "passages", "passages": answer["passages"]}
        assert events[-1] == {"type": "done", "answer": answer}
        deltas = [event["text"] for event in events[1:-1]]
        assert "".join(deltas) == answer["answer"] and len(deltas) > 5


async def test_a_cross_encoder_decides_the_order_where_one_is_named(home: Path) -> None:
    llm = Letters(answers=[json.dumps({"answer": "No.", "passages": []})])
    llm.scores_pairs = True  # by letters in common
    async with serving(llm) as client:
        await filled(client)
        body = {"query": "blues jazz and", "k": 2, "mode": "text"}
        plain = (await client.post(f"{ROOT}/notes/search", json=body)).json()["data"]
        ranked = (await client.post(f"{ROOT}/notes/search", json={**body, "rerank": "fake"})).json()["data"]
        assert plain and ranked and ranked[0]["path"] == "jazz.txt" and ranked[0]["score"] > 0.9 > plain[0]["score"]
        ask = {"question": "jazz", "model": "fake", "rerank": "fake"}
        answer = await client.post(f"{ROOT}/notes/ask", json=ask)
        assert answer.json()["citations"] == [] and answer.json()["passages"][0]["path"] == "jazz.txt"


async def test_questions_that_cannot_be_answered_say_why(home: Path) -> None:
    cut = json.dumps({"answer": "much", "passages": []})[:10]
    async with serving(Letters(answers=[cut, cut])) as client:
        await client.post(ROOT, json={"name": "empty", "model": "fake"})
        await filled(client)
        body = {"question": "tea", "model": "fake"}
        for stream in (False, True):
            for name, more, status, words in (
                ("empty", {"mode": "text"}, 404, "holds nothing"),
                ("none", {}, 404, "no knowledge base"),
                ("notes", {"model": "none"}, 404, "not served"),
                ("notes", {"rerank": "none"}, 404, "not served"),
                ("notes", {"question": ""}, 400, "question"),
            ):
                answer = await client.post(f"{ROOT}/{name}/ask", json={**body, "stream": stream, **more})
                assert answer.status_code == status and words in answer.text, answer.text
        whole = await client.post(f"{ROOT}/notes/ask", json=body)
        assert whole.status_code == 500 and "form that was asked for" in whole.text
        pieces = await client.post(f"{ROOT}/notes/ask", json={**body, "stream": True})
        assert pieces.status_code == 200 and "form that was asked for" in pieces.text.splitlines()[-2]


async def test_an_answer_that_max_tokens_cut_says_so(home: Path) -> None:
    said = json.dumps({"answer": "Boil it well.", "passages": [1]})
    async with serving(Letters(answers=[said] * 3)) as client:
        await filled(client)
        body = {"question": "boil water tea", "model": "fake", "max_tokens": 17}
        whole = await client.post(f"{ROOT}/notes/ask", json=body)
        assert whole.status_code == 200, whole.text
        told = whole.json()
        assert (told["answer"], told["citations"], told["finish_reason"]) == ("Boil", [], "length")
        streamed = await client.post(f"{ROOT}/notes/ask", json={**body, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert events[-1]["answer"] == whole.json()
        few = await client.post(f"{ROOT}/notes/ask", json={**body, "max_tokens": 3})
        assert few.status_code == 400 and few.json()["error"]["param"] == "max_tokens"
