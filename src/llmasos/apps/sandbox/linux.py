"""Calls of the Linux kernel that Python has no names for, and the dropping of rights."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

MACHINE = platform.machine()
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 22, 24, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
SECUREBITS = 0xEF
"""Being root gives no rights, keeping and raising them is off, and all that is locked (linux/securebits.h)."""
CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *args: Any) -> int:
    """Raises OSError with `what` in its text. Integers are passed as longs."""
    given = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return checked(libc().syscall(ctypes.c_long(number), *given), what)


def prctl(option: int, value: Any = 0, third: Any = 0) -> int:
    given = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in (value, third, 0, 0)]
    return checked(libc().prctl(ctypes.c_int(option), *given), f"prctl {option}")


def num_capabilities() -> int:
    """How many rights beyond a plain user's this process has, or could get."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sets = [int(line.split()[1], 16) for line in lines if line.startswith(("CapPrm:", "CapEff:", "CapAmb:"))]
    return max(mask.bit_count() for mask in sets)


def drop_rights() -> None:
    """No rights of root, no groups but the own one, none to be had by running a setuid program."""
    if num_capabilities():
        with suppress(PermissionError):  # in a user namespace of our own, where groups mean nothing
            os.setgroups([])
        for capability in range(64):
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError:  # the last one is behind us, or there is no right to
                break
        with suppress(PermissionError):  # a process with some rights, but not that to set these bits
            prctl(PR_SET_SECUREBITS, SECUREBITS)
        with suppress(OSError):  # a kernel before 4.3
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        syscall("capset", CAPSET[MACHINE], header, (ctypes.c_uint32 * 6)())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
