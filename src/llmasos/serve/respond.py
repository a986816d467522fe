"""How work becomes an HTTP answer: whole or streamed, ended early when its reader goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from llmasos.errors import LLMasOSError
from llmasos.serve import render
from llmasos.serve.problems import CLIENT_CLOSED_REQUEST, error_body, problem_of, unexpected
from llmasos.serve.stream import Disconnected, EventStream, until_disconnect

M = TypeVar("M", bound=BaseModel)


def json_response(body: Any) -> Response:
    return Response(render.dump(body), media_type="application/json")


async def whole(request: Request, work: Awaitable[M], write: Callable[[M], bytes | str] = render.body) -> Response:
    """What `work` gives, written in a thread: an answer may hold a million numbers."""

    async def answer() -> Response:
        return Response(await asyncio.to_thread(write, await work), media_type="application/json")

    return await _unless_gone(request, answer())


async def _unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    try:
        return await until_disconnect(request.receive, work)
    except Disconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def openai_error_event(body: BaseModel) -> str:
    """How OpenAI's streams say that something failed. `body`: from `problems.error_body`."""
    return render.event(body)


async def streamed(
    request: Request,
    events: AsyncGenerator[str, None],
    *,
    error_event: Callable[[BaseModel], str] = openai_error_event,
    media_type: str = "text/event-stream",
    idle: tuple[float, str] | None = None,
) -> Response:
    """The stream once its first event is there: until then errors are ordinary answers."""
    request_id: str = request.state.request_id

    def error_text(e: Exception) -> str:
        problem = problem_of(e) if isinstance(e, LLMasOSError) else unexpected(request_id)
        return error_event(error_body(request.scope, **problem))

    async def start() -> Response:
        first = await anext(events, "")  # nothing may be left to tell
        return EventStream(first, events, error_text, media_type=media_type, idle=idle)

    return await _unless_gone(request, start())
