"""Resident memory of this process, now and at most: the gauge for runs on a CPU. No torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process has now; where the system does not tell (macOS), the most it had."""
    return _status("VmRSS")


def most_resident() -> int:
    """The most bytes of memory that this process had since it began, or since `forget_most`."""
    return _status("VmHWM")


def forget_most() -> None:
    """Where the system allows it (Linux); elsewhere the most stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def give_back() -> None:
    """What glibc keeps of freed memory goes back to the system, from between what is used, too. Other C libraries keep
    what they keep."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
