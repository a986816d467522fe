"""The page to try an application's routes: the console's, whatever the application answers there."""

from __future__ import annotations

from urllib.parse import quote

from starlette.responses import RedirectResponse


def docs(name: str) -> RedirectResponse:
    """From `/apps/NAME/docs`, wherever the server's own root is."""
    return RedirectResponse(f"../../console/#/apps/app/{quote(name, safe='')}/run")
