"""The machine that the server runs on."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from llmasos import __version__
from llmasos.client.types.native import DeviceInfo, DoctorCheck, DoctorReport, SandboxRow, SystemInfo
from llmasos.devices import free_memory, total_memory
from llmasos.errors import LLMasOSError
from llmasos.serve.native import worker
from llmasos.settings import settings
from llmasos.store.pull import disk_free
from llmasos.store.transfer import redact

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


SECRET = ("hf_token",)
WITH_PASSWORDS = ("database", "pypi_index", "app_index", "url")
LITTLE_DISK = 10**9


def report(device: str) -> DoctorReport:
    """What `llmasos doctor` tells about this system, without asking hosts outside. Takes a second."""
    from llmasos.apps.sandbox import enforced

    now = settings()
    checks = [_home(now.home), DoctorCheck(name="device", status="ok", detail=device)]
    rows: list[SandboxRow] = []
    try:
        rows = [SandboxRow(what=row.what, by=list(row.by), why=row.why) for row in enforced()]
    except LLMasOSError as e:
        checks.append(DoctorCheck(name="sandbox", status="warning", detail=e.message))
    return DoctorReport(
        checks=checks,
        sandbox=rows,
        settings={one.name: _shown(one.name, getattr(now, one.name)) for one in fields(now)},
    )


def _home(home: Path) -> DoctorCheck:
    try:
        tempfile.TemporaryFile(dir=home).close()
    except OSError as e:
        return DoctorCheck(name="home", status="error", detail=f"{home}: {e.strerror or e}")
    free = disk_free(home)
    return DoctorCheck(name="home", status="ok" if free > LITTLE_DISK else "warning", detail=str(home))


def _shown(name: str, value: object) -> str:
    if name in SECRET and value:
        return "…"
    return ", ".join(map(redact, str(value).split(","))) if name in WITH_PASSWORDS else str(value)


def create_router(machine: Machine) -> APIRouter:
    router = APIRouter()

    @router.get("/system", summary="The machine: devices, memory, versions")
    async def system() -> SystemInfo:
        return await machine.describe()

    @router.get("/doctor", summary="Is this system fit, what does its sandbox enforce, which settings hold?")
    async def doctor() -> DoctorReport:
        found = await machine.describe()
        return await asyncio.to_thread(report, f"{found.device}, {found.dtype}")

    return router
