"""Which models are served, and who may use one when.

A `Lane` lets one request at a time use a model, first come first served. It is the one place where requests meet a
model, so an engine that runs many at once replaces this file and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from llmasos.errors import NotFoundError, ServerError
from llmasos.inference.request import Chunk, RequestOutput, SamplingParams


class ServedTokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...


class ServedModel(Protocol):
    """What the server needs of `llmasos.LLM`. Its async methods work in a thread, so the event loop stays free, and
    stop at the next token when they are cancelled or closed."""

    name: str
    is_encoder: bool

    @property
    def context_length(self) -> int: ...
    @property
    def tokenizer(self) -> ServedTokenizer: ...
    def params(self, **options: Any) -> SamplingParams: ...
    def chat_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str: ...
    async def acomplete(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]: ...
    def astream_complete(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Chunk, None]: ...
    async def aembed(self, texts: list[str]) -> list[list[float]]: ...


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not serve."""

    param = "model"


class QueueFullError(ServerError):
    """Too many requests wait for a model."""

    http_status = 503
    retry_after = 1


class Lane:
    """One model and the queue in front of it. `max_waiting` bounds the queue; beyond it QueueFullError is raised."""

    def __init__(self, model: ServedModel, max_waiting: int) -> None:
        self.model = model
        self.max_waiting = max_waiting
        self.num_waiting = 0
        self._turn = asyncio.Lock()  # asyncio wakes waiters in the order in which they came

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        if self.num_waiting >= self.max_waiting:
            raise QueueFullError(
                f"{self.num_waiting} requests already wait for {self.model.name}.", hint="Try again in a moment."
            )
        self.num_waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.num_waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    async def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
        async with self._my_turn():
            return await self.model.acomplete(prompts, params)

    async def stream(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        async with self._my_turn(), aclosing(self.model.astream_complete(prompt, params)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def embed(self, texts: list[str]) -> list[list[float]]:
        async with self._my_turn():
            return await self.model.aembed(texts)


class Models:
    """The served models by name. Two names of one model share its lane; an alias is a name that is not listed."""

    def __init__(
        self, llms: Mapping[str, ServedModel], aliases: Mapping[str, str] | None = None, *, max_waiting: int = 256
    ) -> None:
        lanes: dict[int, Lane] = {}
        self._lanes = {name: lanes.setdefault(id(llm), Lane(llm, max_waiting)) for name, llm in llms.items()}
        self._aliases = dict(aliases or {})
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        return list(self._lanes)

    def __getitem__(self, name: str) -> Lane:
        """Raises ModelNotFoundError that lists the served names."""
        lane = self._lanes.get(self._aliases.get(name, name))
        if lane is None:
            served = ", ".join(self.names) or "none"
            raise ModelNotFoundError(f"The model {name!r} is not served here.", hint=f"Served: {served}.")
        return lane
