"""Which models are served under which names, and how much each is asked at once.

Requests go straight to the model, whose engine runs many at once. What is here bounds their number, hands an adapter's
name on with each request for it, and measures them.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, Protocol

from llmasos.errors import InvalidInputError, NotFoundError, UnsupportedError
from llmasos.inference.request import Chunk, RequestOutput, SamplingParams
from llmasos.serve import inflight
from llmasos.serve.admission import Admission
from llmasos.serve.backing import Backing, InProcess
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.metrics import Metrics
from llmasos.serve.served import ServedModel
from llmasos.serve.stream import interleave


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not serve."""

    param = "model"


class Served:
    """What stands behind one name: a model, or one of its adapters. `base` is the model's own served name. `answer`,
    where there is one, answers a conversation as `turn.turn` does: an application chats by itself."""

    answer: Callable[..., AsyncGenerator[Any, None]] | None = None

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

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        own = {} if self.adapter is None else {"adapter": self.adapter}
        return self._caller.request_options({**request, **own})

    async def complete(self, prompts: list[list[int]], params: SamplingParams, **request: Any) -> list[RequestOutput]:
        num = len(prompts) * max(params.n, params.num_beams)
        param = "n" if num > len(prompts) else "prompt"
        with (
            self._admission.admit(num, self._caller, param=param),
            self._metrics.watch(self.base, len(prompts) * params.n) as watch,
        ):
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
        param = "n" if num > len(prompts) else "prompt"
        with self._admission.admit(num, self._caller, param=param), self._metrics.watch(self.base, num) as watch:
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

    async def embed(self, texts: list[str] | list[list[int]], **options: Any) -> list[list[float]]:
        """`options`: those of `LLM.embed`."""
        async with self._pass("embeddings are"):
            vectors = await self.model.aembed(texts, **options)
        inflight.begins(await asyncio.to_thread(self._num_tokens, texts))
        return vectors

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        async with self._pass("scores are"):
            scores = await self.model.ascore_pairs(query, texts)
        counts = await asyncio.to_thread(lambda: (self._num_tokens([query]), self._num_tokens(texts)))
        inflight.begins(len(texts) * counts[0] + counts[1])
        return scores

    @asynccontextmanager
    async def _pass(self, what: str) -> AsyncIterator[None]:
        """Admission for one request that is no completion."""
        if self.adapter is not None:
            raise UnsupportedError(
                f"{self.adapter} is an adapter, and {what} made without.", hint=f"Ask {self.base}.", param="model"
            )
        with self._admission.admit(1, self._caller):
            async with self._admission.embeddings:
                yield

    def _num_tokens(self, texts: Sequence[str] | Sequence[list[int]]) -> int:
        encode = self.model.tokenizer.encode
        return sum(len(encode(text) if isinstance(text, str) else text) for text in texts)


class Chatting(Protocol):
    """Applications that chat, under names that no model has."""

    def is_one(self, name: str) -> bool: ...
    def check(self, name: str, caller: Caller) -> None: ...
    async def names(self, caller: Caller) -> list[str]: ...
    def lease(self, name: str, caller: Caller) -> AbstractAsyncContextManager[Served]: ...


class Models:
    """The served models by name, and their adapters by theirs. An alias is a name that is not listed.

    `llms`: models in memory by name, or another `Backing`. Names of one model share its `max_waiting`: completions that
    may be in flight beyond those that run at once.
    """

    def __init__(
        self,
        llms: Mapping[str, ServedModel] | Backing,
        aliases: Mapping[str, str] | None = None,
        *,
        max_waiting: int = 256,
    ) -> None:
        self.backing: Backing = InProcess(llms) if isinstance(llms, Mapping) else llms
        self.metrics = Metrics(self.backing.loaded, self.backing.status)
        self._aliases = dict(aliases or {})
        self._max_waiting = max_waiting
        self._admissions: dict[str, Admission] = {}
        self.created = int(time.time())
        self.apps: Chatting | None = None
        """Set by who has some, before the first request."""

    def is_app(self, name: str) -> bool:
        """Whether a name is that of an application, there or not."""
        return self.apps is not None and self.apps.is_one(name)

    async def names_for(self, caller: Caller) -> list[str]:
        """What the caller may have a conversation with, applications last. After `look`."""
        own = [name for name in self.names if caller.may_use(name)]
        return own + (await self.apps.names(caller) if self.apps is not None else [])

    async def look(self, name: str | None = None, *, facts: bool = False) -> None:
        """Before `names`, `check` and `models[name]`, which tell what was seen: read the disk, without holding up the
        event loop. See `Backing.look`; a lease needs no look before."""
        await self.backing.look(None if name is None else self._aliases.get(name, name), facts=facts)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.backing.names, *(adapter for adapter, _ in self.backing.adapters())]))

    def __getitem__(self, name: str) -> Served:
        """For its facts: only a leased one may be asked. Raises ModelNotFoundError that lists the served names."""
        base, adapter = self._find(name)
        return self._served(base, self.backing.describe(base), adapter)

    @asynccontextmanager
    async def lease(
        self, name: str, caller: Caller = ANYONE, *, keep_alive: float | None = None, sticky: Hashable = None
    ) -> AsyncIterator[Served]:
        """The model for one request; as long as the block runs, it stays. It may have to be loaded first.

        `keep_alive`: seconds that it stays afterwards while no other needs its room (0: none, math.inf: for ever);
        None: as configured. Requests of equal `sticky` (default: the caller) share a copy of the model where there are
        several. Raises ModelNotFoundError, ForbiddenError for a model that the caller may not use, and what
        `Host.lease` raises.
        """
        inflight.asks(name)
        if self.apps is not None and self.apps.is_one(name):
            async with self.apps.lease(name, caller) as app:
                yield app
            return
        await self.look(name)
        base, adapter = self.check(name, caller)
        inflight.asks(adapter or base)  # an alias is none of the names that usage is told by
        if adapter is not None:
            await self.backing.bring(base, adapter)
        own = caller.key_id if sticky is None else sticky
        async with self.backing.lease(base, keep_alive=keep_alive, sticky=own) as model:
            yield self._served(base, model, adapter).for_caller(caller)

    def check(self, name: str, caller: Caller) -> tuple[str, str | None]:
        """The model's own name, and the adapter's if that is what was named; nothing is loaded. Raises
        ModelNotFoundError that lists what the caller may use, and ForbiddenError for a model that it may not."""
        if self.apps is not None and self.apps.is_one(name):
            self.apps.check(name, caller)
            return name, None
        named = self._aliases.get(name, name)
        if not caller.may_use(named):
            found = self.backing.find(named)  # it may be another name of one that is allowed
            caller.check_model(named if found is None else found)
        return self._find(name, caller)

    def _served(self, base: str, model: ServedModel, adapter: str | None) -> Served:
        if base not in self._admissions:
            self._admissions[base] = Admission(base, partial(self.backing.at_once, base), self._max_waiting)
        return Served(base, model, self._admissions[base], self.metrics, adapter)

    def _find(self, name: str, caller: Caller = ANYONE) -> tuple[str, str | None]:
        """The model's own name, and the adapter's if that is what was named."""
        if (base := self.backing.find(self._aliases.get(name, name))) is not None:
            return base, None
        for adapter, base in self.backing.adapters():
            if adapter == name:
                return self.backing.find(base) or base, adapter
        served = ", ".join(filter(caller.may_use, self.names))
        raise ModelNotFoundError(f"The model {name!r} is not served here.", hint=f"Served: {served or 'none'}.")

    def _bases(self) -> list[str]:
        own = (self.backing.find(name) for name in self.backing.names)
        return list(dict.fromkeys(base for base in own if base is not None))

    async def load_adapter(self, name: str, path: str | None, base: str | None) -> None:
        """Serve an adapter of `base` (may be left out where there is one model). Raises InvalidInputError,
        ModelNotFoundError, and what `LLM.load_adapter` raises."""
        await self.look()
        if base is not None:
            await self.look(base)
        await self.backing.load_adapter(self._base_for(name, base), name, path)

    async def unload_adapter(self, name: str) -> None:
        """Raises ModelNotFoundError, and BusyError while requests use it."""
        await self.look(name)
        base, adapter = self._find(name)
        if adapter is None:
            raise ModelNotFoundError(f"{name!r} is a model, not an adapter.")
        await self.backing.unload_adapter(base, adapter)

    def _base_for(self, name: str, base: str | None) -> str:
        if name in self.names or name in self._aliases:
            raise InvalidInputError(f"{name!r} is served already.", hint="Choose another name.", param="lora_name")
        bases = self._bases()
        if base is None and len(bases) != 1:
            raise InvalidInputError(
                "Several models are served, and the adapter's is not named.",
                hint=f"Set base_model_name to one of: {', '.join(bases)}.",
                param="base_model_name",
            )
        found, adapter = self._find(bases[0] if base is None else base)
        if adapter is not None:
            raise InvalidInputError(f"{base!r} is an adapter itself.", param="base_model_name")
        return found
