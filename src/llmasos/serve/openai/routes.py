"""The routes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Awaitable

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from llmasos.client.types import (
    ChatCompletion,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    Model,
    ModelList,
    TextCompletion,
)
from llmasos.serve.caller import caller_of
from llmasos.serve.models import Models
from llmasos.serve.openai import chat, completions, embeddings
from llmasos.serve.openai.common import refusals, responses
from llmasos.serve.openai.models import describe
from llmasos.serve.respond import json_response, streamed, whole


def create_router(models: Models) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    async def done(request: Request, work: Awaitable[BaseModel]) -> Response:
        async def answer() -> Response:
            return json_response(await work)

        return await whole(request, answer())

    @router.get("/models", summary="List the served models")
    async def list_models() -> ModelList:
        return ModelList(data=[describe(models, name) for name in models.names])

    @router.get("/models/{model:path}", summary="Describe one model", responses={404: responses()[404]})
    async def retrieve_model(model: str) -> Model:
        return describe(models, model)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        description=refusals(ChatCompletionRequest),
        response_model=ChatCompletion,
        responses=responses("ChatCompletionChunk"),
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, chat.events(models, caller, body))
        return await done(request, chat.answer(models, caller, body))

    @router.post(
        "/completions",
        summary="Continue a text",
        description=refusals(CompletionRequest),
        response_model=TextCompletion,
        responses=responses("TextCompletion"),
    )
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, completions.events(models, caller, body))
        return await done(request, completions.answer(models, caller, body))

    @router.post("/embeddings", summary="Embed texts", response_model=EmbeddingList, responses=responses())
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await done(request, embeddings.embed(models, caller_of(request), body))

    return router
