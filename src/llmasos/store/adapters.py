"""Adapters in the library: `<home>/adapters/NAME/`, a folder as PEFT writes it with a card beside. The card names the
model that it belongs to, so an adapter is served under its own name as soon as it lies there.

Adapters without a card (put there by hand, or by a package) are loaded by name, and belong to no model by themselves.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmasos.errors import LLMasOSError, NotFoundError, StoreError
from llmasos.settings import settings
from llmasos.store.card import CARD_NAME, Card, CardFile, check_name, is_of_run, read_card, write_card
from llmasos.store.library import Library, discard, disk_size, model_lock
from llmasos.store.transfer import disk_errors, file_sha256

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class InstalledAdapter:
    """`name`: under which it is served. `base`: its model, as the library calls it, or the path of one elsewhere."""

    name: str
    base: str
    path: Path


def adapters_folder(home: Path | None = None) -> Path:
    return (home or settings().home) / "adapters"


def installed_adapters(home: Path | None = None) -> list[InstalledAdapter]:
    """Those that say which model they belong to, by name; damaged ones are left out."""
    try:
        folders = sorted(one for one in adapters_folder(home).iterdir() if not one.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [found for folder in folders if (found := _read(folder)) is not None]


def adapter_cards(home: Path | None = None) -> list[Card]:
    """Of the adapters that `installed_adapters` tells of."""
    return [read_card(one.path) for one in installed_adapters(home)]


def find_adapter(name: str, home: Path | None = None) -> InstalledAdapter | None:
    """By the name under which it is served, or its folder's."""
    for one in installed_adapters(home):
        if name in (one.name, one.path.name):
            return one
    return None


def install_adapter(source: Path, card: Card, home: Path | None = None) -> Path:
    """Put the adapter in the folder `source` into the library under `card.name`, in one step; its files are hard links
    where the file system has them. An earlier one of the same run is replaced, also a model. Returns
    its folder.

    Raises InvalidInputError for the name, StoreError where something else has it, DiskFullError."""
    target = adapters_folder(home) / check_name(card.name)
    library = Library(home)
    model = library.root / card.name
    if model.exists() and not is_of_run(model, card):
        raise StoreError(f"The library has a model {card.name!r} already.", hint="Choose another name.")
    with model_lock(library.home, card.name):
        if target.exists() and not is_of_run(target, card):
            raise StoreError(f"The library has an adapter {card.name!r} already.", hint="Choose another name.")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
            try:
                files = _link_files(source, staged)
                write_card(staged, card.model_copy(update={"kind": "adapter", "files": files}))
                staged.chmod(0o755)
                discard(target)
                os.rename(staged, target)
                discard(model)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
    return target


def remove_adapter(name: str, home: Path | None = None) -> int:
    """Delete an adapter and return the bytes freed. Raises NotFoundError."""
    found = find_adapter(name, home)
    if found is None:
        raise NotFoundError(f"The adapter {name} is not installed.", hint="`llmasos ls` shows what is.")
    with model_lock(Library(home).home, found.path.name):
        freed = disk_size(found.path)
        discard(found.path)
    return freed


def _read(folder: Path) -> InstalledAdapter | None:
    try:
        card = read_card(folder)
    except LLMasOSError:
        return None
    if card.kind != "adapter" or not card.base or not (folder / WEIGHTS).exists():
        return None
    return InstalledAdapter(card.serves_as or folder.name, card.base, folder)


def _link_files(source: Path, target: Path) -> Sequence[CardFile]:
    files = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or relative.as_posix() == CARD_NAME or path.name.startswith("."):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        try:
            (target / relative).hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target / relative)
        files.append(CardFile(path=relative.as_posix(), size=path.stat().st_size, sha256=file_sha256(path)))
    return files
