"""What the host knows of each model, process and lease, and how it tells that."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llmasos.inference.host.memory import MemoryUse, Prediction, Seen
from llmasos.inference.host.residency import Place, Replica, State
from llmasos.inference.host.status import Loading, LoadPhase, ModelState, ModelStatus, ReplicaStatus
from llmasos.store.transfer import Progress

if TYPE_CHECKING:
    from llmasos.inference.host.process import ModelSpec

STOP_GRACE = 5.0
"""Seconds that an idle process has to end by itself."""


class Process(Protocol):
    """What is needed of a ModelProcess."""

    memory_limit: int | None

    @property
    def llm(self) -> Any: ...
    @property
    def pid(self) -> int: ...
    @property
    def memory(self) -> MemoryUse: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def why(self) -> str:
        """Why it has ended."""

    async def wait(self) -> int: ...
    async def stop(self, grace: float) -> None: ...


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """An event loop has both."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer: ...


Start = Callable[..., Awaitable[Process]]
"""ModelProcess.start."""


@dataclass(eq=False)
class Life:
    """One replica's process."""

    replica: Replica
    place: Place
    prediction: Prediction
    began: float
    task: asyncio.Task[None] | None = None
    process: Process | None = None
    seen: Seen | None = None
    progress: Progress | None = None
    """Of the load; None until the process says something."""
    grace: float = STOP_GRACE


@dataclass(eq=False)
class Hosted:
    spec: ModelSpec
    num_replicas: int
    keep_alive: float
    pinned: bool
    waiting: deque[Lease] = field(default_factory=deque)
    lives: dict[int, Life] = field(default_factory=dict)
    prediction: Prediction | None = None
    stale: bool = True
    """What a load took since the prediction was made is not in it."""
    predicting: asyncio.Task[None] | None = None
    restart: bool = False
    crashes: int = 0
    failures: int = 0
    failure: BaseException | None = None
    retry_at: float = -math.inf
    last_error: str | None = None
    last_used: float | None = None
    why_evicted: str | None = None
    load_seconds: float | None = None
    plan_error: float | None = None
    loads: int = 0
    restarts: int = 0
    evictions: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return str(self.spec.name)


@dataclass(eq=False)
class Lease:
    hosted: Hosted
    keep_alive: float
    sticky: Hashable
    replica: Replica | None = None
    given: asyncio.Future[None] | None = None
    retries: int = 0


def used(life: Life) -> dict[str, int]:
    """What a process has now, by device."""
    if life.process is None:
        return {}
    memory, device = life.process.memory, life.place.device
    used = {"cpu": memory.rss_bytes}
    if device != "cpu":
        ranks = [d for d in life.place.paged if d != "cpu"] or [device]
        used |= dict.fromkeys(ranks, memory.device_bytes + life.prediction.forecast.context)
    return used


def status_of(hosted: Hosted, now: float) -> ModelStatus:
    """`now`: by the host's clock."""
    unix = time.time()
    replicas = [life.replica for life in hosted.lives.values()]
    states = {replica.state for replica in replicas}
    waits = hosted.failure is not None or hosted.crashes > 0
    retry_at = unix + hosted.retry_at - now if waits and hosted.retry_at > now else None
    ready = [r for r in replicas if r.state is State.READY]
    expiries = [r.expires_at for r in ready if not r.busy and not r.pinned and r.expires_at < math.inf]
    state: ModelState = "absent"
    if State.READY in states:
        state = "ready"
    elif State.LOADING in states or hosted.waiting or hosted.restart:
        state = "loading"
    elif states:
        state = "stopping"
    elif hosted.failure is not None:
        state = "failed"
    predicted, measured = Counter[str](), Counter[str]()
    for life in hosted.lives.values():
        predicted.update(life.replica.memory)
        measured.update(used(life))
    if not replicas and hosted.prediction is not None:
        predicted.update(hosted.prediction.places[0].least)
    return ModelStatus(
        loading=_loading(hosted, now) if state == "loading" else None,
        name=hosted.name,
        reference=hosted.spec.reference,
        state=state,
        replicas=tuple(_replica_status(life) for life in hosted.lives.values()),
        num_replicas=hosted.num_replicas,
        predicted_bytes=dict(predicted),
        measured_bytes=dict(measured),
        plan_error=hosted.plan_error,
        busy=sum(r.busy for r in replicas),
        waiting=len(hosted.waiting),
        keep_alive=hosted.keep_alive,
        last_used=hosted.last_used,
        expires_at=unix + max(expiries) - now if len(expiries) == len(ready) and expiries else None,
        pinned=hosted.pinned,
        load_seconds=hosted.load_seconds,
        loads=hosted.loads,
        restarts=hosted.restarts,
        evictions=dict(hosted.evictions),
        why_evicted=hosted.why_evicted,
        last_error=hosted.last_error,
        retry_at=retry_at,
    )


def _loading(hosted: Hosted, now: float) -> Loading:
    """Of the replica that has been loading for longest."""
    lives = [life for life in hosted.lives.values() if life.replica.state is State.LOADING]
    if not lives:
        known = hosted.prediction is not None and not hosted.stale
        return Loading("room" if known else "plan", 0, None, 0.0, None)
    life = min(lives, key=lambda life: life.began)
    progress = life.progress or Progress("note")
    phase: LoadPhase = "start"
    if progress.phase != "note" and progress.phase != "wait" and progress.phase != "done":
        phase = progress.phase
    return Loading(phase, progress.done, progress.total, now - life.began, life.replica.load_seconds)


def _replica_status(life: Life) -> ReplicaStatus:
    replica, process = life.replica, life.process
    return ReplicaStatus(
        pid=process.pid if process else None,
        device=replica.device,
        state=replica.state.value,
        memory=dict(replica.memory),
        measured=process.memory.rss_bytes if process else None,
        measured_device=process.memory.device_bytes if process else None,
        busy=replica.busy,
        draining=replica.draining,
        step_seconds=process.step_seconds if process else 0.0,
    )
