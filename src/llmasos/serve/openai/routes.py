"""The routes of OpenAI's API."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from llmasos.client.types import (
    ChatCompletion,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingList,
    EmbeddingRequest,
    Model,
    ModelList,
    Reranking,
    RerankRequest,
    ScoreList,
    ScoreRequest,
    TextCompletion,
    TokenizeRequest,
    Tokens,
    TokensText,
)
from llmasos.serve.apps.chat import app_chat, app_model, app_models, is_app
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import ASKED, errors, refusals, stream
from llmasos.serve.models import Models
from llmasos.serve.openai import chat, completions, embeddings, rerank, tokens
from llmasos.serve.openai.models import describe
from llmasos.serve.respond import streamed, whole

_EVENTS = "`data:` lines of {} objects, then `data: [DONE]`."


def create_router(models: Models, apps: Supervisor | None = None) -> APIRouter:
    router = APIRouter()
    router.include_router(_openai(models, apps))
    router.include_router(_neighbours(models))
    return router


def _openai(models: Models, apps: Supervisor | None) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=ReadAside)

    @router.get("/models", summary="List the served models")
    async def list_models(request: Request) -> ModelList:
        caller = caller_of(request)
        await models.look(facts=True)
        served = [describe(models, name) for name in models.names if caller.may_use(name)]
        return ModelList(data=served + (await app_models(apps, caller) if apps is not None else []))

    @router.get("/models/{model:path}", summary="Describe one model", responses=errors(404))
    async def retrieve_model(model: str, request: Request) -> Model:
        if apps is not None and is_app(model):
            return await app_model(apps, caller_of(request), model)
        await models.look(model, facts=True)
        models.check(model, caller_of(request))
        return describe(models, model)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        description=refusals(ChatCompletionRequest),
        response_model=ChatCompletion,
        responses=errors(*ASKED) | stream(_EVENTS.format("ChatCompletionChunk")),
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        caller = caller_of(request)
        if apps is not None and is_app(body.model):
            return await app_chat(apps, caller, body.model, request)
        if body.stream:
            return await streamed(request, chat.events(models, caller, body))
        return await whole(request, chat.answer(models, caller, body))

    @router.post(
        "/completions",
        summary="Continue a text",
        description=refusals(CompletionRequest),
        response_model=TextCompletion,
        responses=errors(*ASKED) | stream(_EVENTS.format("TextCompletion")),
    )
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, completions.events(models, caller, body))
        return await whole(request, completions.answer(models, caller, body))

    @router.post("/embeddings", summary="Embed texts", response_model=EmbeddingList, responses=errors(*ASKED))
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await whole(request, embeddings.embed(models, caller_of(request), body))

    return router


def _neighbours(models: Models) -> APIRouter:
    """Routes that are not OpenAI's, under the names that their makers' clients ask for."""
    router = APIRouter(tags=["OpenAI's neighbours"], route_class=ReadAside)

    async def ranked(body: RerankRequest, request: Request) -> Response:
        return await whole(request, rerank.rerank(models, caller_of(request), body))

    async def scored(body: ScoreRequest, request: Request) -> Response:
        return await whole(request, rerank.score(models, caller_of(request), body))

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        router.post(
            path,
            summary="Sort texts by how well they answer a query",
            description=refusals(RerankRequest),
            response_model=Reranking,
            responses=errors(*ASKED),
        )(ranked)
    for path in ("/v1/score", "/score"):
        router.post(
            path,
            summary="Say how well texts answer a query",
            response_model=ScoreList,
            responses=errors(*ASKED),
        )(scored)

    @router.post(
        "/tokenize", summary="Turn a text or messages into tokens", response_model=Tokens, responses=errors(*ASKED)
    )
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        return await whole(request, tokens.tokenize(models, caller_of(request), body))

    @router.post("/detokenize", summary="Turn tokens into text", response_model=TokensText, responses=errors(*ASKED))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        return await whole(request, tokens.detokenize(models, caller_of(request), body))

    return router
