"""`/llmasos/v1/index`: what a folder index has, for whoever installs from it; publishing, reports, yanking."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from llmasos.client.types.jobs import Job
from llmasos.client.types.packages import PackageIndex, PackageRelease, PackageReport, YankRequest
from llmasos.serve.caller import caller_of
from llmasos.serve.index.room import HostedIndex
from llmasos.serve.native.common import responses


def create_router(hosted: HostedIndex) -> APIRouter:
    router = APIRouter(prefix="/index")
    binary = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @router.get("/index.json", summary="All packages", response_model=PackageIndex)
    async def document() -> Response:
        return Response(await asyncio.to_thread(hosted.document), media_type="application/json")

    @router.get("/packages/{path:path}", summary="A package", response_class=Response, responses=responses(404))
    async def package(path: str) -> Response:
        found = await asyncio.to_thread(hosted.file, f"packages/{path}")
        return FileResponse(found, media_type="application/octet-stream")

    @router.get("/reports/{owner}/{name}/{version}", summary="What the checks said", responses=responses(404))
    async def report(owner: str, name: str, version: str) -> PackageReport:
        return await asyncio.to_thread(hosted.report, owner, name, version)

    @router.post(
        "/packages/{owner}",
        status_code=202,
        summary="Have a package checked and published, as a job",
        openapi_extra={"requestBody": {"required": True, **binary}},
        responses=responses(403, 409, 413, 422, 507),
    )
    async def publish(owner: str, request: Request) -> Job:
        return hosted.shown((await hosted.receive(owner, request.stream(), caller_of(request))).job)

    @router.post("/yank", summary="Take a version out of the choice", responses=responses(403, 404))
    async def yank(body: YankRequest, request: Request) -> PackageRelease:
        found = await asyncio.to_thread(hosted.yank, body.name, body.version, body.reason, caller_of(request))
        return PackageRelease(**found.release.model_dump())

    return router
