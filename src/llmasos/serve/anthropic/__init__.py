"""Anthropic's API: /v1/messages, /v1/messages/count_tokens, and /v1/models for its clients.

What a request asks for is done, refused by name, or (thinking budgets and effort) named in `warnings`. Not here:
images, PDFs, tools that Anthropic runs, message batches, files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Match
from starlette.types import Scope

from llmasos.client.types.anthropic import (
    AnthropicMessage,
    AnthropicModel,
    AnthropicModelList,
    CountTokensRequest,
    MessageEvent,
    MessagesRequest,
    Ping,
    TokensCount,
)
from llmasos.errors import InvalidInputError
from llmasos.serve import prepare, render
from llmasos.serve.anthropic.reply import Writer, add_up
from llmasos.serve.anthropic.request import apply_thinking, chat_request, hides_thinking
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.conversation import chat_prompt_ids
from llmasos.serve.documented import ASKED, errors, refusals, stream
from llmasos.serve.models import Models
from llmasos.serve.respond import json_response, streamed, whole
from llmasos.serve.shapes import ANTHROPIC, speaks_anthropic
from llmasos.serve.turn import turn

PATIENCE = 10.0
"""Seconds until a stream begins without the first token (errors that come later are its last event), and between
pings while nothing else is sent: proxies close connections that are silent for long."""

_RESPONSES = errors(*ASKED, shape=ANTHROPIC)
_STREAM = stream("message_start, content blocks (start, deltas, stop), message_delta, message_stop; ping, error.")
_FIELDS = {"response_format": "output_config.format", "stop": "stop_sequences"}
"""Of a chat request, where they have other names here."""


class _AnthropicOnly(APIRoute):
    """A path that OpenAI's API has too: taken only where the request says whose client it is."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and speaks_anthropic(scope):
            return super().matches(scope)
        return Match.NONE, {}


def create_router(models: Models) -> APIRouter:
    """To be included before OpenAI's router."""
    router = APIRouter(prefix="/v1", tags=["Anthropic"], route_class=ReadAside)

    @router.post(
        "/messages",
        summary="Answer a conversation",
        description=refusals(MessagesRequest),
        response_model=AnthropicMessage,
        responses=_RESPONSES | _STREAM,
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            events = _texts(_events(models, caller, body))
            return await streamed(request, events, error_event=_error_event, idle=(PATIENCE, _sse(Ping(type="ping"))))
        return await whole(request, _message(models, caller, body))

    @router.post(
        "/messages/count_tokens",
        summary="Count the tokens of a conversation",
        description=refusals(CountTokensRequest),
        response_model=TokensCount,
        responses=_RESPONSES,
    )
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        return await whole(request, _count(models, caller_of(request), body))

    theirs = APIRouter(route_class=_AnthropicOnly)

    @theirs.get("/models", include_in_schema=False)
    async def list_models(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> Response:
        caller = caller_of(request)
        await models.look(facts=True)
        names = await models.names_for(caller)
        return json_response(_page(models, names, limit, after_id, before_id))

    @theirs.get("/models/{model:path}", include_in_schema=False)
    async def retrieve_model(model: str, request: Request) -> Response:
        if models.is_app(model):
            async with models.lease(model, caller_of(request)):
                return json_response(_describe(models, model))
        await models.look(model, facts=True)
        models.check(model, caller_of(request))
        return json_response(_describe(models, model))

    router.include_router(theirs)
    return router


async def _message(models: Models, caller: Caller, body: MessagesRequest) -> AnthropicMessage:
    async with aclosing(_events(models, caller, body)) as events:
        return add_up([event async for event in events])


async def _events(models: Models, caller: Caller, body: MessagesRequest) -> AsyncGenerator[MessageEvent, None]:
    """Nothing comes before the first token, so that errors up to there have a status of their own; but not later than
    PATIENCE."""
    chat = chat_request(body)
    async with models.lease(body.model, caller) as served, prepare.fields_called(_FIELDS):
        warnings = apply_thinking(body, chat, served.model)
        writer = Writer(body.model, served.model.context_length, body.max_tokens, hides_thinking(body), warnings)
        async with aclosing(turn(served, chat, fit=True)) as events:
            start = writer.read(await anext(events))
            first = asyncio.ensure_future(anext(events))
            try:
                await asyncio.wait({first}, timeout=PATIENCE)
                if first.done():
                    first.result()
                for event in start:
                    yield event
                for event in writer.read(await first):
                    yield event
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            async for piece in events:
                for event in writer.read(piece):
                    yield event


async def _texts(events: AsyncGenerator[MessageEvent, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield _sse(event)


def _sse(event: MessageEvent) -> str:
    return f"event: {event.type}\n{render.event(event)}"


def _error_event(body: BaseModel) -> str:
    return f"event: error\n{render.event(body)}"


async def _count(models: Models, caller: Caller, body: CountTokensRequest) -> TokensCount:
    chat = chat_request(body)
    async with models.lease(body.model, caller) as served:
        apply_thinking(body, chat, served.model)
        ids = await asyncio.to_thread(chat_prompt_ids, served.model, chat)
        return TokensCount(input_tokens=len(ids))


def _describe(models: Models, name: str) -> AnthropicModel:
    context_length = None if models.is_app(name) else models[name].model.context_length
    return AnthropicModel(
        type="model",
        id=name,
        display_name=name,
        created_at=datetime.fromtimestamp(models.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        lifecycle="active",
        max_input_tokens=context_length,
        max_tokens=context_length,
    )


def _page(
    models: Models, names: list[str], limit: int, after_id: str | None, before_id: str | None
) -> AnthropicModelList:
    for name, value in (("after_id", after_id), ("before_id", before_id)):
        if value is not None and value not in names:
            raise InvalidInputError(f"{name} names {value!r}, which is not served here.", param=name)
    if after_id is not None:
        names = names[names.index(after_id) + 1 :]
    if before_id is not None:
        names = names[: names.index(before_id)] if before_id in names else []
        page, more = names[-limit:], len(names) > limit
    else:
        page, more = names[:limit], len(names) > limit
    return AnthropicModelList(
        data=[_describe(models, name) for name in page],
        first_id=page[0] if page else None,
        last_id=page[-1] if page else None,
        has_more=more,
    )
