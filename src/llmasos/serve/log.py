"""Logs: one line per event as text or JSON, the latest lines kept for `/llmasos/v1/logs`, one line per request.

A line may hold `fields` (`extra={"fields": {...}}`) and knows the request that it belongs to. Bodies and keys are never
logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from llmasos.client.types.native import LogLevel, LogLine
from llmasos.serve import inflight
from llmasos.serve.inflight import InFlight

KEPT_LINES = 2000
QUEUED_LINES = 1000
"""What a follower may lag behind before lines are left out for it."""
LOGGERS = ("llmasos", "uvicorn.error")
_QUIET = frozenset(
    f"GET {path}"
    for path in (
        *("/healthz", "/readyz", "/metrics", "/console/{path:path}"),
        *(f"/llmasos/v1/{name}" for name in ("status", "system", "requests", "logs", "jobs", "agents/runs")),
        *(f"/llmasos/v1/apps{more}" for more in ("", "/{name}", "/{name}/logs")),
    )
)
"""Asked every few seconds by machines and the console: their lines are for `debug`."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}

access = logging.getLogger("llmasos.access")


def line_of(record: logging.LogRecord) -> LogLine:
    """What everybody sees of a log record."""
    values = dict(getattr(record, "fields", {}))
    if record.exc_info:
        values["exception"] = logging.Formatter().formatException(record.exc_info)
    return LogLine(
        time=datetime.fromtimestamp(record.created, UTC),
        level=record.levelname.lower(),
        logger=record.name,
        message=record.getMessage(),
        request_id=values.pop("request_id", None) or inflight.current_id(),
        fields=values,
    )


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = line_of(record)
        stamp = line.time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": stamp, "level": line.level, "logger": line.logger, "message": line.message}
        if line.request_id:
            head["request_id"] = line.request_id
        return json.dumps(head | line.fields, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One line for people; what clients sent can't break it in two."""

    def format(self, record: logging.LogRecord) -> str:
        line = line_of(record)
        exception = line.fields.pop("exception", None)
        parts = [f"{line.time.astimezone():%Y-%m-%d %H:%M:%S}", f"{line.level:<7}", line.message.translate(_CONTROL)]
        if line.request_id:
            parts.append(f"[{line.request_id}]")
        return " ".join(parts) + (f"\n{exception}" if exception else "")


class Journal(logging.Handler):
    """The latest lines, and those who follow them."""

    def __init__(self, size: int = KEPT_LINES) -> None:
        super().__init__()
        self._lines: deque[LogLine] = deque(maxlen=size)
        self._followers: dict[asyncio.Queue[LogLine], asyncio.AbstractEventLoop] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = line_of(record)
        self._lines.append(line)
        for queue, loop in list(self._followers.items()):
            with contextlib.suppress(RuntimeError):  # its loop has just been closed
                loop.call_soon_threadsafe(_offer, queue, line)

    def lines(
        self, *, level: LogLevel | None = None, request_id: str | None = None, limit: int = KEPT_LINES
    ) -> list[LogLine]:
        """The latest `limit` of them that fit, oldest first."""
        found = [line for line in list(self._lines) if _fits(line, level, request_id)]
        return found[-limit:]

    async def follow(
        self, *, level: LogLevel | None = None, request_id: str | None = None, limit: int = 0
    ) -> AsyncGenerator[LogLine, None]:
        """The latest `limit` lines, then those to come, until the caller has enough."""
        queue: asyncio.Queue[LogLine] = asyncio.Queue(QUEUED_LINES)
        past = self.lines(level=level, request_id=request_id, limit=limit) if limit else []
        self._followers[queue] = asyncio.get_running_loop()
        try:
            for line in past:
                yield line
            while True:
                line = await queue.get()
                if _fits(line, level, request_id):
                    yield line
        finally:
            del self._followers[queue]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hears the package's loggers while the block runs."""
        loggers = [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addHandler(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(self)


def _offer(queue: asyncio.Queue[LogLine], line: LogLine) -> None:
    with contextlib.suppress(asyncio.QueueFull):
        queue.put_nowait(line)


def _fits(line: LogLine, level: LogLevel | None, request_id: str | None) -> bool:
    if request_id is not None and line.request_id != request_id:
        return False
    return level is None or _LEVELS.get(line.level, logging.CRITICAL) >= _LEVELS[level]


@contextlib.contextmanager
def logging_to(
    stream: TextIO | None = None, *, format: Literal["text", "json"] | str = "text", level: str = "info"
) -> Iterator[None]:
    """The package's and uvicorn's loggers write to `stream` (default: standard error) while the block runs."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    before = []
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.propagate))
        least = (
            _LEVELS[level] if name == "llmasos" else max(logging.WARNING, _LEVELS[level])
        )  # uvicorn's info is chatter
        logger.setLevel(least)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, old, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(old)
            logger.propagate = propagate


def log_access(request: InFlight) -> None:
    """The line of a request that has ended."""
    route = request.route[:200]
    level = logging.DEBUG if route in _QUIET else logging.INFO
    if not access.isEnabledFor(level):
        return
    seconds = time.monotonic() - request.started
    fields: dict[str, Any] = {
        "request_id": request.id,
        "route": route,
        "status": request.status,
        "seconds": round(seconds, 4),
        "model": request.model and request.model[:200],
        "key": request.caller.key_id,
    }
    if request.is_begun:
        fields["prompt_tokens"] = request.num_prompt_tokens
        fields["cached_tokens"] = request.num_cached_tokens
        fields["output_tokens"] = request.num_output_tokens
        if request.first_token is not None:
            fields["first_token_seconds"] = round(request.first_token - request.started, 4)
        if request.finish_reasons:
            fields["finish_reasons"] = request.finish_reasons[:16]
    if request.cancelled:
        fields["cancelled"] = True
    fields = {name: value for name, value in fields.items() if value is not None}
    tokens = f", {request.num_prompt_tokens}+{request.num_output_tokens} tokens" if request.is_begun else ""
    model = f" {fields['model']}" if "model" in fields else ""
    key = f" key {fields['key']}" if "key" in fields else ""
    message = f"{route} {request.status or '-'}{model} {seconds:.3f} s{tokens}{key}".translate(_CONTROL)
    access.log(level, "%s", message, extra={"fields": fields})
