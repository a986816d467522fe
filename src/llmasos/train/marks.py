"""What a run writes: only what it has written itself may it remove or replace (folders have a mark in them for it), and
what cannot be written is said with the way on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmasos.errors import DiskFullError, InvalidInputError, LLMasOSError, StoreError

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
            f"{path} is there already, and the run {run!r} has not made it.",
            hint="Give a folder of its own with --output, or move that one away.",
            param="output",
        )


@contextmanager
def written(path: Path, then: str = RESUME) -> Iterator[None]:
    """Raises DiskFullError, StoreError for what the system says of `path` or what is below it. then: how to go on."""
    try:
        yield
    except LLMasOSError:
        raise
    except Exception as e:
        # tokenizers and safetensors tell of the system's errors in words
        told = re.search(r"(.*?)\s*\(os error (\d+)\)", str(e))
        if not isinstance(e, OSError) and told is None:
            raise
        number, why = (int(told[2]), told[1]) if told else (e.errno, e.strerror or e)  # type: ignore[attr-defined]
        is_full = number in (errno.ENOSPC, errno.EDQUOT)
        to_do = "Free some space in" if is_full else "See that files can be written in"
        raise (DiskFullError if is_full else StoreError)(
            f"{path} could not be written: {why}.", hint=f"{to_do} {path.parent}; {then}."
        ) from e
