"""Which models are loaded: look, load, unload, pin."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from fastapi import APIRouter, Request

from llmasos.client.types.native import (
    LoadProgress,
    LoadRequest,
    ModelStatus,
    ModelStatusList,
    PinRequest,
    ReplicaInfo,
    UnloadRequest,
)
from llmasos.errors import UnsupportedError
from llmasos.inference.host.status import ModelStatus as HostStatus
from llmasos.serve import inflight
from llmasos.serve.backing import Hosted
from llmasos.serve.caller import caller_of
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.native.common import responses
from llmasos.serve.served import ServedModel


class Residents(Protocol):
    """Who decides what is loaded. Unknown names raise ModelNotFoundError."""

    def status(self) -> list[ModelStatus]: ...
    async def load(self, name: str, *, pin: bool | None) -> None: ...
    async def unload(self, name: str, *, force: bool) -> None: ...
    async def pin(self, name: str, pinned: bool) -> None: ...
    async def keep(self, name: str, seconds: float) -> None:
        """How long it stays after its last request; math.inf: until its room is needed."""

    async def removed(self, name: str) -> None:
        """The model's files were deleted."""


class InProcess:
    """Models that a program has loaded and lent to the server: they stay as long as the program wants."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def status(self) -> list[ModelStatus]:
        return [self._describe(name, copies) for name, copies in self._models.backing.loaded().items()]

    def _describe(self, name: str, copies: Sequence[ServedModel]) -> ModelStatus:
        return ModelStatus(name=name, reference=name, state="ready", pinned=True, **_engine_facts(copies))

    async def load(self, name: str, *, pin: bool | None) -> None:
        self._models[name]

    async def unload(self, name: str, *, force: bool) -> None:
        self._models[name]
        raise self._refused(name)

    async def pin(self, name: str, pinned: bool) -> None:
        self._models[name]
        if not pinned:
            raise self._refused(name)

    async def keep(self, name: str, seconds: float) -> None:
        self._models[name]
        raise self._refused(name)

    async def removed(self, name: str) -> None:
        pass

    def _refused(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} belongs to the program that this server runs in.", hint="`llmasos serve` unloads.", param="model"
        )


class InHost:
    """Models of a host, in processes of their own. `install` makes an installed model known to it."""

    def __init__(self, backing: Hosted, install: Callable[[str], Awaitable[str | None]]) -> None:
        self._backing, self._host, self._install = backing, backing.host, install

    def status(self) -> list[ModelStatus]:
        """Those that were asked for since the start."""
        loaded = self._host.loaded()
        known = self._host.status()
        return [_wire(one, loaded.get(one.name, ())) for one in known if one.loads or one.state != "absent"]

    async def load(self, name: str, *, pin: bool | None) -> None:
        await self._host.load(await self._own_name(name), pin=pin)

    async def unload(self, name: str, *, force: bool) -> None:
        own = await self._own_name(name)
        if own in self._host:
            await self._host.unload(own, force=force)

    async def pin(self, name: str, pinned: bool) -> None:
        self._host.pin(await self._own_name(name), pinned)

    async def keep(self, name: str, seconds: float) -> None:
        self._host.keep(await self._own_name(name), seconds)

    async def removed(self, name: str) -> None:
        await self._backing.removed(name)

    async def _own_name(self, name: str) -> str:
        await self._backing.look(name)
        own = self._backing.find(name) or await self._install(name)  # here, as it may add to the host: no thread
        if own is None:
            raise ModelNotFoundError(
                f"{name} is not installed here.", hint=f"`llmasos pull {name}`, or POST /llmasos/v1/pulls."
            )
        return own


def _engine_facts(copies: Sequence[ServedModel]) -> dict[str, Any]:
    """What the engines of a model's copies tell together."""
    stats = [llm.stats for llm in copies]
    return {
        "context_length": copies[0].context_length if copies else None,
        "num_running": sum(one.num_running for one in stats),
        "num_waiting": sum(one.num_waiting for one in stats),
        "num_generated_tokens": sum(one.num_generated_tokens for one in stats),
        "kv_cache_usage": max((one.kv_cache_usage for one in stats), default=0.0),
    }


def _wire(one: HostStatus, copies: Sequence[ServedModel]) -> ModelStatus:
    return ModelStatus(
        name=one.name,
        reference=one.reference,
        state=one.state,
        loading=None if one.loading is None else LoadProgress(**vars(one.loading)),
        pinned=one.pinned,
        replicas=[
            ReplicaInfo(
                pid=replica.pid,
                device=replica.device,
                state=replica.state,
                busy=replica.busy,
                step_seconds=round(replica.step_seconds, 1),
            )
            for replica in one.replicas
        ],
        num_replicas=one.num_replicas,
        predicted_bytes=dict(one.predicted_bytes),
        measured_bytes=dict(one.measured_bytes),
        busy=one.busy,
        waiting=one.waiting,
        load_seconds=one.load_seconds,
        last_used=_moment(one.last_used),
        keep_alive=one.keep_alive if math.isfinite(one.keep_alive) else None,
        expires_at=_moment(one.expires_at),
        loads=one.loads,
        restarts=one.restarts,
        evictions=dict(one.evictions),
        why_evicted=one.why_evicted,
        last_error=one.last_error,
        retry_at=_moment(one.retry_at),
        **_engine_facts(copies),
    )


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None or math.isinf(seconds) else datetime.fromtimestamp(seconds, UTC)


def create_router(residents: Residents) -> APIRouter:
    router = APIRouter()

    def found(name: str) -> ModelStatus:
        absent = ModelStatus(name=name, reference=name, state="absent")
        return next((one for one in residents.status() if one.name.lower() == name.lower()), absent)

    @router.get("/status", summary="The models that are loaded, loading, failed or unloaded, with why")
    async def status() -> ModelStatusList:
        return ModelStatusList(data=residents.status())

    @router.post("/load", summary="Load a model", responses=responses(404, 503, 507))
    async def load(body: LoadRequest, request: Request) -> ModelStatus:
        inflight.asks(body.model)
        caller_of(request).check_model(body.model)
        await residents.load(body.model, pin=body.pin)
        if body.keep_alive is not None:
            await residents.keep(body.model, math.inf if body.keep_alive < 0 else body.keep_alive)
        return found(body.model)

    @router.post("/unload", summary="Unload a model", responses=responses(404, 409))
    async def unload(body: UnloadRequest, request: Request) -> ModelStatus:
        inflight.asks(body.model)
        caller_of(request).check_model(body.model)
        await residents.unload(body.model, force=body.force)
        return found(body.model)

    @router.post("/pin", summary="Keep a model loaded, or no longer", responses=responses(404))
    async def pin(body: PinRequest, request: Request) -> ModelStatus:
        inflight.asks(body.model)
        caller_of(request).check_model(body.model)
        await residents.pin(body.model, body.pinned)
        return found(body.model)

    return router
