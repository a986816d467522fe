"""What the routers of this room share: described errors, events with signs of life between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel

from llmasos.client.types import ErrorBody
from llmasos.serve import render

PING_SECONDS = 15.0
"""A comment is sent after this long without an event: proxies and clients give up on silent connections."""
PING = ": still here\n\n"

_WRONG = {
    400: "A field is wrong, unknown or not supported; `param` names it.",
    403: "The caller may not do this.",
    404: "There is nothing of this name.",
    409: "Not in its present state, or somebody else is at it.",
    413: "Too long for this server.",
    422: "The file is not what it claims to be, or of an unknown architecture.",
    502: "A host could not be reached or answered wrongly.",
    503: "Offline mode is on, or the server is stopping.",
    507: "There is no room: on the disk, or in memory.",
}


def responses(*statuses: int, stream: str = "") -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses`: the errors that an operation may answer with. `stream`: what its events are."""
    known = (400, *statuses)
    found: dict[int | str, dict[str, Any]] = {k: {"model": ErrorBody, "description": _WRONG[k]} for k in known}
    if stream:
        schema = {"type": "string", "description": f"`data:` lines of {stream}."}
        found[200] = {"description": "The events", "content": {"text/event-stream": {"schema": schema}}}
    return found


async def sse(
    items: AsyncGenerator[Any, None], stopping: asyncio.Event, *, greet: bool = False
) -> AsyncGenerator[str, None]:
    """Each item as an event; pings in between. Ends when the server is `stopping`: it would wait for its readers.

    `greet`: a ping comes first, so that a reader knows at once that it is listening.
    """
    async with aclosing(items):
        upcoming = asyncio.ensure_future(anext(items))
        stop = asyncio.ensure_future(stopping.wait())
        try:
            if greet:
                yield PING
            while True:
                await asyncio.wait({upcoming, stop}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done():
                    if stop.done():
                        return
                    yield PING
                    continue
                try:
                    item: BaseModel = upcoming.result()
                except StopAsyncIteration:
                    return
                upcoming = asyncio.ensure_future(anext(items))
                yield render.event(item)
        finally:
            for one in (upcoming, stop):
                one.cancel()
            await asyncio.gather(upcoming, stop, return_exceptions=True)
