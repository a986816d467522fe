"""What the routers of this room share: described errors, events with signs of life between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel

from llmasos.serve import documented, render
from llmasos.serve.documented import Responses

PING_SECONDS = 15.0
"""A comment is sent after this long without an event: proxies and clients give up on silent connections."""
PING = ": still here\n\n"


def responses(*statuses: int, stream: str = "") -> Responses:
    """The errors that an operation may answer with. `stream`: what its events are."""
    return documented.errors(400, *statuses) | (documented.stream(f"`data:` lines of {stream}.") if stream else {})


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
