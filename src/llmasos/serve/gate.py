"""What every request passes through: an id, a check of its host, limits on its body, and a net under all of it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmasos.apps.hosting import foreign_host
from llmasos.serve import inflight
from llmasos.serve.access.routes import rule_for
from llmasos.serve.problems import error_response, log, problem_of, unexpected
from llmasos.serve.shapes import shape_of

BODY_SECONDS = 30.0
BODY_RATE = 1024.0
"""Bytes per second."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware. `x-request-id` is taken from the request where it is harmless text, else made, and sent back.

    `loopback_only` refuses requests whose Host header is no loopback name. `max_upload_bytes` holds for the routes that
    `access.routes` calls uploads; `max_body_bytes` for all others.
    """

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, loopback_only: bool, max_upload_bytes: int | None = None
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_upload_bytes = max_upload_bytes or max_body_bytes
        self.loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers_out = MutableHeaders(scope=message)
                headers_out["x-request-id"] = headers_out[shape_of(scope).id_header] = request_id
            await send(message)

        try:
            if self.loopback_only and (message := foreign_host(scope)):
                await error_response(scope, 403, message, code="forbidden_host")(scope, receive, send_with_id)
                return
            await self.app(scope, self._limited(scope, headers, receive), send_with_id)
        except asyncio.CancelledError:  # the server stops, or somebody cancelled the request; nothing runs above this
            if not started:
                await error_response(scope, **problem_of(inflight.why_cancelled()))(scope, receive, send_with_id)
        except Exception:
            problem = unexpected(request_id)
            if started:
                log.error("request %s had been answered in part; its connection is dropped", request_id)
                raise
            await error_response(scope, **problem)(scope, receive, send_with_id)

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """`receive` that raises status 413 as soon as the body is known to be too long, and 408 when it comes so slowly
        that it only holds the connection: it may keep us waiting for BODY_SECONDS in all, and as long again as it would
        take at BODY_RATE."""
        rule = rule_for(scope["method"], scope["path"])
        most = self.max_upload_bytes if rule is not None and rule.upload else self.max_body_bytes
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isascii() and declared.isdigit() else 0
        num_received, waited, is_whole = 0, 0.0, False

        async def limited() -> Message:
            nonlocal num_received, waited, is_whole
            if is_whole:  # what comes now is the client's going away
                return await receive()
            message: Message = {"type": "http.request"}
            if size <= most:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(BODY_SECONDS + num_received / BODY_RATE - waited):
                        message = await receive()
                except TimeoutError:
                    text = f"The body came too slowly: {num_received} bytes so far."
                    raise HTTPException(408, text, {"connection": "close"}) from None
                waited += time.monotonic() - began
            if message["type"] == "http.request":
                num_received += len(message.get("body", b""))
                if max(size, num_received) > most:
                    raise HTTPException(413, f"The body is longer than {most} bytes, this server's limit.")
                is_whole = not message.get("more_body", False)
            return message

        return limited
