"""/v1/responses and /v1/conversations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from llmasos.client.types import ErrorBody
from llmasos.client.types import responses as wire
from llmasos.client.types.response_events import ResponseErrorEvent
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import ASKED, errors, stream
from llmasos.serve.respond import streamed, whole
from llmasos.serve.responses import store
from llmasos.serve.responses.conversations import Conversations
from llmasos.serve.responses.events import sse
from llmasos.serve.responses.request import INCLUDE_LOGPROBS, INCLUDE_REASONING
from llmasos.serve.responses.service import Responses

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]
_NOT_FOUND = errors(404)


def create_router(responses: Responses) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI: responses"], route_class=ReadAside)
    storage = responses.storage

    @router.post(
        "/responses",
        summary="Answer, and remember",
        response_model=wire.Response,
        responses=errors(*ASKED) | stream("`event:` and `data:` lines of events."),
    )
    async def create(body: wire.ResponseRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            numbers = count()
            events = responses.stream(caller, body, numbers)
            return await streamed(request, events, error_event=lambda e: error_event(e, next(numbers)))
        return await whole(request, responses.answer(caller, body), BaseModel.model_dump_json)

    @router.post("/responses/input_tokens", summary="How many tokens would this input be?")
    async def input_tokens(body: wire.InputTokensRequest, request: Request) -> wire.InputTokens:
        return wire.InputTokens(input_tokens=await responses.count(caller_of(request), body))

    @router.get("/responses/{response_id}", response_model=wire.Response, responses=_NOT_FOUND, summary="A response")
    async def retrieve(
        response_id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0)] = None,
        include_obfuscation: bool = False,
        include: Annotated[list[str] | None, Query(alias="include[]")] = None,
    ) -> Response:
        _check_include(include)
        if include_obfuscation:
            raise UnsupportedError("include_obfuscation is not supported.", param="include_obfuscation")
        if not stream:
            if starting_after is not None:
                raise InvalidInputError("starting_after needs stream=true.", param="starting_after")
            return _json(await responses.get(caller_of(request), response_id))
        after = -1 if starting_after is None else starting_after
        events = responses.replay(caller_of(request), response_id, after)
        return await streamed(request, events, error_event=lambda e: error_event(e, after + 1))

    @router.delete("/responses/{response_id}", responses=_NOT_FOUND, summary="Forget a response")
    async def delete(response_id: str, request: Request) -> wire.DeletedResponse:
        await responses.delete(caller_of(request), response_id)
        return wire.DeletedResponse(id=response_id)

    @router.post(
        "/responses/{response_id}/cancel",
        response_model=wire.Response,
        responses=_NOT_FOUND,
        summary="End a background response",
    )
    async def cancel(response_id: str, request: Request) -> Response:
        return _json(await responses.cancel(caller_of(request), response_id))

    @router.get("/responses/{response_id}/input_items", responses=_NOT_FOUND, summary="What a response was made from")
    async def input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        order: Order = "desc",
        include: Annotated[list[str] | None, Query(alias="include[]")] = None,
    ) -> wire.ItemList:
        _check_include(include)
        key_id = caller_of(request).key_id
        items = await storage.run(lambda s: store.input_items(s, response_id, key_id), read_only=True)
        return page(items, after, limit, order)

    conversations = Conversations(storage)

    @router.post("/conversations", summary="Begin a conversation")
    async def create_conversation(body: wire.ConversationRequest, request: Request) -> wire.Conversation:
        return await conversations.create(caller_of(request), body)

    @router.get("/conversations/{conversation_id}", responses=_NOT_FOUND, summary="A conversation")
    async def retrieve_conversation(conversation_id: str, request: Request) -> wire.Conversation:
        return await conversations.get(caller_of(request), conversation_id)

    @router.post("/conversations/{conversation_id}", responses=_NOT_FOUND, summary="Change a conversation's labels")
    async def update_conversation(
        conversation_id: str, body: wire.ConversationUpdate, request: Request
    ) -> wire.Conversation:
        return await conversations.update(caller_of(request), conversation_id, body)

    @router.delete("/conversations/{conversation_id}", responses=_NOT_FOUND, summary="Forget a conversation")
    async def delete_conversation(conversation_id: str, request: Request) -> wire.DeletedConversation:
        await conversations.delete(caller_of(request), conversation_id)
        return wire.DeletedConversation(id=conversation_id)

    @router.post("/conversations/{conversation_id}/items", responses=_NOT_FOUND, summary="Add items")
    async def create_items(
        conversation_id: str, body: wire.ConversationItemsRequest, request: Request
    ) -> wire.ItemList:
        added = await conversations.add(caller_of(request), conversation_id, body.items)
        return page(added, None, len(added), "asc")

    @router.get("/conversations/{conversation_id}/items", responses=_NOT_FOUND, summary="A conversation's items")
    async def list_items(
        conversation_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        order: Order = "desc",
        include: Annotated[list[str] | None, Query(alias="include[]")] = None,
    ) -> wire.ItemList:
        _check_include(include)
        return page(await conversations.items(caller_of(request), conversation_id), after, limit, order)

    @router.get("/conversations/{conversation_id}/items/{item_id}", responses=_NOT_FOUND, summary="One item")
    async def retrieve_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
        return await conversations.item(caller_of(request), conversation_id, item_id)

    @router.delete("/conversations/{conversation_id}/items/{item_id}", responses=_NOT_FOUND, summary="Forget an item")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> wire.Conversation:
        return await conversations.remove_item(caller_of(request), conversation_id, item_id)

    return router


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def error_event(body: BaseModel, number: int) -> str:
    assert isinstance(body, ErrorBody)
    problem = body.error
    return sse(
        ResponseErrorEvent(code=problem.code, message=problem.message, param=problem.param, sequence_number=number)
    )


def _check_include(include: Sequence[str] | None) -> None:
    for one in include or ():
        if one not in (INCLUDE_LOGPROBS, INCLUDE_REASONING):
            raise UnsupportedError(f"include: {one!r} is not supported.", hint="Leave it out.", param="include")


def page(items: list[dict[str, Any]], after: str | None, limit: int, order: Order) -> wire.ItemList:
    """A part of the items, which are given the oldest first. Raises InvalidInputError for an `after` that is none."""
    ordered = items if order == "asc" else items[::-1]
    start = 0
    if after is not None:
        start = next((i + 1 for i, item in enumerate(ordered) if item["id"] == after), -1)
        if start < 0:
            raise InvalidInputError(f"There is no item {after!r} in this list.", param="after")
    data = ordered[start : start + limit]
    ids = [item["id"] for item in data] or [""]
    return wire.ItemList(data=data, first_id=ids[0], last_id=ids[-1], has_more=start + limit < len(ordered))
