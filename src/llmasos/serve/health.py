"""What machines ask of the server itself: is it alive, is it ready, its numbers, what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from llmasos import __version__
from llmasos.errors import LLMasOSError
from llmasos.serve.caller import caller_of
from llmasos.serve.models import Models

Check = Callable[[], Awaitable[str | None]]
"""What keeps the server from being ready, None if nothing does."""

GUIDE = """\
# LLMasOS {version}

> Language models behind OpenAI's, Anthropic's and Ollama's APIs on this server.

- [OpenAPI]({url}/openapi.json): every route with its types
- OpenAI clients: base URL {url}/v1 (chat/completions, completions, responses, embeddings, files, batches,
  fine_tuning/jobs)
- Anthropic clients: base URL {url} (/v1/messages)
- Ollama clients: host {url} (/api/chat, /api/generate, /api/embed)
- LLMasOS's own API: {url}/llmasos/v1 (models, load, unload, plan, pulls, requests, logs)
- [Models]({url}/v1/models): the names to use as `model`
- Errors have `error.message`, `error.code` and `error.param`; 429 and 503 have Retry-After.
"""


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]


class Ready(BaseModel):
    """`reasons`: by check, what the server waits for; empty when it is ready."""

    status: Literal["ready", "not ready"]
    reasons: dict[str, str] = Field(default_factory=dict)


class Version(BaseModel):
    name: str = "llmasos"
    version: str = __version__


class Description(BaseModel):
    """Where everything is, as paths of this server."""

    name: str = "llmasos"
    version: str = __version__
    openapi: str = "/openapi.json"
    apis: dict[str, str] = Field(
        default_factory=lambda: {
            "openai": "/v1",
            "anthropic": "/v1/messages",
            "ollama": "/api",
            "llmasos": "/llmasos/v1",
        }
    )
    health: str = "/healthz"
    ready: str = "/readyz"
    metrics: str = "/metrics"
    guide: str = "/llms.txt"


class Readiness:
    """Whether requests should be sent here. `stopping` is set when the server is told to stop."""

    def __init__(self) -> None:
        self.checks: dict[str, Check] = {}
        self.stopping = asyncio.Event()

    async def reasons(self) -> dict[str, str]:
        found = {"server": "stopping"} if self.stopping.is_set() else {}
        for name, check in self.checks.items():
            try:
                reason = await check()
            except LLMasOSError as e:
                reason = e.message
            if reason is not None:
                found[name] = reason
        return found


def create_router(models: Models, readiness: Readiness) -> APIRouter:
    router = APIRouter(tags=["Server"])

    @router.get("/healthz", summary="Is the server up?")
    async def healthz(request: Request) -> Health:
        caller = caller_of(request)  # this is open to everybody; which models there are is not
        await models.look()
        return Health(models=[name for name in models.names if caller.may_use(name)])

    @router.get(
        "/readyz",
        summary="Should requests be sent here?",
        responses={503: {"model": Ready, "description": "Not now; `reasons` says why."}},
    )
    async def readyz(response: Response) -> Ready:
        reasons = await readiness.reasons()
        response.status_code = 503 if reasons else 200
        return Ready(status="not ready" if reasons else "ready", reasons=reasons)

    @router.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}},
    )
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", summary="Which version is this?")
    async def version() -> Version:
        return Version()

    @router.get("/.well-known/llmasos.json", summary="Where everything is")
    async def description() -> Description:
        return Description()

    @router.get(
        "/llms.txt",
        summary="The same for language models",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def guide(request: Request) -> Response:
        url = str(request.base_url).rstrip("/")
        return Response(GUIDE.format(version=__version__, url=url), media_type="text/plain; charset=utf-8")

    return router
