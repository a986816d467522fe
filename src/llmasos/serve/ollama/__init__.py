"""Ollama's API: /api/chat, generate, embed, embeddings, tags, show, ps, pull, delete, version.

What a request asks for is done, refused by name, or named in the answer's `warnings`. Not here: images, Modelfiles
(create, copy, push, blobs), Ollama's own templates, and `context`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from llmasos import __version__
from llmasos.client.types.ollama import (
    OllamaChatRequest,
    OllamaChatResponse,
    OllamaDeleteRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbeddingsResponse,
    OllamaEmbedRequest,
    OllamaEmbedResponse,
    OllamaGenerateRequest,
    OllamaGenerateResponse,
    OllamaModelList,
    OllamaProgress,
    OllamaPullRequest,
    OllamaRunningList,
    OllamaShowRequest,
    OllamaShowResponse,
    OllamaVersion,
)
from llmasos.errors import LLMasOSError
from llmasos.serve import inflight, render
from llmasos.serve.caller import caller_of
from llmasos.serve.console import to_console, wants_page
from llmasos.serve.documented import ASKED, Responses, errors, refusals, stream
from llmasos.serve.models import Models
from llmasos.serve.native.pulls import Pulls
from llmasos.serve.native.residents import Residents
from llmasos.serve.ollama import answer, pulls, shelf
from llmasos.serve.ollama.body import AnyContentType
from llmasos.serve.ollama.names import served_name
from llmasos.serve.respond import streamed, whole
from llmasos.serve.shapes import OLLAMA
from llmasos.store.library import Library

OLLAMA_VERSION = "0.13.0"
"""The version of Ollama whose wire this is; clients compare it with the least that they need."""
_ASKED = errors(*ASKED, shape=OLLAMA)
_NAMED = errors(400, 404, shape=OLLAMA)


class NotImplementedHereError(LLMasOSError):
    """A route of Ollama's that this server does not have."""

    http_status = 501
    code = "not_implemented"


def _lines(kind: str) -> Responses:
    return stream(f"{kind} objects, one per line.", "application/x-ndjson")


def create_router(models: Models, residents: Residents, jobs: Pulls) -> APIRouter:
    """`residents` decides what is loaded; `jobs` are the server's pulls."""
    router = APIRouter(tags=["Ollama"], route_class=AnyContentType)

    @router.post(
        "/api/chat",
        summary="Answer a conversation",
        description=refusals(OllamaChatRequest),
        response_model=OllamaChatResponse,
        responses=_ASKED | _lines("OllamaChatResponse"),
    )
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        return await _answer(body, request)

    @router.post(
        "/api/generate",
        summary="Answer a prompt, or continue a text",
        description=refusals(OllamaGenerateRequest),
        response_model=OllamaGenerateResponse,
        responses=_ASKED | _lines("OllamaGenerateResponse"),
    )
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        return await _answer(body, request)

    async def _answer(body: OllamaChatRequest | OllamaGenerateRequest, request: Request) -> Response:
        lines = answer.lines(models, residents, caller_of(request), body)
        if body.stream is False:
            return await whole(request, answer.whole_answer(lines))
        return await _ndjson(request, lines)

    @router.post("/api/embed", summary="Embed texts", response_model=OllamaEmbedResponse, responses=_ASKED)
    async def embed(body: OllamaEmbedRequest, request: Request) -> Response:
        return await whole(request, answer.embed(models, residents, caller_of(request), body))

    @router.post(
        "/api/embeddings",
        summary="Embed a text (older form)",
        response_model=OllamaEmbeddingsResponse,
        responses=_ASKED,
    )
    async def embeddings(body: OllamaEmbeddingsRequest, request: Request) -> Response:
        return await whole(request, answer.embed_one(models, residents, caller_of(request), body))

    @router.get("/api/tags", summary="List the served models")
    async def tags(request: Request) -> OllamaModelList:
        caller = caller_of(request)
        await models.look()
        names = await models.names_for(caller)
        return OllamaModelList(models=await asyncio.to_thread(shelf.list_models, names, models.created))

    @router.get("/api/ps", summary="List the loaded models")
    async def ps(request: Request) -> OllamaRunningList:
        caller = caller_of(request)
        statuses = [status for status in residents.status() if caller.may_use(status.name)]
        return OllamaRunningList(models=await asyncio.to_thread(shelf.list_running, statuses))

    @router.post("/api/show", summary="Describe a model", responses=_NAMED)
    async def show(body: OllamaShowRequest, request: Request) -> OllamaShowResponse:
        caller = caller_of(request)
        name = await served_name(models, body.model, caller, facts=True)
        if models.is_app(name):
            async with models.lease(name, caller) as served:
                return shelf.show(name, served.model, shelf.Facts(), models.created)
        base, _ = models.check(name, caller)
        facts = await asyncio.to_thread(shelf.facts_of, base)
        return shelf.show(name, models[name].model, facts, models.created)

    @router.post(
        "/api/pull",
        summary="Install a model",
        description=refusals(OllamaPullRequest),
        response_model=OllamaProgress,
        responses=_NAMED | _lines("OllamaProgress"),
    )
    async def pull(body: OllamaPullRequest, request: Request) -> Response:
        inflight.asks(body.model)
        resolved = await asyncio.to_thread(pulls.wanted, body)
        progress = pulls.follow(resolved, jobs, models)
        if body.stream is False:
            return await whole(request, _last(progress))
        return await _ndjson(request, progress)

    @router.delete(
        "/api/delete",
        summary="Delete a model from the disk",
        response_class=Response,  # Ollama's has no body
        responses=_NAMED,
    )
    async def delete(body: OllamaDeleteRequest, request: Request) -> Response:
        inflight.asks(body.model)
        name = await asyncio.to_thread(shelf.installed_name, body.model)
        caller_of(request).check_model(name)
        if any(status.name == name and status.state not in ("absent", "failed") for status in residents.status()):
            await residents.unload(name, force=False)
        await asyncio.to_thread(Library().remove, name)
        await residents.removed(name)
        return Response(status_code=200)

    @router.get("/api/version", summary="Which version is this?")
    async def version() -> OllamaVersion:
        return OllamaVersion(version=OLLAMA_VERSION, llmasos=__version__)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root(request: Request) -> Response:
        """What clients look for to see whether a server is there; browsers are shown the console."""
        return (
            to_console() if wants_page(request) else PlainTextResponse("Ollama is running", headers={"vary": "accept"})
        )

    router.add_api_route("/api/tags", tags, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/api/version", version, methods=["HEAD"], include_in_schema=False)
    for path, instead in (
        ("/api/create", "`llmasos import` installs a model from its files."),
        ("/api/copy", "Give the model a second name where it is served."),
        ("/api/push", "Publish the model's files where it is to be pulled from."),
        ("/api/blobs/{digest}", "`llmasos import` installs a model from its files."),
    ):
        router.add_api_route(path, _not_here(instead), methods=["POST"], include_in_schema=False)
    return router


def _not_here(instead: str) -> Any:
    async def refuse(request: Request) -> Response:
        raise NotImplementedHereError(f"{request.url.path} is not a part of this server.", hint=instead)

    return refuse


async def _ndjson(request: Request, lines: AsyncGenerator[Any, None]) -> Response:
    return await streamed(request, _texts(lines), error_event=_line, media_type="application/x-ndjson")


async def _texts(lines: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[str, None]:
    async with aclosing(lines):
        async for line in lines:
            yield _line(line)


def _line(body: BaseModel) -> str:
    return f"{render.dump(body)}\n"


async def _last(progress: AsyncGenerator[OllamaProgress, None]) -> OllamaProgress:
    async with aclosing(progress):
        lines = [line async for line in progress]
    return lines[-1]
