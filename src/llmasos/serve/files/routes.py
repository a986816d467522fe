"""/v1/files and /v1/uploads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

from llmasos.client.types import files as wire
from llmasos.errors import InvalidInputError
from llmasos.serve.caller import caller_of
from llmasos.serve.documented import errors
from llmasos.serve.files.form import Form, received
from llmasos.serve.files.store import Files
from llmasos.serve.files.uploads import MAX_PART_BYTES, Uploads
from llmasos.serve.problems import CLIENT_CLOSED_REQUEST

_NOT_FOUND = errors(404)
_TOO_LARGE = errors(413, 507)
_FILE = {"type": "string", "format": "binary"}
Limit = Annotated[int, Query(ge=1, le=10_000)]
Order = Literal["asc", "desc"]


def _form(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": required, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


_UPLOAD = _form(
    ["file", "purpose"],
    {
        "file": _FILE,
        "purpose": {"type": "string", "enum": list(wire.PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
)


def create_router(files: Files, uploads: Uploads) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI: files"])

    @router.post(
        "/files", summary="Upload a file", response_model=wire.File, responses=_TOO_LARGE, openapi_extra=_UPLOAD
    )
    async def create(request: Request) -> Response:
        caller = caller_of(request)
        await files.admit(caller)

        async def keep(form: Form) -> wire.File:
            purpose, seconds = _fields(form)
            return await files.keep(caller, form.path, filename=form.filename, purpose=purpose, seconds=seconds)

        return await _received(request, files, "file", files.max_file_bytes, keep)

    @router.get("/files", summary="List files")
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Limit = 10_000,
        order: Order = "desc",
    ) -> wire.FileList:
        return await files.list(caller_of(request), purpose=purpose, after=after, limit=limit, ascending=order == "asc")

    @router.get("/files/{file_id}", responses=_NOT_FOUND, summary="A file")
    async def retrieve(file_id: str, request: Request) -> wire.File:
        return await files.get(caller_of(request), file_id)

    @router.get(
        "/files/{file_id}/content",
        response_class=FileResponse,
        responses=_NOT_FOUND | {200: {"content": {"application/octet-stream": {"schema": _FILE}}}},
        summary="A file's bytes",
    )
    async def content(file_id: str, request: Request) -> FileResponse:
        file, path = await files.content(caller_of(request), file_id)
        headers = {"x-content-type-options": "nosniff"}
        return FileResponse(path, filename=file.filename, media_type="application/octet-stream", headers=headers)

    @router.delete("/files/{file_id}", responses=_NOT_FOUND, summary="Delete a file")
    async def delete(file_id: str, request: Request) -> wire.DeletedFile:
        await files.delete(caller_of(request), file_id)
        return wire.DeletedFile(id=file_id)

    @router.post("/uploads", responses=_TOO_LARGE, summary="Begin a file that comes in parts")
    async def create_upload(body: wire.UploadRequest, request: Request) -> wire.Upload:
        return await uploads.create(caller_of(request), body)

    @router.post(
        "/uploads/{upload_id}/parts",
        summary="Add a part",
        response_model=wire.UploadPart,
        responses=_NOT_FOUND | _TOO_LARGE,
        openapi_extra=_form(["data"], {"data": _FILE}),
    )
    async def add_part(upload_id: str, request: Request) -> Response:
        caller = caller_of(request)
        await uploads.check_pending(caller, upload_id)

        async def keep(form: Form) -> wire.UploadPart:
            _check_names(form, ())
            return await uploads.add_part(caller, upload_id, form.path, form.num_bytes)

        return await _received(request, files, "data", MAX_PART_BYTES, keep)

    @router.post("/uploads/{upload_id}/complete", responses=_NOT_FOUND, summary="Make the file of its parts")
    async def complete(upload_id: str, body: wire.CompleteUploadRequest, request: Request) -> wire.Upload:
        return await uploads.complete(caller_of(request), upload_id, body)

    @router.post("/uploads/{upload_id}/cancel", responses=_NOT_FOUND, summary="Forget an upload")
    async def cancel(upload_id: str, request: Request) -> wire.Upload:
        return await uploads.cancel(caller_of(request), upload_id)

    return router


async def _received(
    request: Request,
    files: Files,
    field: str,
    max_bytes: int,
    keep: Callable[[Form], Awaitable[wire.File | wire.UploadPart]],
) -> Response:
    try:
        async with received(request, files.folder, file_field=field, max_bytes=max_bytes) as form:
            kept = await keep(form)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(kept.model_dump_json(), media_type="application/json")


def _fields(form: Form) -> tuple[str, int | None]:
    """Purpose, and after how many seconds the file is to go."""
    _check_names(form, ("purpose", "expires_after[anchor]", "expires_after[seconds]"))
    purpose = form.fields.get("purpose")
    if purpose not in wire.PURPOSES:
        raise InvalidInputError(
            f"purpose={purpose!r} is not known." if purpose else "The field 'purpose' is required.",
            hint=f"One of {', '.join(wire.PURPOSES)}.",
            param="purpose",
        )
    anchor, seconds = (form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return purpose, None
    if anchor != "created_at":
        raise InvalidInputError("expires_after[anchor] must be 'created_at'.", param="expires_after")
    if not (seconds and seconds.isascii() and seconds.isdigit() and 3600 <= int(seconds[:10]) <= 2592000):
        raise InvalidInputError(
            f"expires_after[seconds]={seconds!r} is not from 3600 to 2592000 (30 days).", param="expires_after"
        )
    return purpose, int(seconds)


def _check_names(form: Form, known: tuple[str, ...]) -> None:
    for name in form.fields:
        if name not in known:
            raise InvalidInputError(f"Unknown field {name!r}.", param=name)
