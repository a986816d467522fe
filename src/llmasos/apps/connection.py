"""A connection that can't be held by doing nothing: uvicorn's, with limits that it lacks.

Uvicorn closes a connection that is idle between requests. Beyond that, here: a request's head must come within
HEAD_SECONDS and be no longer than HEAD_BYTES; a client must take its answer; and what is left of a body after its
answer is not waited for. How fast a body must come is the application's business (see `llmasos.serve.gate`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 15.0
"""From the first byte of a request (from the opening of the connection, for its first) to the end of its head."""
HEAD_BYTES = 64 * 1024
STALLED_SECONDS = 120.0
"""How long a client may leave its answer unread when all buffers are full."""
LINGER_SECONDS = 5.0
"""A body that nobody reads may go on for so long after the answer: closed at once, the answer could be lost."""


class BoundedHttp(HttpToolsProtocol):
    """What `uvicorn.Config(http=...)` takes."""

    _in_head = True
    _in_body = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn says so too
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not (self._in_head or self._in_body):
            self._begin_head()  # the next request, be it with an empty line that the parser passes over
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        if not self._in_head:
            self._begin_head()  # a request right behind another
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self._linger_timer is None and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._await_head()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._await_head()  # a request sent ahead, while we answer the one before
        else:
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
