"""A generator as an answer: server-sent events, or everything at once for a client that asks for JSON.

Each element is one event, `data: <JSON of the element>`; the last one is `event: done`, or `event: error` with a
problem document if the generator failed midway. A failure before the first element is an ordinary error answer with its
status. What the function says with `report_progress` is `event: progress`, `{"done": share or null, "message": words}`;
of many at once some are left out. When the client goes away the generator is closed, so its `finally` blocks run.

A plain generator lives in one thread from first to last element: grad modes of torch, SQLite connections and re-entrant
locks belong to a thread, and would break if each step ran in another one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llmasos.apps import problems
from llmasos.apps.jobs import reporting_to
from llmasos.apps.routes import Route
from llmasos.client import leaving

PING_SECONDS = 15.0
"""A comment is sent after this much silence, so that proxies keep the connection while a model reads a long prompt."""
_AHEAD = 16
Worker = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a call in a worker thread."""
END, PING = object(), object()
"""What `next_element` gives when all is over, and when nothing has come for a while."""


class _Progress:
    def __init__(self, done: float | None, message: str) -> None:
        self.body = {"done": done, "message": message}


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Streaming(Response):
    """Runs `items`, an iterator or async iterator, while `send_from` reads it; ends it when the client goes away."""

    tells_progress = False
    """Whether `source` has progress, too."""

    def __init__(self, name: str, items: Any, *, worker: Worker) -> None:
        self.status_code, self.background = 200, None
        self.raw_headers = []
        """On top of those that the answer has anyway, whichever it becomes."""
        self._function, self._items, self._in_thread = name, items, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = leaving.Token()
        async with anyio.create_task_group() as group:
            group.start_soon(self._stop_when_gone, receive, group.cancel_scope, token)
            with token.active():
                async with _running(
                    self._function, self._items, self._in_thread, tells_progress=self.tells_progress
                ) as source:
                    await self.send_from(source, scope, receive, self._with_headers(send))
            group.cancel_scope.cancel()

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and self.raw_headers:
                message = {**message, "headers": [*message["headers"], *self.raw_headers]}
            await send(message)

        return sending

    async def send_from(
        self, source: MemoryObjectReceiveStream[Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        raise NotImplementedError

    @staticmethod
    async def _stop_when_gone(receive: Receive, scope: anyio.CancelScope, token: leaving.Token) -> None:
        await until_left(receive)
        token.cancel()
        scope.cancel()


async def until_left(receive: Receive) -> None:
    """Until the client goes away. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamResponse(Streaming):
    """Sends the elements as they come; `collected`: all of them, as one JSON document."""

    def __init__(self, route: Route, items: Any, *, collected: bool, worker: Worker) -> None:
        super().__init__(route.name, items, worker=worker)
        self._route, self._collected, self.tells_progress = route, collected, not collected

    async def send_from(
        self, source: MemoryObjectReceiveStream[Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._collected:
            await (await self._collect(source))(scope, receive, send)
        else:
            await self._events(source, scope, receive, send)

    async def _collect(self, source: MemoryObjectReceiveStream[Any]) -> Response:
        try:
            items = [element(item) async for item in source]
            return Response(self._route.collect(items), media_type="application/json")
        except (Exception, SystemExit) as e:
            return problems.response(problems.of_exception(e, self._route.name))

    async def _events(self, source: MemoryObjectReceiveStream[Any], scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        while True:
            item = await next_element(source)
            event, failure = self._event(item)
            if failure is not None and not started:
                await problems.response(failure)(scope, receive, send)
                return
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                started = True
            last = item is END or failure is not None
            await send({"type": "http.response.body", "body": event, "more_body": not last})
            if last:
                return

    def _event(self, item: Any) -> tuple[bytes, dict[str, Any] | None]:
        """The bytes of one event, and the problem if it is an error."""
        if item is PING:
            return b": waiting\n\n", None
        if isinstance(item, _Progress):
            return b"event: progress\ndata: " + problems.encode(item.body) + b"\n\n", None
        if item is END:
            return b"event: done\ndata: {}\n\n", None
        try:
            return b"data: " + self._route.dump_item(element(item)) + b"\n\n", None
        except (Exception, SystemExit) as e:
            failure = problems.of_exception(e, self._route.name)
            return b"event: error\ndata: " + problems.encode(failure) + b"\n\n", failure


@asynccontextmanager
async def reading(route: Route, items: Any, worker: Worker) -> AsyncIterator[AsyncGenerator[Any, None]]:
    """The elements of an iterator or async iterator as they come, for any surface; raises what it raises. It is closed
    with the block."""

    async def elements(source: MemoryObjectReceiveStream[Any]) -> AsyncGenerator[Any, None]:
        async for item in source:
            yield element(item)

    async with _running(route.name, items, worker) as source:
        yield elements(source)


@asynccontextmanager
async def _running(
    name: str, items: Any, worker: Worker, *, tells_progress: bool = False
) -> AsyncIterator[MemoryObjectReceiveStream[Any]]:
    """The iterator runs where it belongs, a little ahead of its reader. A failure is the last element."""
    sink, source = anyio.create_memory_object_stream[Any](_AHEAD)
    failure: Exception | None = None
    loop = asyncio.get_running_loop()

    def report(done: float | None, message: str) -> None:
        loop.call_soon_threadsafe(tell, _Progress(done, message))

    def tell(progress: _Progress) -> None:
        with contextlib.suppress(anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
            sink.send_nowait(progress)

    async with anyio.create_task_group() as group:
        with reporting_to(report) if tells_progress else contextlib.nullcontext():
            group.start_soon(_produce, name, items, worker, sink)  # it begins with this context
        with source:
            try:
                yield source
            except Exception as e:  # the reader's own: a task group would wrap it
                failure = e
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _produce(name: str, items: Any, worker: Worker, sink: MemoryObjectSendStream[Any]) -> None:
    with sink:
        try:
            if isinstance(items, AsyncIterable):
                await _pump_async(aiter(items), sink)
            else:
                await worker(functools.partial(_pump, iter(items), sink))
        except (Exception, SystemExit) as e:
            try:
                await sink.send(_Failure(e))  # the reader decides between status and event
            except (anyio.BrokenResourceError, asyncio.CancelledError) as unread:
                problems.of_exception(e, name)  # nobody reads any more: the log is all there is
                if isinstance(unread, asyncio.CancelledError):
                    raise


HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


def _pump(items: Iterator[Any], sink: MemoryObjectSendStream[Any]) -> None:
    try:
        for item in items:
            try:
                anyio.from_thread.run(sink.send, item)
            except (anyio.BrokenResourceError, concurrent.futures.CancelledError, asyncio.CancelledError):
                return  # the client is gone
    finally:
        if close := getattr(items, "close", None):
            close()


async def _pump_async(items: AsyncIterator[Any], sink: MemoryObjectSendStream[Any]) -> None:
    # A task of its own: anyio cancels again at every await and would break off what the generator awaits to clean up.
    # Here it is cancelled once, and not at all when it is closing already.
    closing = asyncio.Event()
    task = asyncio.create_task(_iterate(items, sink, closing))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not closing.is_set():
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            raise error from None
        raise


async def _iterate(items: AsyncIterator[Any], sink: MemoryObjectSendStream[Any], closing: asyncio.Event) -> None:
    try:
        async for item in items:
            try:
                await sink.send(item)
            except anyio.BrokenResourceError:
                return  # the client is gone
    finally:
        closing.set()
        if close := getattr(items, "aclose", None):
            await close()


def element(item: Any) -> Any:
    """What the iterator gave; raises what it raised."""
    if isinstance(item, _Failure):
        raise item.error
    return item


async def next_element(source: MemoryObjectReceiveStream[Any]) -> Any:
    """The next element for `element`, END, or PING."""
    with anyio.move_on_after(PING_SECONDS):
        try:
            return await source.receive()
        except anyio.EndOfStream:
            return END
    return PING


def is_stream(value: Any) -> bool:
    return isinstance(value, Iterator | AsyncIterator)


def prefers_json(accept: str) -> bool:
    """Whether an Accept header names application/json above text/event-stream; without either, events it is."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        media, *parameters = (p.strip() for p in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            weights[media] = float(quality)
        except ValueError:
            weights[media] = 1.0
    return weights.get("application/json", 0.0) > weights.get("text/event-stream", 0.0)
