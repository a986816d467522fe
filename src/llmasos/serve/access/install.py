"""Access control put around an application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llmasos.serve.access.access import Access
from llmasos.serve.access.api import create_router
from llmasos.serve.access.guard import Guard

_READABLE = (
    "request-id",
    "retry-after",
    "x-request-id",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
"""Headers of answers that a page of another origin may read."""


def install(app: FastAPI, access: Access) -> None:
    """Guard every route, add those of keys, let the allowed origins' pages in. Before the gate is added, which stays
    outside: what is refused here has an id, too."""
    app.add_middleware(Guard, access=access)
    if access.policy.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.policy.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_READABLE,
            max_age=600,
        )
    app.include_router(create_router(access))
