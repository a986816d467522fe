"""/v1/batches."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from llmasos.client.types import files as wire
from llmasos.serve.batches.worker import Batches
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import errors

_NO_ROOM = errors(413, 507)
_NOT_FOUND = errors(404)


def create_router(batches: Batches) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI: batches"])

    @router.post("/batches", responses=_NO_ROOM, summary="Have a file of requests answered")
    async def create(body: wire.BatchRequest, request: Request) -> wire.Batch:
        return await batches.create(caller_of(request), body)

    @router.get("/batches", summary="List batches")
    async def list_batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> wire.BatchList:
        return await batches.list(caller_of(request), after, limit)

    @router.get("/batches/{batch_id}", responses=_NOT_FOUND, summary="A batch")
    async def retrieve(batch_id: str, request: Request) -> wire.Batch:
        return await batches.get(caller_of(request), batch_id)

    @router.post("/batches/{batch_id}/cancel", responses=_NOT_FOUND, summary="End a batch; what is done stays")
    async def cancel(batch_id: str, request: Request) -> wire.Batch:
        return await batches.cancel(caller_of(request), batch_id)

    return router
