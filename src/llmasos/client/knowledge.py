"""Knowledge bases as `client.knowledge`: documents in, passages and answers out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

from llmasos.client.http import AsyncHttp, Http, Request, Target, path_of
from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.sse import Event
from llmasos.client.types.knowledge import (
    KnowledgeAnswer,
    KnowledgeAnswerEvent,
    KnowledgeDocument,
    KnowledgeDocumentList,
    KnowledgeInfo,
    KnowledgeList,
    KnowledgePassage,
    KnowledgePassageList,
)
from llmasos.errors import NetworkError, ProviderError


def _put(name: str, path: str, content: bytes | Path) -> Request:
    where = f"{path_of('knowledge', name, 'documents')}/{path_of(*path.split('/'))[1:]}"
    if isinstance(content, Path):
        return Request("PUT", where, file=content)
    return Request("PUT", where, data=content)


def _document(name: str, path: str) -> str:
    return f"{path_of('knowledge', name, 'documents')}/{path_of(*path.split('/'))[1:]}"


def _asked(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**{name: value for name, value in fields.items() if value is not None}, **more}


def _event(event: Event, target: Target) -> KnowledgeAnswerEvent:
    data = event_json(event, target.label)
    if event.event == "error" or (isinstance(data, dict) and "error" in data):
        raise ProviderError(f"{target.label}: {data['error'].get('message', event.data)}")
    return parsed(KnowledgeAnswerEvent, data, target.label)


def _whole(last: KnowledgeAnswerEvent | None, target: Target) -> None:
    if last is None or last.type != "done":
        raise NetworkError(f"{target.label} ended the stream before the answer was complete.", hint="Try again.")


class Knowledge:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self) -> list[KnowledgeInfo]:
        data = self._http.json("GET", path_of("knowledge"))
        return parsed(KnowledgeList, data, self._http.target.label).data

    def create(self, name: str, *, model: str | None = None) -> KnowledgeInfo:
        """A new base. `model`: the served one that makes its vectors."""
        data = self._http.json("POST", path_of("knowledge"), _asked({"name": name, "model": model}))
        return parsed(KnowledgeInfo, data, self._http.target.label)

    def get(self, name: str) -> KnowledgeInfo:
        return parsed(KnowledgeInfo, self._http.json("GET", path_of("knowledge", name)), self._http.target.label)

    def delete(self, name: str) -> None:
        """With all documents."""
        self._http.json("DELETE", path_of("knowledge", name))

    def documents(self, name: str) -> Sequence[KnowledgeDocument]:
        data = self._http.json("GET", path_of("knowledge", name, "documents"))
        return parsed(KnowledgeDocumentList, data, self._http.target.label).data

    def add(self, name: str, path: str, content: bytes | Path) -> KnowledgeDocument:
        """Add or replace the document `path`: bytes, or a file."""
        return parsed(KnowledgeDocument, self._http.send(_put(name, path, content)), self._http.target.label)

    def remove(self, name: str, path: str) -> None:
        self._http.json("DELETE", _document(name, path))

    def search(self, name: str, query: str, **fields: Any) -> Sequence[KnowledgePassage]:
        """The best passages first. `fields`: `k`, `mode`, `rerank`."""
        data = self._http.json("POST", path_of("knowledge", name, "search"), _asked(fields, query=query))
        return parsed(KnowledgePassageList, data, self._http.target.label).data

    def ask(self, name: str, question: str, *, model: str, **fields: Any) -> KnowledgeAnswer:
        """The answer and the passages that it rests on. `fields`: `k`, `mode`, `rerank`, `max_tokens`."""
        body = _asked(fields, question=question, model=model)
        data = self._http.json("POST", path_of("knowledge", name, "ask"), body)
        return parsed(KnowledgeAnswer, data, self._http.target.label)

    def stream_ask(
        self, name: str, question: str, *, model: str, **fields: Any
    ) -> Generator[KnowledgeAnswerEvent, None, None]:
        """The same in pieces: the passages, the text as it comes, the whole."""
        body = _asked(fields, question=question, model=model, stream=True)
        last: KnowledgeAnswerEvent | None = None
        with closing(self._http.events("POST", path_of("knowledge", name, "ask"), body)) as events:
            for event in events:
                last = _event(event, self._http.target)
                yield last
        _whole(last, self._http.target)


class AsyncKnowledge:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self) -> list[KnowledgeInfo]:
        data = await self._http.json("GET", path_of("knowledge"))
        return parsed(KnowledgeList, data, self._http.target.label).data

    async def create(self, name: str, *, model: str | None = None) -> KnowledgeInfo:
        data = await self._http.json("POST", path_of("knowledge"), _asked({"name": name, "model": model}))
        return parsed(KnowledgeInfo, data, self._http.target.label)

    async def get(self, name: str) -> KnowledgeInfo:
        return parsed(KnowledgeInfo, await self._http.json("GET", path_of("knowledge", name)), self._http.target.label)

    async def delete(self, name: str) -> None:
        await self._http.json("DELETE", path_of("knowledge", name))

    async def documents(self, name: str) -> Sequence[KnowledgeDocument]:
        data = await self._http.json("GET", path_of("knowledge", name, "documents"))
        return parsed(KnowledgeDocumentList, data, self._http.target.label).data

    async def add(self, name: str, path: str, content: bytes | Path) -> KnowledgeDocument:
        return parsed(KnowledgeDocument, await self._http.send(_put(name, path, content)), self._http.target.label)

    async def remove(self, name: str, path: str) -> None:
        await self._http.json("DELETE", _document(name, path))

    async def search(self, name: str, query: str, **fields: Any) -> Sequence[KnowledgePassage]:
        data = await self._http.json("POST", path_of("knowledge", name, "search"), _asked(fields, query=query))
        return parsed(KnowledgePassageList, data, self._http.target.label).data

    async def ask(self, name: str, question: str, *, model: str, **fields: Any) -> KnowledgeAnswer:
        body = _asked(fields, question=question, model=model)
        data = await self._http.json("POST", path_of("knowledge", name, "ask"), body)
        return parsed(KnowledgeAnswer, data, self._http.target.label)

    async def stream_ask(
        self, name: str, question: str, *, model: str, **fields: Any
    ) -> AsyncGenerator[KnowledgeAnswerEvent, None]:
        body = _asked(fields, question=question, model=model, stream=True)
        last: KnowledgeAnswerEvent | None = None
        async with aclosing(self._http.events("POST", path_of("knowledge", name, "ask"), body)) as events:
            async for event in events:
                last = _event(event, self._http.target)
                yield last
        _whole(last, self._http.target)
