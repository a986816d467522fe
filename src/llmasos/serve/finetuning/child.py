"""The process of a run, from the server's side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmasos.errors import LLMasOSError, ServerError, error_of

COMMAND = (sys.executable, "-m", "llmasos.train.process")
SAVE_SECONDS = 600.0
"""A process that was told to stop may save its checkpoint this long; then it is killed."""
_LINE_BYTES = 2**24
_STOPPED = 75

Told = Callable[[dict[str, Any]], None]


class StoppedError(LLMasOSError):
    """The process has stopped by itself before the run was over: somebody has told it to."""


async def run(config: Path, log: Path, told: Told) -> dict[str, Any]:
    """Carry out the run of `config`; gives its event "result". What is printed goes to `log`. Cancelling saves the run
    first.

    Raises the error that it ended with, or ServerError with the last words of a process that died."""
    with log.open("ab") as words:
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, str(config), "--with-parent"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=words,
            limit=_LINE_BYTES,
            start_new_session=True,  # what a terminal sends is for the server, which tells it to stop
        )
    assert process.stdin and process.stdout
    last: dict[str, Any] = {}
    try:
        while line := await process.stdout.readline():
            try:
                last = json.loads(line)
            except ValueError:
                continue
            told(last)
        code = await process.wait()
    finally:
        await _end(process)
        process.stdin.close()
    if last.get("type") == "error":
        raise error_of(last)
    if last.get("type") == "result":
        return last
    if code == _STOPPED:
        raise StoppedError("The run was stopped from outside; it is saved.", hint="Resume the job to go on.")
    raise ServerError(
        f"The process of the run ended with code {code}: {_last_words(log) or 'it said no reason'}",
        hint=f"Resume the job to go on from the last checkpoint; {'/'.join(log.parts[-3:])} on the server has more.",
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    assert process.stdout is not None
    reading = asyncio.ensure_future(process.stdout.read())  # a full pipe would hold it up
    for stop, seconds in ((process.terminate, SAVE_SECONDS), (process.kill, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), seconds)
            break
    await asyncio.wait([reading], timeout=10.0)
    reading.cancel()


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " ".join(text.split())[-500:]
