"""Work that loads torch or may be ended at any moment, in a short-lived process of its own: plans, pulls, checks.

The server itself stays light and can't be taken down by a file. Ending a pull is ending its process: what has arrived
stays on the disk. The child reads one JSON object from its standard input and writes one per line: progress, then
`ok` or `error`. It ends when its standard input closes, so it never outlives the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmasos.errors import LLMasOSError, ServerError, error_facts, error_of

_LINE_BYTES = 2**24

OnProgress = Callable[[dict[str, Any]], None]


async def run(task: str, options: dict[str, Any], on_progress: OnProgress = lambda _: None) -> dict[str, Any]:
    """What `task` (a function of this module's table) answers. Cancelling ends the process.

    Raises the error that it raised, or ServerError with the last lines of a process that died.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "llmasos.serve.native.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
        start_new_session=True,  # a terminal's Ctrl-C is for the server, which lets its requests end
    )
    assert process.stdin and process.stdout and process.stderr
    said = asyncio.ensure_future(process.stderr.read())
    try:
        process.stdin.write(json.dumps({"task": task, "options": options}).encode() + b"\n")
        while line := await process.stdout.readline():
            answer = json.loads(line)
            if "ok" in answer:
                found: dict[str, Any] = answer["ok"]
                return found
            if "error" in answer:
                raise error_of(answer["error"])
            on_progress(answer["progress"])
        last = " ".join((await said).decode(errors="replace").split())[-500:]
        raise ServerError(f"The process for this {task} ended with code {await process.wait()}: {last or 'no reason'}")
    finally:
        await _end(process)
        said.cancel()
        await asyncio.gather(said, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    """It has nothing to save: what has arrived is on the disk. A server that stops cancels its requests, and again what
    is left of them: the process is gone then, too."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):  # with what it has begun, which holds its pipes
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    gone = asyncio.ensure_future(process.wait())
    again: asyncio.CancelledError | None = None
    while not gone.done():
        try:
            await asyncio.shield(gone)
        except asyncio.CancelledError as e:
            again = e
    if again is not None:
        raise again


# the child's side


def _plan(options: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    import dataclasses

    from llmasos.store import plan

    found = plan(options.pop("model"), **options)
    extra = ("memory_bytes", "fits_disk", "fits_memory", "fits", "verdict")
    return dataclasses.asdict(found) | {name: getattr(found, name) for name in extra}


def _pull(options: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    import dataclasses

    from llmasos.store import pull

    card = pull(options["model"], name=options["name"], on_progress=lambda p: report(dataclasses.asdict(p)))
    return {"name": card.name}


def _check(options: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    """Every header of the model in `folder`, and that its files are as long as they say."""
    from llmasos.formats import open_checkpoint
    from llmasos.store.headers import opener, read_facts
    from llmasos.store.library import files_at

    folder = Path(options["folder"])
    names = files_at(folder)
    facts = read_facts(names, opener(folder))
    open_checkpoint(folder / facts.weights[0] if facts.format == "gguf" else folder).close()
    config = facts.config
    return {"files": names, "format": facts.format, "architecture": config.architecture, "family": config.family}


def _machine(options: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    from llmasos.devices import describe

    return describe()


TASKS = {"plan": _plan, "pull": _pull, "check": _check, "machine": _machine}


def _end_with_the_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(0)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    lock = threading.Lock()

    def write(answer: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(answer, default=str), file=answers, flush=True)

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        write({"ok": TASKS[asked["task"]](asked["options"], lambda progress: write({"progress": progress}))})
    except LLMasOSError as e:
        write({"error": error_facts(e)})
    answers.flush()
    os._exit(0)  # threads of an unfinished download must not hold it up


if __name__ == "__main__":
    main()
