"""Which models are loaded: look, load, unload, pin."""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter, Request

from llmasos.client.types.native import LoadRequest, ModelStatus, ModelStatusList, PinRequest, UnloadRequest
from llmasos.errors import UnsupportedError
from llmasos.serve.caller import caller_of
from llmasos.serve.models import Models
from llmasos.serve.native.common import responses


class Residents(Protocol):
    """Who decides what is loaded. Unknown names raise ModelNotFoundError."""

    def status(self) -> list[ModelStatus]: ...
    async def load(self, name: str, *, pin: bool | None) -> None: ...
    async def unload(self, name: str, *, force: bool) -> None: ...
    async def pin(self, name: str, pinned: bool) -> None: ...


class InProcess:
    """Models that a program has loaded and lent to the server: they stay as long as the program wants."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def status(self) -> list[ModelStatus]:
        return [self._describe(name) for name in self._models.names if self._models[name].adapter is None]

    def _describe(self, name: str) -> ModelStatus:
        model = self._models[name].model
        stats = model.stats
        return ModelStatus(
            name=name,
            reference=name,
            state="ready",
            pinned=True,
            context_length=model.context_length,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_generated_tokens=stats.num_generated_tokens,
            kv_cache_usage=stats.kv_cache_usage,
        )

    async def load(self, name: str, *, pin: bool | None) -> None:
        self._models[name]

    async def unload(self, name: str, *, force: bool) -> None:
        self._models[name]
        raise self._refused(name)

    async def pin(self, name: str, pinned: bool) -> None:
        self._models[name]
        if not pinned:
            raise self._refused(name)

    def _refused(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} belongs to the program that this server runs in.", hint="`llmasos serve` unloads.", param="model"
        )


def create_router(residents: Residents) -> APIRouter:
    router = APIRouter()

    def found(name: str) -> ModelStatus:
        absent = ModelStatus(name=name, reference=name, state="absent")
        return next((one for one in residents.status() if one.name == name), absent)

    @router.get("/status", summary="The models that are loaded, loading, failed or unloaded, with why")
    async def status() -> ModelStatusList:
        return ModelStatusList(data=residents.status())

    @router.post("/load", summary="Load a model", responses=responses(404, 503, 507))
    async def load(body: LoadRequest, request: Request) -> ModelStatus:
        caller_of(request).check_model(body.model)
        await residents.load(body.model, pin=body.pin)
        return found(body.model)

    @router.post("/unload", summary="Unload a model", responses=responses(404, 409))
    async def unload(body: UnloadRequest, request: Request) -> ModelStatus:
        caller_of(request).check_model(body.model)
        await residents.unload(body.model, force=body.force)
        return found(body.model)

    @router.post("/pin", summary="Keep a model loaded, or no longer", responses=responses(404))
    async def pin(body: PinRequest, request: Request) -> ModelStatus:
        caller_of(request).check_model(body.model)
        await residents.pin(body.model, body.pinned)
        return found(body.model)

    return router
