"""ASGI middleware: no request reaches a route without leave, and what it used is written down.

It stands inside the gate, which gives each request its id, and CORS, whose questions carry no key. It puts the
`Caller` into the request's state.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmasos.errors import LLMasOSError, StoreError
from llmasos.serve import inflight
from llmasos.serve.access.access import Access
from llmasos.serve.access.errors import AccessUnavailableError, UnauthorizedError
from llmasos.serve.access.keys import Key, redacted
from llmasos.serve.access.limits import Meter
from llmasos.serve.access.routes import Rule, methods_of, rule_for
from llmasos.serve.access.usage import Counts
from llmasos.serve.caller import Caller
from llmasos.serve.problems import error_response, problem_of

log = logging.getLogger("llmasos.serve.access")

_ANY_KEY = Rule("", "", "any")
_UNCHANGING = ("GET", "HEAD", "OPTIONS")


class Guard:
    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        rule = rule_for(scope["method"], scope["path"])
        try:
            # what is not there is told to those who have a key, as everything else
            caller, key = await self.access.caller(scope, rule or _ANY_KEY)
        except LLMasOSError as e:
            await _refuse(e, scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if rule is None:
            await _nothing_here(scope, receive, send)
            return
        answer = _Answer(send)
        if not rule.counted:
            try:
                await self.app(scope, receive, answer.send)
            finally:
                self._audit(rule, caller, scope, answer)
            return
        await self._counted(caller, key, scope, receive, answer)

    async def _counted(self, caller: Caller, key: Key | None, scope: Scope, receive: Receive, answer: _Answer) -> None:
        meter: Meter | None = None
        try:
            meter = await self.access.admit(key) if key is not None else None
        except LLMasOSError as e:
            assert key is not None
            headers = self.access.limit_headers(self.access.meter(key))
            await _refuse(e, scope, receive, answer.send, headers)
            return
        if meter is not None:
            answer.headers = dict(self.access.limit_headers(meter))

        def end() -> None:
            if meter is not None:
                meter.release()
            self.access.record(caller, *_used(answer.status))

        with contextlib.ExitStack() as stack:
            stack.callback(end)
            answer.before_last = stack.close
            await self.app(scope, receive, answer.send)

    def _audit(self, rule: Rule, caller: Caller, scope: Scope, answer: _Answer) -> None:
        """What changes the server is written down by whoever does it. Keys' own routes write more, in the same
        transaction as the change."""
        if rule.access != "manage" or rule.method in _UNCHANGING or rule.path.startswith("/llmasos/v1/keys"):
            return
        details: dict[str, object] = {"status": answer.status}
        if (request := inflight.current()) is not None and request.model is not None:
            details["model"] = request.model
        id = scope["state"].get("request_id")
        self.access.ledger.note(caller.actor, f"{rule.method} {rule.path}", redacted(scope["path"]), details, id)


class _Answer:
    """The way out, watched: which status went, and more headers on it. `before_last` is called before its last bytes
    go: whoever has them may ask again at once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.headers: dict[str, str] = {}
        self.before_last: Callable[[], None] = lambda: None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update(self.headers)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.before_last()
        await self._send(message)


def _used(status: int) -> tuple[str, Counts]:
    """Model and counts of the request that ends. No model is named for one that reached none: names that clients make
    up would fill the table."""
    request = inflight.current()
    counts = Counts(requests=1, errors=int(not 200 <= status < 400))
    if request is None or not request.is_begun:
        return "", counts
    counts.prompt_tokens = request.num_prompt_tokens
    counts.cached_tokens = request.num_cached_tokens
    counts.output_tokens = request.num_output_tokens
    return request.model or "", counts


async def _refuse(
    e: LLMasOSError, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    if isinstance(e, StoreError):
        log.error("a request could not be checked: %s", e)
        e = AccessUnavailableError()
    problem = problem_of(e)
    problem["headers"] = {**problem["headers"], **(headers or {})}
    if isinstance(e, UnauthorizedError):
        problem["headers"]["www-authenticate"] = "Bearer"
    await error_response(scope, **problem)(scope, receive, send)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    message = f"There is no {scope['method']} {scope['path']}. See /openapi.json."
    allowed = methods_of(scope["path"])
    status, code = (405, "method_not_allowed") if allowed else (404, "not_found")
    headers = {"allow": ", ".join(allowed)} if allowed else {}
    await error_response(scope, status, message, code=code, headers=headers)(scope, receive, send)
