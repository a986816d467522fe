"""What a run writes: only what it has written itself may it remove or replace (folders have a mark in them for it), and
what cannot be written is said with the way on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from llmasos.errors import InvalidInputError
from llmasos.store.transfer import disk_errors

MARK = ".llmasos-run"
"""The file holds the name of the run."""
RESUME = "the run goes on from the last checkpoint with resume"


def mark(folder: Path, run: str) -> None:
    (folder / MARK).write_text(run, encoding="utf-8")


def is_marked(folder: Path, run: str) -> bool:
    try:
        return (folder / MARK).read_text(encoding="utf-8") == run
    except (OSError, UnicodeDecodeError):
        return False


def check_way(path: Path, run: str) -> None:
    """Raises InvalidInputError for something that is in the way and that `run` has not written."""
    is_free = not path.exists() or (path.is_dir() and (is_marked(path, run) or not any(path.iterdir())))
    if not is_free:
        raise InvalidInputError(
            f"{path} is there already, and {run!r} has not made it.",
            hint="Give a folder of its own with --output, or move that one away.",
            param="output",
        )


def written(path: Path, then: str = RESUME) -> AbstractContextManager[None]:
    """Raises DiskFullError, StoreError for what the system says of `path` or what is below it. then: how to go on."""
    return disk_errors(path, then)
