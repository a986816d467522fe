"""Landlock: a process gives up files, ports, signals and abstract sockets for itself and all that it starts. It needs
no rights for that. Source: Documentation/userspace-api/landlock.rst of Linux; versions 1 to 7 of its interface differ
in what can be given up."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from llmasos.apps.sandbox import linux

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO
WRITE |= MAKE_SYM | REFER | TRUNCATE
DEVICE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
BIND_TCP, CONNECT_TCP = 1, 2
ABSTRACT_SOCKETS, SIGNALS = 1, 2
CREATE, ADD, RESTRICT = 444, 445, 446
_VERSION, _BENEATH, _PORT = 1, 1, 2


def abi() -> int:
    """The version of the kernel's interface; 0: there is none."""
    try:
        return linux.syscall("landlock", CREATE, None, 0, _VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):  # the last: a container's filter
            return 0
        raise


def handled(version: int) -> int:
    """What can be said about files in this version, as bits."""
    since = {1: (1 << 13) - 1, 2: REFER, 3: TRUNCATE, 5: IOCTL_DEV}
    return sum(bits for first, bits in since.items() if version >= first)


def restrict(
    version: int,
    *,
    read: Iterable[Path],
    write: Iterable[Path],
    devices: Iterable[Path],
    ports: Iterable[int] | None,
) -> None:
    """From here on this process can only do that much. `ports`: those that TCP may connect to; None: any. A path that
    is not there is left out. no_new_privs must be set."""
    known = handled(version)
    net = BIND_TCP | CONNECT_TCP if version >= 4 and ports is not None else 0
    attributes = struct.pack("=QQQ", known, net, ABSTRACT_SOCKETS | SIGNALS if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = linux.syscall("landlock_create_ruleset", CREATE, attributes, size, 0)
    try:
        for paths, access in ((read, READ), (write, WRITE), (devices, DEVICE)):
            for path in paths:
                _allow(ruleset, path, access & known)
        for port in ports or () if net else ():
            linux.syscall("landlock_add_rule", ADD, ruleset, _PORT, struct.pack("=QQ", CONNECT_TCP, port), 0)
        linux.syscall("landlock_restrict_self", RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # the latter: what this user cannot reach anyway
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= ON_FILES
        linux.syscall("landlock_add_rule", ADD, ruleset, _BENEATH, struct.pack("=Qi", access, fd), 0)
    finally:
        os.close(fd)
