"""OpenAI's protocol: chat completions are already our own form, so little is translated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmasos.client.providers.table import Provider
from llmasos.client.sse import Event
from llmasos.client.types import ChatCompletion, ChatCompletionChunk, TextCompletion
from llmasos.errors import ProviderError, UnavailableError

T = TypeVar("T", bound=BaseModel)


def parsed(model: type[T], data: Any, provider: str) -> T:
    """A response body as its model. Raises ProviderError saying which field is not as documented."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProviderError(f"{provider} sent an answer of another form: {where}: {first['msg']}.") from e


_UNAVAILABLE = frozenset({"model_crashed", "queue_full", "stopping"})
"""Codes of errors inside a stream after which the same request may be sent again."""


def event_json(event: Event, provider: str) -> Any:
    """The JSON of a streamed event. Raises ProviderError for text that is none and for an error sent mid-stream."""
    try:
        data = json.loads(event.data)
    except ValueError as e:
        raise ProviderError(f"{provider} sent an event that is not JSON: {event.data[:80]!r}.") from e
    if isinstance(data, dict) and data.get("error"):
        raise stream_error(data["error"], event, provider)
    return data


def stream_error(error: Any, event: Event, provider: str) -> ProviderError:
    detail = error if isinstance(error, dict) else {"message": error}
    code = detail.get("code") or detail.get("type") or ""
    kind = UnavailableError if code in _UNAVAILABLE else ProviderError
    message = f"{provider} stopped with an error: {detail.get('message') or event.data[:300]}"
    return kind(message, server_code=str(code), param=detail.get("param"))


class OpenAIWire:
    """Translates; does no I/O."""

    completions_path, embeddings_path, models_path = "/completions", "/embeddings", "/models"

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Body fields under the names that this provider gives them."""
        names = {"max_tokens": self.provider.max_tokens_field, "seed": self.provider.seed_field}
        return {names.get(k, k): v for k, v in body.items()}

    def chat_call(self, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return "/chat/completions", self.fields(body)

    def chat_reply(self, data: Any) -> ChatCompletion:
        return parsed(ChatCompletion, data, self.provider.name)

    def stream_reader(self) -> OpenAIStreamReader:
        return OpenAIStreamReader(self.provider.name)


class OpenAIStreamReader:
    """`done` is true once the stream has said that it is complete."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.done = False

    def read(self, event: Event) -> list[ChatCompletionChunk]:
        if event.data.strip() == "[DONE]":
            self.done = True
            return []
        chunk = parsed(ChatCompletionChunk, event_json(event, self.provider), self.provider)
        self.done = self.done or any(choice.finish_reason for choice in chunk.choices)
        return [chunk]


class CompletionReader:
    """The same for /completions."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.done = False

    def read(self, event: Event) -> list[TextCompletion]:
        if event.data.strip() == "[DONE]":
            self.done = True
            return []
        chunk = parsed(TextCompletion, event_json(event, self.provider), self.provider)
        self.done = self.done or any(choice.finish_reason for choice in chunk.choices)
        return [chunk]
