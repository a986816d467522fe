"""Installed applications: `<home>/apps/NAME/VERSION/`, all files of a version, unchanged.

    <home>/apps/ask/1.0.0/          the package's files; installed.json says where they came from
    <home>/apps/ask/1.1.0/
    <home>/apps/ask/current         one line: 1.1.0
    <home>/apps/ask/data/           the application's own; stays when versions come and go

All of it can be moved, copied and deleted by hand. A version's folder is renamed into its place when it is whole, and
`current` is written after it, so an install that was interrupted leaves nothing that counts.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, ValidationError

from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError, StoreError, UnsupportedError
from llmasos.settings import settings
from llmasos.store.library import discard, model_lock
from llmasos.store.packages.index import Found, Index, choose
from llmasos.store.packages.manifest import Grant, Kind, Manifest, check_app_name, grants, read_manifest, sheet, widened
from llmasos.store.packages.pack import write_whole
from llmasos.store.packages.sign import Publisher, check_publisher, note_publisher, verify
from llmasos.store.packages.unpack import Package, open_package
from llmasos.store.transfer import disk_errors, file_sha256

CURRENT, RECORD, DATA = "current", "installed.json", "data"


@dataclass(frozen=True)
class Request:
    """What an install asks its user. `asked`: the permissions in question: all of them, or in an update those that it
    adds. `sheet`: the whole sheet as data."""

    manifest: Manifest
    asked: tuple[Grant, ...]
    publisher: Publisher | None
    source: str
    previous: str | None
    yanked: str | None = None

    @property
    def sheet(self) -> dict[str, Any]:
        return sheet(self.manifest)


Accept = Callable[[Request], bool]


class NotAcceptedError(InvalidInputError):
    """Nobody has accepted what an application may do. `request` has it."""

    def __init__(self, request: Request) -> None:
        app, wants = request.manifest.app, ", ".join(map(str, request.asked))
        asks = f"asks for: {wants or 'no permissions'}" if request.previous is None else f"also asks for: {wants}"
        super().__init__(
            f"{app.name} {app.version} {asks}. Nobody has accepted that.",
            hint="Look at it, then repeat the command with --yes.",
            param="yes",
        )
        self.request = request


class Record(BaseModel):
    """`installed.json` of a version. `sha256`: of its package. `name`: OWNER/NAME, where the index has owners."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    source: str
    sha256: str
    key_id: str | None = None
    installed: str
    name: str = ""


@dataclass(frozen=True)
class Installed:
    """An installed version. `error` instead of `manifest` where it is damaged."""

    name: str
    version: str
    folder: Path
    versions: tuple[str, ...]
    manifest: Manifest | None = None
    record: Record | None = None
    error: str = ""

    @property
    def entry(self) -> str:
        """The file that has the application, and its name there: what `load_application` takes."""
        assert self.manifest is not None
        return str(self.folder / self.manifest.app.entry)


class Apps:
    """The applications in `<home>/apps`; `home` defaults to the one in the settings."""

    kinds: tuple[Kind, ...] = ("app",)
    folder = "apps"

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or settings().home
        self.root = self.home / self.folder

    def list(self) -> list[Installed]:
        """Every application with a current version, by name. Damaged ones carry their `error`."""
        try:
            names = sorted(path.name for path in self.root.iterdir() if (path / CURRENT).is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for name in names:
            with contextlib.suppress(InvalidInputError, NotFoundError):  # a name that no application has; one just gone
                found.append(self._describe(check_app_name(name)))
        return found

    def has(self, name: str) -> bool:
        """Whether an application of this name is installed."""
        try:
            return (self.root / check_app_name(name) / CURRENT).is_file()
        except InvalidInputError:
            return False

    def get(self, name: str) -> Installed:
        """The current version. Raises NotFoundError if none is installed, FormatError if it is damaged."""
        found = self._describe(check_app_name(name))
        if found.error:
            raise FormatError(
                f"{name} {found.version} is damaged: {found.error}",
                hint=f"`llmasos app rollback {name}` takes the version before it; `llmasos app uninstall {name}`.",
            )
        return found

    def data(self, name: str) -> Path:
        """The application's own folder."""
        return self.root / check_app_name(name) / DATA

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions that are there whole, the oldest first."""
        folder = self.root / check_app_name(name)
        found = [path.name for path in folder.iterdir() if _is_version(path.name)] if folder.is_dir() else []
        return tuple(sorted((v for v in found if (folder / v / RECORD).is_file()), key=Version))

    def _describe(self, name: str) -> Installed:
        try:
            version = (self.root / name / CURRENT).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"No application {name} is installed.",
                hint="`llmasos app ls` shows what is; `llmasos app install NAME` installs one.",
            ) from None
        except UnicodeDecodeError:
            version = "?"
        folder, versions = self.root / name / version, self.versions(name)
        if version not in versions:
            return Installed(name, version, folder, versions, error=f"there is no version {version[:40]!r}.")
        try:
            manifest = read_manifest(folder)
        except LLMasOSError as e:
            return Installed(name, version, folder, versions, error=e.message)
        record = _record(folder)
        if record is None:
            return Installed(name, version, folder, versions, error=f"its {RECORD} can't be read.")
        if (manifest.app.name, manifest.app.version) != (name, version):
            other = f"{manifest.app.name} {manifest.app.version}"
            return Installed(name, version, folder, versions, error=f"its folder has {other}.")
        return Installed(name, version, folder, versions, manifest, record)

    def install(
        self,
        reference: str | Path,
        asked: Sequence[Index] = (),
        *,
        accept: Accept | bool = False,
        trust: str | None = None,
        source: str | None = None,
    ) -> Installed:
        """Install a package file, or what `NAME` or `NAME==VERSION` stands for in the indexes.

        `accept` is asked, or says, whether the application may do what its sheet lists; NotAcceptedError otherwise.
        Raises NotFoundError, FormatError for a package that may be hostile, KeyChangedError (see `sign`),
        UnsupportedError for another Python, StoreError if this version is there with other bytes. `source`: where a
        file is from, if not from where it lies.
        """
        if str(reference).endswith(".llmapp"):
            path = Path(reference)
            with open_package(path) as package:
                name = package.manifest.app.name
                with self._changing(name):
                    return self._install(package, source or str(path.absolute()), accept, trust, is_update=False)
        found = choose(asked, str(reference))
        with self._changing(found.app), found.index.package(found, self.home / "cache" / "apps") as path:
            self._check_owner(found)
            return self._from_index(path, found, accept, trust, is_update=False)

    def update(
        self, name: str, asked: Sequence[Index], *, accept: Accept | bool = False, trust: str | None = None
    ) -> Installed:
        """Make the newest version of the indexes the current one; what there is if it is not newer.

        `accept` is only asked for permissions that the current version does not have, and for all of them where nobody
        signed the package and it comes from another place than the current version. Raises as `install` does.
        """
        record = self.get(name).record
        found = choose(asked, (record.name if record else "") or name)
        with self._changing(name):
            now = self.get(name)
            if Version(found.version) <= Version(now.version):
                return now
            with found.index.package(found, self.home / "cache" / "apps") as path:
                return self._from_index(path, found, accept, trust, is_update=True)

    def _from_index(
        self, path: Path, found: Found, accept: Accept | bool, trust: str | None, is_update: bool
    ) -> Installed:
        with open_package(path) as package:
            app = package.manifest.app
            if (app.name, app.version, app.kind) != (found.app, found.version, found.release.kind):
                said = f"{found.release.kind} {found.name} {found.version}"
                raise FormatError(
                    f"{found.index} lists {said}, and the package is {app.kind} {app.name} {app.version}.",
                    hint="Tell whoever keeps the index.",
                )
            return self._install(
                package,
                str(found.index),
                accept,
                trust,
                is_update=is_update,
                yanked=found.release.yanked,
                name=found.name,
            )

    def _check_owner(self, found: Found) -> None:
        """Raises StoreError where the package of this name here is another owner's."""
        known = _record(self.root / found.app / self._current(found.app))
        if known is not None and "/" in known.name and "/" in found.name and known.name != found.name:
            raise StoreError(
                f"{found.app} is {known.name} here, and {found.name} is another package.",
                hint=f"`llmasos app uninstall {found.app}` first, if you want that one.",
            )

    def _current(self, name: str) -> str:
        try:
            return (self.root / name / CURRENT).read_text(encoding="utf-8").strip() or "-"
        except (OSError, UnicodeDecodeError):
            return "-"

    def _install(
        self,
        package: Package,
        source: str,
        accept: Accept | bool,
        trust: str | None,
        *,
        is_update: bool,
        yanked: str | None = None,
        name: str = "",
    ) -> Installed:
        manifest, app = package.manifest, package.manifest.app
        if app.kind not in self.kinds:
            raise UnsupportedError(
                f"{app.name} is no application but a package of the kind {app.kind}.",
                hint=f"`llmasos app install {app.name}` on the machine itself installs it.",
                param="file",
            )
        package.check()  # nobody is asked about a package that is not whole
        publisher, sha256 = verify(package), file_sha256(package.path)
        check_publisher(self.home, app.name, publisher, trust)
        _check_python(app.name, app.python)
        folder = self.root / app.name / app.version
        previous = self._accepted(app.name, source, publisher) if is_update else None
        new = grants(manifest) if previous is None else widened(previous, manifest)
        request = Request(manifest, new, publisher, source, previous.app.version if previous else None, yanked)
        if (previous is None or new) and not (accept(request) if callable(accept) else accept):
            raise NotAcceptedError(request)
        if known := _record(folder):
            if known.sha256 != sha256:
                raise StoreError(
                    f"{app.name} {app.version} is installed with other bytes, and versions never change.",
                    hint=f"`llmasos app uninstall {app.name}` first, if this package is the right one.",
                )
        else:
            key_id = publisher.key_id if publisher else None
            now = datetime.now(UTC).replace(microsecond=0).isoformat()
            record = Record(source=source, sha256=sha256, key_id=key_id, installed=now, name=name)
            self._place(package, folder, record)
        if publisher:
            note_publisher(self.home, app.name, publisher)
        self._show(manifest, folder)
        self._set_current(app.name, app.version)
        return self.get(app.name)

    def _show(self, manifest: Manifest, folder: Path) -> None:
        """This version becomes the one that is used."""

    def _hide(self, name: str) -> None:
        """None is used any more."""

    def _accepted(self, name: str, source: str, publisher: Publisher | None) -> Manifest | None:
        """The current version, if what was accepted for it holds for its update: one that nobody signed and that comes
        from elsewhere may be another application of the same name."""
        now = self.get(name)
        assert now.record is not None
        return now.manifest if publisher or now.record.source == source else None

    def _place(self, package: Package, folder: Path, record: Record) -> None:
        if folder.exists():
            discard(folder)  # without a good record it is not whole
        package.extract(folder, {RECORD: record.model_dump_json(indent=2).encode() + b"\n"})

    def _set_current(self, name: str, version: str) -> None:
        with write_whole(self.root / name / CURRENT) as temporary:
            temporary.write_text(f"{version}\n", encoding="utf-8")

    def rollback(self, name: str, version: str | None = None) -> Installed:
        """Make an installed version the current one; default: the newest before it. The data folder stays as it is.

        Raises NotFoundError if there is none.
        """
        with self._changing(name):
            there = self.versions(name)
            current = self._describe(name).version
            if version is None:
                limit = Version(current) if _is_version(current) else None
                older = [v for v in there if limit is None or Version(v) < limit]
                version = older[-1] if older else None
            if version not in there:
                wanted = f"no version {version}" if version else f"no version before {current}"
                raise NotFoundError(f"{name} has {wanted} here.", hint=f"It has: {', '.join(there) or 'none'}.")
            assert version is not None
            folder = self.root / name / version
            self._show(read_manifest(folder), folder)
            self._set_current(name, version)
            return self.get(name)

    def uninstall(self, name: str, *, data: bool = False) -> tuple[str, ...]:
        """Delete all versions, and with `data` the application's own folder; gives the versions. The publisher's key
        stays noted."""
        with self._changing(name):
            gone = self._describe(name).versions
            folder = self.root / name
            self._hide(name)
            with disk_errors(folder):
                (folder / CURRENT).unlink()  # from here on it is not installed
            for path in folder.iterdir():
                if _is_version(path.name) or (data and path.name == DATA):
                    discard(path)
            return gone

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """One process at a time changes an application; what an interrupted one left is cleared away."""
        folder = self.root / check_app_name(name)
        with model_lock(self.home, f"app.{name}"):
            for path in [*folder.glob(".new-*"), *folder.glob(".trash-*")]:
                shutil.rmtree(path, ignore_errors=True)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if nothing is in it


def _record(folder: Path) -> Record | None:
    """Where the version in `folder` came from; None if that can't be told."""
    try:
        return Record.model_validate_json((folder / RECORD).read_bytes())
    except (ValidationError, OSError):
        return None


def version_of(text: str) -> Version:
    """Raises InvalidInputError for what is none."""
    try:
        return Version(text)
    except InvalidVersion:
        raise InvalidInputError(
            f"{text[:100]!r} is no version.", hint="Write one like 1.0.0.", param="version"
        ) from None


def _is_version(name: str) -> bool:
    try:
        return str(Version(name)) == name
    except InvalidVersion:
        return False


def _check_python(name: str, wanted: str) -> None:
    here = platform.python_version()
    if not SpecifierSet(wanted).contains(here, prereleases=True):
        raise UnsupportedError(
            f"{name} needs Python {wanted}; this is {here}.", hint="Run LLMasOS with another Python."
        )
