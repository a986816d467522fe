"""Namespaces of Linux: process ids and a file tree of its own, made of the granted paths alone. Root has the right to
make them; others get it in a user namespace, where their system allows that.

The way to the new root is that of pivot_root(2) and of bubblewrap: a tmpfs becomes the root, the old one hangs in it,
what is granted is bound from there, the old one is let go.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from llmasos.apps.sandbox import linux

_NEW_MOUNTS, _NEW_USERS, _NEW_PIDS, _NEW_NET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_SET_FLAGS, _UP = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE, _MOUNT_SETATTR, _PIVOT_ROOT = 0x8000, 442, {"x86_64": 155, "aarch64": 41}
_MOST_LINKS = 40


def enter() -> bool:
    """Into new namespaces for files and process ids; the next child is the first process there. True: in a user
    namespace of its own, too. Raises OSError where that is not allowed."""
    if linux.MACHINE not in _PIVOT_ROOT:
        raise OSError(f"not known for {linux.MACHINE}")
    if os.geteuid() == 0:
        with suppress(PermissionError):  # root of a container may have to try as anybody else does
            _unshare(_NEW_MOUNTS | _NEW_PIDS)
            return False
    attempt = os.fork()  # one that fails halfway could not be taken back
    if attempt == 0:
        try:
            _enter_as_user()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EPERM)
    if code := os.waitstatus_to_exitcode(os.waitpid(attempt, 0)[1]):
        raise OSError(code, os.strerror(code))
    _enter_as_user()
    return True


def _enter_as_user() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEW_USERS | _NEW_MOUNTS | _NEW_PIDS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _unshare(flags: int) -> None:
    linux.checked(linux.libc().unshare(ctypes.c_int(flags)), "unshare")


def enter_network() -> None:
    """Into a new network, which has a loopback and nothing else; abstract sockets belong to it, too. After `enter`.
    Raises OSError where that is not allowed."""
    _unshare(_NEW_NET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SET_FLAGS, struct.pack("16sH22x", b"lo", _UP))


def begin_root() -> None:
    """An empty root, the old one at /old. Raises OSError, and has changed nothing, where mounting is not allowed."""
    _set(Path("/"), 0, recursive=False)  # nothing, but it fails on kernels before 5.12
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=0755,size=4m")
    os.chdir("/tmp")
    os.mkdir("old")
    os.mkdir("new")
    linux.syscall("pivot_root", _PIVOT_ROOT[linux.MACHINE], b".", b"old")
    os.chdir("/")
    _mount("/new", "/new", None, _BIND)


def finish_root(read: Iterable[Path], write: Iterable[Path], devices: Iterable[Path]) -> bool:
    """Fill the new root and let the old one go. False: /proc could not be had."""
    kinds = {**dict.fromkeys(read, "read"), **dict.fromkeys(write, "write"), **dict.fromkeys(devices, "device")}
    for path in sorted(kinds, key=lambda path: len(path.parts)):  # a folder before what lies in it
        real = _place(path)
        if real is not None:
            _grant(real, kinds[path])
    has_proc = _try_proc()
    _set(Path("/new"), _READ_ONLY, recursive=False)
    _umount("/old")
    os.chdir("/new")
    linux.syscall("pivot_root", _PIVOT_ROOT[linux.MACHINE], b".", b".")
    _umount(".")
    os.chdir("/")
    return has_proc


def _place(path: Path) -> PurePosixPath | None:
    """Where a path of the old root leads; symbolic links on the way are made in the new root. None: to nothing."""
    for _ in range(_MOST_LINKS):
        link = next(_links(path), None)
        if link is None:
            return PurePosixPath(path) if _old(path).exists() else None
        target = os.readlink(_old(link))
        new = _new(link)
        if not new.is_symlink():
            with suppress(OSError):  # within a folder that is bound already
                new.parent.mkdir(parents=True, exist_ok=True)
                new.symlink_to(target)
        rest = path.relative_to(link)
        path = Path(os.path.normpath(link.parent / target / rest))
    return None


def _links(path: Path) -> Iterator[Path]:
    for part in (*reversed(path.parents), path):
        if _old(part).is_symlink():
            yield part


def _old(path: Path | PurePosixPath) -> Path:
    return Path("/old") / PurePosixPath(path).relative_to("/")


def _new(path: Path | PurePosixPath) -> Path:
    return Path("/new") / PurePosixPath(path).relative_to("/")


def _grant(path: PurePosixPath, kind: str) -> None:
    source, target = _old(path), _new(path)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(source.stat().st_mode):
            target.mkdir()
        else:
            target.touch()
    _mount(str(source), str(target), None, _BIND | _REC)
    attributes = {"read": _READ_ONLY | _ATTR_NODEV, "write": _ATTR_NODEV, "device": 0}[kind] | _ATTR_NOSUID
    _set(target, attributes, recursive=True)


def _try_proc() -> bool:
    """A /proc of the new process ids, read-only. Systems that hide parts of theirs refuse it."""
    proc = Path("/new/proc")
    proc.mkdir(exist_ok=True)
    try:
        _mount("proc", str(proc), "proc", _NOSUID | _NODEV | _NOEXEC)
    except PermissionError:
        return False
    _set(proc, _READ_ONLY, recursive=False)
    return True


def _set(target: Path, attributes: int, *, recursive: bool) -> None:
    given = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE * recursive
    linux.syscall(f"mount_setattr {target}", _MOUNT_SETATTR, -100, os.fsencode(target), flags, given, 32)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    result = linux.libc().mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    linux.checked(result, f"mount {source} {target}")


def _umount(target: str) -> None:
    linux.checked(linux.libc().umount2(os.fsencode(target), ctypes.c_int(_DETACH)), f"umount {target}")
