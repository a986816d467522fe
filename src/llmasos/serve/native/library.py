"""Models on the server's disk and in the catalogue, and what one would cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query

from llmasos.client.types.native import (
    CatalogModel,
    CatalogModelList,
    LibraryModel,
    LibraryModelList,
    ModelPlan,
    ModelStatus,
    PlanRequest,
    RemovedModel,
)
from llmasos.errors import InvalidInputError
from llmasos.serve.native import worker
from llmasos.serve.native.common import responses
from llmasos.serve.native.residents import Residents
from llmasos.store.card import Card
from llmasos.store.catalog import catalog
from llmasos.store.library import Library

PLANS_AT_ONCE = 2
"""Each is a process; more wait."""
_FACTS = ("name", "format", "architecture", "family", "use", "licence", "source", "notice", "size", "created", "error")


def library_model(card: Card, statuses: Mapping[str, ModelStatus]) -> LibraryModel:
    facts = {name: getattr(card, name) for name in _FACTS}
    if (status := statuses.get(card.serves_as or card.name)) is not None:
        facts |= {"state": status.state, "loading": status.loading}
    return LibraryModel(**facts)


def create_router(residents: Residents) -> APIRouter:
    router = APIRouter()

    def statuses() -> dict[str, ModelStatus]:
        return {one.name: one for one in residents.status()}

    @router.get("/models", summary="The models on the server's disk")
    async def models() -> LibraryModelList:
        cards = await asyncio.to_thread(Library().list)
        now = statuses()
        return LibraryModelList(data=[library_model(card, now) for card in cards])

    @router.get("/models/{name}", summary="One of them", responses=responses(404))
    async def model(name: str) -> LibraryModel:
        return library_model(await asyncio.to_thread(_card, name), statuses())

    @router.delete("/models/{name}", summary="Delete a model from the disk", responses=responses(404, 409))
    async def remove(name: str) -> RemovedModel:
        card = await asyncio.to_thread(_card, name)
        if (status := statuses().get(card.serves_as or card.name)) is not None and status.state not in (
            "absent",
            "failed",
        ):
            await residents.unload(card.serves_as or card.name, force=False)
        freed = await asyncio.to_thread(Library().remove, card.name)
        await residents.removed(card.serves_as or card.name)
        return RemovedModel(name=card.name, freed_bytes=freed)

    @router.get("/catalog", summary="Models that can be pulled by name")
    async def search(query: Annotated[str, Query(max_length=500)] = "") -> CatalogModelList:
        return CatalogModelList(data=await asyncio.to_thread(_search, query))

    planning = asyncio.Semaphore(PLANS_AT_ONCE)

    @router.post("/plan", summary="What a model would cost", responses=responses(404, 422, 502, 503))
    async def plan(body: PlanRequest) -> ModelPlan:
        check_no_path(body.model)
        async with planning:
            return ModelPlan.model_validate(await worker.run("plan", body.model_dump()))

    return router


def check_no_path(reference: str) -> None:
    """Raises InvalidInputError for a reference to a file of the server's machine that is no model of its library."""
    library = Library()
    if library.has(reference):
        return
    if library.resolve(reference).sources[0].kind == "file":
        raise InvalidInputError(
            f"{reference!r} is a path of the server's machine, and clients have no say there.",
            hint="Upload the model, or `llmasos import` it on that machine.",
            param="model",
        )


def _card(name: str) -> Card:
    """Also of a model whose card is damaged: its `error` says so. Raises NotFoundError."""
    library = Library()
    folder = library.folder(name)
    return next(card for card in library.list() if card.name == folder.name)


def _search(query: str) -> list[CatalogModel]:
    library = Library()
    here = {card.name for card in library.list() if not card.error}
    return [
        CatalogModel(
            name=entry.name,
            family=entry.family,
            architecture=entry.architecture,
            use=entry.use,
            licence=entry.licence,
            upstream=entry.repo,
            languages=list(entry.languages),
            aliases=list(entry.aliases),
            installed=(entry.stored_as or entry.name) in here,
            notice=entry.notice,
        )
        for entry in catalog().search(query)
    ]
