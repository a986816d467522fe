"""`llmasos.client`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from common import MODEL
from official.world import CALLED, EMBEDDER, PLAIN, QUESTION, SIMILAR, Server, example, feature, is_nearer, weather


@contextlib.contextmanager
def own_client(server: Server) -> Iterator[Any]:
    from llmasos.client import Client

    with Client(server.v1, timeout=300) as client:
        yield client


@feature("llmasos", "chat and stream")
def _(server: Server) -> None:
    from llmasos.errors import ProviderError

    with own_client(server) as client:
        client.chat(QUESTION, model=MODEL, **PLAIN)
        whole = client.chat(QUESTION, model=MODEL, **PLAIN).choices[0].message.content
        chunks = list(client.stream_chat(QUESTION, model=MODEL, **PLAIN))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole and len(chunks) > 4
        try:
            client.chat(QUESTION, model="none")
        except ProviderError as e:
            assert MODEL in str(e), e
        else:
            raise AssertionError("a model that is not there answered")


@feature("llmasos", "tools loop")
def _(server: Server) -> None:
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """Weather of a city"""
        asked.append(city)
        return weather(city)

    with own_client(server) as client:
        run = client.run_tools(example(), model=MODEL, tools=[get_weather], **CALLED)
    assert asked == ["Paris"], (asked, run)
    assert "18 degrees" in run.text, run.text


@feature("llmasos", "embeddings")
def _(server: Server) -> None:
    with own_client(server) as client:
        assert is_nearer([one.embedding for one in client.embed(SIMILAR, model=EMBEDDER).data])


@feature("llmasos", "files and batch")
def _(server: Server) -> None:
    body = {"model": EMBEDDER, "input": "A cat."}
    lines = [{"custom_id": f"e{i}", "method": "POST", "url": "/v1/embeddings", "body": body} for i in range(3)]
    with own_client(server) as client:
        file = client.files.upload("\n".join(map(json.dumps, lines)).encode())
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings")
        batch = client.batches.wait(made.id, interval=0.25)
        assert batch.status == "completed", batch
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).splitlines()]
        assert sorted(one["custom_id"] for one in answers) == ["e0", "e1", "e2"]
        assert all(len(one["response"]["body"]["data"][0]["embedding"]) == 384 for one in answers)
        for id in (file.id, batch.output_file_id):
            assert client.files.delete(id).deleted
