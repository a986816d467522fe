"""`/llmasos/v1/jobs`: the list of all jobs, one, its events; pausing, going on, cancelling.

A key sees its own jobs; with the scope `manage` everybody's."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from llmasos.client.types.jobs import Job, JobList
from llmasos.serve.caller import caller_of
from llmasos.serve.jobs.room import Jobs
from llmasos.serve.native.common import responses, sse
from llmasos.serve.respond import streamed

Action = Literal["pause", "resume", "cancel"]
_Kind = Annotated[str | None, Query(max_length=100, description="only those of this kind")]


def create_router(jobs: Jobs, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter(prefix="/jobs")

    @router.get("", summary="The jobs of this server, the latest first")
    async def list_jobs(request: Request, kind: _Kind = None) -> JobList:
        return JobList(data=[*await jobs.list(caller_of(request), kind=kind)])

    @router.get("/{id}", summary="One of them", responses=responses(404))
    async def get(id: str, request: Request) -> Job:
        return await jobs.get(caller_of(request), id)

    @router.get(
        "/{id}/events",
        summary="Follow a job",
        response_class=Response,
        responses=responses(404, stream="Job objects, until it is done, failed, paused or cancelled"),
    )
    async def events(id: str, request: Request) -> Response:
        return await streamed(request, sse(jobs.follow(caller_of(request), id), stopping))

    @router.post("/{id}/{action}", summary="Pause, resume or cancel a job", responses=responses(404, 409))
    async def act(id: str, action: Action, request: Request) -> Job:
        return await jobs.act(caller_of(request), id, action)

    return router
