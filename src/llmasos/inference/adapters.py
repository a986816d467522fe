"""Adapters of a model that is being served: loaded and unloaded by name, mixed per request within one pass.

A known adapter lies in a slot of the wrapped layers, or, when others needed the room, only on disk, until a request
names it again. One thread calls everything here: the engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmasos.errors import BusyError, InsufficientMemoryError, InvalidInputError, NotFoundError
from llmasos.inference.state import AdapterInfo
from llmasos.models.lora import (
    Adapter,
    LoraLinear,
    LoraState,
    check_adaptable,
    linear_layers,
    read_adapter,
    unwrap,
    wrap,
)
from llmasos.settings import settings

if TYPE_CHECKING:
    from llmasos.inference.kernels.lora import Routes
    from llmasos.models.load import LoadedModel

Ints = NDArray[Any]
MAX_RANK = 64
"""Of adapters from anywhere, where nobody says it."""


@dataclass
class _Entry:
    name: str
    path: Path
    slot: int | None = None
    rank: int = 0
    key: int = 0
    num_requests: int = 0
    last_use: int = 0


class Adapters:
    """`max_adapters` lie in memory at once; more may be known. `max_rank`: of each; None: MAX_RANK, and any of those
    that somebody put into the library. `state.version` grows when the model's layers or the adapters' memory were
    exchanged: then what was derived from them (CUDA graphs) is stale."""

    def __init__(self, model: LoadedModel, *, max_adapters: int = 8, max_rank: int | None = None) -> None:
        for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
            if value is not None and value < 1:
                raise InvalidInputError(f"{name}={value} is not a whole number of at least 1.", param=name)
        check_adaptable(model)
        self.model, self.max_adapters, self.max_rank = model, max_adapters, max_rank
        on_gpu = model.module.device.type == "cuda"
        self.state: LoraState = GPULoraState(max_adapters, model.module.device) if on_gpu else LoraState()
        self._entries: dict[str, _Entry] = {}
        self._keys, self._clock = itertools.count(1), itertools.count(1)

    # what is here

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def list(self) -> list[AdapterInfo]:
        return [
            AdapterInfo(e.name, e.path, e.slot, e.rank, e.num_requests)
            for e in sorted(self._entries.values(), key=lambda e: e.name)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory that the slots take on the model's device."""
        return sum(t.numel() * t.element_size() for layer in self._wrapped().values() for t in (layer.a, layer.b))

    def _wrapped(self) -> dict[str, LoraLinear]:
        layers = linear_layers(self.model.module)
        return {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise NotFoundError(
                f"No adapter {name!r} is loaded.", hint=f"Loaded: {', '.join(self.names) or 'none'}; load it first."
            )
        return self._entries[name]

    # loading

    def load(self, name: str, path: Path | str | None = None) -> int:
        """Make an adapter known and bring it into a slot, which is returned. `path`: a PEFT folder, or a name in the
        home's `adapters` folder; default: the name.

        What a failing load finds stays as it was. Raises NotFoundError, FormatError, UnsupportedError,
        InvalidInputError, InsufficientMemoryError, and BusyError when running requests use every slot.
        """
        if not name.strip():
            raise InvalidInputError(f"{name!r} is no name for an adapter.", param="name")
        folder = _resolve(name if path is None else path)
        known = self._entries.get(name)
        if known is not None and known.path != folder:
            raise InvalidInputError(
                f"The adapter {name!r} is loaded from {known.path}.", hint="Unload it first.", param="name"
            )
        entry = known or _Entry(name, folder)
        slot = self._bring(entry)
        self._entries[name] = entry
        return slot

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises NotFoundError, and BusyError while requests use it. The last one gone, the model
        is what it was before the first."""
        entry = self._entry(name)
        if entry.num_requests:
            raise BusyError(
                f"The adapter {name!r} is in use by {entry.num_requests} running requests.",
                hint="Wait for them or cancel them, then unload.",
            )
        self._evict(entry)
        del self._entries[name]
        self._unwrap_if_unused()

    def _unwrap_if_unused(self) -> None:
        if not self._entries:
            unwrap(self.model)
            self.state.plan(None)
            self.state.version += 1

    def _bring(self, entry: _Entry) -> int:
        entry.last_use = next(self._clock)
        if entry.slot is None:
            adapter = read_adapter(entry.path, self.model)
            if (most := self._most_rank(entry.path)) is not None and adapter.rank > most:
                raise InvalidInputError(
                    f"The adapter {entry.name!r} has rank {adapter.rank}; at most {most} is allowed here.",
                    hint=f"Raise max_lora_rank to {adapter.rank}.",
                    param="max_lora_rank",
                )
            slot = self._free_slot()
            self._put(slot, adapter)
            entry.slot, entry.rank, entry.key = slot, adapter.rank, next(self._keys)
        return entry.slot

    def _most_rank(self, folder: Path) -> int | None:
        """None: any."""
        if self.max_rank is None:
            return None if folder.parent == _library().resolve() else MAX_RANK
        return self.max_rank

    def _free_slot(self) -> int:
        """The first empty slot, else that of the adapter that was not used for the longest time."""
        taken = {e.slot for e in self._entries.values()}
        free = [slot for slot in range(self.max_adapters) if slot not in taken]
        if free:
            return free[0]
        idle = [e for e in self._entries.values() if e.slot is not None and not e.num_requests]
        if not idle:
            raise BusyError(
                f"Running requests use all {self.max_adapters} adapters that fit at once.",
                hint="Try again when one has ended, or raise max_loras.",
            )
        oldest = min(idle, key=lambda e: e.last_use)
        slot = oldest.slot
        assert slot is not None
        self._evict(oldest)
        return slot

    def _evict(self, entry: _Entry) -> None:
        if entry.slot is not None:
            for layer in self._wrapped().values():
                layer.put(entry.slot, None)
        entry.slot = None

    def _put(self, slot: int, adapter: Adapter) -> None:
        """Slots are made in doubling numbers: one adapter does not pay for max_adapters."""
        num_slots = min(1 << slot.bit_length(), self.max_adapters)
        try:
            for name in adapter.layers.keys() - self._wrapped().keys():
                wrap(self.model, name, self.state)
                self.state.version += 1
            for name, layer in self._wrapped().items():
                weights = adapter.layers.get(name)
                if layer.reserve(num_slots, max(weights.ranks) if weights else 0):
                    self.state.version += 1
                layer.put(slot, weights)
        except torch.OutOfMemoryError as e:
            for layer in self._wrapped().values():
                if slot < len(layer.ranks):
                    layer.put(slot, None)
            num_bytes = self.num_bytes
            self._unwrap_if_unused()
            raise InsufficientMemoryError(
                f"The device has no room for an adapter of rank {adapter.rank} beside {num_bytes >> 20} MiB of "
                "adapters.",
                hint="Unload another, or leave more memory: a smaller gpu_memory_utilization.",
            ) from e

    # requests

    def available(self, name: str) -> bool:
        """`acquire` would find a slot now. Raises NotFoundError."""
        if self._entry(name).slot is not None:
            return True
        resident = [e for e in self._entries.values() if e.slot is not None]
        return len(resident) < self.max_adapters or any(not e.num_requests for e in resident)

    def acquire(self, name: str) -> int:
        """Keep an adapter in its slot for one more request, brought back from disk if need be. Returns a number that no
        other content has had, as salt of the request's keys and values. Raises as `load`."""
        entry = self._entry(name)
        self._bring(entry)
        entry.num_requests += 1
        return entry.key

    def release(self, name: str) -> None:
        """One request less."""
        entry = self._entry(name)
        assert entry.num_requests > 0, f"{name} was released more often than acquired"
        entry.num_requests -= 1

    def release_all(self) -> None:
        """No request runs any more: their engine broke."""
        for entry in self._entries.values():
            entry.num_requests = 0

    def token_slots(self, names: Sequence[str | None], num_tokens: Sequence[int]) -> Ints | None:
        """Slots [T] for `LoraState.plan`, from each sequence's adapter and its number of tokens; None: no adapter."""
        if not any(name is not None for name in names):
            return None
        slots = [-1 if name is None else self._entries[name].slot for name in names]
        return np.repeat(np.array(slots, np.int32), num_tokens)


def _resolve(path: Path | str) -> Path:
    """A folder as given, or of that name in the home's adapters."""
    given = Path(path).expanduser()
    installed = _library() / given
    if given.is_dir():
        return given.resolve()
    if len(given.parts) == 1 and given.name not in ("", "..") and installed.is_dir():
        return installed.resolve()
    raise NotFoundError(
        f"There is no adapter folder {path}, and none of that name in {_library()}.",
        hint="Give the folder that PEFT's save_pretrained wrote.",
    )


def _library() -> Path:
    return settings().home / "adapters"


class GPULoraState(LoraState):
    """The same with kernels that take all adapters of a pass at once.

    A CUDA graph keeps Routes of its own (`buffers`): `capturing` them while it is recorded, `fill` before each replay.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        super().__init__()
        self.num_slots, self.device = num_slots, device
        self._routes: Routes | None = None
        self._cuts: dict[tuple[int, ...], Tensor] = {}

    @property
    def active(self) -> bool:
        return self._routes is not None

    def plan(self, token_slots: Ints | None) -> None:
        self._routes = None
        if token_slots is not None and (token_slots >= 0).any():
            self._routes = self.buffers(len(token_slots))
            self.fill(self._routes, token_slots)

    def buffers(self, num_tokens: int) -> Routes:
        from llmasos.inference.kernels.lora import Routes

        return Routes.empty(num_tokens, self.num_slots, self.device)

    def capturing(self, routes: Routes | None) -> None:
        """The next passes take their adapters from `routes`."""
        self._routes = routes

    def fill(self, routes: Routes, token_slots: Ints) -> None:
        """Slots [T] into routes of as many tokens or more."""
        from llmasos.inference.kernels.lora import sort

        table = torch.from_numpy(sort(token_slots, routes.num_tokens, self.num_slots))
        if self.device.type == "cuda":
            table = table.pin_memory()  # torch keeps the block until the copy has read it
        routes.table.copy_(table, non_blocking=True)

    def add(self, y: Tensor, x: Tensor, layer: LoraLinear) -> None:
        from llmasos.inference.kernels.lora import add_lora, cuts_of

        assert self._routes is not None
        if layer.sizes not in self._cuts:
            self._cuts[layer.sizes] = cuts_of(layer.sizes, self.device)
        add_lora(y, x, layer.a, layer.b, self._cuts[layer.sizes], self._routes)
