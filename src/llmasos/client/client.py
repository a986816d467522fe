"""The Python SDK: one blocking and one asyncio client for LLMasOS and any OpenAI-compatible server.

Answers are the models of `llmasos.client.types`. Errors are `ProviderError` (the server said no: `status` and its
message), `NetworkError` (no answer), `OfflineError` (not asked); all are `LLMasOSError`s. Loads no torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.providers.anthropic import AnthropicWire
from llmasos.client.providers.openai import OpenAIWire, event_json, parsed
from llmasos.client.providers.table import Endpoint, own_server
from llmasos.client.sse import Event
from llmasos.client.types import (
    ChatCompletion,
    ChatCompletionChunk,
    EmbeddingList,
    Model,
    ModelList,
    TextCompletion,
)
from llmasos.errors import NetworkError, UnsupportedError

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
Messages = str | Sequence[Mapping[str, Any]]
T = TypeVar("T", bound=BaseModel)


class StreamReader(Protocol):
    done: bool

    def read(self, event: Event) -> list[ChatCompletionChunk]: ...


class Wire(Protocol):
    """One protocol's translation to and from chat completions. It does no I/O."""

    completions_path: str
    embeddings_path: str
    models_path: str

    def headers(self, key: str) -> dict[str, str]: ...
    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]: ...
    def chat_call(self, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]: ...
    def chat_reply(self, data: Any) -> ChatCompletion: ...
    def stream_reader(self) -> StreamReader: ...


class _Calls:
    """What both clients share: everything but the I/O."""

    def __init__(self, base_url: str | Endpoint, api_key: str | None, timeout: float, max_retries: int) -> None:
        endpoint = base_url if isinstance(base_url, Endpoint) else own_server(base_url, api_key=api_key)
        self.provider = endpoint.provider
        self._wire: Wire = (AnthropicWire if self.provider.protocol == "anthropic" else OpenAIWire)(self.provider)
        self._target = Target(
            base_url=self.provider.base_url,
            label=self.provider.name,
            headers=self._wire.headers(endpoint.key),
            key_variable=self.provider.key_variable,
            timeout=timeout,
            max_retries=max_retries,
        )

    def _chat(self, messages: Messages, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        return self._wire.chat_call({"model": model, "messages": turns, **_given(fields)})

    def _completion(self, prompt: Any, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        body = self._wire.fields({"model": model, "prompt": prompt, **_given(fields)})
        return self._path("completions"), body

    def _embedding(self, texts: Any, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return self._path("embeddings"), {"model": model, "input": texts, **_given(fields)}

    def _path(self, door: str) -> str:
        path: str = getattr(self._wire, f"{door}_path")
        if not path:
            raise UnsupportedError(f"{self.provider.name}'s API has no {door}.")
        return path

    def _parsed(self, model: type[T], data: Any) -> T:
        return parsed(model, data, self.provider.name)

    def _text_chunk(self, event: Event) -> TextCompletion | None:
        if event.data.strip() == "[DONE]":
            return None
        return self._parsed(TextCompletion, event_json(event, self.provider.name))

    def _broken(self) -> NetworkError:
        return NetworkError(f"{self.provider.name} ended the stream before the answer was complete.", hint="Try again.")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}


class Client(_Calls):
    """Blocking client. `base_url` usually ends in `/v1`, or is an `Endpoint` of `llmasos.client.providers.parse`. The
    key defaults to LLMASOS_API_KEY; times are seconds.

    Keyword arguments of `chat`, `complete` and `embed` are the fields of the request bodies in `llmasos.client.types`.
    Answers 408, 409, 429 and 5xx are asked again up to `max_retries` times, after the pause that the server names or
    an exponential one. Works as a context manager and from several threads.
    """

    def __init__(
        self,
        base_url: str | Endpoint = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = Http(self._target, transport)

    def models(self) -> list[Model]:
        return self._parsed(ModelList, self._http.json("GET", self._wire.models_path)).data

    def model(self, name: str) -> Model:
        return self._parsed(Model, self._http.json("GET", f"{self._wire.models_path}/{quote(name, safe='')}"))

    def chat(self, messages: Messages, *, model: str, **fields: Any) -> ChatCompletion:
        return self._wire.chat_reply(self._http.json("POST", *self._chat(messages, model, fields)))

    def stream_chat(
        self, messages: Messages, *, model: str, **fields: Any
    ) -> Generator[ChatCompletionChunk, None, None]:
        """Closing the iterator ends the request. Raises NetworkError if the stream breaks off."""
        reader = self._wire.stream_reader()
        call = self._chat(messages, model, {**fields, "stream": True})
        with closing(self._http.events("POST", *call)) as events:
            for event in events:
                yield from reader.read(event)
        if not reader.done:
            raise self._broken()

    def complete(
        self, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, model: str, **fields: Any
    ) -> TextCompletion:
        return self._parsed(TextCompletion, self._http.json("POST", *self._completion(prompt, model, fields)))

    def stream_complete(
        self, prompt: str | Sequence[int], *, model: str, **fields: Any
    ) -> Generator[TextCompletion, None, None]:
        done = False
        call = self._completion(prompt, model, {**fields, "stream": True})
        with closing(self._http.events("POST", *call)) as events:
            for event in events:
                if (chunk := self._text_chunk(event)) is not None:
                    done = done or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
        if not done:
            raise self._broken()

    def embed(self, texts: str | Sequence[str], *, model: str, **fields: Any) -> EmbeddingList:
        return self._parsed(EmbeddingList, self._http.json("POST", *self._embedding(texts, model, fields)))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(_Calls):
    """The same for asyncio; belongs to one event loop. Cancelling a call ends the request."""

    def __init__(
        self,
        base_url: str | Endpoint = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = AsyncHttp(self._target, transport)

    async def models(self) -> list[Model]:
        return self._parsed(ModelList, await self._http.json("GET", self._wire.models_path)).data

    async def model(self, name: str) -> Model:
        return self._parsed(Model, await self._http.json("GET", f"{self._wire.models_path}/{quote(name, safe='')}"))

    async def chat(self, messages: Messages, *, model: str, **fields: Any) -> ChatCompletion:
        return self._wire.chat_reply(await self._http.json("POST", *self._chat(messages, model, fields)))

    async def stream_chat(
        self, messages: Messages, *, model: str, **fields: Any
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        reader = self._wire.stream_reader()
        call = self._chat(messages, model, {**fields, "stream": True})
        async with aclosing(self._http.events("POST", *call)) as events:
            async for event in events:
                for chunk in reader.read(event):
                    yield chunk
        if not reader.done:
            raise self._broken()

    async def complete(
        self, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, model: str, **fields: Any
    ) -> TextCompletion:
        return self._parsed(TextCompletion, await self._http.json("POST", *self._completion(prompt, model, fields)))

    async def stream_complete(
        self, prompt: str | Sequence[int], *, model: str, **fields: Any
    ) -> AsyncGenerator[TextCompletion, None]:
        done = False
        call = self._completion(prompt, model, {**fields, "stream": True})
        async with aclosing(self._http.events("POST", *call)) as events:
            async for event in events:
                if (chunk := self._text_chunk(event)) is not None:
                    done = done or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
        if not done:
            raise self._broken()

    async def embed(self, texts: str | Sequence[str], *, model: str, **fields: Any) -> EmbeddingList:
        return self._parsed(EmbeddingList, await self._http.json("POST", *self._embedding(texts, model, fields)))

    async def close(self) -> None:
        await self._http.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
