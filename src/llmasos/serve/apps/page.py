"""The page to try an application's routes: this server's own, whatever the application answers there."""

from __future__ import annotations

import importlib.resources

from starlette.responses import HTMLResponse

_RULES = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def docs() -> HTMLResponse:
    page = importlib.resources.files("llmasos.apps").joinpath("docs.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"content-security-policy": _RULES, "x-content-type-options": "nosniff"})
