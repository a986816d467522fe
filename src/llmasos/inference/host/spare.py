"""Processes that tell what a model takes, so that the server itself needs no torch, and then wait for a model: it is
mostly the one that was asked about, and to start an interpreter and torch anew would take longer than a small model's
weights.

On a CPU only: elsewhere they would hold a part of the device, and begin with a state of it that a load does not expect.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from llmasos.errors import ServerError, error_of
from llmasos.inference.host import messages as wire
from llmasos.inference.host.forecast import Forecast

SPARE_S = 5.0
"""How long a process waits for a model. One that must wait for room longer is loaded by a new process."""


@dataclass(eq=False)
class Spare:
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


_waiting: dict[Spare, threading.Timer] = {}
_lock = threading.Lock()


def start(name: str) -> subprocess.Popen[bytes]:
    """A process for a model (`host.child`), which reads from its standard input what to do."""
    return subprocess.Popen(
        [sys.executable, "-m", "llmasos.inference.host.child", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent; and the child's own children can be found
    )


def tell(process: subprocess.Popen[bytes], message: wire.Setup | wire.Foretell) -> None:
    """The pipe stays open: its end is how a child knows that its parent is gone."""
    frame = wire.encode(message)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended already: that is noticed elsewhere
        process.stdin.write(len(frame).to_bytes(4, "big") + frame)
        process.stdin.flush()


async def run_forecast(options: Mapping[str, Any]) -> Forecast:
    """What a model takes. Raises a typed error, or ServerError with the last lines that the process wrote."""
    spare = Spare(start(str(options["reference"])))  # by this thread: the process ends with the one that started it
    tell(spare.process, wire.Foretell(dict(options)))
    heard: Future[bytes] = Future()

    def listen() -> None:
        assert spare.process.stdout is not None
        with suppress(InvalidStateError):  # nobody waits any more
            heard.set_result(spare.process.stdout.readline())

    threading.Thread(target=listen, name="llmasos-forecast", daemon=True).start()
    try:
        line = await asyncio.wrap_future(heard)
        answer = json.loads(line or b"{}")
    except BaseException:
        threading.Thread(target=spare.end, daemon=True).start()
        raise
    if "ok" in answer:
        told = Forecast(**answer["ok"])
        if told.device == "cpu":
            _keep(spare)
        else:
            await asyncio.to_thread(spare.end)
        return told
    _, said = await asyncio.to_thread(spare.process.communicate)  # it has ended
    if "error" in answer:
        raise error_of(answer["error"])
    last = "\n".join(said.decode(errors="replace").splitlines()[-5:])
    raise ServerError(f"What {options['reference']} takes could not be told: {last}")


def _keep(spare: Spare) -> None:
    timer = threading.Timer(SPARE_S, _give_up, [spare])
    timer.daemon = True
    with _lock:
        _waiting[spare] = timer
    timer.start()


def _give_up(spare: Spare) -> None:
    with _lock:
        late = _waiting.pop(spare, None) is None
    if not late:  # else it was taken just now
        spare.end()


def take() -> Spare | None:
    """One that waits for a model, which is the caller's from now on."""
    while True:
        with _lock:
            if not _waiting:
                return None
            spare, timer = _waiting.popitem()
        timer.cancel()
        if spare.process.poll() is None:
            return spare
        spare.end()


def end_all() -> None:
    """Wait for no more models."""
    while (spare := take()) is not None:
        spare.end()


def memory() -> int:
    """Bytes of main memory that those have which wait: what is loaded next gets it."""
    total = 0
    for spare in tuple(_waiting):
        with suppress(psutil.Error, OSError):
            total += psutil.Process(spare.process.pid).memory_info().rss
    return total
