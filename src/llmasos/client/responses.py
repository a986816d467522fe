"""OpenAI's Responses and Conversations, as `client.responses` and `client.conversations`.

Answers that the server keeps, so that the next one can go on from them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmasos.client.http import AsyncHttp, Http, path_of
from llmasos.client.providers.openai import event_json, parsed, stream_error
from llmasos.client.sse import Event
from llmasos.client.types.response_events import ResponseErrorEvent, ResponseEvent, ResponseStateEvent
from llmasos.client.types.responses import (
    Conversation,
    DeletedConversation,
    DeletedResponse,
    InputTokens,
    ItemList,
    Response,
)
from llmasos.errors import ProviderError

_RUNNING = frozenset({"queued", "in_progress"})
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})


@cache
def _events() -> TypeAdapter[ResponseEvent]:
    return TypeAdapter(ResponseEvent)


class ResponseReader:
    """`done` is true after one of the last events."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.done = False

    def read(self, event: Event) -> list[ResponseEvent]:
        if event.data.strip() == "[DONE]":
            return []
        try:
            found = _events().validate_python(event_json(event, self.label))
        except ValidationError as e:
            raise ProviderError(f"{self.label} sent an event of another form: {e.errors()[0]['msg']}.") from e
        if isinstance(found, ResponseErrorEvent):
            raise stream_error(found.model_dump(exclude={"type"}), event, self.label)
        self.done = self.done or (isinstance(found, ResponseStateEvent) and found.type in _LAST)
        return [found]


def _given(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}


def _body(model: str, input: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "input": input, **_given(**fields)}


class Responses:
    """Blocking. `input` is a text or a list of items; `fields` are those of `ResponseRequest`."""

    def __init__(self, http: Http) -> None:
        self._http, self._label = http, http.target.label

    def create(self, input: str | list[Any], *, model: str, **fields: Any) -> Response:
        return self._read(self._http.json("POST", "/responses", _body(model, input, fields), once=True))

    def stream(self, input: str | list[Any], *, model: str, **fields: Any) -> Generator[ResponseEvent, None, None]:
        """The last event has the whole response. Closing the iterator ends the request."""
        body = _body(model, input, {**fields, "stream": True})
        yield from self._http.stream(ResponseReader(self._label), "POST", "/responses", body, once=True)

    def retrieve(self, id: str) -> Response:
        return self._read(self._http.json("GET", path_of("responses", id)))

    def follow(self, id: str, *, starting_after: int | None = None) -> Generator[ResponseEvent, None, None]:
        """The events of a response that was begun with `stream(background=True)`: those after number `starting_after`,
        or all, then those to come."""
        path = path_of("responses", id, stream=True, starting_after=starting_after)
        yield from self._http.stream(ResponseReader(self._label), "GET", path)

    def wait(self, id: str, *, interval: float = 1.0) -> Response:
        """A background response once it is over, however it ended; asked for every `interval` seconds."""
        while (response := self.retrieve(id)).status in _RUNNING:
            time.sleep(interval)
        return response

    def cancel(self, id: str) -> Response:
        return self._read(self._http.json("POST", path_of("responses", id, "cancel")))

    def delete(self, id: str) -> DeletedResponse:
        return parsed(DeletedResponse, self._http.json("DELETE", path_of("responses", id)), self._label)

    def input_items(self, id: str, *, after: str | None = None, limit: int | None = None) -> ItemList:
        data = self._http.json("GET", path_of("responses", id, "input_items", after=after, limit=limit))
        return parsed(ItemList, data, self._label)

    def count_tokens(self, input: str | list[Any], *, model: str, **fields: Any) -> int:
        """How many tokens the input would be."""
        data = self._http.json("POST", path_of("responses", "input_tokens"), _body(model, input, fields))
        return parsed(InputTokens, data, self._label).input_tokens

    def _read(self, data: Any) -> Response:
        return parsed(Response, data, self._label)


class AsyncResponses:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def create(self, input: str | list[Any], *, model: str, **fields: Any) -> Response:
        return self._read(await self._http.json("POST", "/responses", _body(model, input, fields), once=True))

    async def stream(self, input: str | list[Any], *, model: str, **fields: Any) -> AsyncGenerator[ResponseEvent, None]:
        body = _body(model, input, {**fields, "stream": True})
        async with aclosing(
            self._http.stream(ResponseReader(self._label), "POST", "/responses", body, once=True)
        ) as events:
            async for event in events:
                yield event

    async def retrieve(self, id: str) -> Response:
        return self._read(await self._http.json("GET", path_of("responses", id)))

    async def follow(self, id: str, *, starting_after: int | None = None) -> AsyncGenerator[ResponseEvent, None]:
        path = path_of("responses", id, stream=True, starting_after=starting_after)
        async with aclosing(self._http.stream(ResponseReader(self._label), "GET", path)) as events:
            async for event in events:
                yield event

    async def wait(self, id: str, *, interval: float = 1.0) -> Response:
        while (response := await self.retrieve(id)).status in _RUNNING:
            await asyncio.sleep(interval)
        return response

    async def cancel(self, id: str) -> Response:
        return self._read(await self._http.json("POST", path_of("responses", id, "cancel")))

    async def delete(self, id: str) -> DeletedResponse:
        return parsed(DeletedResponse, await self._http.json("DELETE", path_of("responses", id)), self._label)

    async def input_items(self, id: str, *, after: str | None = None, limit: int | None = None) -> ItemList:
        data = await self._http.json("GET", path_of("responses", id, "input_items", after=after, limit=limit))
        return parsed(ItemList, data, self._label)

    async def count_tokens(self, input: str | list[Any], *, model: str, **fields: Any) -> int:
        data = await self._http.json("POST", path_of("responses", "input_tokens"), _body(model, input, fields))
        return parsed(InputTokens, data, self._label).input_tokens

    def _read(self, data: Any) -> Response:
        return parsed(Response, data, self._label)


class Conversations:
    """Blocking. `conversation=` of `responses.create` goes on from one and adds to it."""

    def __init__(self, http: Http) -> None:
        self._http, self._label = http, http.target.label

    def create(self, items: list[Any] | None = None, *, metadata: Mapping[str, str] | None = None) -> Conversation:
        body = _given(items=items, metadata=metadata)
        return parsed(Conversation, self._http.json("POST", "/conversations", body, once=True), self._label)

    def retrieve(self, id: str) -> Conversation:
        return parsed(Conversation, self._http.json("GET", path_of("conversations", id)), self._label)

    def update(self, id: str, metadata: Mapping[str, str] | None) -> Conversation:
        body = {"metadata": metadata}
        return parsed(Conversation, self._http.json("POST", path_of("conversations", id), body), self._label)

    def delete(self, id: str) -> DeletedConversation:
        return parsed(DeletedConversation, self._http.json("DELETE", path_of("conversations", id)), self._label)

    def add_items(self, id: str, items: list[Any]) -> ItemList:
        path = path_of("conversations", id, "items")
        return parsed(ItemList, self._http.json("POST", path, {"items": items}, once=True), self._label)

    def items(
        self, id: str, *, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> ItemList:
        """One page, the newest first."""
        path = path_of("conversations", id, "items", after=after, limit=limit, order=order)
        return parsed(ItemList, self._http.json("GET", path), self._label)

    def item(self, id: str, item_id: str) -> dict[str, Any]:
        return dict(self._http.json("GET", path_of("conversations", id, "items", item_id)))

    def delete_item(self, id: str, item_id: str) -> Conversation:
        path = path_of("conversations", id, "items", item_id)
        return parsed(Conversation, self._http.json("DELETE", path), self._label)


class AsyncConversations:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def create(
        self, items: list[Any] | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> Conversation:
        body = _given(items=items, metadata=metadata)
        return parsed(Conversation, await self._http.json("POST", "/conversations", body, once=True), self._label)

    async def retrieve(self, id: str) -> Conversation:
        return parsed(Conversation, await self._http.json("GET", path_of("conversations", id)), self._label)

    async def update(self, id: str, metadata: Mapping[str, str] | None) -> Conversation:
        body = {"metadata": metadata}
        return parsed(Conversation, await self._http.json("POST", path_of("conversations", id), body), self._label)

    async def delete(self, id: str) -> DeletedConversation:
        return parsed(DeletedConversation, await self._http.json("DELETE", path_of("conversations", id)), self._label)

    async def add_items(self, id: str, items: list[Any]) -> ItemList:
        path = path_of("conversations", id, "items")
        return parsed(ItemList, await self._http.json("POST", path, {"items": items}, once=True), self._label)

    async def items(
        self, id: str, *, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> ItemList:
        path = path_of("conversations", id, "items", after=after, limit=limit, order=order)
        return parsed(ItemList, await self._http.json("GET", path), self._label)

    async def item(self, id: str, item_id: str) -> dict[str, Any]:
        return dict(await self._http.json("GET", path_of("conversations", id, "items", item_id)))

    async def delete_item(self, id: str, item_id: str) -> Conversation:
        path = path_of("conversations", id, "items", item_id)
        return parsed(Conversation, await self._http.json("DELETE", path), self._label)
