"""/v1/fine_tuning/jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from llmasos.client.types import finetuning as wire
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import errors, refusals
from llmasos.serve.finetuning.room import FineTuning
from llmasos.serve.native.common import sse
from llmasos.serve.respond import streamed

Action = Literal["cancel", "pause", "resume"]
Limit = Annotated[int, Query(ge=1, le=1000)]
_NOT_FOUND = errors(404)


def create_router(room: FineTuning, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI: fine-tuning"])

    @router.post(
        "",
        summary="Train a model on a file",
        description=refusals(wire.FineTuningRequest),
        responses=errors(404, 413, 507),
    )
    async def create(body: wire.FineTuningRequest, request: Request) -> wire.FineTuningJob:
        return await room.create(caller_of(request), body)

    @router.get("", summary="List fine-tuning jobs; metadata[NAME]=VALUE chooses by label")
    async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> wire.FineTuningJobList:
        labels = {
            name[len("metadata[") : -1]: value
            for name, value in request.query_params.items()
            if name.startswith("metadata[") and name.endswith("]")
        }
        return await room.list(caller_of(request), after, limit, labels)

    @router.get("/{fine_tuning_job_id}", responses=_NOT_FOUND, summary="A fine-tuning job")
    async def retrieve(fine_tuning_job_id: str, request: Request) -> wire.FineTuningJob:
        return await room.get(caller_of(request), fine_tuning_job_id)

    @router.get(
        "/{fine_tuning_job_id}/events",
        response_model=wire.FineTuningEventList,
        responses=_NOT_FOUND,
        summary="What has happened to a job, the latest first; with stream=true as it happens",
    )
    async def events(
        fine_tuning_job_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        stream: bool = False,
    ) -> Response | wire.FineTuningEventList:
        caller = caller_of(request)
        if stream:
            return await streamed(request, sse(room.follow(caller, fine_tuning_job_id), stopping))
        return await room.events(caller, fine_tuning_job_id, after, limit)

    @router.get("/{fine_tuning_job_id}/checkpoints", responses=_NOT_FOUND, summary="The checkpoints of a job")
    async def checkpoints(
        fine_tuning_job_id: str, request: Request, after: str | None = None, limit: Limit = 10
    ) -> wire.FineTuningCheckpointList:
        return await room.checkpoints(caller_of(request), fine_tuning_job_id, after, limit)

    @router.post(
        "/{fine_tuning_job_id}/{action}",
        responses=errors(404, 409),
        summary="Cancel, pause or resume a fine-tuning job",
    )
    async def act(fine_tuning_job_id: str, action: Action, request: Request) -> wire.FineTuningJob:
        return await room.act(caller_of(request), fine_tuning_job_id, action)

    return router
