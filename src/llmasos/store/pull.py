"""Pull: from a reference to a folder in the library, or to nothing at all.

The order is: ask the sources one after the other, check the architecture from headers, check the disk, download into
`<home>/cache/partial`, hash, and move the finished folder into the library in one rename. Whatever fails before that
rename leaves the library as it was; the partial files stay for the next try.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from functools import partial
from pathlib import Path

from llmasos.errors import (
    DiskFullError,
    InvalidInputError,
    LLMasOSError,
    NetworkError,
    NotFoundError,
    OfflineError,
    StoreError,
)
from llmasos.store.card import CARD_NAME, Card, CardFile, check_name, write_card
from llmasos.store.catalog import Resolved, SourceRef, existing, local_path, looks_like_model
from llmasos.store.headers import Facts, opener, read_facts
from llmasos.store.library import Library, discard, import_model, loadable, model_lock
from llmasos.store.listings import check_sources, list_source
from llmasos.store.sources import Listing
from llmasos.store.transfer import Meter, OnProgress, disk_errors, file_sha256

DISK_MARGIN = 64 << 20  # bytes that a pull leaves free

_log = logging.getLogger("llmasos")


def pull(ref: str | Path, *, name: str | None = None, on_progress: OnProgress | None = None) -> Card:
    """Install what `ref` names and return its card; no request is made if it is installed already.

    `name` overrides the name in the library. Raises NotFoundError, NetworkError (which lists every source and why),
    OfflineError, ChecksumError, DiskFullError, BusyError, UnknownArchitectureError, PickleRefusedError.
    """
    library, meter = Library(), Meter(on_progress)
    resolved = library.resolve(ref)
    target = check_name(name or resolved.name)
    _say_notice(resolved, meter, on_progress)
    if card := _installed(library, target, resolved):
        return card
    if resolved.sources[0].kind == "file":
        return import_model(resolved.sources[0].path, name=target, on_progress=on_progress)
    check_sources(resolved.sources)
    with model_lock(
        library.home, target, waiting=lambda: meter.note(f"another process is pulling {target}: waiting", phase="wait")
    ):
        if card := _installed(library, target, resolved):
            return card
        return _pull_from_any(resolved, target, library, meter)


def ensure(ref: str | Path, *, on_progress: OnProgress | None = None) -> Path:
    """Where the model that `ref` names lies on this disk, pulled first if need be: what `load_model` takes.

    A path of this machine is returned as it is; a name means an installed model before one of the catalogue.
    """
    path = local_path(ref)
    library = Library()
    if isinstance(ref, str) and library.has(ref):
        _say_notice(library.resolve(ref), Meter(on_progress), on_progress)
        return library.path(ref)
    if looks_like_model(path):
        return loadable(path.absolute())
    try:
        resolved = library.resolve(ref)
    except NotFoundError as e:
        if path.is_dir():
            where, hint = path.absolute(), "Give a folder with a config.json, or a .gguf file."
            raise NotFoundError(
                f"There is no model {str(ref)!r}, and no model in the folder {where}.", hint=hint
            ) from e
        raise
    if resolved.sources[0].kind == "file":
        return loadable(existing(resolved.sources[0].path))
    return library.path(pull(ref, on_progress=on_progress).name)


def _say_notice(resolved: Resolved, meter: Meter, on_progress: OnProgress | None) -> None:
    """What must be said when a model stands in for another: through the callback, or the log where there is none."""
    if resolved.entry and resolved.entry.notice:
        if on_progress:
            meter.note(resolved.entry.notice)
        else:
            _log.warning("%s", resolved.entry.notice)


def _installed(library: Library, name: str, resolved: Resolved) -> Card | None:
    """The card if the model is there in full. Raises StoreError if the name belongs to something else."""
    folder = library.root / name
    if not folder.exists():
        return None
    card = next((card for card in library.list() if card.name == name), None)
    if card is None:
        raise StoreError(f"{folder} is not a folder of the library.", hint="Move it away or choose another name.")
    if card.error:
        raise StoreError(f"{name} is damaged: {card.error}", hint=f"`llmasos rm {name}`, then pull again.")
    source = resolved.sources[0]
    mine = resolved.entry or card.source == source.text or (source.kind == "hf" and card.upstream.repo == source.repo)
    if not mine:
        raise InvalidInputError(
            f"The name {name!r} belongs to another model, from {card.source or 'a folder put there by hand'}.",
            hint=f"Choose another with --name, or `llmasos rm {name}` first.",
            param="name",
        )
    return card if library.has(name) else None


def _pull_from_any(resolved: Resolved, name: str, library: Library, meter: Meter) -> Card:
    failures: list[tuple[SourceRef, LLMasOSError]] = []
    for i, source in enumerate(resolved.sources):
        try:
            listing = list_source(source, resolved.entry, meter.note)
            return _install(listing, resolved, name, library, meter)
        except (NetworkError, NotFoundError) as e:  # one that offline mode forbids, too: another may be on this machine
            failures.append((source, e))
            if i + 1 < len(resolved.sources):
                meter.note(f"{source.text}: {e.message} Trying {resolved.sources[i + 1].text}.")
    if len(failures) == 1 or all(isinstance(error, OfflineError) for _, error in failures):
        raise failures[0][1]
    reasons = " ".join(f"[{source.text}] {error.message}" for source, error in failures)
    raise NetworkError(
        f"{name} could not be had from any of its {len(failures)} sources: {reasons}",
        hint="Check the connection (`llmasos doctor`), or `llmasos import` a copy of the files.",
    )


def _install(listing: Listing, resolved: Resolved, name: str, library: Library, meter: Meter) -> Card:
    facts = read_facts([file.path for file in listing.files], listing.open) if listing.files else None
    unfinished = partial_folder(library.home, name, listing.source)
    _check_disk(listing, unfinished, library)
    with disk_errors(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
    files = listing.obtain(unfinished, meter)
    facts = facts or read_facts([file.path for file in listing.files], opener(files))
    card = _card(listing, resolved, name, facts, files, meter)
    staging, folder = library.root / f".staging-{name}", library.root / name
    try:
        with disk_errors(staging):
            write_card(files, card)  # while a full disk still costs nothing: from here on there are only renames
            shutil.rmtree(staging, ignore_errors=True)
            library.root.mkdir(parents=True, exist_ok=True)
            _move(files, staging, [*(file.path for file in card.files), CARD_NAME])
            if folder.exists():
                discard(folder)  # it lacks files: `_installed` has looked
            os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(unfinished, ignore_errors=True)
    meter.note(f"{name} is installed", phase="done")
    return card


def partial_folder(home: Path, name: str, source: str) -> Path:
    """Where the unfinished files of one model from one source lie."""
    return home / "cache" / "partial" / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _check_disk(listing: Listing, unfinished: Path, library: Library) -> None:
    if listing.disk_bytes is None:
        return
    there = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    needed, free = max(0, listing.disk_bytes - there) + DISK_MARGIN, disk_free(library.home)
    if needed > free:
        raise DiskFullError(
            f"{listing.source} needs {size(needed)} on the disk and {library.home} has {size(free)} free.",
            hint="Free some space: `llmasos ls` shows sizes, `llmasos rm` removes.",
        )


def disk_free(path: Path) -> int:
    """Bytes that can still be written at `path`, which need not exist yet."""
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _card(listing: Listing, resolved: Resolved, name: str, facts: Facts, files: Path, meter: Meter) -> Card:
    """The card of finished files. Hashes that the source has checked are taken over, the others are computed."""
    entries = []
    meter.begin(sum((files / file.path).stat().st_size for file in listing.files if not file.sha256))
    for file in listing.files:
        path = files / file.path
        sha256 = file.sha256 or file_sha256(path, on_bytes=partial(meter.at, file.path, phase="check"))
        entries.append(CardFile(path=file.path, size=path.stat().st_size, sha256=sha256))
    entry = resolved.entry
    return Card(
        name=name,
        format=facts.format,
        architecture=facts.config.architecture,
        family=entry.family if entry else facts.config.family,
        use=entry.use if entry else None,
        source=listing.source,
        upstream=listing.upstream,
        licence=entry.licence if entry else listing.licence,
        files=entries,
        notice=entry.notice if entry and not entry.stored_as else None,
    )


def _move(files: Path, staging: Path, paths: list[str]) -> None:
    """The card's files and nothing else, by renaming where cache and library share a file system."""
    for path in paths:
        target = staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(files / path, target)
        except OSError:
            shutil.move(files / path, target)
