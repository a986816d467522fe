"""The requests in flight: what each is at, for lists, cancelling, the access log, usage and traces.

`Watch` is the outermost middleware, so that refused requests are seen too. What happens further in is noted through
`asks`, `begins` and `gives`, which find their request in the context and do nothing outside of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmasos.errors import LLMasOSError
from llmasos.serve.access.keys import redacted
from llmasos.serve.access.routes import rule_for
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.problems import CLIENT_CLOSED_REQUEST, StoppingError


class RequestCancelledError(LLMasOSError):
    """Somebody with the right to do so ended this request. Nobody should repeat it unasked, so its status is none of
    those that clients retry."""

    http_status = CLIENT_CLOSED_REQUEST

    def __init__(self) -> None:
        super().__init__("This request was cancelled on the server.")


@dataclass(slots=True, eq=False)
class InFlight:
    """One HTTP request. Times are of `time.monotonic`, but `began`, which is of `time.time`."""

    scope: Scope
    task: asyncio.Task[object] | None
    began: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    model: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    is_begun: bool = False
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    status: int = 0
    cancelled: bool = False

    @property
    def id(self) -> str:
        """Empty until the gate has chosen it."""
        found: str = self.scope.get("state", {}).get("request_id", "")
        return found

    @property
    def caller(self) -> Caller:
        found = self.scope.get("state", {}).get("caller", ANYONE)
        assert isinstance(found, Caller)
        return found

    @property
    def route(self) -> str:
        """Method and path, with `{names}` in the place of values where there is such a route: bounded in number."""
        method, path = self.scope["method"], self.scope["path"]
        rule = rule_for(method, path)
        return f"{method} {rule.path if rule else redacted(path)}"

    @property
    def state(self) -> Literal["waiting", "running"]:
        """A request waits for its model; what waits in the model's own queue is counted there."""
        return "running" if self.is_begun else "waiting"

    @property
    def age(self) -> float:
        return time.monotonic() - self.started


_current: ContextVar[InFlight | None] = ContextVar("llmasos_request", default=None)


def current() -> InFlight | None:
    """The request that this code runs for."""
    return _current.get()


@contextlib.contextmanager
def noting(request: InFlight) -> Iterator[None]:
    """What happens in the block is `request`'s: for work without an HTTP request of its own."""
    before = _current.set(request)
    try:
        yield
    finally:
        _current.reset(before)


def current_id() -> str | None:
    request = _current.get()
    return (request.id or None) if request else None


def asks(model: str) -> None:
    """The request wants `model`, which may have to be loaded first, or does something with it."""
    if request := _current.get():
        request.model = redacted(model)


def begins(num_prompt_tokens: int) -> None:
    """Prompts of together `num_prompt_tokens` go to the model."""
    if request := _current.get():
        request.is_begun = True
        request.num_prompt_tokens += num_prompt_tokens


def gives(num_tokens: int, *, num_cached: int = 0, finish_reason: str | None = None) -> None:
    """The model made `num_tokens` for the request. `num_cached` prompt tokens had not to be computed."""
    request = _current.get()
    if request is None:
        return
    if num_tokens and request.first_token is None:
        request.first_token = time.monotonic()
    request.num_output_tokens += num_tokens
    request.num_cached_tokens += num_cached
    if finish_reason is not None:
        request.finish_reasons.append(finish_reason)


def why_cancelled() -> RequestCancelledError | StoppingError:
    """What to tell the client of a request whose task is cancelled."""
    request = _current.get()
    return RequestCancelledError() if request is not None and request.cancelled else StoppingError()


class Requests:
    """The requests of one server."""

    def __init__(self) -> None:
        self._flying: set[InFlight] = set()
        self.on_begin: list[Callable[[InFlight], None]] = []
        self.on_end: list[Callable[[InFlight], None]] = []

    def __iter__(self) -> Iterator[InFlight]:
        """The oldest first."""
        return iter(sorted(self._flying, key=lambda request: request.started))

    def __len__(self) -> int:
        return len(self._flying)

    def cancel(self, id: str) -> InFlight | None:
        """End a request: its client gets RequestCancelledError. None if there is none of this id."""
        found = next((request for request in self._flying if request.id == id), None)
        if found is not None and found.task is not None:
            found.cancelled = True
            found.task.cancel()
        return found

    def begin(self, request: InFlight) -> None:
        self._flying.add(request)
        for call in self.on_begin:
            call(request)

    def end(self, request: InFlight) -> None:
        self._flying.discard(request)
        for call in self.on_end:
            call(request)


class Watch:
    """ASGI middleware that knows of every request from its first byte to its answer's last."""

    def __init__(self, app: ASGIApp, *, requests: Requests) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        request = InFlight(scope, asyncio.current_task())
        _current.set(request)  # and not reset: what is logged of a failure after this belongs to it

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            await send(message)

        self.requests.begin(request)
        try:
            await self.app(scope, receive, watched)
        finally:
            self.requests.end(request)
