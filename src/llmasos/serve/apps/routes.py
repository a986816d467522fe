"""Installed applications over HTTP. The types are in `llmasos.client.types.apps`.

    GET    /llmasos/v1/apps                      {"object": "list", "data": [AppInfo]}    every key: those it may use
    POST   /llmasos/v1/apps                      InstallAppRequest -> 201 AppInfo, 409 with the sheet       scope manage
    PUT    /llmasos/v1/apps?accept=&trust=       body: a .llmapp -> as POST                                 scope manage
    GET    /llmasos/v1/apps/openapi.json         the applications' OpenAPI documents as one                 every key
    GET    /llmasos/v1/apps/{name}               AppInfo                                                    every key
    PATCH  /llmasos/v1/apps/{name}               ConfigureAppRequest -> AppInfo                             scope manage
    DELETE /llmasos/v1/apps/{name}?data=false    RemovedApp                                                 scope manage
    GET    /llmasos/v1/apps/{name}/logs          text; with `follow` events of AppLogLine; `limit`          scope manage
    POST   /llmasos/v1/apps/{name}/{action}      start stop restart update rollback; AppAction -> AppInfo   scope manage
    *      /apps/{name}/...                      its own routes, /app.json, /mcp, /jobs               scope inference

A 409 of install and update is an error body with the sheet beside it:
    {"error": {"message": ..., "code": "not_accepted", ...}, "sheet": AppSheet}
and the request is sent again with `"accept": sheet.accept`. An install answers 422 with code `unhealthy` where the
application does not start; what was there before is there again then.

`GET /v1/models` lists an application that can chat as `app/NAME`; `POST /v1/chat/completions` with that model goes to
it, with the caller's right to the application (`apps` of its key) and to the model's name.
`/apps/NAME/app.json` and `/apps/NAME/openapi.json` are answered without starting it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from llmasos.client.types.apps import (
    AppAction,
    AppInfo,
    AppList,
    AppLogLine,
    AppSheet,
    ConfigureAppRequest,
    InstallAppRequest,
    RemovedApp,
)
from llmasos.serve.apps import log, openapi, values
from llmasos.serve.apps.info import info_of
from llmasos.serve.apps.installing import Installing, SheetError
from llmasos.serve.apps.proxy import METHODS, forward
from llmasos.serve.apps.rights import may_use
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import Responses
from llmasos.serve.native.common import responses, sse
from llmasos.serve.problems import error_body, problem_of
from llmasos.serve.respond import streamed
from llmasos.serve.storage import check_room
from llmasos.store.packages import Installed
from llmasos.store.transfer import file_sha256

Act = Literal["start", "stop", "restart", "update", "rollback"]
_LOGS: Responses = {
    200: {
        "description": "The lines; with `follow` `data:` lines of AppLogLine objects.",
        "content": {media: {"schema": {"type": "string"}} for media in ("text/plain", "text/event-stream")},
    }
}
_NOT_ACCEPTED: Responses = {409: {"description": "Nobody has accepted the permissions: `sheet` is an AppSheet."}}


def create_router(supervisor: Supervisor, stopping: asyncio.Event) -> APIRouter:
    router = APIRouter()
    _add_own(router, supervisor, stopping)
    _add_doors(router, supervisor)
    return router


def _add_own(router: APIRouter, supervisor: Supervisor, stopping: asyncio.Event) -> None:
    own = APIRouter(prefix="/llmasos/v1/apps", tags=["Applications"])
    installing = Installing(supervisor)

    async def told(app: Installed, request: Request) -> AppInfo:
        return await info_of(supervisor, app, whole="manage" in caller_of(request).scopes)

    @own.get("", summary="Installed applications")
    async def list_apps(request: Request) -> AppList:
        caller = caller_of(request)
        whole = "manage" in caller.scopes
        found = [app for app in await asyncio.to_thread(supervisor.apps.list) if may_use(caller, app.name)]
        return AppList(data=[await info_of(supervisor, app, whole=whole) for app in found])

    @own.post(
        "",
        summary="Install an application",
        status_code=201,
        response_model=AppInfo,
        responses=responses(404, 422, 502, 503, 507) | _NOT_ACCEPTED,
    )
    async def install(body: InstallAppRequest, request: Request) -> Any:
        try:
            app = await installing.install(body.reference, body.index, body.accept, body.trust)
        except SheetError as e:
            return _sheet(request, e)
        return await told(app, request)

    @own.put(
        "",
        summary="Install an uploaded package",
        status_code=201,
        response_model=AppInfo,
        responses=responses(413, 422, 503, 507) | _NOT_ACCEPTED,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def install_upload(
        request: Request,
        accept: Annotated[str, Query(max_length=100, description="`accept` of the sheet, or true")] = "",
        trust: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Any:
        path = await _received(request, supervisor.home)
        try:
            answer: str | bool = accept.lower() == "true" or accept
            # The same bytes have the same name, so what the sheet of the first request was accepted for is these.
            digest = await asyncio.to_thread(file_sha256, path)
            app = await installing.install(str(path), (), answer, trust, source=f"upload {digest[:16]}")
        except SheetError as e:
            return _sheet(request, e)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return await told(app, request)

    @own.get("/openapi.json", summary="The applications' OpenAPI documents as one", response_model=dict[str, Any])
    async def merged(request: Request) -> Response:
        caller, documents = caller_of(request), {}
        for app in await asyncio.to_thread(supervisor.apps.list):
            if app.manifest is not None and may_use(caller, app.name):
                documents[app.name] = (await supervisor.documents(app)).openapi
        return JSONResponse(await asyncio.to_thread(openapi.merged, documents))

    @own.get("/{name}", summary="One of them", responses=responses(404))
    async def show(name: str, request: Request) -> AppInfo:
        caller_of(request).check_app(name)
        return await told(await supervisor.installed(name), request)

    @own.patch("/{name}", summary="Set its values", responses=responses(404))
    async def configure(name: str, body: ConfigureAppRequest, request: Request) -> AppInfo:
        app = await supervisor.installed(name)
        await asyncio.to_thread(values.change, supervisor.apps, app, body.config)
        await supervisor.stop(name)  # it reads them when it starts
        return await told(app, request)

    @own.delete("/{name}", summary="Uninstall it", responses=responses(404))
    async def uninstall(name: str, request: Request, data: bool = False) -> RemovedApp:
        await supervisor.installed_or_damaged(name)
        gone = await installing.uninstall(name, data=data, actor=caller_of(request).actor)
        return RemovedApp(name=name, versions=list(gone), data_kept=supervisor.apps.data(name).exists())

    @own.get(
        "/{name}/logs",
        summary="Its latest log lines; with `follow` also those to come",
        response_model=None,
        responses=responses(404) | _LOGS,
    )
    async def logs(
        name: str, request: Request, follow: bool = False, limit: Annotated[int, Query(ge=0, le=log.KEPT_LINES)] = 200
    ) -> Response:
        await supervisor.installed_or_damaged(name)
        found = supervisor.slot(name).log
        if follow:
            return await streamed(request, sse(found.follow(limit), stopping, greet=True))
        return PlainTextResponse("".join(f"{line_of(line)}\n" for line in found.lines(limit)))

    @own.post(
        "/{name}/{action}",
        summary="Start, stop or restart it, update it or take an earlier version",
        response_model=AppInfo,
        responses=responses(404, 422, 502, 503, 507) | _NOT_ACCEPTED,
    )
    async def act(name: str, action: Act, request: Request, body: AppAction | None = None) -> Any:
        body = body or AppAction()
        app = await supervisor.installed_or_damaged(name)
        try:
            match action:
                case "stop":
                    await supervisor.stop(name, hold=True)
                case "start" | "restart":
                    await supervisor.installed(name)
                    slot = supervisor.slot(name)
                    if action == "restart" or slot.running is None:
                        await supervisor.restart(name)
                case "update":
                    app = await installing.update(name, body.index, body.accept, body.trust)
                case "rollback":
                    app = await installing.rollback(name, body.version)
        except SheetError as e:
            return _sheet(request, e)
        return await told(app, request)

    router.include_router(own)


def _add_doors(router: APIRouter, supervisor: Supervisor) -> None:
    async def door(name: str, path: str, request: Request) -> Response:
        caller_of(request).check_app(name)
        if request.method == "GET" and path in ("app.json", "openapi.json"):
            app = await supervisor.installed(name)
            known = await supervisor.documents(app)
            if known.app:
                return JSONResponse(dict(known.app if path == "app.json" else known.openapi))
        if request.method == "GET" and path == "docs":
            await supervisor.installed(name)
            return RedirectResponse(f"../../console/#/apps/app/{name}/run")  # the same forms, and whose it is
        return await forward(supervisor, request, name, f"/{path}")

    for method in METHODS:
        router.add_api_route(
            "/apps/{name}/{path:path}",
            door,
            methods=[method],
            name=f"app_{method.lower()}",
            summary="An application's own routes",
            operation_id=f"app_{method.lower()}",
            tags=["Applications"],
            responses=responses(404, 502, 503),
        )


def line_of(line: AppLogLine) -> str:
    return f"{line.time:%Y-%m-%dT%H:%M:%SZ} {line.stream:<6} {line.text}"


def _sheet(request: Request, e: SheetError) -> Response:
    problem: Mapping[str, Any] = problem_of(e)
    body = error_body(request.scope, problem["status"], problem["message"], code=problem["code"])
    found: AppSheet = e.sheet
    return JSONResponse({**json.loads(body.model_dump_json(exclude_unset=True)), "sheet": found.model_dump()}, 409)


async def _received(request: Request, home: Path) -> Path:
    """The body in a file. Raises DiskFullError."""
    folder = home / "cache" / "apps"
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    path = folder / f"{secrets.token_hex(6)}.llmapp"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            async for piece in request.stream():
                await asyncio.to_thread(check_room, folder, len(piece))
                await asyncio.to_thread(file.write, piece)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
