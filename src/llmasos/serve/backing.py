"""Where served models come from: a program's own, in its process, or a host's, each in a process of its own.

`Models` puts names, limits and numbers around either.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError
from llmasos.inference.config import EngineConfig
from llmasos.inference.state import AdapterInfo, EngineStats
from llmasos.store.headers import opener, read_facts
from llmasos.store.library import Library, files_at
from llmasos.text import read_chat_template

if TYPE_CHECKING:
    from llmasos.inference.host.host import Host
    from llmasos.inference.host.process import ModelSpec
    from llmasos.inference.host.status import ModelStatus
    from llmasos.serve.models import ServedModel


class Backing(Protocol):
    """Models by their own names. A model may have further names, by which `find` knows it."""

    @property
    def names(self) -> list[str]: ...
    def find(self, name: str) -> str | None:
        """The own name of the model that `name` means; None: there is none."""

    def describe(self, name: str) -> ServedModel:
        """For facts; only a leased one may be asked."""

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

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None: ...
    async def unload_adapter(self, name: str, adapter: str) -> None: ...


class InProcess:
    """Models that are in memory as long as the program wants. Two names may mean the same one."""

    def __init__(self, llms: Mapping[str, ServedModel]) -> None:
        self._llms = dict(llms)
        self._own: dict[int, str] = {}
        for name, llm in llms.items():
            self._own.setdefault(id(llm), name)

    @property
    def names(self) -> list[str]:
        return list(self._llms)

    def find(self, name: str) -> str | None:
        return self._own[id(self._llms[name])] if name in self._llms else None

    def describe(self, name: str) -> ServedModel:
        return self._llms[name]

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

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None:
        await asyncio.to_thread(self._llms[name].load_adapter, adapter, path)

    async def unload_adapter(self, name: str, adapter: str) -> None:
        await asyncio.to_thread(self._llms[name].unload_adapter, adapter)


class Hosted:
    """A host's models. With `installed`, those of the library too: it makes a model's spec of its name and path, and
    the options of `Host.add`."""

    def __init__(
        self, host: Host, *, installed: Callable[[str, Path], tuple[ModelSpec, Mapping[str, Any]]] | None = None
    ) -> None:
        self.host, self._installed = host, installed
        self._given = set(host.names)

    @property
    def names(self) -> list[str]:
        found = dict.fromkeys(name for name in self.host.names if name in self._given)
        if self._installed is not None:
            found |= dict.fromkeys(card.name for card in Library().list() if not card.error)
        return list(found)

    def add(self, spec: ModelSpec, **options: Any) -> None:
        """Serve a further model; `options` are those of `Host.add`."""
        self.host.add(spec, **options)
        self._given.add(spec.name)

    def find(self, name: str) -> str | None:
        if name in self._given and name in self.host:
            return name
        return self._in_library(name) if self._installed is not None else None

    def _in_library(self, name: str) -> str | None:
        """Adds an installed model to the host's."""
        assert self._installed is not None
        if name in self.host and self.host.loaded().get(name):
            return name  # no look at the disk for every request
        library = Library()
        try:
            own, path = library.get(name).name, library.path(name)
        except (NotFoundError, InvalidInputError):
            return None
        if own not in self.host:
            spec, options = self._installed(own, path)
            self.host.add(spec, **options)
        return own

    def describe(self, name: str) -> ServedModel:
        there = self.host.loaded().get(name)
        found = there[0] if there else Absent(self.host.spec(name))
        return cast("ServedModel", found)

    def at_once(self, name: str) -> int:
        options = EngineConfig.of(**self.host.spec(name).engine)
        return options.max_num_seqs * max(1, len(self.host.loaded().get(name, ())))

    def lease(
        self, name: str, *, keep_alive: float | None, sticky: Hashable
    ) -> AbstractAsyncContextManager[ServedModel]:
        return self.host.lease(name, keep_alive=keep_alive, sticky=sticky)

    def loaded(self) -> Mapping[str, Sequence[ServedModel]]:
        return self.host.loaded()

    def status(self) -> list[ModelStatus]:
        return self.host.status()

    def adapters(self) -> Iterator[tuple[str, str]]:
        return ((adapter, name) for name in self.host.names for adapter in self.host.spec(name).adapters)

    async def load_adapter(self, name: str, adapter: str, path: str | None) -> None:
        """Into every copy, and with every load from now on."""
        async with self.host.lease(name):
            for llm in self.host.loaded().get(name, []):
                await asyncio.to_thread(llm.load_adapter, adapter, path)
        spec = self.host.spec(name)
        self.host.amend(replace(spec, adapters={**spec.adapters, adapter: path or adapter}))

    async def unload_adapter(self, name: str, adapter: str) -> None:
        for llm in self.host.loaded().get(name, []):
            await asyncio.to_thread(llm.unload_adapter, adapter)
        spec = self.host.spec(name)
        self.host.amend(replace(spec, adapters={k: v for k, v in spec.adapters.items() if k != adapter}))


class Absent:
    """What is known of a model that is not in memory, from its files' headers. Files that can't be read say nothing
    here: loading them says what is wrong."""

    matryoshka = False

    def __init__(self, spec: ModelSpec) -> None:
        self.name = spec.name
        self.engine_config = EngineConfig.of(**spec.engine)
        self.stats = EngineStats()
        self.adapters = [
            AdapterInfo(name, Path(path), slot=None, rank=0, num_requests=0) for name, path in spec.adapters.items()
        ]
        self.is_encoder, length, self.chat_template = _facts_of(spec.reference)
        self.context_length = min(length, self.engine_config.max_model_len or length)


def _facts_of(reference: str) -> tuple[bool, int, str | None]:
    """Is it an encoder, its context, its chat template."""
    try:
        library = Library()
        path = library.path(reference) if library.has(reference) else Path(reference).expanduser().absolute()
        return _read(path, path.stat().st_mtime_ns)
    except (LLMasOSError, OSError):
        return False, 0, None


@lru_cache(maxsize=512)
def _read(path: Path, changed: int) -> tuple[bool, int, str | None]:
    """`changed` makes replaced files new ones."""
    config = read_facts(files_at(path), opener(path if path.is_dir() else path.parent)).config
    return config.is_encoder, config.context_length, read_chat_template(path)
