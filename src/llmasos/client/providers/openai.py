"""OpenAI's protocol: chat completions are already our own form, so little is translated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from llmasos.client.providers.table import Provider
from llmasos.client.sse import Event
from llmasos.client.types import ChatCompletion, ChatCompletionChunk, TextCompletion
from llmasos.errors import ProviderError, UnavailableError

T = TypeVar("T", bound=BaseModel)
T_chunk = TypeVar("T_chunk", ChatCompletionChunk, TextCompletion)


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

    def stream_reader(self, body: Mapping[str, Any]) -> OpenAIStreamReader[ChatCompletionChunk]:
        return OpenAIStreamReader(ChatCompletionChunk, self.provider.name, body.get("n") or 1)


class OpenAIStreamReader(Generic[T_chunk]):
    """`done` is true once the stream has said that it is complete, or (not every server says so) each of the
    `num_choices` completions that were asked for has ended."""

    def __init__(self, kind: type[T_chunk], provider: str, num_choices: int) -> None:
        self.kind: type[T_chunk] = kind
        self.provider = provider
        self.done = False
        self._open = set(range(num_choices))

    def read(self, event: Event) -> list[T_chunk]:
        if event.data.strip() == "[DONE]":
            self.done = True
            return []
        chunk = parsed(self.kind, event_json(event, self.provider), self.provider)
        self._open.difference_update(choice.index for choice in chunk.choices if choice.finish_reason)
        self.done = self.done or not self._open
        return [chunk]


def completion_reader(body: Mapping[str, Any], provider: str) -> OpenAIStreamReader[TextCompletion]:
    """The same for /completions, which takes several prompts at once."""
    prompt = body["prompt"]
    num_prompts = 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)
    return OpenAIStreamReader(TextCompletion, provider, num_prompts * (body.get("n") or 1))
