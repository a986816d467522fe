"""The server's door for one application: a Unix socket of its own, behind which the same routes are, for that
application's key alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from llmasos.apps.connection import BoundedHttp
from llmasos.serve.access.access import TENANT, Tenant

MOST_CONNECTIONS = 128
"""More are closed at once: an application could take all of the server's."""


class ServerDoor:
    def __init__(self, app: ASGIApp, tenant: Tenant) -> None:
        self._app, self._tenant = app, tenant
        self._state = ServerState()
        self._server: asyncio.AbstractServer | None = None

    async def open(self, path: Path) -> None:
        config = uvicorn.Config(
            self._serve,
            http=_Bounded,
            interface="asgi3",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
        )
        config.load()

        def connection() -> asyncio.Protocol:
            return _Bounded(config=config, server_state=self._state, app_state={})

        self._server = await asyncio.get_running_loop().create_unix_server(connection, str(path), backlog=64)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, TENANT: self._tenant, "client": None}, receive, send)

    async def close(self) -> None:
        """Whatever the application has asked for ends."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._state.tasks)
        for connection in list(self._state.connections):
            transport: Any = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Bounded(BoundedHttp):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn says so too
        if len(self.server_state.connections) >= MOST_CONNECTIONS:
            transport.abort()
            self.transport = transport
            self._refused = True
            return
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not getattr(self, "_refused", False):
            super().connection_lost(exc)
