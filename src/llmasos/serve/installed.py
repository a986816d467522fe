"""What is in the library, and what models are that are not in memory, from their files' headers. Everything here reads
the disk: call it in a thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError
from llmasos.store.card import CARD_NAME, read_card
from llmasos.store.headers import opener, read_facts
from llmasos.store.library import Library, files_at
from llmasos.text import read_chat_template


@dataclass(frozen=True)
class Installed:
    name: str
    path: Path


@dataclass(frozen=True)
class Facts:
    """Of files that can't be read nothing is known: loading them says what is wrong."""

    is_encoder: bool = False
    context_length: int = 0
    chat_template: str | None = None


def installed() -> list[Installed]:
    """The models of the library that are not damaged."""
    library = Library()
    try:
        folders = sorted(one for one in library.root.iterdir() if one.is_dir() and not one.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [found for folder in folders if (found := _readable(folder)) is not None]


def find_installed(name: str) -> Installed | None:
    """A model by any of its names. Raises FormatError for a damaged one, StoreError for one that lacks files."""
    library = Library()
    try:
        folder = library.folder(name)
    except (NotFoundError, InvalidInputError):
        return None
    return Installed(_served_name(folder), library.path(folder.name))


def read_all_facts(references: Iterable[str]) -> dict[str, Facts]:
    return {reference: facts_of(reference) for reference in references}


def facts_of(reference: str) -> Facts:
    try:
        path, library = Path(reference).expanduser(), Library()
        if not path.is_absolute():
            path = library.path(reference) if library.has(reference) else path.absolute()
        return _read_facts(path, path.stat().st_mtime_ns)
    except (LLMasOSError, OSError):
        return Facts()


def _readable(folder: Path) -> Installed | None:
    changed = [one.stat().st_mtime_ns for one in (folder, folder / CARD_NAME) if one.exists()]
    try:
        return _read_installed(folder, tuple(changed))
    except (LLMasOSError, OSError):
        return None


@lru_cache(maxsize=1024)
def _read_installed(folder: Path, changed: tuple[int, ...]) -> Installed:
    """`changed` makes replaced files new ones."""
    return Installed(_served_name(folder), Library(folder.parent.parent).path(folder.name))


def _served_name(folder: Path) -> str:
    """The folder's, but for models of fine-tuning jobs."""
    try:
        return read_card(folder).serves_as or folder.name
    except LLMasOSError:
        return folder.name


@lru_cache(maxsize=1024)
def _read_facts(path: Path, changed: int) -> Facts:
    config = read_facts(files_at(path), opener(path if path.is_dir() else path.parent)).config
    return Facts(config.is_encoder, config.context_length, read_chat_template(path))
