"""Requests on their way to an application and back.

Nothing of who asks goes with them: no key, no cookie, no address; only a text that tells callers apart
(`llmasos.apps.clients`). What comes back is shown by browsers as a page of
nobody's: an application answers under the server's own address, and its scripts must not do there what its reader may.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from urllib.parse import quote

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmasos.apps.clients import CLIENT, name_for
from llmasos.errors import ServerError
from llmasos.serve import inflight
from llmasos.serve.apps.running import Running
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.caller import caller_of
from llmasos.serve.problems import CLIENT_CLOSED_REQUEST

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
_HOP |= {"upgrade", "proxy-connection"}
_NOT_SENT = _HOP | {"authorization", "x-api-key", "cookie", "host", "forwarded", "x-real-ip", "origin", "referer"}
_NOT_SENT |= {CLIENT}
_NOT_RETURNED = _HOP | {"set-cookie", "set-cookie2", "server", "date", "strict-transport-security", "clear-site-data"}
_NOT_RETURNED |= {"content-security-policy", "x-content-type-options", "service-worker-allowed", "alt-svc", "link"}
_NOT_RETURNED |= {"refresh", "www-authenticate", "x-request-id", "request-id"}
_SAFE = {
    "content-security-policy": "sandbox allow-scripts allow-forms; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
}
_EMPTY = (204, 304)
"""Whose head is their end, whatever length it gives."""
_LONG = ("/mcp", "/jobs")
"""Where a stream may be silent for as long as it likes."""


class AppTimeoutError(ServerError):
    http_status = 504
    code = "app_timeout"


class AppEndedError(ServerError):
    """The application ended, or broke the connection off, before it had answered."""

    http_status = 502
    code = "app_ended"


async def forward(
    supervisor: Supervisor, request: Request, name: str, path: str, *, body: bytes | None = None
) -> Response:
    """The application's answer at its own `path`, once its head is there. `body`: instead of the request's.

    Raises what `Supervisor.use` raises, AppTimeoutError, AppEndedError."""
    stack = contextlib.AsyncExitStack()
    try:
        found = await stack.enter_async_context(supervisor.use(name))
        answer = await _head(supervisor, found, request, path, body)
        if answer is None:
            await stack.aclose()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        stack.push_async_callback(answer.aclose)
    except BaseException:
        await stack.aclose()
        raise
    return _Passing(supervisor, found, answer, stack, path)


async def _head(
    supervisor: Supervisor, found: Running, request: Request, path: str, body: bytes | None
) -> httpx.Response | None:
    """None: the client went away."""
    headers = [(k, v) for k, v in request.headers.raw if k.decode("latin-1").lower() not in _NOT_SENT]
    headers = [(k, v) for k, v in headers if not k.lower().startswith(b"x-forwarded-")]
    if (client := name_for(found.order.app.name, caller_of(request).key_id)) is not None:
        headers.append((CLIENT.encode(), client.encode()))
    if body is not None:
        headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
    if (id := inflight.current_id()) is not None:
        headers = [(k, v) for k, v in headers if k.lower() != b"x-request-id"] + [(b"x-request-id", id.encode())]
    has_body = body is not None or "content-length" in request.headers or "transfer-encoding" in request.headers
    sent = _Body(request) if has_body and body is None else None
    query = request.scope.get("query_string", b"")
    url = httpx.URL("http://app").copy_with(raw_path=_quoted(path) + (b"?" + query if query else b""))
    # not the client's way to make one, which adds headers that nobody has sent
    asked = httpx.Request(request.method, url, headers=headers, content=body if sent is None else sent)
    asking = asyncio.create_task(found.client.send(asked, stream=True))
    gone = asyncio.create_task(_gone(request, sent))
    try:
        await asyncio.wait({asking, gone}, timeout=found.terms.timeout, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            if sent is not None and sent.error is not None:
                raise sent.error  # the body was too long, or too slow
            answer = asking.result()
            if 200 <= answer.status_code < 600:
                return answer
            await answer.aclose()
            raise AppEndedError(f"{found.order.app.name} answered with the status {answer.status_code}.")
        if gone.done():
            return None
        supervisor.check_later(found)
        raise AppTimeoutError(
            f"{found.order.app.name} did not answer within {found.terms.timeout:g} s.",
            hint="Long calls go with `Prefer: respond-async`.",
        )
    except httpx.HTTPError as e:
        raise await ended(found, e) from e
    finally:
        for task in (asking, gone):
            task.cancel()
        await asyncio.gather(asking, gone, return_exceptions=True)


def _quoted(path: str) -> bytes:
    return quote(path, safe="/:@!$&'()*+,;=~-._").encode()


class _Body:
    """The request's body as it comes; keeps what its reading raised, which the client library would wrap."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.read = asyncio.Event()
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._request.stream():
                yield piece
        except Exception as e:
            self.error = e
            raise
        finally:
            self.read.set()


async def _gone(request: Request, sent: _Body | None) -> None:
    """Until the client goes away, which can be told when its body is read."""
    if sent is not None:
        await sent.read.wait()
        if sent.error is not None:
            await asyncio.Event().wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def ended(found: Running, e: Exception) -> AppEndedError:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):  # it may be known in a moment why
            await found.wait()
    name = found.order.app.name
    if found.exit is not None:
        return AppEndedError(f"{name} ended before it had answered: {found.exit.reason}.")
    return AppEndedError(f"{name} broke the connection off before it had answered ({type(e).__name__}).")


class _Passing(Response):
    """The application's answer, sent on as it comes."""

    def __init__(
        self,
        supervisor: Supervisor,
        found: Running,
        answer: httpx.Response,
        stack: contextlib.AsyncExitStack,
        path: str,
    ) -> None:
        self._supervisor, self._found, self._answer, self._stack = supervisor, found, answer, stack
        self.status_code = answer.status_code
        self.body = b""
        self.background = None
        kept = [(k.lower(), v) for k, v in answer.headers.raw if k.decode("latin-1").lower() not in _NOT_RETURNED]
        kept = [(k, v) for k, v in kept if not k.startswith((b"access-control-", b"x-ratelimit-"))]
        self.raw_headers = kept + [(k.encode(), v.encode()) for k, v in _SAFE.items()]
        is_long = path.startswith(_LONG)
        self._silence = None if is_long else found.terms.timeout
        length = answer.headers.get("content-length", "")
        self._length = int(length) if length.isascii() and length.isdigit() else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            passing = asyncio.create_task(self._pass(send))
            gone = asyncio.create_task(_disconnect(receive))
            try:
                await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
                if passing.done():
                    passing.result()
            finally:
                for task in (passing, gone):
                    task.cancel()
                await asyncio.gather(passing, gone, return_exceptions=True)

    async def _pass(self, send: Send) -> None:
        """Whoever has the last byte may call again at once, so its place is free before that is sent."""
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        is_empty = self._length == 0 or self.status_code in _EMPTY
        if not is_empty:
            await send(head)
        num_read, last = 0, b""
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                num_read += len(piece)
                if num_read == self._length:
                    last = piece
                else:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._stack.aclose()
        if is_empty:
            await send(head)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        found = self._answer.aiter_raw()
        async with contextlib.aclosing(found) as source:  # type: ignore[type-var]  # httpx calls its generator an iterator
            while True:
                try:
                    async with asyncio.timeout(self._silence):
                        piece = await anext(source, None)
                except TimeoutError:
                    self._supervisor.check_later(self._found)
                    raise AppTimeoutError(f"{self._found.order.app.name} was silent for {self._silence:g} s.") from None
                except httpx.HTTPError as e:
                    raise await ended(self._found, e) from e
                if piece is None:
                    return
                yield piece


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
