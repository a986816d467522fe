"""The console, a web page for people, at `/console/`. Its conventions are in README.md beside this file."""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from llmasos.errors import NotFoundError

FOLDER = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline: what a model or an application writes can't run and can't call home.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked about each time, and mostly answered 304
}


class NoSuchFileError(NotFoundError):
    pass


def files() -> dict[str, Path]:
    """What browsers may have, by its path below `/console/`."""
    found = (path for path in FOLDER.rglob("*") if path.suffix in TYPES and path.is_file())
    return {path.relative_to(FOLDER).as_posix(): path for path in found}


@lru_cache(maxsize=256)
def _read(path: Path, _changed: int) -> tuple[bytes, bytes, str]:
    """Bytes, gzipped bytes, tag."""
    content = path.read_bytes()
    return content, gzip.compress(content, 9, mtime=0), f'"{hashlib.sha256(content).hexdigest()[:20]}"'


def _answer(request: Request, path: Path) -> Response:
    content, packed, tag = _read(path, path.stat().st_mtime_ns)
    headers = {**HEADERS, "etag": tag, "vary": "accept-encoding"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["content-encoding"] = packed, "gzip"
    return Response(content, headers={**headers, "content-type": TYPES[path.suffix]})


def wants_page(request: Request) -> bool:
    """Is this a person's browser, which opens a page, and no program?"""
    return "text/html" in request.headers.get("accept", "")


def to_console() -> Response:
    return RedirectResponse("console/", status_code=307, headers={"vary": "accept"})


def create_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    known = files()

    @router.get("/console")
    async def door() -> Response:
        return to_console()

    @router.get("/console/{path:path}")
    async def file(path: str, request: Request) -> Response:
        name = path or "index.html"
        if name not in known:
            raise NoSuchFileError(f"The console has no file {name!r}.")
        return _answer(request, known[name])

    return router
