"""What an application prints, and what the server did with it: the latest lines in memory, more in a file,
`<home>/logs/apps/NAME.log`, which begins anew when it has grown long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from llmasos.client.types.apps import AppLogLine

KEPT_LINES, LINE_BYTES, FILE_BYTES = 2000, 4000, 2**21
QUEUED_LINES = 1000
_CHUNK = 1 << 16
_PAUSE = 0.01
"""Seconds between two looks at what it prints: 6 MB a second at most, the rest waits."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

Stream = Literal["stdout", "stderr", "server"]


def path_of(home: Path, name: str) -> Path:
    return home / "logs" / "apps" / f"{name}.log"


class AppLog:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: deque[AppLogLine] = deque(maxlen=KEPT_LINES)
        self._followers: set[asyncio.Queue[AppLogLine]] = set()

    def add(self, text: str, stream: Stream = "server") -> None:
        clean = _CONTROL.sub("\ufffd", text)[:LINE_BYTES]
        line = AppLogLine(time=datetime.now(UTC), stream=stream, text=clean)
        self._lines.append(line)
        for queue in self._followers:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(line)
        with contextlib.suppress(OSError):  # a full disk must not end anything
            self._write(f"{line.time:%Y-%m-%dT%H:%M:%SZ} {stream:<6} {clean}\n")

    def _write(self, text: str) -> None:
        if self._path.exists() and self._path.stat().st_size > FILE_BYTES:
            os.replace(self._path, self._path.with_suffix(".log.1"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            file.write(text)

    def lines(self, limit: int = KEPT_LINES) -> list[AppLogLine]:
        return list(self._lines)[-limit:] if limit else []

    def last(self, number: int = 20) -> list[str]:
        """The latest lines of the application itself."""
        return [line.text for line in self._lines if line.stream != "server"][-number:]

    async def follow(self, limit: int = 0) -> AsyncGenerator[AppLogLine, None]:
        """The latest `limit` lines, then those to come."""
        queue: asyncio.Queue[AppLogLine] = asyncio.Queue(QUEUED_LINES)
        past = self.lines(limit)
        self._followers.add(queue)
        try:
            for line in past:
                yield line
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)

    async def read(self, pipe: IO[bytes], stream: Stream) -> None:
        """Until its end. A line without an end is cut."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_CHUNK)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        try:
            while data := await reader.read(_CHUNK):
                *whole, rest = (rest + data).split(b"\n")
                if len(rest) > LINE_BYTES:
                    whole, rest = [*whole, rest], b""
                for line in whole[-KEPT_LINES:]:
                    self.add(line.decode("utf-8", "replace").rstrip("\r"), stream)
                await asyncio.sleep(_PAUSE)
            if rest:
                self.add(rest.decode("utf-8", "replace"), stream)
        finally:
            transport.close()
