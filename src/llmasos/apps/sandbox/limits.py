"""The limits that the kernel itself holds each process to (setrlimit)."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

NICE = 10
"""Of programs whose cores are limited."""
GRACE_S = 1
"""Seconds of computing between the signal that a process may catch and the one that it may not."""


def set_rlimits(limits: Mapping[str, Any], *, own_count: bool) -> list[str]:
    """Names of the limits that this process and those it starts are held to from here on. `own_count`: processes are
    counted for this sandbox alone, by a user namespace, and not for the user as a whole."""
    import resource

    wanted: dict[str, tuple[int, int | None, int]] = {
        "cpu_seconds": (resource.RLIMIT_CPU, limits["cpu_seconds"], GRACE_S),
        "open_files": (resource.RLIMIT_NOFILE, limits["open_files"], 0),
        "file_size": (resource.RLIMIT_FSIZE, limits["file_size"], 0),
    }
    if sys.platform == "linux":  # other systems take the number and do nothing
        wanted["memory"] = (resource.RLIMIT_DATA, limits["memory"], 0)
    if own_count:
        keepers = 1  # the first process of the namespace
        number = limits["processes"]
        wanted["processes"] = (resource.RLIMIT_NPROC, number and number + keepers, 0)
    held = []
    for name, (which, value, more) in wanted.items():
        if value is not None:
            _, most = resource.getrlimit(which)
            hard = value + more if most == resource.RLIM_INFINITY else min(value + more, most)
            with suppress(ValueError, OSError):  # a number that this system does not take
                resource.setrlimit(which, (min(value, hard), hard))
                held.append(name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits["cores"] is not None and _take_cores(limits["cores"]):
        held.append("cores")
    return held


def _take_cores(number: int) -> bool:
    """Compute on that many processors from here on, behind whoever else wants them."""
    os.nice(NICE)
    if not hasattr(os, "sched_setaffinity"):
        return False
    there = sorted(os.sched_getaffinity(0))
    with suppress(OSError):
        os.sched_setaffinity(0, random.sample(there, min(number, len(there))))
        return True
    return False
