"""What an application's manifest grants it, as the policy that the sandbox holds its process to."""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmasos.apps.sandbox.policy import Limits, Policy, python_paths
from llmasos.apps.sandbox.watch import disk_of
from llmasos.errors import DiskFullError, UnsupportedError
from llmasos.serve.apps.environment import runtime_paths
from llmasos.store.packages.manifest import Manifest, num_bytes, seconds

MEMORY, CORES, PROCESSES, OPEN_FILES, DISK = 2**30, 1, 128, 512, 2**30
TIMEOUT, CONCURRENCY = 300.0, 32
"""Where the manifest names none."""


@dataclass(frozen=True)
class Terms:
    """`timeout`: seconds of one call, of a stream between two of its pieces; `concurrency`: calls at once."""

    limits: Limits
    timeout: float
    concurrency: int


def terms_of(manifest: Manifest) -> Terms:
    asked = manifest.resources
    disk = num_bytes(asked.disk) if asked.disk else DISK
    return Terms(
        limits=Limits(
            memory=num_bytes(asked.memory) if asked.memory else MEMORY,
            cpu_seconds=None,
            processes=asked.processes or PROCESSES,
            open_files=OPEN_FILES,
            file_size=disk,
            disk=disk,
            wall_seconds=None,
            cores=math.ceil(asked.cpu) if asked.cpu else CORES,
        ),
        timeout=float(seconds(asked.timeout)) if asked.timeout else TIMEOUT,
        concurrency=asked.concurrency or CONCURRENCY,
    )


@dataclass(frozen=True)
class Rooms:
    """Where things of one application lie. `config`: the file with its values, if there is one; `sockets`: those of the
    server that it may connect to."""

    folder: Path
    data: Path
    environment: Path
    sockets: tuple[Path, ...] = ()
    config: Path | None = None


def policy_of(manifest: Manifest, rooms: Rooms, config: Mapping[str, Any]) -> Policy:
    """Folders and files that are not there are left out; so is what leads elsewhere by a link in its own folder.
    Blocking. Raises DiskFullError if its folder holds more than it may already."""
    asked, limits = manifest.permissions, terms_of(manifest).limits
    used = disk_of([rooms.data], ())
    if limits.disk is not None and used > limits.disk:
        raise DiskFullError(
            f"The folder of {manifest.name} holds {used} bytes, and it may hold {limits.disk}.",
            hint=f"Delete something in {rooms.data}.",
        )
    chosen = [config.get(name) for name, entry in manifest.config.items() if entry.type in ("folder", "file")]
    read = [rooms.folder, rooms.environment, *python_paths(), *runtime_paths(), *_absolute(asked.fs.read)]
    read += [Path(path).expanduser() for path in chosen if isinstance(path, str)]
    read += [rooms.config] if rooms.config is not None else []
    write = [path for path in _absolute(asked.fs.write) if path.is_dir()]
    beside = disk_of(write, ())  # what is there already is none of the application's
    if limits.disk is not None:
        limits = Limits(**{**vars(limits), "disk": limits.disk + beside})
    return Policy(
        read=tuple(dict.fromkeys(path for path in read if path.is_absolute() and path.exists())),
        write=(rooms.data, *write),
        net="loopback" if asked.net else "none",
        sockets=rooms.sockets,
        env=tuple(asked.env),
        exec=asked.exec,
        gpu=asked.gpu,
        limits=limits,
    )


def check_home(home: Path) -> None:
    """Raises UnsupportedError where every application could read what belongs to others."""
    open_to_all = [path for path in (*python_paths(), *runtime_paths()) if home.is_relative_to(path)]
    if open_to_all:
        raise UnsupportedError(
            f"The home folder {home} lies in {open_to_all[0]}, which applications read.",
            hint="Set LLMASOS_HOME to a folder elsewhere.",
        )


def _absolute(paths: list[str]) -> list[Path]:
    return [Path(path) for path in paths if path.startswith("/")]


def make_data(folder: Path) -> None:
    """The application's own folder, readable by nobody else. Raises OSError for a link in its place."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if stat.S_ISLNK(folder.lstat().st_mode):
        raise NotADirectoryError(f"{folder} is a link")
