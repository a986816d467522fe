"""What a run has written itself: only that may it remove or replace. Folders have a mark in them for it."""

from __future__ import annotations

from pathlib import Path

from llmasos.errors import InvalidInputError

MARK = ".llmasos-run"
"""The file holds the name of the run."""


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
            f"{path} is there already, and the run {run!r} has not made it.",
            hint="Give a folder of its own with --output, or move that one away.",
            param="output",
        )
