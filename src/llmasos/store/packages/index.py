"""Indexes of packages: `index.json` and the packages beside it, in a folder, a git checkout or behind a URL.

    index.json
    packages/NAME/NAME-VERSION.llmapp

In an index of a server, names are OWNER/NAME; NAME alone stands for the only one of that name. One more index comes
with LLMasOS (`bundled.py`).

Several are asked in their order, and an application belongs to the first that has its name: no later index can slip in
a newer version of it. Versions never change: other bytes for one that is there are refused. A version can be yanked,
with a reason; then only `NAME==VERSION` finds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmasos.errors import BusyError, ChecksumError, FormatError, InvalidInputError, NotFoundError
from llmasos.settings import api_key, settings
from llmasos.store.card import stays_inside
from llmasos.store.packages.kinds import MAX_BIG
from llmasos.store.packages.manifest import AppTable, Kind, Line, check_app_name, line
from llmasos.store.packages.pack import MAX_PACKED, SUFFIX, write_whole
from llmasos.store.packages.sign import verify
from llmasos.store.packages.unpack import open_package
from llmasos.store.transfer import Download, Meter, disk_errors, download, fetch, file_sha256, redact

INDEX = "index.json"
LOCK_TIMEOUT = 60.0  # seconds that a publisher waits for another
_MAX_INDEX = 64 << 20  # bytes


class Release(BaseModel):
    """One version of a package in an index. `file`: path beside `index.json`; `key_id`: who signed it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    file: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: int = Field(ge=0, le=MAX_BIG)
    kind: Kind = "app"
    summary: str = ""
    license: str = ""
    key_id: str | None = None
    published: str = ""
    yanked: Line | None = None

    @model_validator(mode="after")
    def _fits(self) -> Release:
        if self.kind == "app" and self.size > MAX_PACKED:
            raise ValueError(f"an application of {self.size} bytes; {MAX_PACKED} are allowed")
        return self


class Document(BaseModel):
    """`index.json`: releases by version by name."""

    model_config = ConfigDict(extra="ignore", strict=True)
    format: Literal[1] = 1
    apps: dict[str, dict[str, Release]] = {}


@dataclass(frozen=True)
class Found:
    """A version of a package and the index that it is in."""

    index: Index
    name: str
    version: str
    release: Release

    @property
    def app(self) -> str:
        """The name without its owner."""
        return self.name.rpartition("/")[2]


class Index:
    """One index: a folder, or a URL that `index.json` lies below."""

    def __init__(self, place: str | Path) -> None:
        text = str(place)
        self.is_url = text.startswith(("https://", "http://"))
        self.place = text.removesuffix(INDEX).rstrip("/") if self.is_url else str(Path(text).expanduser().absolute())

    def __str__(self) -> str:
        return redact(self.place) if self.is_url else self.place

    @property
    def apps(self) -> dict[str, dict[str, Release]]:
        """Releases by version by name, read now. Raises NotFoundError, FormatError, NetworkError, OfflineError."""
        return self._read().apps

    def _read(self) -> Document:
        if self.is_url:
            data, _ = fetch(f"{self.place}/{INDEX}", self._headers())
        else:
            try:
                with (Path(self.place) / INDEX).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    data = file.read(min(size, _MAX_INDEX) + 1)
            except (FileNotFoundError, NotADirectoryError):
                raise NotFoundError(
                    f"{self} has no {INDEX}.", hint=f"`llmasos app publish FILE --index {self}` makes one."
                ) from None
        try:
            if len(data) > _MAX_INDEX:
                raise ValueError(f"it is longer than {_MAX_INDEX} bytes")
            document = Document.model_validate_json(data)
            _check(document)
        except ValueError as e:
            reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
            raise FormatError(f"The index {self} is damaged: {reason}.", hint="Tell whoever keeps it.") from e
        return document

    @contextlib.contextmanager
    def package(self, found: Found, cache: Path) -> Iterator[Path]:
        """The package of `found` on this disk, with the bytes that the index promises. Raises ChecksumError."""
        release = found.release
        if not self.is_url:
            path = Path(self.place) / release.file
            if not path.is_file():
                raise NotFoundError(f"{self} lists {release.file}, which is not there.", hint="Tell whoever keeps it.")
            if path.stat().st_size != release.size or file_sha256(path) != release.sha256:
                raise ChecksumError(
                    f"{path} is not the file that {INDEX} lists.",
                    hint="Somebody changed it. Tell whoever keeps the index.",
                )
            yield path
            return
        target = f"{release.sha256}{SUFFIX}"
        headers = tuple(self._headers().items())
        item = Download(target, f"{self.place}/{release.file}", release.size, release.sha256, headers=headers)
        try:
            yield download(item, cache, Meter(None))
        finally:
            (cache / target).unlink(missing_ok=True)

    def _headers(self) -> dict[str, str]:
        """The key of the server at LLMASOS_URL, where it hosts the index; no other may see it."""
        key, ours, theirs = api_key("llmasos"), urlsplit(settings().url), urlsplit(self.place)
        own = key and (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)
        return {"Authorization": f"Bearer {key}"} if own else {}

    def publish(self, package: Path, owner: str | None = None) -> Found:
        """Add a package to this folder, as OWNER/NAME where it has an owner, making it an index if it is none yet.

        The package is read whole and its signature checked first. Raises InvalidInputError for a URL, and for another
        package of a version that is there.
        """
        folder = self._folder()
        with open_package(package) as opened:
            opened.check()
            publisher, app = verify(opened), opened.manifest.app
        sha256 = file_sha256(package)
        name = f"{check_app_name(owner)}/{app.name}" if owner else app.name
        with self._changing(folder) as document:
            versions = document.apps.setdefault(name, {})
            same = next((v for v in versions if Version(v) == Version(app.version)), None)
            if same is not None:
                if versions[same].sha256 == sha256:
                    return Found(self, name, same, versions[same])
                raise InvalidInputError(
                    f"{self} has {name} {same} already, with other bytes, and versions never change.",
                    hint="Give it a new version in llmasos.toml, pack and publish again.",
                    param="version",
                )
            path = f"packages/{name}/{app.name}-{app.version}{SUFFIX}"
            with write_whole(folder / path) as temporary:
                shutil.copyfile(package, temporary)
                if file_sha256(temporary) != sha256:
                    raise ChecksumError(f"{package} was changed while it was read.", hint="Repeat the command.")
            release = Release(
                file=path,
                sha256=sha256,
                size=(folder / path).stat().st_size,
                kind=app.kind,
                summary=app.summary,
                license=app.license,
                key_id=publisher.key_id if publisher else None,
                published=datetime.now(UTC).replace(microsecond=0).isoformat(),
            )
            versions[app.version] = release
        return Found(self, name, app.version, release)

    def yank(self, name: str, version: str, reason: str) -> Found:
        """Take a version out of every choice but `NAME==VERSION`. Its package stays."""
        folder = self._folder()
        if not reason.strip():
            raise InvalidInputError("A version is yanked with a reason.", hint='--reason "loses data"', param="reason")
        with self._changing(folder) as document:
            versions = document.apps.get(name, {})
            if version not in versions:
                raise _no_version(name, version, self, versions)
            try:
                line(reason)
            except ValueError as e:
                raise InvalidInputError(f"The reason {reason!r} {e}.", hint="Write one line.", param="reason") from None
            versions[version] = versions[version].model_copy(update={"yanked": reason.strip()})
        return Found(self, name, version, versions[version])

    def _folder(self) -> Path:
        if self.is_url:
            raise InvalidInputError(
                f"{self} can't be written to.", hint="Change the folder that it is served from.", param="index"
            )
        return Path(self.place)

    @contextlib.contextmanager
    def _changing(self, folder: Path) -> Iterator[Document]:
        """The document, written in one step at the end if it was changed; one writer at a time."""
        from filelock import FileLock, Timeout

        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".index.lock")
            try:
                lock.acquire(timeout=LOCK_TIMEOUT)
            except Timeout:
                raise BusyError(f"Another process is publishing to {self}.", hint="Wait, then repeat.") from None
        try:
            document = self._read() if (folder / INDEX).exists() else Document()
            before = document.model_dump()
            yield document
            if document.model_dump() != before:
                _check(document)
                with write_whole(folder / INDEX) as temporary:
                    temporary.write_text(_text(document), encoding="utf-8")
        finally:
            lock.release()


def _text(document: Document) -> str:
    """Sorted and a value a line, so that a change is a small one in git."""
    import json

    facts = document.model_dump(exclude_none=True)
    return json.dumps(facts, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _check(document: Document) -> None:
    """Raises ValueError for names, versions and paths that no manifest could have brought."""
    for name, versions in document.apps.items():
        for version, release in versions.items():
            owner, slash, app = name.rpartition("/")
            facts = {
                "name": app,
                "version": version,
                "summary": release.summary or "-",
                "license": release.license or "-",
            }
            try:
                if slash:
                    check_app_name(owner)
                AppTable.model_validate(facts)
            except InvalidInputError as e:
                raise ValueError(f"{name!r}: {e.message}") from e
            except ValidationError as e:
                raise ValueError(f"{name!r} {version!r}: {e.errors()[0]['msg']}") from e
            if not stays_inside(release.file):
                raise ValueError(f"{release.file!r} leads out of it")


def search(asked: Sequence[Index], words: Sequence[str] = ()) -> list[Found]:
    """The newest version of every application whose name or summary has all `words`, by name. Those of which all
    versions are yanked are left out, and those that an earlier index has, too."""
    first: dict[str, Found] = {}
    names: set[str] = set()
    for index in asked:
        apps = index.apps
        for name, versions in apps.items():
            if name not in names and (best := _newest(versions)):
                first[name] = Found(index, name, best, versions[best])
        names |= apps.keys()
    lowered = [word.lower() for word in words]
    fits = (one for one in first.values() if all(w in f"{one.name} {one.release.summary}".lower() for w in lowered))
    return sorted(fits, key=lambda one: one.name)


def choose(asked: Sequence[Index], reference: str) -> Found:
    """What `NAME` or `NAME==VERSION` stands for in the first index that has the name.

    Raises NotFoundError if no index has it, or not this version.
    """
    name, exact, version = reference.partition("==")
    owner, slash, app = name.rpartition("/")
    check_app_name(app)
    if slash:
        check_app_name(owner)
    for index in asked:
        apps = index.apps
        name = _full_name(apps, name, index)
        versions = apps.get(name)
        if not versions:
            continue
        chosen = next((v for v in versions if _same(v, version)), None) if exact else _newest(versions)
        if chosen is None:
            raise _no_version(name, version, index, versions)
        return Found(index, name, chosen, versions[chosen])
    raise NotFoundError(
        f"No package {name} in {', '.join(map(str, asked))}.", hint="`llmasos app search` shows what there is."
    )


def _full_name(apps: Mapping[str, object], name: str, index: Index) -> str:
    """What a name without an owner stands for here. Raises InvalidInputError where that can't be told."""
    if name in apps or "/" in name:
        return name
    found = sorted(full for full in apps if full.endswith(f"/{name}"))
    if len(found) > 1:
        raise InvalidInputError(
            f"{index} has several packages {name}.", hint=f"Name its owner: {', '.join(found)}.", param="name"
        )
    return found[0] if found else name


def _same(known: str, asked: str) -> bool:
    try:
        return Version(known) == Version(asked)
    except InvalidVersion:
        return False


def _newest(versions: dict[str, Release]) -> str | None:
    """The newest that is not yanked; one before a release only where there is no release."""
    good = [version for version, release in versions.items() if release.yanked is None]
    final = [version for version in good if not Version(version).is_prerelease]
    return max(final or good, key=Version, default=None)


def _no_version(name: str, version: str, index: Index, versions: dict[str, Release]) -> NotFoundError:
    shown = [v if versions[v].yanked is None else f"{v} (yanked)" for v in sorted(versions, key=Version)]
    what = f"{name} {version}" if version else f"version of {name} that is not yanked"
    return NotFoundError(
        f"{index} has no {what}.", hint=f"It has: {', '.join(shown) or 'none'}. Ask for NAME==VERSION."
    )
