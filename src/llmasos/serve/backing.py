"""Where served models come from: a program's own, in its process, or a host's, each in a process of its own.

`Models` puts names, limits and numbers around either.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from llmasos.errors import BusyError, LLMasOSError, ModelCrashedError, NotFoundError
from llmasos.inference.config import EngineConfig
from llmasos.inference.state import AdapterInfo, EngineStats
from llmasos.serve.installed import Facts, Installed, find_installed, installed, read_all_facts
from llmasos.serve.served import ServedModel
from llmasos.store.adapters import WEIGHTS, InstalledAdapter, installed_adapters

if TYPE_CHECKING:
    from llmasos.inference.host.host import Host
    from llmasos.inference.host.process import ModelSpec
    from llmasos.inference.host.status import ModelStatus

_log = logging.getLogger("llmasos")

MOST_SEEN = 1000
"""Names of installed models that are remembered; a model has many spellings."""


class Backing(Protocol):
    """Models by their own names. A model may have further names, by which `find` knows it. Only `look` reads the disk,
    in a thread: the others tell what it saw."""

    async def look(self, name: str | None = None, *, facts: bool = False) -> None:
        """Before `names`, `find` and `describe`: see which models there are, or whether there is that one, and with
        `facts` what they are. Raises FormatError for a damaged model, StoreError for one that lacks files."""

    @property
    def names(self) -> list[str]: ...
    def find(self, name: str) -> str | None:
        """The own name of the model that `name` means; None: there is none."""

    def describe(self, name: str) -> ServedModel:
        """For facts; only a leased one may be asked."""

    def reference(self, name: str) -> str:
        """What the model was loaded from, or would be: a path, or a name in the library."""

    def at_once(self, name: str) -> int:
        """Completions that the model computes at a time."""

    def lease(
        self, name: str, *, keep_alive: float | None, sticky: Hashable
    ) -> AbstractAsyncContextManager[ServedModel]: ...
    def loaded(self) -> Mapping[str, Sequence[ServedModel]]:
        """By name, every copy that is in memory."""

    def status(self) -> list[ModelStatus]:
        """What a host tells; empty without one."""

    def adapters(self) -> Iterator[tuple[str, str]]:
        """Every adapter, with the own name of its model."""

    async def bring(self, name: str, adapter: str) -> None:
        """Before a request for one of `adapters`: the model knows it, as it is on the disk now."""

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None: ...
    async def unload_adapter(self, name: str, adapter: str) -> None: ...


class InProcess:
    """Models that are in memory as long as the program wants. Two names may mean the same one."""

    def __init__(self, llms: Mapping[str, ServedModel]) -> None:
        self._llms = dict(llms)
        self._own: dict[int, str] = {}
        for name, llm in llms.items():
            self._own.setdefault(id(llm), name)

    async def look(self, name: str | None = None, *, facts: bool = False) -> None:
        pass

    @property
    def names(self) -> list[str]:
        return list(self._llms)

    def find(self, name: str) -> str | None:
        return self._own[id(self._llms[name])] if name in self._llms else None

    def describe(self, name: str) -> ServedModel:
        return self._llms[name]

    def reference(self, name: str) -> str:
        model = getattr(self._llms[name], "model", None)
        return name if model is None else str(model.path)

    def at_once(self, name: str) -> int:
        return self._llms[name].engine_config.max_num_seqs

    @asynccontextmanager
    async def lease(self, name: str, *, keep_alive: float | None, sticky: Hashable) -> AsyncIterator[ServedModel]:
        yield self._llms[name]

    def loaded(self) -> Mapping[str, Sequence[ServedModel]]:
        return {name: [self._llms[name]] for name in self._own.values()}

    def status(self) -> list[ModelStatus]:
        return []

    def adapters(self) -> Iterator[tuple[str, str]]:
        return ((info.name, name) for name in self._own.values() for info in self._llms[name].adapters)

    async def bring(self, name: str, adapter: str) -> None:
        pass

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None:
        await asyncio.to_thread(self._llms[name].load_adapter, adapter, path)

    async def unload_adapter(self, name: str, adapter: str) -> None:
        await asyncio.to_thread(self._llms[name].unload_adapter, adapter)


class Hosted:
    """A host's models. With `installed`, those of the library too: it makes a model's spec of its name and path, and
    the options of `Host.add`. Adapters of the library whose model is among them are served beside it: a model gets
    one with its first request."""

    def __init__(
        self, host: Host, *, installed: Callable[[str, Path], tuple[ModelSpec, Mapping[str, Any]]] | None = None
    ) -> None:
        self.host, self._installed = host, installed
        self._given = set(host.names)
        self._shelf: list[str] = []
        """Names of the library's models."""
        self._seen: dict[str, Installed] = {}
        """By every name that was looked for."""
        self._facts: dict[str, Facts] = {}
        self._adapters: dict[str, InstalledAdapter] = {}
        """Of the library, by name."""
        self._brought: dict[str, int] = {}
        """Those that a model was told of, each with its weights' time stamp then."""
        self._bringing: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def look(self, name: str | None = None, *, facts: bool = False) -> None:
        if self._installed is not None and name is None:
            there = {one.name: one for one in await asyncio.to_thread(installed)}
            self._shelf = list(there)
            spelt = {name: there[one.name] for name, one in self._seen.items() if one.name in there}
            self._seen = spelt | there
            await self._forget_removed()
        elif self._installed is not None and name is not None and not self._is_known(name):
            self._see(name, await asyncio.to_thread(find_installed, name))
        if name is None or not (self._is_known(name) or name in self._seen):
            await self._look_for_adapters(name)
        if facts:
            own = None if name is None else self.find(name) or dict(self.adapters()).get(name)
            names = self.names if name is None else [own] if own else []
            wanted = [self._spec(one).reference for one in names if one not in self.host.loaded()]
            self._facts |= await asyncio.to_thread(read_all_facts, wanted)

    async def _look_for_adapters(self, name: str | None) -> None:
        found = {one.name: one for one in await asyncio.to_thread(installed_adapters)}
        wanted = next((one for one in found.values() if name in (one.name, one.path.name)), None)
        if wanted is not None and self._installed is not None and wanted.base not in self._seen:
            self._see(wanted.base, await asyncio.to_thread(find_installed, wanted.base))
        self._adapters = found

    def _base_of(self, adapter: InstalledAdapter) -> str | None:
        """Its model's own name, if that is served; the host need not know it yet."""
        if adapter.base in self._given:
            return adapter.base
        for name in self._given:
            if self.host.spec(name).reference == adapter.base:
                return name
        seen = self._seen.get(adapter.base) if self._installed is not None else None
        return None if seen is None else seen.name

    def _is_known(self, name: str) -> bool:
        """Without a look at the disk: requests for what is in memory need none."""
        return name in self._given or bool(self.host.loaded().get(name)) or any(name == a for a, _ in self.adapters())

    def _see(self, name: str, found: Installed | None) -> None:
        if found is None:
            self._seen.pop(name, None)
            return
        if len(self._seen) > MOST_SEEN:
            self._seen.clear()
        self._seen[name] = self._seen[found.name] = found

    async def _forget_removed(self) -> None:
        """What is neither in the library nor in memory any more."""
        for one in self.host.status():
            if one.state in ("absent", "failed") and one.name not in self._given and one.name not in self._seen:
                await self.removed(one.name)

    async def removed(self, name: str) -> None:
        """A model's files are gone: it is served no longer than it is in use."""
        with suppress(BusyError, NotFoundError):
            await self.host.remove(name)
            self._given.discard(name)
        self._shelf = [one for one in self._shelf if one != name]
        self._seen = {spelt: one for spelt, one in self._seen.items() if one.name != name}

    @property
    def names(self) -> list[str]:
        given = [name for name in self.host.names if name in self._given]
        return list(dict.fromkeys([*given, *self._shelf]))

    def add(self, spec: ModelSpec, **options: Any) -> None:
        """Serve a further model; `options` are those of `Host.add`."""
        self.host.add(spec, **options)
        self._given.add(spec.name)

    def find(self, name: str) -> str | None:
        if name in self.host and (name in self._given or self.host.loaded().get(name)):
            return name
        seen = self._seen.get(name)
        if seen is None or self._installed is None:
            return None
        if seen.name not in self.host:
            spec, options = self._installed(seen.name, seen.path)
            self.host.add(spec, **options)
        return seen.name

    def _spec(self, name: str) -> ModelSpec:
        """Of a model that `names` tells of, without making it the host's."""
        if name in self.host:
            return self.host.spec(name)
        assert self._installed is not None
        return self._installed(name, self._seen[name].path)[0]

    def describe(self, name: str) -> ServedModel:
        there = self.host.loaded().get(name)
        spec = self.host.spec(name)
        found = there[0] if there else Absent(spec, self._facts.get(spec.reference) or Facts())
        return cast(ServedModel, found)

    def reference(self, name: str) -> str:
        return self._spec(name).reference

    def at_once(self, name: str) -> int:
        options = EngineConfig.of(**self.host.spec(name).engine)
        return options.max_num_seqs * max(1, len(self.host.loaded().get(name, ())))

    @asynccontextmanager
    async def lease(self, name: str, *, keep_alive: float | None, sticky: Hashable) -> AsyncIterator[ServedModel]:
        self._forget_brought(name)
        async with self.host.lease(name, keep_alive=keep_alive, sticky=sticky) as model:
            yield model

    def loaded(self) -> Mapping[str, Sequence[ServedModel]]:
        return self.host.loaded()

    def status(self) -> list[ModelStatus]:
        return self.host.status()

    def adapters(self) -> Iterator[tuple[str, str]]:
        for name in self.host.names:
            yield from ((adapter, name) for adapter in self.host.spec(name).adapters if adapter not in self._brought)
        for one in self._adapters.values():
            if (base := self._base_of(one)) is not None:
                yield one.name, base

    async def bring(self, name: str, adapter: str) -> None:
        one = self._adapters.get(adapter)
        if one is None:
            return
        async with self._bringing[name]:
            self._forget_brought(name)
            stamp = await asyncio.to_thread(_stamp, one.path)
            if stamp is not None and self._brought.get(adapter) == stamp:
                return
            if adapter in self._brought:  # it was trained further, or removed
                try:
                    await self.unload_adapter(name, adapter)
                except BusyError:
                    if stamp is not None:
                        return  # those who ask while it is in use get the one before
            if stamp is None:
                del self._adapters[adapter]
                raise NotFoundError(f"The adapter {adapter} is not installed any more.", hint="GET /v1/models lists.")
            await self.load_adapter(name, adapter, str(one.path))
            self._brought[adapter] = stamp

    def _forget_brought(self, name: str) -> None:
        """A model that is not in memory begins without the library's adapters: each comes again when it is asked for,
        and one that is damaged or gone does not keep the model from loading."""
        if not self._brought or self.host.loaded().get(name):
            return
        spec = self.host.spec(name)
        if gone := [one for one in spec.adapters if one in self._brought]:
            self.host.amend(replace(spec, adapters={k: v for k, v in spec.adapters.items() if k not in gone}))
            for one in gone:
                del self._brought[one]

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None:
        """Into every copy or none, and with every load from now on."""
        async with self.host.lease(name):
            await self._in_every_copy(
                name, lambda llm: llm.load_adapter(adapter, path), undo=lambda llm: llm.unload_adapter(adapter)
            )
            spec = self.host.spec(name)
            self.host.amend(replace(spec, adapters={**spec.adapters, adapter: path or adapter}))

    async def unload_adapter(self, name: str, adapter: str) -> None:
        """From every copy or none."""
        path = self.host.spec(name).adapters[adapter]

        def unload(llm: ServedModel) -> None:
            with suppress(ModelCrashedError):  # then it is gone from there, too
                llm.unload_adapter(adapter)

        await self._in_every_copy(name, unload, undo=lambda llm: llm.load_adapter(adapter, path))
        spec = self.host.spec(name)
        self.host.amend(replace(spec, adapters={k: v for k, v in spec.adapters.items() if k != adapter}))
        self._brought.pop(adapter, None)

    async def _in_every_copy(
        self, name: str, work: Callable[[ServedModel], None], *, undo: Callable[[ServedModel], None]
    ) -> None:
        """Also in those that become ready meanwhile. The next statement of the caller runs before another can."""
        done: list[ServedModel] = []
        try:
            while left := [llm for llm in self.host.loaded().get(name, []) if llm not in done]:
                await asyncio.to_thread(work, left[0])
                done.append(left[0])
        except Exception:
            for llm in done:
                try:
                    await asyncio.to_thread(undo, llm)
                except LLMasOSError as e:
                    _log.warning("A copy of %s could not be put back: %s", name, e.message)
            raise


def _stamp(adapter: Path) -> int | None:
    """Of an adapter's weights; None: it is gone."""
    try:
        return (adapter / WEIGHTS).stat().st_mtime_ns
    except OSError:
        return None


class Absent:
    """What is known of a model that is not in memory."""

    matryoshka = False

    def __init__(self, spec: ModelSpec, facts: Facts) -> None:
        self.name = spec.name
        self.engine_config = EngineConfig.of(**spec.engine)
        self.stats = EngineStats()
        self.adapters = [
            AdapterInfo(name, Path(path), slot=None, rank=0, num_requests=0) for name, path in spec.adapters.items()
        ]
        self.is_encoder, self.chat_template = facts.is_encoder, facts.chat_template
        self.context_length = min(facts.context_length, self.engine_config.max_model_len or facts.context_length)
