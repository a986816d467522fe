"""The library: one readable folder per model in `<home>/models`, original files beside a card.

Folders can be moved, renamed, copied and deleted by hand. What is found on disk counts: a folder without a card is
shown as far as it can be understood, one with a damaged card is shown with its error; neither disturbs the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from llmasos.errors import BusyError, FormatError, InvalidInputError, LLMasOSError, NotFoundError, StoreError
from llmasos.settings import settings
from llmasos.store.card import CARD_NAME, Card, CardFile, Upstream, check_name, read_card, tidy_name, write_card
from llmasos.store.catalog import Resolved, existing, model_stem, parse_source, resolve
from llmasos.store.headers import opener, read_facts
from llmasos.store.sources import SHARD, choose_files
from llmasos.store.transfer import Meter, OnProgress, disk_errors, file_sha256

LOCK_TIMEOUT = 3600.0  # seconds that a second process waits for the first to finish the same model

Mode = Literal["link", "copy"]


@dataclass(frozen=True)
class Verification:
    """Paths in the model's folder, by what is wrong with them."""

    name: str
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that the card lists is there, unchanged. Extra files do no harm."""
        return not (self.missing or self.changed)


@dataclass(frozen=True)
class ImportedFile:
    """`how` is hardlink, symlink or copy."""

    source: Path
    path: str
    size: int
    how: Literal["hardlink", "symlink", "copy"]


@dataclass(frozen=True)
class ImportPlan:
    """What an import would do. `copied_bytes` is the disk space that it takes."""

    name: str
    folder: Path
    architecture: str
    files: tuple[ImportedFile, ...]

    @property
    def copied_bytes(self) -> int:
        return sum(file.size for file in self.files if file.how == "copy")


TRAINED = "ft:"
"""How the served names of fine-tuned models begin; their folders have the same with hyphens."""


class Library:
    """The models in `<home>/models`; `home` defaults to the one in the settings."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or settings().home
        self.root = self.home / "models"

    def list(self) -> list[Card]:
        """A card for every folder, by name. Damaged ones carry their `error`."""
        try:
            folders = sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [_describe(folder) for folder in folders]

    def get(self, name: str) -> Card:
        """The card of an installed model, by its name, an alias or the reference that it was pulled by.

        Raises NotFoundError if it is not installed, FormatError if its card is damaged.
        """
        card = _describe(self.folder(name))
        if card.error:
            raise FormatError(
                f"{card.name} cannot be used: {card.error}", hint=f"`llmasos rm {card.name}`, then pull again."
            )
        return card

    def has(self, name: str) -> bool:
        """Whether `name` is installed with all the files that its card lists."""
        try:
            folder = self.folder(name)
        except (NotFoundError, InvalidInputError):
            return False
        card = _describe(folder)
        return not card.error and all((folder / file.path).exists() for file in card.files)

    def path(self, name: str) -> Path:
        """What `load_model` takes: the .gguf file (the first part of a split one) or the folder."""
        folder = self.folder(name)
        card = self.get(name)
        weights = sorted(f.path for f in card.files if f.path.lower().endswith(".gguf"))
        path = folder / weights[0] if card.format == "gguf" and weights else folder
        if missing := [file.path for file in card.files if not (folder / file.path).exists()]:
            raise StoreError(
                f"{card.name} lacks {missing[0]}.",
                hint=f"`llmasos pull {card.name}` fetches it again.",
            )
        return path

    def folder(self, name: str) -> Path:
        """The folder of an installed model; NotFoundError if there is none."""
        for candidate in self._spellings(name):
            if (self.root / candidate).is_dir():
                return self.root / candidate
        raise NotFoundError(
            f"{name} is not installed.", hint=f"`llmasos ls` shows what is; `llmasos pull {name}` installs it."
        )

    def _spellings(self, name: str) -> Iterator[str]:
        if name.startswith(TRAINED):
            yield tidy_name(name)
            return
        try:
            yield check_name(name)
            folders = os.listdir(self.root) if self.root.is_dir() else []
            yield from (folder for folder in folders if folder.lower() == name.lower())
        except InvalidInputError:
            if not any(mark in name for mark in "/:"):
                raise
        try:
            resolved = resolve(name)
        except LLMasOSError:
            return
        if resolved.entry or resolved.sources[0].kind in ("hf", "pypi"):
            yield resolved.name  # names from paths and addresses do not tell two models apart

    def resolve(self, ref: str | Path) -> Resolved:
        """`catalog.resolve`, where the name of an installed model stands for the source that it came from."""
        try:
            return resolve(ref)
        except NotFoundError:
            try:
                card = self.get(str(ref))
                made_here = card.lineage is not None and card.lineage.method == "merge"
                source = parse_source(f"file:{self.folder(card.name)}" if made_here else card.source)
            except FormatError:
                raise  # it is installed, and damaged
            except LLMasOSError:
                pass
            else:
                return Resolved(str(ref), card.name, (source,))
            raise

    def remove(self, name: str) -> int:
        """Delete a model and return the bytes freed. Files that it links to stay where they are."""
        folder = self.folder(name)
        with model_lock(self.home, folder.name):
            freed = disk_size(folder)
            discard(folder)
        return freed

    def verify(self, name: str, *, on_progress: OnProgress | None = None) -> Verification:
        """Read every byte again and compare it with the card. Raises NotFoundError for a folder without one."""
        folder, card = self.folder(name), self.get(name)
        if not (folder / CARD_NAME).exists():
            raise NotFoundError(
                f"{folder} has no {CARD_NAME}, so there are no hashes to compare its files with.",
                hint=f"`llmasos import {folder} --name NAME` makes a model with one.",
            )
        meter = Meter(on_progress, card.size)
        missing, changed = [], []
        for file in card.files:
            path = folder / file.path
            if not path.exists():
                missing.append(file.path)
            elif path.stat().st_size != file.size or _hash(path, file.path, meter) != file.sha256:
                changed.append(file.path)
        listed = {file.path for file in card.files} | {CARD_NAME}
        extra = [path for path in _files(folder) if path not in listed]
        return Verification(folder.name, tuple(missing), tuple(changed), tuple(extra))

    def disk_size(self, name: str) -> int:
        """Bytes that the model takes on this disk: what is linked from elsewhere does not count."""
        return disk_size(self.folder(name))


def _describe(folder: Path) -> Card:
    """The card on disk, or the best that can be said without one."""
    try:
        return read_card(folder)
    except FormatError as e:
        return Card(name=folder.name, error=e.message)
    except NotFoundError:
        pass
    try:
        names = files_at(folder)
        facts = read_facts(names, opener(folder))
    except (LLMasOSError, OSError) as e:
        return Card(name=folder.name, error=e.message if isinstance(e, LLMasOSError) else str(e))
    config, files = facts.config, [CardFile(path=n, size=(folder / n).stat().st_size, sha256="") for n in names]
    return Card(
        name=folder.name,
        format=facts.format,
        architecture=config.architecture,
        family=config.family,
        source=f"file:{folder}",
        files=files,
    )


def _files(folder: Path, depth: int = 100) -> list[str]:
    """Paths below `folder`, at most `depth` folders down."""
    found = []
    for where, folders, files in os.walk(folder):
        deepest = len(Path(where).relative_to(folder).parts) >= depth
        folders[:] = [] if deepest else [name for name in folders if not name.startswith(".")]
        found += [(Path(where) / name).relative_to(folder).as_posix() for name in files]
    return sorted(found)


def _hash(path: Path, name: str, meter: Meter) -> str:
    return file_sha256(path, on_bytes=lambda done: meter.at(name, done, phase="check"))


def disk_size(folder: Path) -> int:
    """Bytes below `folder` that deleting it would free: no symbolic links, no files with another name elsewhere."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def discard(folder: Path) -> None:
    """Take a folder of the library away in one step, then delete it. A folder that is a link only loses the link."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        os.replace(folder, trash)
        shutil.rmtree(trash)
    except FileNotFoundError:
        return
    except OSError as e:
        raise StoreError(
            f"{folder} could not be removed: {e.strerror or e}.", hint="Close what uses it and repeat."
        ) from e


@contextmanager
def model_lock(home: Path, name: str, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Only one process at a time changes a model. BusyError after LOCK_TIMEOUT seconds; `waiting` is called before."""
    from filelock import FileLock, Timeout

    folder = home / "cache" / "locks"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name.lower()}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if waiting:
                    waiting()
                lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=0.1)
        except Timeout:
            raise BusyError(
                f"Another process has been working on {name} for {LOCK_TIMEOUT:.0f} seconds.",
                hint="Wait for it or end it, then repeat.",
            ) from None
    try:
        yield
    finally:
        lock.release()


@overload
def import_model(
    path: str | Path,
    *,
    name: str | None = ...,
    mode: Mode = ...,
    dry_run: Literal[True],
    on_progress: OnProgress | None = ...,
) -> ImportPlan: ...
@overload
def import_model(
    path: str | Path,
    *,
    name: str | None = ...,
    mode: Mode = ...,
    dry_run: Literal[False] = ...,
    on_progress: OnProgress | None = ...,
) -> Card: ...
def import_model(
    path: str | Path,
    *,
    name: str | None = None,
    mode: Mode = "link",
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> Card | ImportPlan:
    """Take a model that is on this machine into the library: a Hugging Face folder (or snapshot of its cache), a .gguf
    file (any part of a split one) or a .safetensors file with its config.json beside it.

    `link` makes hard links where the file system allows and symbolic links elsewhere; `copy` copies. The original is
    never changed. Raises NotFoundError, UnknownArchitectureError, PickleRefusedError, StoreError if the name is taken.
    """
    library = Library()
    plan = _plan_import(library, existing(path).absolute(), name, mode)
    if dry_run:
        return plan
    with model_lock(library.home, plan.name):
        return _carry_out(plan, library, on_progress)


def import_into(library: Library, path: Path, name: str) -> Card:
    """`import_model` with links, into any library."""
    plan = _plan_import(library, existing(path).absolute(), name, "link")
    with model_lock(library.home, plan.name):
        return _carry_out(plan, library, None)


def _plan_import(library: Library, path: Path, name: str | None, mode: Mode) -> ImportPlan:
    if mode not in ("link", "copy"):
        raise InvalidInputError(f"mode={mode!r} is not known.", hint="Use link or copy.", param="mode")
    folder = path if path.is_dir() else path.parent
    names = files_at(path)
    facts = read_facts(names, opener(folder))
    name = check_name(name) if name else tidy_name(model_stem(path))
    files = []
    for relative in names:
        source = (folder / relative).resolve()  # a hub cache's files are links themselves
        how: Literal["hardlink", "symlink", "copy"] = "copy"
        if mode == "link":
            how = "hardlink" if _same_disk(source, library.home) else "symlink"
        files.append(ImportedFile(source, relative, source.stat().st_size, how))
    return ImportPlan(name, library.root / name, facts.config.architecture, tuple(files))


def files_at(path: Path) -> list[str]:
    """The files of the model at `path` (a folder, or one weight file), relative to its folder."""
    if path.is_dir():
        # A model has at most one level of folders; what lies deeper in somebody's folder is not meant.
        near = [name for name in _files(path, depth=1) if name != CARD_NAME]
        return choose_files(near, str(path), index=lambda name: (path / name).read_bytes())
    here = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    if path.suffix.lower() == ".gguf":
        group = SHARD.sub("", path.name)
        return choose_files([name for name in here if SHARD.sub("", name) == group], str(path))
    if path.suffix.lower() == ".safetensors":
        others = [name for name in here if not name.endswith((".gguf", ".safetensors", ".safetensors.index.json"))]
        return choose_files([*others, path.name], str(path))
    return choose_files([path.name], str(path))  # refuses, and says why


def loadable(path: Path) -> Path:
    """What `load_model` takes for a model at `path`: a .gguf file or a folder as it is, the folder of a .safetensors
    file. Raises InvalidInputError if that folder's model does not consist of the file."""
    if path.suffix.lower() != ".safetensors" or path.is_dir():
        return path
    if path.name in files_at(path.parent):
        return path.parent
    raise InvalidInputError(
        f"{path} is not the one that {path.parent} is loaded from.",
        hint=f"`llmasos import {path} --name NAME` makes a model of it.",
        param="ref",
    )


def _same_disk(source: Path, home: Path) -> bool:
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    return source.stat().st_dev == existing.stat().st_dev


def _carry_out(plan: ImportPlan, library: Library, on_progress: OnProgress | None) -> Card:
    if plan.folder.exists() or plan.folder.is_symlink():
        raise StoreError(
            f"The library has a model {plan.name!r} already.",
            hint=f"Choose another name with --name, or `llmasos rm {plan.name}` first.",
        )
    staging = library.root / f".staging-{plan.name}"
    meter = Meter(on_progress, sum(file.size for file in plan.files))
    try:
        with disk_errors(staging):
            shutil.rmtree(staging, ignore_errors=True)
            for file in plan.files:
                target = staging / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                _place(file, target)
        files = [
            CardFile(
                path=file.path,
                size=file.size,
                sha256=_hash(staging / file.path, file.path, meter),
                linked_from=None if file.how == "copy" else str(file.source),
            )
            for file in plan.files
        ]
        facts = read_facts([file.path for file in plan.files], opener(staging))
        origin = plan.files[-1].source
        card = Card(
            name=plan.name,
            format=facts.format,
            architecture=plan.architecture,
            family=facts.config.family,
            source=f"file:{origin}",
            upstream=_cache_upstream(plan),
            files=files,
        )
        with disk_errors(plan.folder):
            write_card(staging, card)
            os.replace(staging, plan.folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return card


def _place(file: ImportedFile, target: Path) -> None:
    if file.how == "copy":
        shutil.copyfile(file.source, target)
    elif file.how == "symlink":
        target.symlink_to(file.source)
    else:
        try:
            target.hardlink_to(file.source)
        except OSError:  # a file system without hard links, or a file of another user (protected_hardlinks)
            target.symlink_to(file.source)


def _cache_upstream(plan: ImportPlan) -> Upstream:
    """A hub cache's file names tell the repository."""
    for parent in plan.files[-1].source.parents:
        if parent.name.startswith("models--"):
            return Upstream(repo=parent.name.removeprefix("models--").replace("--", "/", 1))
    return Upstream()
