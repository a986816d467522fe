"""The latest log lines, and those to come."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from llmasos.client.types.native import LogLevel, LogLineList
from llmasos.serve.log import KEPT_LINES, Journal
from llmasos.serve.native.common import responses, sse
from llmasos.serve.respond import json_response, streamed


def create_router(journal: Journal, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/logs",
        summary="The latest log lines, oldest first; with `follow` also those to come",
        response_model=LogLineList,
        responses=responses(stream="LogLine objects, with `follow`"),
    )
    async def logs(
        request: Request,
        follow: bool = False,
        level: Annotated[LogLevel | None, Query(description="This level and more severe ones")] = None,
        request_id: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=0, le=KEPT_LINES)] = 200,
    ) -> Response:
        if follow:
            lines = journal.follow(level=level, request_id=request_id, limit=limit)
            return await streamed(request, sse(lines, stopping, greet=True))
        return json_response(
            LogLineList(object="list", data=journal.lines(level=level, request_id=request_id, limit=limit))
        )

    return router
