"""What a program in the sandbox may do."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmasos.errors import InvalidInputError

MB = 1_000_000
SYSTEM_PATHS = tuple(
    Path(path)
    for path in (
        *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/System", "/Library"),
        *(
            f"/etc/{name}"
            for name in (
                *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "passwd", "group"),
                *(
                    "ssl/certs",
                    "ssl/openssl.cnf",
                    "pki/tls/certs",
                    "pki/ca-trust",
                    "hosts",
                    "resolv.conf",
                    "nsswitch.conf",
                    "mime.types",
                ),
            )
        ),
    )
)
"""What programs need of the system in order to run at all; those that are not there are left out."""


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and counts; None: no limit. They hold for all processes of the sandbox together, except for
    `open_files`, `file_size` and a second, exact hold of `memory` and `cpu_seconds`, which are each process's own.
    `processes` counts threads, too. `disk` is what the write paths hold. `cores`: processors that it may compute on at
    once, which lie at the system's choice, and the priority of background work."""

    memory: int | None = 512 * MB
    cpu_seconds: int | None = 60
    processes: int | None = 64
    open_files: int | None = 256
    file_size: int | None = 100 * MB
    disk: int | None = 500 * MB
    wall_seconds: float | None = 120.0
    cores: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise InvalidInputError(f"limits.{name} is {value}.", hint="Give more than 0, or None.", param=name)


@dataclass(frozen=True)
class Policy:
    """Nothing is granted that is not named.

    `read`: files and folders to read, and to run programs from where `exec` is set; SYSTEM_PATHS are always added.
    `write`: folders to read and write; the first is the working folder, HOME and TMPDIR. `net`: "none", "loopback",
    "all", or the TCP ports that may be connected to. `sockets`: Unix sockets that may be connected to. `env`: names of
    variables of this process to pass on. `exec`: whether it may start other programs. `gpu`: whether it may use the
    GPUs.

    `net="loopback"` is a network of its own in which it meets nobody but itself; "none" where namespaces are not to be
    had.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    net: Literal["none", "loopback", "all"] | tuple[int, ...] = "none"
    sockets: tuple[Path, ...] = ()
    env: tuple[str, ...] = ()
    exec: bool = False
    gpu: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for path in (*self.read, *self.write, *self.sockets):
            if not path.is_absolute():
                raise InvalidInputError(f"{path} is no absolute path.", hint="Name it from the root.", param="policy")
            if not path.exists():
                raise InvalidInputError(f"{path} does not exist.", hint="Make it first.", param="policy")
        if any(not path.is_dir() for path in self.write):
            raise InvalidInputError("A write path is no folder.", hint="Name the folder of the file.", param="write")
        if isinstance(self.net, str) and self.net not in ("none", "loopback", "all"):
            hint = 'Give "none", "loopback", "all" or ports.'
            raise InvalidInputError(f"net is {self.net!r}.", hint=hint, param="net")
        if not isinstance(self.net, str) and any(not 0 < port < 65536 for port in self.net):
            raise InvalidInputError(f"net is {self.net!r}.", hint="A port is from 1 to 65535.", param="net")


def python_paths() -> tuple[Path, ...]:
    """Where this Python and its environment lie: what a program in it has to read."""
    folders = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))
    return tuple(dict.fromkeys(Path(folder) for folder in folders))
