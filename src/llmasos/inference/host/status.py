"""What the host tells of its models. Plain values; times are Unix seconds, durations seconds, memory bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ModelState = Literal["absent", "loading", "ready", "stopping", "failed"]


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

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(one.pid for one in self.replicas if one.pid is not None)
