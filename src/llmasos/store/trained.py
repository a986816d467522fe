"""Models that were trained here come into the library: imported like any other, with a card that says how they were
made."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from llmasos.errors import StoreError
from llmasos.store.adapters import adapters_folder
from llmasos.store.card import Card, CardFile, check_name, is_of_run, write_card
from llmasos.store.library import Library, discard, import_into
from llmasos.store.transfer import disk_errors


def install_model(source: Path, card: Card, home: Path | None = None) -> Path:
    """Put the model in the folder `source` into the library under `card.name`, which appears there in one step. An
    earlier one of the same run, or its adapter, is replaced. What `card` says of files and format is found anew; its
    source, if it has one, stands for the folder, which then need not stay.
    Returns its folder.

    Raises InvalidInputError for the name, StoreError where something else has it, DiskFullError, FormatError."""
    check_free(card, home)
    library = Library(home)
    target, adapter = library.root / card.name, adapters_folder(home) / card.name
    imported = import_into(library, source, f"new-{secrets.token_hex(8)}")
    staged = library.root / imported.name
    try:
        about = card.model_dump(include={"serves_as", "licence", "notice"}) | {"lineage": card.lineage}
        if card.source:
            about |= {"source": card.source, "files": [_own(file, staged) for file in imported.files]}
        write_card(staged, imported.model_copy(update={**about, "name": card.name}))
        with disk_errors(target):
            discard(target)
            os.rename(staged, target)
            discard(adapter)
    except BaseException:
        discard(staged)
        raise
    return target


def check_free(card: Card, home: Path | None = None) -> None:
    """Raises InvalidInputError for the name, StoreError where something has it that is not of this run."""
    target = Library(home).root / check_name(card.name)
    adapter = adapters_folder(home) / card.name
    if adapter.exists() and not is_of_run(adapter, card):
        raise StoreError(f"The library has an adapter {card.name!r} already.", hint="Choose another name.")
    if target.exists() and not is_of_run(target, card):
        raise StoreError(
            f"The library has a model {card.name!r} already.",
            hint=f"Choose another name, or `llmasos rm {card.name}` first.",
        )


def _own(file: CardFile, folder: Path) -> CardFile:
    """A hard link is the library's own file, wherever the other name of it was."""
    return file if (folder / file.path).is_symlink() else file.model_copy(update={"linked_from": None})
