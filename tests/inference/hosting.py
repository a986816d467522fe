"""Models in processes of their own, for tests: started and stopped outside of any test's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from llmasos.inference.host.process import ModelProcess, ModelSpec


def spec_of(folder: Path, name: str = "tiny", **options: Any) -> ModelSpec:
    return ModelSpec(name, str(folder), **{"device": "cpu", "dtype": "float32"} | options)


@contextmanager
def hosted(spec: ModelSpec, **options: Any) -> Iterator[ModelProcess]:
    process = asyncio.run(ModelProcess.start(spec, **options))
    try:
        yield process
    finally:
        asyncio.run(process.stop(0))
        assert not family(process.pid), "a process is left behind"


def family(pid: int) -> list[psutil.Process]:
    """The processes of a model that run: its own, and those that it has started."""
    found = []
    for process in psutil.process_iter(["status", "cmdline"]):
        try:
            if psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and _group(process.pid) == pid:
                found.append(process)
        except psutil.Error:
            pass
    return found


def _group(pid: int) -> int:
    import os

    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what another process is about to do."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


async def until_async(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.005)
