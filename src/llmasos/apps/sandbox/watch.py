"""What all processes of a sandbox take together, looked at again and again from outside."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_BLOCK = 512


@dataclass(frozen=True)
class Use:
    """Bytes of memory that are no mapped files (elsewhere than on Linux: all), seconds computed, processes and their
    threads."""

    memory: int = 0
    cpu_seconds: float = 0.0
    processes: int = 0


def tree(root: int) -> list[list[int]]:
    """Process ids by generation, `root` first."""
    generations = [[root]]
    while generations[-1]:
        generations.append([child for pid in generations[-1] for child in _children(pid)])
    return generations[:-1]


def _children(pid: int) -> list[int]:
    if sys.platform == "linux":
        with suppress(OSError):
            found: list[int] = []
            for task in Path(f"/proc/{pid}/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    found += map(int, (task / "children").read_text().split())
            return found
        return []
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def use_of(generations: list[list[int]], num_keepers: int) -> Use:
    """Of all but the first generations, which are keepers; what their ended children computed counts."""
    memory, cpu, count = 0, 0.0, 0
    for depth, pids in enumerate(generations):
        for pid in pids:
            with suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                times = process.cpu_times()
                cpu += times.children_user + times.children_system
                if depth >= num_keepers:
                    cpu += times.user + times.system
                    memory += _memory(process)
                    count += process.num_threads()
    return Use(memory, cpu, count)


def _memory(process: psutil.Process) -> int:
    if sys.platform != "linux":
        return int(process.memory_info().rss)
    total = 0
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
            total += 1024 * int(line.split()[1])
    return total


def disk_of(folders: Iterable[Path], pids: Iterable[int]) -> int:
    """Bytes on disk of what lies in folders, and of files that are deleted but still open (Linux)."""
    sizes: dict[tuple[int, int], int] = {}
    waiting = [str(folder) for folder in folders]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    _count(sizes, entry.stat(follow_symlinks=False))
    for pid in pids if sys.platform == "linux" else ():
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    facts = entry.stat()
                    if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                        _count(sizes, facts)
    return sum(sizes.values())


def _count(sizes: dict[tuple[int, int], int], facts: os.stat_result) -> None:
    blocks = getattr(facts, "st_blocks", None)
    sizes[facts.st_dev, facts.st_ino] = facts.st_size if blocks is None else blocks * _BLOCK
