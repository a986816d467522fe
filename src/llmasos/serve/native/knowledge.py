"""Knowledge bases over HTTP: made, filled with uploads and deleted by those who run the server, searched by all who may
ask its models.

They are those of `llmasos kb`, in the home. Vectors are made by a served model, so by the process that it has; reading
and searching is done in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response

from llmasos.apps.knowledge import KnowledgeBase, Passage, Stats, delete, names
from llmasos.apps.knowledge.answer import answer_from, answer_so_far
from llmasos.apps.knowledge.base import folder_named
from llmasos.apps.knowledge.index import Index
from llmasos.client.types.knowledge import (
    KnowledgeAnswer,
    KnowledgeAnswerEvent,
    KnowledgeAskRequest,
    KnowledgeDocument,
    KnowledgeDocumentList,
    KnowledgeInfo,
    KnowledgeList,
    KnowledgePassage,
    KnowledgePassageList,
    KnowledgeRequest,
    KnowledgeSearchRequest,
)
from llmasos.errors import BusyError
from llmasos.serve import render
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.models import Models, Served
from llmasos.serve.native.common import responses
from llmasos.serve.respond import streamed, whole
from llmasos.serve.taskmodel import ServedTaskModel
from llmasos.tasks.model import Messages, Reply

T = TypeVar("T")
State = Literal["added", "replaced", "unchanged"]
ADDED_AT_ONCE = 2
"""Documents; others wait."""


class _Stopped(Exception):
    """The client has gone."""


class _Encoder:
    """A leased model, for a thread."""

    def __init__(self, name: str, served: Served, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.context_length = served.model.context_length
        self.tokenizer: Any = served.model.tokenizer
        self.is_stopped = False
        self._served, self._loop = served, loop

    def embed(self, texts: Sequence[str], /) -> list[list[float]]:
        if self.is_stopped:
            raise _Stopped
        return asyncio.run_coroutine_threadsafe(self._served.embed(list(texts)), self._loop).result()


class _Ranker:
    """A leased cross-encoder, for a thread."""

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop) -> None:
        self._served, self._loop = served, loop

    def score_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        return asyncio.run_coroutine_threadsafe(self._served.score_pairs(query, texts), self._loop).result()


class Knowledge:
    """The bases of the home, with what their searches keep in memory."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._indexes: dict[Path, Index] = {}
        self._turn = asyncio.Semaphore(ADDED_AT_ONCE)

    def all(self) -> list[Stats]:
        return [self.open(name).stats() for name in names()]

    def open(self, name: str) -> KnowledgeBase:
        """Raises NotFoundError."""
        base = KnowledgeBase.open(folder_named(name), create=False)
        base.index = self._indexes.setdefault(base.path, base.index)
        return base

    async def create(self, name: str, model: str, caller: Caller) -> Stats:
        """Raises BusyError for a name that is taken, and ModelNotFoundError."""
        await self._models.look(model)
        self._models.check(model, caller)

        def make() -> Stats:
            if name in names():
                raise BusyError(f"There is a knowledge base {name!r} already.", hint="Choose another name.")
            return KnowledgeBase.open(folder_named(name), model=model).stats()

        return await asyncio.to_thread(make)

    def remove(self, name: str) -> None:
        path = folder_named(name)
        delete(path)
        self._indexes.pop(path, None)

    async def with_model(self, name: str, caller: Caller, work: Callable[[KnowledgeBase], T]) -> T:
        """What `work` makes of the base in a thread, with its model at hand."""
        base = await asyncio.to_thread(self.open, name)
        async with self._models.lease(base.model, caller) as served:
            encoder = _Encoder(base.model, served, asyncio.get_running_loop())
            base.use(encoder)
            working = asyncio.ensure_future(asyncio.to_thread(work, base))
            try:
                return await asyncio.shield(working)
            except asyncio.CancelledError:
                # the thread may not outlive the lease
                encoder.is_stopped = True
                await asyncio.gather(working, return_exceptions=True)
                raise

    async def add(self, name: str, path: str, data: bytes, caller: Caller) -> KnowledgeDocument:
        def put(base: KnowledgeBase) -> KnowledgeDocument:
            changes = base.add_bytes(path, data)
            states: tuple[State, ...] = ("added", "replaced", "unchanged")
            [state] = [kind for kind in states if getattr(changes, kind)]
            [file] = [file for file in base.files() if file.path == path]
            return KnowledgeDocument(**asdict(file), state=state)

        async with self._turn:
            return await self.with_model(name, caller, put)

    async def search(
        self, name: str, body: KnowledgeSearchRequest | KnowledgeAskRequest, caller: Caller
    ) -> list[Passage]:
        query = body.question if isinstance(body, KnowledgeAskRequest) else body.query
        async with contextlib.AsyncExitStack() as stack:
            ranker: _Ranker | None = None
            if body.rerank is not None:
                served = await stack.enter_async_context(self._models.lease(body.rerank, caller))
                ranker = _Ranker(served, asyncio.get_running_loop())

            def find(base: KnowledgeBase) -> list[Passage]:
                return base.search(query, body.k, mode=body.mode, rerank=ranker)

            if body.mode == "text":
                return await asyncio.to_thread(lambda: find(self.open(name)))
            return await self.with_model(name, caller, find)

    async def ask(
        self, name: str, body: KnowledgeAskRequest, caller: Caller, tell: Callable[[KnowledgeAnswerEvent], object]
    ) -> KnowledgeAnswer:
        """`tell` hears of the passages and of the text as it comes, where it is to be streamed."""
        passages = await self.search(name, body, caller)
        async with self._models.lease(body.model, caller) as served:
            model = ServedTaskModel(served, body.model)

            async def ask(messages: Messages, schema: Mapping[str, Any], shown: Sequence[Passage]) -> Reply:
                text, said = "", None

                def come(piece: str) -> None:
                    nonlocal text, said
                    if said is None:
                        tell(KnowledgeAnswerEvent(type="passages", passages=[_passage(one) for one in shown]))
                        said = ""
                    text += piece
                    now = answer_so_far(text)
                    if len(now) > len(said) and now.startswith(said):
                        tell(KnowledgeAnswerEvent(type="delta", text=now[len(said) :]))
                        said = now

                on_text = come if body.stream else None
                return await model.ask(messages, schema, max_tokens=body.max_tokens, on_text=on_text)

            found = await answer_from(body.question, passages, name, ask, body.max_tokens)
        shown = [_passage(one) for one in found.passages]
        reason: Literal["stop", "length"] = "length" if found.is_cut else "stop"
        return KnowledgeAnswer(answer=found.text, citations=list(found.citations), passages=shown, finish_reason=reason)

    async def ask_in_pieces(self, name: str, body: KnowledgeAskRequest, caller: Caller) -> AsyncGenerator[str, None]:
        """Ready-made events."""
        queue: asyncio.Queue[KnowledgeAnswerEvent | None] = asyncio.Queue()
        asking = asyncio.create_task(self.ask(name, body, caller, queue.put_nowait))
        asking.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield render.event(event)
            yield render.event(KnowledgeAnswerEvent(type="done", answer=await asking))
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def create_router(knowledge: Knowledge) -> APIRouter:
    router = APIRouter(prefix="/knowledge")
    file = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @router.get("", summary="The knowledge bases")
    async def bases() -> KnowledgeList:
        return KnowledgeList(data=[_info(stats) for stats in await asyncio.to_thread(knowledge.all)])

    @router.post("", status_code=201, summary="Make a knowledge base", responses=responses(404, 409, 507))
    async def create(body: KnowledgeRequest, request: Request) -> KnowledgeInfo:
        return _info(await knowledge.create(body.name, body.model, caller_of(request)))

    @router.get("/{name}", summary="One of them", responses=responses(404))
    async def get(name: str) -> KnowledgeInfo:
        return _info(await asyncio.to_thread(lambda: knowledge.open(name).stats()))

    @router.delete("/{name}", status_code=204, summary="Delete it with all documents", responses=responses(404))
    async def remove(name: str) -> Response:
        await asyncio.to_thread(knowledge.remove, name)
        return Response(status_code=204)

    @router.get("/{name}/documents", summary="Its documents", responses=responses(404))
    async def documents(name: str) -> KnowledgeDocumentList:
        files = await asyncio.to_thread(lambda: knowledge.open(name).files())
        return KnowledgeDocumentList(data=[KnowledgeDocument(**asdict(one)) for one in files])

    @router.put(
        "/{name}/documents/{path:path}",
        summary="Add or replace a document",
        openapi_extra={"requestBody": {"required": True, **file}},
        responses=responses(404, 409, 413, 422, 503, 507),
    )
    async def put(name: str, path: str, request: Request) -> KnowledgeDocument:
        return await knowledge.add(name, path, await request.body(), caller_of(request))

    @router.delete(
        "/{name}/documents/{path:path}", status_code=204, summary="Remove a document", responses=responses(404)
    )
    async def drop(name: str, path: str) -> Response:
        await asyncio.to_thread(lambda: knowledge.open(name).remove_document(path))
        return Response(status_code=204)

    @router.post("/{name}/search", summary="Find passages", responses=responses(404, 503))
    async def search(name: str, body: KnowledgeSearchRequest, request: Request) -> KnowledgePassageList:
        found = await knowledge.search(name, body, caller_of(request))
        return KnowledgePassageList(data=[_passage(one) for one in found])

    @router.post(
        "/{name}/ask",
        summary="Answer a question, with the passages that the answer rests on",
        response_model=KnowledgeAnswer,
        responses=responses(403, 404, 503, stream="KnowledgeAnswerEvent objects, with `stream`"),
    )
    async def ask(name: str, body: KnowledgeAskRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, knowledge.ask_in_pieces(name, body, caller))
        return await whole(request, knowledge.ask(name, body, caller, lambda _: None))

    return router


def _passage(passage: Passage) -> KnowledgePassage:
    return KnowledgePassage(**_facts(passage), citation=passage.citation)


def _info(stats: Stats) -> KnowledgeInfo:
    facts = asdict(stats)
    return KnowledgeInfo(documents=facts.pop("files"), **facts)


def _facts(passage: Passage) -> dict[str, Any]:
    facts = asdict(passage)
    del facts["id"]
    return facts | {"headings": list(passage.headings)}
