"""Which models are served under which names, and how much each is asked at once.

Requests go straight to the model, whose engine runs many at once. What is here bounds their number, hands an adapter's
name on with each request for it, and measures them.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmasos.errors import InvalidInputError, NotFoundError, ServerError, UnsupportedError
from llmasos.inference.config import EngineConfig
from llmasos.inference.request import Chunk, RequestOutput, SamplingParams
from llmasos.serve import inflight
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.metrics import Metrics
from llmasos.serve.stream import interleave

if TYPE_CHECKING:
    from llmasos.inference.state import AdapterInfo, EngineStats


EMBEDDINGS = 2
"""Requests for embeddings that a model works on at once: one's texts become tokens while another is computed. Each
holds one of the threads that all models share."""


class ServedTokenizer(Protocol):
    vocab_size: int
    special_ids: frozenset[int]

    def id(self, token: str) -> int | None: ...
    def token(self, id: int) -> str: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...


class ServedModel(Protocol):
    """What the server needs of `llmasos.LLM`. Its async methods run at once, leave the event loop free, and stop at the
    next token when they are cancelled or closed."""

    name: str
    is_encoder: bool
    engine_config: EngineConfig

    @property
    def context_length(self) -> int: ...
    @property
    def tokenizer(self) -> ServedTokenizer: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def adapters(self) -> list[AdapterInfo]: ...
    def params(self, **options: Any) -> SamplingParams: ...
    def chat_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str: ...
    def load_adapter(self, name: str, path: Path | str | None = None) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    async def acomplete(
        self, prompts: list[list[int]], params: SamplingParams, **request: Any
    ) -> list[RequestOutput]: ...
    def astream_complete(
        self, prompt: list[int], params: SamplingParams, **request: Any
    ) -> AsyncGenerator[Chunk, None]: ...
    async def aembed(self, texts: list[str], **options: Any) -> list[list[float]]: ...
    async def ascore_pairs(self, query: str, texts: Sequence[str]) -> list[float]: ...


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not serve."""

    param = "model"


class QueueFullError(ServerError):
    """Too many requests wait for a model."""

    http_status = 503
    retry_after = 1


class Admission:
    """The completions of one model that are in flight. While they are `limit` or more, further ones are refused."""

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.num_in_flight = 0
        self.embeddings = asyncio.Semaphore(EMBEDDINGS)

    @contextmanager
    def admit(self, num: int) -> Iterator[None]:
        if self.num_in_flight >= self.limit:
            raise QueueFullError(
                f"{self.num_in_flight} completions of {self.name} are running or waiting already.",
                hint="Try again in a moment.",
            )
        self.num_in_flight += num
        try:
            yield
        finally:
            self.num_in_flight -= num


class Served:
    """What stands behind one name: a model, or one of its adapters. `base` is the model's own served name."""

    def __init__(
        self, base: str, model: ServedModel, admission: Admission, metrics: Metrics, adapter: str | None = None
    ) -> None:
        self.base, self.model, self.adapter = base, model, adapter
        self._admission, self._metrics = admission, metrics
        self._caller = ANYONE

    def for_caller(self, caller: Caller) -> Served:
        """The same, with the caller's priority and share of the cache."""
        found = copy.copy(self)
        found._caller = caller
        return found

    def with_adapter(self, name: str) -> Served:
        return Served(self.base, self.model, self._admission, self._metrics, name)

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        own = {} if self.adapter is None else {"adapter": self.adapter}
        return self._caller.request_options({**request, **own})

    async def complete(self, prompts: list[list[int]], params: SamplingParams, **request: Any) -> list[RequestOutput]:
        num = len(prompts) * max(params.n, params.num_beams)
        with self._admission.admit(num), self._metrics.watch(self.base, len(prompts) * params.n) as watch:
            inflight.begins(sum(map(len, prompts)))
            outputs = await self.model.acomplete(prompts, params, **self._request(request))
            for output in outputs:
                watch.measure(output.metrics)
                inflight.gives(0, num_cached=output.metrics.num_cached_tokens)
                for completion in output.outputs:
                    watch.end(completion.finish_reason)
                    inflight.gives(len(completion.token_ids), finish_reason=completion.finish_reason)
            return outputs

    async def stream(
        self, prompts: list[list[int]], params: SamplingParams, **request: Any
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks of all prompts as they come, each with its prompt's number."""
        num = len(prompts) * params.n
        with self._admission.admit(num), self._metrics.watch(self.base, num) as watch:
            inflight.begins(sum(map(len, prompts)))
            streams = [self.model.astream_complete(ids, params, **self._request(request)) for ids in prompts]
            async with aclosing(interleave(streams)) as chunks:
                async for index, chunk in chunks:
                    num_cached = chunk.metrics.num_cached_tokens if chunk.metrics is not None else 0
                    inflight.gives(len(chunk.token_ids), num_cached=num_cached, finish_reason=chunk.finish_reason)
                    if chunk.finish_reason is not None:
                        watch.end(chunk.finish_reason)
                    if chunk.metrics is not None:
                        watch.measure(chunk.metrics)
                    yield index, chunk

    async def embed(self, texts: list[str], **options: Any) -> list[list[float]]:
        """`options`: those of `LLM.embed`."""
        if self.adapter is not None:
            raise UnsupportedError(
                f"{self.adapter} is an adapter, and embeddings are made without.",
                hint=f"Ask {self.base}.",
                param="model",
            )
        with self._admission.admit(1):
            async with self._admission.embeddings:
                return await self.model.aembed(texts, **options)


class Models:
    """The served models by name, and their adapters by theirs. An alias is a name that is not listed.

    Two names of one model share its `max_waiting`: completions that may be in flight beyond those that run at once.
    """

    def __init__(
        self, llms: Mapping[str, ServedModel], aliases: Mapping[str, str] | None = None, *, max_waiting: int = 256
    ) -> None:
        first: dict[int, Served] = {}
        self.metrics = Metrics()
        self._served: dict[str, Served] = {}
        for name, llm in llms.items():
            if id(llm) not in first:
                admission = Admission(name, llm.engine_config.max_num_seqs + max_waiting)
                first[id(llm)] = Served(name, llm, admission, self.metrics)
                self.metrics.add(name, llm)
            self._served[name] = first[id(llm)]
        self._bases = list(first.values())
        self._aliases = dict(aliases or {})
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        own = [info.name for base in self._bases for info in base.model.adapters]
        return list(dict.fromkeys([*self._served, *own]))

    def __getitem__(self, name: str) -> Served:
        """Raises ModelNotFoundError that lists the served names."""
        served = self._served.get(self._aliases.get(name, name)) or self._adapter(name)
        if served is None:
            raise ModelNotFoundError(
                f"The model {name!r} is not served here.", hint=f"Served: {', '.join(self.names) or 'none'}."
            )
        return served

    @asynccontextmanager
    async def lease(
        self, name: str, caller: Caller = ANYONE, *, keep_alive: float | None = None
    ) -> AsyncIterator[Served]:
        """The model for one request; as long as the block runs, it stays, and where models come and go for
        `keep_alive` seconds longer. Raises ModelNotFoundError, and ForbiddenError for a model that the caller may not
        use."""
        inflight.asks(name)
        caller.check_model(self._aliases.get(name, name))
        yield self[name].for_caller(caller)

    def _adapter(self, name: str) -> Served | None:
        for base in self._bases:
            if any(info.name == name for info in base.model.adapters):
                return base.with_adapter(name)
        return None

    def base_for_adapter(self, name: str, base: str | None) -> Served:
        """The model that a new adapter belongs to. Raises InvalidInputError, ModelNotFoundError."""
        if name in self.names or name in self._aliases:
            raise InvalidInputError(f"{name!r} is served already.", hint="Choose another name.", param="lora_name")
        if base is not None:
            found = self[base]
        elif len(self._bases) == 1:
            found = self._bases[0]
        else:
            served = ", ".join(one.base for one in self._bases)
            raise InvalidInputError(
                "Several models are served, and the adapter's is not named.",
                hint=f"Set base_model_name to one of: {served}.",
                param="base_model_name",
            )
        if found.adapter is not None:
            raise InvalidInputError(f"{base!r} is an adapter itself.", param="base_model_name")
        return found
