"""What the host tells of its models. Plain values; times are Unix seconds, durations seconds, memory bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ModelState = Literal["absent", "loading", "ready", "stopping", "failed"]
LoadPhase = Literal["plan", "room", "start", "download", "check", "unpack", "load"]
"""What takes time before a model is ready: what it needs is told from its headers, it waits until others have made
room, its process begins, its files are fetched, its weights are read."""


@dataclass(frozen=True)
class Loading:
    """How far a load is. `done` of `total` bytes of the phase; `seconds` since the process was started, of those that
    it is expected to take without a download."""

    phase: LoadPhase
    done: int
    total: int | None
    seconds: float
    expected_seconds: float | None


@dataclass(frozen=True)
class ReplicaStatus:
    pid: int | None
    device: str
    state: str
    memory: Mapping[str, int]
    """Bytes held for it, by device."""
    measured: int | None
    """Bytes of main memory that it has now."""
    measured_device: int | None
    """Bytes of its device's memory that it has now; 0 on a CPU."""
    busy: int
    draining: bool
    step_seconds: float
    """For how long the engine's current step has been running."""


@dataclass(frozen=True)
class ModelStatus:
    """What the host knows of one model. Times are Unix seconds, durations seconds, memory bytes."""

    name: str
    reference: str
    state: ModelState
    replicas: tuple[ReplicaStatus, ...]
    num_replicas: int
    """As many are wanted."""
    predicted_bytes: Mapping[str, int]
    """Held for all replicas, or, of an absent model, what one is expected to take; by device."""
    measured_bytes: Mapping[str, int]
    plan_error: float | None
    """Of the last load: (predicted - measured) / measured."""
    busy: int
    waiting: int
    keep_alive: float
    """For how long it stays after its last lease; math.inf: until its room is needed."""
    last_used: float | None
    expires_at: float | None
    """None: not loaded, busy, pinned, or kept for ever."""
    pinned: bool
    load_seconds: float | None
    loads: int
    restarts: int
    evictions: Mapping[str, int]
    """By reason: room, idle, unloaded."""
    why_evicted: str | None
    last_error: str | None
    retry_at: float | None
    """When a failed or crashed model may be started again."""
    loading: Loading | None = None
    """Of a model that is."""

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(one.pid for one in self.replicas if one.pid is not None)
