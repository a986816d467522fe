"""Answers that end when their reader does: server-sent events, and waiting for work while watching the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmasos.serve import inflight

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


class Disconnected(Exception):
    """The client closed the connection before its answer was ready."""


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away (then Disconnected is raised).

    Returns only when `work` has really ended, so nothing runs on unseen. The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (watcher, task):
            one.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def interleave(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several streams give, as it comes, each with its stream's number. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def read(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for item in stream:
                    await queue.put((index, item))
            await queue.put(None)
        except Exception as e:
            await queue.put(e)

    tasks = [asyncio.ensure_future(read(index)) for index in range(len(streams))]
    try:
        num_open = len(tasks)
        while num_open:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                num_open -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends `first` and then what `events` yields (ready-made `data: ...` text); closes it when the client goes away.

    `first` was taken from `events` before the status line had to be sent, so that an early error has its own status.
    A later one becomes the last event, made by `error_event`. A slow reader does not hold the model: events wait in
    memory, bounded by the tokens that were asked for. `idle`: seconds without any event, and what is sent then.
    """

    def __init__(
        self,
        first: str,
        events: AsyncGenerator[str, None],
        error_event: Callable[[Exception], str],
        *,
        media_type: str = "text/event-stream",
        idle: tuple[float, str] | None = None,
    ) -> None:
        # Proxies must pass events on one by one (X-Accel-Buffering is nginx's word for it).
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._first, self._events, self._error_event, self._idle = first, events, error_event, idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await until_disconnect(receive, self._send_all(send))
        except Disconnected:
            pass
        except asyncio.CancelledError:
            last = self._error_event(inflight.why_cancelled()).encode()
            await send({"type": "http.response.body", "body": last, "more_body": False})
            raise
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        queue.put_nowait(self._first)
        tasks = [asyncio.ensure_future(self._produce(queue))]
        if self._idle is not None:
            tasks.append(asyncio.ensure_future(self._fill(queue, *self._idle)))
        try:
            open_ = True
            while open_:
                self._is_silent = False
                ready = [await queue.get()]
                while ready[-1] is not None and not queue.empty():
                    ready.append(queue.get_nowait())
                open_ = ready[-1] is not None
                body = "".join(text for text in ready if text is not None).encode()
                await send({"type": "http.response.body", "body": body, "more_body": open_})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, queue: asyncio.Queue[str | None], seconds: float, text: str) -> None:
        """Looks from time to time instead of timing every event, which would cost each of them."""
        while True:
            self._is_silent = True
            await asyncio.sleep(seconds)
            if self._is_silent:
                queue.put_nowait(text)

    async def _produce(self, queue: asyncio.Queue[str | None]) -> None:
        try:
            async for text in self._events:
                queue.put_nowait(text)
        except Exception as e:
            queue.put_nowait(self._error_event(e))
        finally:
            queue.put_nowait(None)
