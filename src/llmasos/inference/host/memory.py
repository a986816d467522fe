"""Memory: how much models may take on each device, what one will take, and what it was seen to take.

A prediction is told from headers (`forecast`) until the model has been loaded here once with the same options; from
then on it is what was measured. Measurements lie in `<home>/cache/memory.json`, by the identity of the model's files;
deleting the file costs nothing but the first prediction's accuracy.

A process holds three kinds of memory: what it has once it is loaded (the process itself and the weights), what passes
take besides (activations), and pages. On a CPU pages are memory only once they have been written; they are counted from
the start all the same, because the promise is what must fit.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmasos import __version__
from llmasos.errors import DeviceError, LLMasOSError
from llmasos.inference.host.forecast import Forecast
from llmasos.inference.host.residency import Bytes, Place
from llmasos.inference.host.spare import run_forecast
from llmasos.settings import settings

T = TypeVar("T")

SHARE = 0.9
"""Part of a device's memory that models may take together."""
GPU_HOST = 1_500_000_000
"""Main memory of a process that computes on a GPU, beyond what the same process takes without one."""
LOADING = 3.0, 1e9
"""First guess of how long a load takes: seconds to start a process, and bytes of weights read in a second."""
_MOST_SEEN = 500
_NAMED = {"reference", "device", "dtype", "quantization", "load_format"}


class MemoryUse(Protocol):
    """What a model's process tells of itself, in bytes: main memory, and that of one of its devices."""

    @property
    def rss_bytes(self) -> int: ...
    @property
    def peak_rss_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def peak_device_bytes(self) -> int: ...


class Spec(Protocol):
    """What is read of a ModelSpec."""

    @property
    def reference(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def load_format(self) -> str: ...
    @property
    def engine(self) -> Mapping[str, Any]: ...


# how much there is


class Budgets:
    """The most that models may take together on each device (`limits`, bytes), less what others take of it now.

    `free` tells what a device has left, None where that is not known.
    """

    def __init__(self, limits: Bytes, free: Callable[[str], int | None] = lambda device: None) -> None:
        self.limits, self._free = dict(limits), free

    @classmethod
    def detect(cls, share: float = SHARE, limits: Bytes | None = None) -> Budgets:
        """A `share` of main memory, and of accelerators when they become known (`add`); or the `limits` that are given
        for a device."""
        budgets = cls({"cpu": int(share * main_memory())} | dict(limits or {}), _Free())
        budgets._share = share
        return budgets

    _share = SHARE

    def add(self, devices: Bytes, uuids: Mapping[str, str]) -> None:
        """Accelerators, by their memory. Limits that were given stay."""
        for device, memory in devices.items():
            self.limits.setdefault(device, int(self._share * memory))
        if isinstance(self._free, _Free):
            self._free.uuids.update(uuids)

    def free(self, device: str) -> int | None:
        """Bytes that a device has left now; None where that is not known."""
        return self._free(device)

    def now(self, used: Bytes) -> dict[str, int]:
        """What models may take together now; `used`: what they are using of each device at the moment."""
        found = {}
        for device, limit in self.limits.items():
            free = self._free(device)
            found[device] = limit if free is None else min(limit, used.get(device, 0) + int(self._share * free))
        return found


class _Free:
    def __init__(self) -> None:
        self.uuids: dict[str, str] = {}
        self._nvml: _Nvml | None = None

    def __call__(self, device: str) -> int | None:
        if device == "cpu":
            from llmasos.devices import free_memory

            return min([free_memory(), *(limit - used for limit, used in _cgroups())])
        if device in self.uuids:
            self._nvml = self._nvml or _Nvml()
            return self._nvml.free(self.uuids[device])
        return None


def main_memory() -> int:
    """Bytes that this process and its children may have together: the machine's, or its control group's."""
    from llmasos.devices import total_memory

    return min([total_memory(), *(limit for limit, _ in _cgroups())])


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) of every control group around this process that has a limit: systemd's, a container's, in both
    versions of Linux's interface. Files that the kernel would drop do not count as used."""
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, path in lines:
        if number == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = base / path.lstrip("/")
        for folder in {base, inner, *(p for p in inner.parents if p.is_relative_to(base))}:
            try:
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            if limit < 1 << 60:
                found.append((limit, max(0, used - int(stat.get(names[2], 0)))))
    return found


class _Nvml:
    """NVIDIA's management library: a GPU's free memory without a context on it, which would take half a gigabyte."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1" if sys.platform != "win32" else "nvml.dll")
            if self._library.nvmlInit_v2() != 0:
                self._library = None
        except OSError:
            self._library = None

    def free(self, uuid: str) -> int | None:
        if self._library is None:
            return None
        handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
        if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        if self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory[1])


# how much a model takes


@dataclass
class Seen:
    """What a model's processes were seen to take: main memory and a device's."""

    loaded: int
    """Main memory after loading."""
    load_peak: int
    """Main memory while loading, the mapped files included: those give way where room is short, so it is not needed."""
    beyond: int
    """Of main memory, what a higher peak later on was above `loaded` and, on a CPU, the pages."""
    device: int
    """The highest peak of a device, less the pages."""
    load_seconds: float
    at: float
    """Unix time of the last load."""


@dataclass(frozen=True)
class Prediction:
    key: str
    forecast: Forecast
    seen: Seen | None
    places: tuple[Place, ...]
    load_seconds: float

    @property
    def on_cpu(self) -> bool:
        return self.forecast.device == "cpu"

    def loaded(self, pages: int) -> int:
        """Bytes on the model's own device once it is loaded and idle, pages as far as they are memory by then."""
        told, seen = self.forecast, self.seen
        if self.on_cpu:
            return seen.loaded if seen else told.process + told.weights
        return pages + (seen.device if seen else told.context + told.weights + told.activations)


@dataclass
class Memory:
    """Predicts and remembers. `forecast` asks a process of its own by default; tests pass another."""

    budgets: Budgets
    path: Path | None = None
    """Default: `cache/memory.json` in the home folder."""
    forecast: Callable[[dict[str, Any]], Awaitable[Forecast]] = run_forecast

    async def predict(self, spec: Spec) -> Prediction:
        """Where a model could run and what it takes there. Raises what `store.plan` does."""
        options = {name: getattr(spec, name) for name in _NAMED} | {"engine": _plain(spec.engine)}
        key, entry = await asyncio.to_thread(self._look_up, options)
        told = _read(Forecast, entry.get("forecast"))
        if told is None or (told.device != "cpu" and not self._knows(told.device)):
            told = await self.forecast(options)
        self.budgets.add(told.devices, told.uuids)
        return self._prediction(key, told, _read(Seen, entry.get("seen")), spec.engine.get("kv_cache_memory"))

    def _knows(self, device: str) -> bool:
        return any(known == device or known.startswith(f"{device}:") for known in self.budgets.limits)

    def _prediction(self, key: str, told: Forecast, seen: Seen | None, pages: int | None) -> Prediction:
        seconds = seen.load_seconds if seen else LOADING[0] + told.weights * told.num_ranks / LOADING[1]
        least, most = (told.least_pages, told.most_pages) if pages is None else (pages, pages)
        main, device = told.process, told.context + told.weights + told.activations
        if told.device == "cpu":
            main += told.weights + told.activations
            if seen:
                main = seen.loaded + max(told.activations, seen.beyond)
        else:
            main += GPU_HOST
            if seen:
                main, device = seen.loaded + max(0, seen.beyond), seen.device
        paged = bool(most)

        def place(where: str, on: tuple[str, ...], fixed: dict[str, int]) -> Place:
            return Place(where, fixed, on if paged else (), least, most, told.num_context)

        kind, _, number = told.device.partition(":")
        if kind == "cpu":
            places = [place("cpu", ("cpu",), {"cpu": main})]
        elif kind == "mps":  # the GPU's memory is main memory
            places = [place("mps", ("cpu", "mps"), {"cpu": main + device, "mps": device})]
        elif told.num_ranks > 1:  # ranks take the first devices
            on = tuple(f"{kind}:{i}" for i in range(told.num_ranks))
            places = [place(kind, on, {"cpu": main * told.num_ranks} | dict.fromkeys(on, device))]
        else:
            known = [one for one in self.budgets.limits if one.startswith(f"{kind}:")]
            wanted = [told.device] if number else known
            places = [place(one, (one,), {"cpu": main, one: device}) for one in wanted if one in known]
        if not places:
            raise DeviceError(f"There is no {told.device} here.", hint="See `llmasos doctor`.")
        return Prediction(key, told, seen, tuple(places), seconds)

    def loaded(self, prediction: Prediction, use: MemoryUse, *, pages: int, load_seconds: float) -> Seen:
        """Remember what a load took. Returns what is known now; blocks for a small file."""
        before = prediction.seen
        peak = use.peak_device_bytes + prediction.forecast.context - pages
        seen = Seen(
            loaded=use.rss_bytes,
            load_peak=use.peak_rss_bytes,
            beyond=before.beyond if before else 0,
            device=0 if prediction.on_cpu else max(peak, before.device if before else 0),
            load_seconds=load_seconds,
            at=time.time(),
        )
        self._store(prediction, seen)
        return seen

    def error(self, prediction: Prediction, use: MemoryUse, *, pages: int) -> float:
        """How far a prediction was off: (predicted - measured) / measured, of what the model's own device holds."""
        measured = use.rss_bytes if prediction.on_cpu else use.peak_device_bytes + prediction.forecast.context
        return (prediction.loaded(pages) - measured) / measured if measured else 0.0

    def lived(
        self, prediction: Prediction, seen: Seen, use: MemoryUse, *, pages: int, limit: int | None = None
    ) -> None:
        """Remember the peaks of a process, if they were above what is known. One beyond its `limit` of main memory
        tells of a request that was too large, not of what the model needs: others would have to go for it ever after.
        """
        peak = use.peak_rss_bytes
        higher = peak > seen.load_peak and (limit is None or peak <= limit)
        beyond = peak - seen.loaded - (pages if prediction.on_cpu else 0) if higher else 0
        device = 0 if prediction.on_cpu else use.peak_device_bytes + prediction.forecast.context - pages
        if beyond > seen.beyond or device > seen.device:
            seen.beyond, seen.device = max(beyond, seen.beyond), max(device, seen.device)
            self._store(prediction, seen)

    # the file

    def _file(self) -> Path:
        return self.path or settings().home / "cache" / "memory.json"

    def _look_up(self, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        key = _key(options)
        entry = _read_json(self._file()).get(key, {})
        return key, entry if isinstance(entry, dict) else {}

    def _store(self, prediction: Prediction, seen: Seen) -> None:
        file, forecast = self._file(), vars(prediction.forecast)
        entries = _read_json(file)
        entries[prediction.key] = {"forecast": forecast, "seen": vars(seen)}
        latest = sorted(entries.items(), key=lambda e: _at(e[1]))[-_MOST_SEEN:]
        text = json.dumps(dict(latest), indent=1, sort_keys=True)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        except OSError:  # a full disk costs accuracy, not the model
            with suppress(OSError):
                temporary.unlink()


def _key(options: Mapping[str, Any]) -> str:
    """Which files, which options, which version of ours, on which devices by default. Pages are told apart anyway."""
    engine = {name: value for name, value in options["engine"].items() if name != "kv_cache_memory"}
    defaults = settings()
    parts = [
        __version__,
        _identity(options["reference"]),
        {**options, "engine": engine, "reference": ""},
        [defaults.device, defaults.dtype],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _identity(reference: str) -> Any:
    """Names, sizes and times of a model's files where they are here, else what it is called."""
    from llmasos.store.library import Library, files_at

    try:
        library = Library()
        path = library.path(reference) if library.has(reference) else Path(reference).expanduser().absolute()
        folder = path if path.is_dir() else path.parent
        stats = [(name, (folder / name).stat()) for name in files_at(path)]
        return [str(path), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    except (LLMasOSError, OSError):
        return reference


def _plain(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a JSON object can carry. Of the others (speculation) the first load tells."""
    return {name: value for name, value in engine.items() if isinstance(value, str | int | float | bool)}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(kind: type[T], values: Any) -> T | None:
    """A dataclass from a file that anybody may have edited."""
    named = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    return kind(**values) if isinstance(values, dict) and set(values) == named else None


def _at(entry: Any) -> float:
    try:
        return float(entry["seen"]["at"])
    except (TypeError, KeyError, ValueError):
        return -math.inf
