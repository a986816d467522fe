"""Requests made from the server's own OpenAPI document, sent to the application in this process.

Schemathesis makes the requests (valid ones and broken ones, and its systematic edge cases) and judges the answers:
status, content type, headers and body as documented. Beyond what it knows: ids that the server gave are used again,
models are named by their names, and an answer without end (a log that is followed) is left after a moment.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.generation.overrides import Override
from schemathesis.specs.openapi import checks

BASE = "http://127.0.0.1:8000"
STREAMS = ("text/event-stream", "application/x-ndjson")
SECONDS = 20.0
"""What takes longer hangs."""
LISTENING = 0.15
"""So long we listen to a stream that says nothing; then we leave."""
EXPECTED_5XX = {501: "not supported here", 503: "offline, stopping or busy"}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    is_cut: bool = False
    error: str = ""


@dataclass
class Tally:
    """What came of a run. `failures`: what was wrong, with one request that shows it, each kind once."""

    num_requests: int = 0
    operations: set[str] = field(default_factory=set)
    succeeded: set[str] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    num_unsendable: int = 0
    num_cut: int = 0
    slowest: float = 0.0
    slowest_operation: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    num_failures: Counter[str] = field(default_factory=Counter)

    def fail(self, kind: str, operation: str, example: str) -> None:
        name = f"{kind}: {operation}"
        self.num_failures[name] += 1
        self.failures.setdefault(name, example)


class Running:
    """An ASGI application with its lifespan, on an event loop in a thread."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stack = contextlib.AsyncExitStack()

    def __enter__(self) -> Running:
        self._thread.start()
        self._do(self._stack.enter_async_context(self.app.router.lifespan_context(self.app)))
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stack.aclose())
        self._do(self._last_words())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _last_words(self) -> None:
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def num_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        found: int = self._do(count())
        return found

    def ask(self, request: requests.PreparedRequest) -> Answer:
        """Raises TimeoutError for a request that hangs."""
        work = asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)
        try:
            return work.result(SECONDS)
        except concurrent.futures.TimeoutError:
            work.cancel()
            raise

    async def _ask(self, request: requests.PreparedRequest) -> Answer:
        assert request.url and request.method
        parts = urlsplit(request.url)
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        answer, changed, gone = Answer(), asyncio.Event(), asyncio.Event()
        upload = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(upload, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in message["headers"]]
            else:
                answer.body += message.get("body", b"")
            changed.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": parts.scheme,
            "path": unquote(parts.path),
            "raw_path": parts.path.encode(),
            "root_path": "",
            "query_string": parts.query.encode(),
            "headers": [
                (b"host", parts.netloc.encode()),
                *((_bytes(k).lower(), _bytes(v)) for k, v in request.headers.items()),
            ],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        task = asyncio.ensure_future(self.app(scope, receive, send))
        task.add_done_callback(lambda _: changed.set())
        try:
            while not task.done():
                changed.clear()
                kind = dict(answer.headers).get("content-type", "")
                patience = LISTENING if kind.startswith(STREAMS) else None
                try:
                    async with asyncio.timeout(patience):
                        await changed.wait()
                except TimeoutError:
                    answer.is_cut = True
                    gone.set()
                    await task
            await task
        except Exception as e:
            answer.error = repr(e)
        finally:
            gone.set()
        return answer


class Fuzzer:
    """Sends what schemathesis makes of `app`'s document. `names`: models to ask for."""

    def __init__(self, running: Running, names: list[str], *, number: int = 0, exclude: str = "(?!)") -> None:
        load_all_checks()
        self.running, self.names, self.number = running, names, number
        self.schema = schemathesis.openapi.from_dict(running.app.openapi()).exclude(path_regex=exclude)
        self.tally = Tally()
        self._random = random.Random(number)
        self._ids: dict[str, list[str]] = {}

    def furnish(self) -> None:
        """Things to ask about: a conversation, a response, files, a batch, an upload, a pull, a key."""
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
        line["body"] = {"model": self.names[0], "prompt": "hi"}  # type: ignore[assignment]
        file = {"file": ("b.jsonl", json.dumps(line).encode())}
        part = {"filename": "f", "purpose": "batch", "bytes": 2, "mime_type": "text/plain"}
        started: list[tuple[str, dict[str, Any]]] = [
            ("/v1/conversations", {"json": {"items": [{"role": "user", "content": "hi"}]}}),
            ("/v1/responses", {"json": {"model": self.names[0], "input": "hi"}}),
            ("/v1/responses", {"json": {"model": self.names[0], "input": "hi", "background": True}}),
            ("/v1/files", {"files": file, "data": {"purpose": "batch"}}),
            ("/v1/uploads", {"json": part}),
            ("/llmasos/v1/uploads", {"json": {"name": "sent"}}),
            ("/llmasos/v1/pulls", {"json": {"model": "hf:acme/thing"}}),
        ]
        if ("POST", "/llmasos/v1/keys") in {(o.method.upper(), o.path) for o in self.operations()}:
            started.append(("/llmasos/v1/keys", {"json": {"name": "ann"}}))
        for path, fields in started:
            made = self.running.ask(requests.Request("POST", BASE + path, **fields).prepare())
            assert 200 <= made.status < 300, (path, made)
            self._remember(path, made.body)
        batch = {"input_file_id": self._known("file"), "endpoint": "/v1/completions", "completion_window": "24h"}
        made = self.running.ask(requests.Request("POST", BASE + "/v1/batches", json=batch).prepare())
        assert made.status == 200, made
        self._remember("/v1/batches", made.body)

    def operations(self) -> list[Any]:
        found = [result.ok() for result in self.schema.get_all_operations()]
        # What makes things comes first, what deletes or cancels them last.
        order = {"POST": 0, "PUT": 1, "PATCH": 2, "GET": 3, "DELETE": 5}
        return sorted(found, key=lambda o: 4 if o.path.endswith("/cancel") else order[o.method.upper()])

    def edges(self, most: int | None = None) -> None:
        """The systematic cases of every operation: each limit, each wrong type, each missing field."""
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        for operation in self.operations():
            generator = CoverageGenerator(
                operation=operation,
                generation_modes=modes,
                generation_config=self.schema.config.generation_for(operation=operation),
                auth_storage=None,
                override=Override(),
                feedback=FeedbackSources(),
            )
            for i, case in enumerate(generator):
                if i == most:
                    break
                self.send(case)

    def random_cases(self, per_operation: int, round_: int = 0) -> None:
        for index, operation in enumerate(self.operations()):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                share = max(1, round(per_operation * (0.7 if mode is GenerationMode.POSITIVE else 0.3)))
                with contextlib.suppress(Unsatisfiable):  # some operations have nothing that could be wrong
                    _draw(operation.as_strategy(generation_mode=mode), share, (self.number, round_, index), self.send)

    def send(self, case: Any) -> None:
        self._make_real(case)
        operation, tally = case.operation.label, self.tally
        try:
            prepared = requests.Request(**_request_fields(case)).prepare()
        except (requests.exceptions.RequestException, UnicodeError, ValueError):
            tally.num_unsendable += 1  # no client can put this on a wire
            return
        began = time.monotonic()
        try:
            answer = self.running.ask(prepared)
        except concurrent.futures.TimeoutError:
            tally.fail("hangs", operation, _shown(prepared))
            return
        seconds = time.monotonic() - began
        tally.num_requests += 1
        tally.operations.add(operation)
        tally.statuses[answer.status] += 1
        tally.num_cut += answer.is_cut
        if seconds > tally.slowest:
            tally.slowest, tally.slowest_operation = round(seconds, 2), operation
        self._judge(case, prepared, answer, seconds)

    def _judge(self, case: Any, prepared: requests.PreparedRequest, answer: Answer, seconds: float) -> None:
        operation, tally = case.operation.label, self.tally
        if answer.error:
            tally.fail("raises", operation, f"{answer.error} for {_shown(prepared)}")
            return
        expected = answer.status in EXPECTED_5XX and self._says_why(answer)
        if answer.status < 200 or (answer.status >= 500 and not expected):
            tally.fail(f"status {answer.status}", operation, f"{answer.body[:300]!r} for {_shown(prepared)}")
            return
        if "\n" in str(answer.headers) or "\r" in str(answer.headers):
            tally.fail("line break in a header", operation, f"{answer.headers} for {_shown(prepared)}")
        if prepared.method != case.operation.method.upper():
            return  # an undocumented method: its answer is not documented either
        headers: dict[str, list[str]] = {}
        for name, value in answer.headers:
            headers.setdefault(name, []).append(value)
        response = Response(
            answer.status, headers, answer.body, prepared, seconds, False, encoding="utf-8",
            stream_cut_short=answer.is_cut,
        )  # fmt: skip
        is_stream = headers.get("content-type", [""])[0].startswith(STREAMS)
        if is_stream and (wrong := _wrong_line(answer)):
            tally.fail("a wrong line of a stream", operation, f"{wrong!r} for {_shown(prepared)}")
        # A stream is documented as text; schemathesis would have each event be that.
        wanted = [check for check in CHECKS if not (is_stream and check is checks.response_schema_conformance)]
        try:
            case.validate_response(response, checks=wanted, excluded_checks=[not_a_server_error])
        except FailureGroup as group:
            for one in group.exceptions:
                if not isinstance(one, Failure):
                    raise
                message = " ".join(one.message.split())[:300]
                tally.fail(
                    f"{type(one).__name__} {answer.status}",
                    operation,
                    f"{message} | {answer.body[:200]!r} for {_shown(prepared)}",
                )
        if 200 <= answer.status < 300:
            tally.succeeded.add(operation)
            self._remember(case.operation.path, answer.body)

    def _says_why(self, answer: Answer) -> bool:
        try:
            error = json.loads(answer.body)["error"]
        except (ValueError, KeyError, TypeError):
            return False
        text = error if isinstance(error, str) else error.get("message", "")
        return len(text) > 10

    def _remember(self, path: str, body: bytes) -> None:
        with contextlib.suppress(ValueError):
            for one in _objects(json.loads(body)):
                if isinstance(id := one.get("id"), str) and 0 < len(id) < 100:
                    kept = self._ids.setdefault(_kind(id), [])
                    kept.append(id)
                    del kept[:-20]

    def _known(self, kind: str) -> str | None:
        kept = self._ids.get(kind)
        return self._random.choice(kept) if kept else None

    def _make_real(self, case: Any) -> None:
        """Most requests name things that there are: otherwise nearly every answer is 404."""
        if self._random.random() < 0.2:
            return
        path = case.operation.path
        for name in case.path_parameters or {}:
            choices = {"model": self.names, "name": self.names, "path": _FILES}.get(name)
            value = self._random.choice(choices) if choices else self._known(_kind_of(name, path))
            if value is not None:
                case.path_parameters[name] = value
        if isinstance(case.body, dict):
            for name in case.body:
                if name == "model" and isinstance(case.body[name], str):
                    case.body[name] = self._random.choice(self.names)
                elif name in _FIELDS and (value := self._known(_FIELDS[name])) is not None:
                    case.body[name] = value


_FILES = ["config.json", "tokenizer.json", "model.safetensors", "model.gguf"]
_FIELDS = {"previous_response_id": "resp", "conversation": "conv", "input_file_id": "file"}
_PARAMETERS = {"response_id": "resp", "conversation_id": "conv", "item_id": "msg", "file_id": "file"}
_PARAMETERS |= {"batch_id": "batch", "key_id": "key"}


def _kind_of(name: str, path: str) -> str:
    if name == "id":
        return {"pulls": "pull", "uploads": "upload"}.get(path.split("/")[3], "req")
    return "upload" if name == "upload_id" else _PARAMETERS.get(name, name)


def _kind(id: str) -> str:
    head = id.replace("-", "_").split("_")[0]
    return head if "_" in id or "-" in id else "key"


def _objects(found: Any) -> Iterator[dict[str, Any]]:
    if isinstance(found, dict):
        yield found
        found = list(found.values())
    if isinstance(found, list):
        for one in found[:20]:
            yield from _objects(one)


def _wrong_line(answer: Answer) -> str | None:
    """The first line that is neither JSON nor one of server-sent events."""
    lines = answer.body.decode("utf-8", "replace").split("\n")
    for line in lines[:-1] if answer.is_cut else lines:
        if not line or line.startswith((":", "event: ")) or line == "data: [DONE]":
            continue
        try:
            json.loads(line.removeprefix("data: "))
        except ValueError:
            return line[:200]
    return None


def _draw(strategy: Any, count: int, number: tuple[int, ...], send: Any) -> None:
    @seed(repr(number))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        send(case)

    run()


def _request_fields(case: Any) -> dict[str, Any]:
    fields: dict[str, Any] = case.as_transport_kwargs(base_url=BASE)
    known = ("method", "url", "headers", "files", "data", "params", "auth", "cookies", "json")
    return {name: value for name, value in fields.items() if name in known}


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1", "replace")


def _shown(request: requests.PreparedRequest) -> str:
    body = request.body or b""
    body = body.encode(errors="replace") if isinstance(body, str) else body
    url = (request.url or "").removeprefix(BASE)
    return f"{request.method} {url[:300]} {body[:600].decode(errors='replace')!r}"
