"""The machine that the server runs on."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from llmasos import __version__
from llmasos.client.types.native import DeviceInfo, SystemInfo
from llmasos.devices import free_memory, total_memory
from llmasos.serve.native import worker
from llmasos.settings import settings
from llmasos.store.pull import disk_free

Budgets = Callable[[], Mapping[str, int]]
"""Bytes that models may take together, by device."""
Free = Callable[[str], int | None]
"""Bytes that a device has left now; None: not known."""


class Machine:
    """Facts that stay are asked for once, of a process of their own: torch knows them."""

    def __init__(self, *, budgets: Budgets = dict, free: Free = lambda device: None) -> None:
        import psutil

        self._budgets, self._free = budgets, free
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._process = psutil.Process()
        self._facts: dict[str, Any] | None = None
        self._asking = asyncio.Lock()

    async def describe(self) -> SystemInfo:
        async with self._asking:
            if self._facts is None:
                self._facts = await worker.run("machine", {})
        return await asyncio.to_thread(self._describe, self._facts)

    def _describe(self, facts: dict[str, Any]) -> SystemInfo:
        import psutil

        budgets, now = self._budgets(), settings()
        devices = [
            DeviceInfo(
                name="cpu",
                kind=facts["machine"],
                memory_total=total_memory(),
                memory_free=free_memory(),
                budget_bytes=budgets.get("cpu"),
            )
        ]
        for number, gpu in enumerate(facts["gpus"]):
            name = f"cuda:{number}"
            devices.append(
                DeviceInfo(
                    name=name,
                    kind=gpu["name"],
                    memory_total=gpu["memory"],
                    memory_free=self._free(name),
                    budget_bytes=budgets.get(name),
                )
            )
        return SystemInfo(
            version=__version__,
            python=platform.python_version(),
            torch=facts["torch"],
            platform=platform.platform(),
            pid=os.getpid(),
            started=self._started,
            uptime_seconds=round(time.monotonic() - self._clock, 1),
            home=str(now.home),
            disk_free=disk_free(now.home),
            offline=now.offline,
            device=facts["device"],
            dtype=facts["dtype"],
            cpu_cores=facts["cpu_cores"],
            cpu_percent=psutil.cpu_percent(),
            memory_rss=self._process.memory_info().rss,
            devices=devices,
        )


def create_router(machine: Machine) -> APIRouter:
    router = APIRouter()

    @router.get("/system", summary="The machine: devices, memory, versions")
    async def system() -> SystemInfo:
        return await machine.describe()

    return router
