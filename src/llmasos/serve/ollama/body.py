"""Bodies as Ollama takes them: JSON, whatever the request calls them. `curl -d`, which calls them forms, is in all
examples."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from llmasos.serve.body import ReadAside

_NAME = b"content-type"


class AnyContentType(ReadAside):
    """Not for web pages: a browser sends a form to other sites without asking them, and JSON only with leave."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            if "origin" not in request.headers and "sec-fetch-site" not in request.headers:
                others = [(name, value) for name, value in request.scope["headers"] if name != _NAME]
                scope = {**request.scope, "headers": [*others, (_NAME, b"application/json")]}
                request = Request(scope, request.receive)
            return await handle(request)

        return as_json
