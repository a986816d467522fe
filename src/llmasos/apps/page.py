"""The page of an application at `/docs`: its routes as forms. Its files are the console's."""

from __future__ import annotations

import importlib.resources
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from llmasos.apps import problems

PAGE = "application.html"
_FOLDERS = ("components", "core", "strings", "vendor")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@cache
def _files() -> dict[str, Path]:
    """What browsers may have, by its path below `/docs/`."""
    folder = Path(str(importlib.resources.files("llmasos"))) / "serve" / "console"
    found = [*folder.iterdir(), *(path for name in _FOLDERS for path in (folder / name).rglob("*"))]
    return {path.relative_to(folder).as_posix(): path for path in found if path.suffix in _TYPES}


def page() -> Response:
    return _answer(_files()[PAGE])


async def file(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["path"]
    if not name:
        return RedirectResponse("../docs", 307)
    if name not in _files():
        return problems.response(problems.problem(404, "not_found", f"The page has no file {name!r}."))
    return _answer(_files()[name])


def _answer(path: Path) -> Response:
    return Response(path.read_bytes(), headers={**_HEADERS, "content-type": f"{_TYPES[path.suffix]}; charset=utf-8"})
