"""Reads a `.llmapp` that anybody may have made, and writes its files into a folder.

Refused, each with its own message, before a file is written: what is no plain zip (bytes before or behind it,
overlapping entries, zip64, encryption, other packings than deflate), names that lead out of the folder or that some
system would not keep apart, links and devices, more or larger files than allowed, a ratio that only a bomb has, a file
that is not in `files.sha256`, a listed one that is missing or differs by a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmasos.errors import FormatError, NotFoundError
from llmasos.formats import sync
from llmasos.store.packages.kinds import MAX_BIG, problem_of_contents
from llmasos.store.packages.manifest import MANIFEST, MAX_MANIFEST, Manifest, parse_manifest
from llmasos.store.packages.names import RESERVED_FILES, problem_of_names
from llmasos.store.packages.pack import (
    HASHES,
    MAX_FILES,
    MAX_PACKED,
    MAX_UNPACKED,
    SIGNATURE,
    Source,
    bytes_source,
)
from llmasos.store.packages.requirements import LOCK_FILE, check_wheels, parse_lock
from llmasos.store.transfer import disk_errors

MAX_RATIO = 200  # unpacked bytes for a packed one, of files above MAX_FREE; text packs 3 to 30 times
MAX_FREE = 1 << 20
_MAX_DIRECTORY = 8 << 20  # bytes; with names of 400 bytes 10,000 entries take less than half
_MAX_SIGNATURE = 1 << 16
_MAX_LOCK = 4 << 20
_CHUNK = 1 << 20
_END = struct.Struct("<4s4H2LH")  # APPNOTE 4.3.16
_BIG_END = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_ANEW = "Get the package anew from its publisher."


@dataclass(frozen=True)
class Package:
    """An open package whose directory, list of hashes and manifest are good; `check` reads the rest."""

    path: Path
    archive: zipfile.ZipFile
    hashes: dict[str, str]
    hash_list: bytes
    signature: bytes | None
    manifest: Manifest

    def check(self) -> None:
        """Read every file. Raises FormatError for one that differs from the list, or a wheel from the lock."""
        for name in self.hashes:
            self._copy(name, lambda data: None)
        if self.manifest.kind == "app" and LOCK_FILE in self.hashes:
            lock = _small(self.path, self.archive, LOCK_FILE, _MAX_LOCK)
            check_wheels(parse_lock(lock, f"{self.path.name}: {LOCK_FILE}"), self.hashes)

    def sources(self) -> dict[str, Source]:
        """Every listed file and the list itself, by name, to be written into another package."""

        def of(name: str) -> Source:
            size = self.archive.getinfo(name).file_size
            return Source(size, lambda: self.archive.open(name), self.hashes[name])

        return {HASHES: bytes_source(self.hash_list), **{name: of(name) for name in self.hashes}}

    def extract(self, folder: Path, more: Mapping[str, bytes] | None = None) -> None:
        """Write all files, and `more`, into `folder`, which must not exist: beside it first, then renamed, so it is
        whole or not there."""
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
            try:
                self._write_to(temporary, more or {})
                os.rename(temporary, folder)
                sync(folder.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _write_to(self, folder: Path, more: Mapping[str, bytes]) -> None:
        folder.chmod(0o755)
        for name in self.hashes:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                self._copy(name, file.write)
            target.chmod(0o644)
        signature = {} if self.signature is None else {SIGNATURE: self.signature}
        for name, data in {HASHES: self.hash_list, **signature, **more}.items():
            (folder / name).write_bytes(data)
        for where, _, files in os.walk(folder):
            for name in files:
                sync(Path(where, name))
            sync(Path(where))

    def _copy(self, name: str, take: Callable[[bytes], object]) -> None:
        digest = hashlib.sha256()
        with _reading(self.path, name), self.archive.open(name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                take(chunk)
        if digest.hexdigest() != self.hashes[name]:
            raise FormatError(f"{self.path.name}: {name} is not the file that {HASHES} lists.", hint=_ANEW)


@contextlib.contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """The package at `path`. Raises NotFoundError without the file, FormatError for what may not be in a package."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(f"There is no package {path}.", hint="`llmasos app pack` makes one.") from None
    with file:
        count = _check_end(path, file)
        try:
            archive = zipfile.ZipFile(file)
        except UnicodeDecodeError as e:
            raise _bad(path, "a name in it is not UTF-8") from e
        # what zipfile raises for damaged directories; NotImplementedError: a version that it does not know
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as e:
            raise _bad(path, f"it is no zip file: {e}") from e
        with archive:
            if len(archive.infolist()) != count:
                raise _bad(path, f"its directory has {len(archive.infolist())} files instead of {count}")
            yield _package(path, archive)


def _bad(path: Path, why: str) -> FormatError:
    return FormatError(f"{path.name} is refused: {why}.", hint=_ANEW)


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    # what zipfile raises for damaged files; NotImplementedError: a compression that it lacks, RuntimeError: a password
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as e:
        raise _bad(path, f"{name} can't be read: {e}") from e


def _check_end(path: Path, file: IO[bytes]) -> int:
    """The number of files, and the directory's size before anything reads it, from the records that a plain zip ends
    with. The longer ones, of more than 2 GiB, are allowed for what is no application."""
    size = file.seek(0, os.SEEK_END)
    if size > MAX_BIG:
        raise _bad(path, f"it has {size} bytes; {MAX_BIG} are allowed")
    file.seek(max(0, size - _END.size - _LOCATOR.size))
    tail = file.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise _bad(path, "it is no zip file, or has something behind its end")
    _, disk, first_disk, here, entries, length, start, comment = _END.unpack(tail[-_END.size :])
    if disk or first_disk or here != entries or comment:
        raise _bad(path, "it is a part of several, or has a comment")
    end = size - _END.size
    if tail[: -_END.size][:4] == b"PK\6\7":
        end, entries, length, start = _check_big_end(path, file, tail[: _LOCATOR.size], end, (entries, length, start))
    elif entries == 0xFFFF or 0xFFFFFFFF in (length, start):
        raise _bad(path, "its zip64 records are missing")
    if entries > MAX_FILES + 2:
        raise _bad(path, f"it has {entries} files; {MAX_FILES} are allowed")
    if length > _MAX_DIRECTORY:
        raise _bad(path, f"its directory has {length} bytes; {_MAX_DIRECTORY} are allowed")
    if start + length != end:
        raise _bad(path, "it has bytes that belong to no file")
    return int(entries)


def _check_big_end(
    path: Path, file: IO[bytes], locator: bytes, end: int, short: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """Where the zip64 records begin, and what they say of the directory; the short ones must agree."""
    _, disk, place, disks = _LOCATOR.unpack(locator)
    if disk or disks != 1 or place + _BIG_END.size + _LOCATOR.size != end:
        raise _bad(path, "its zip64 records are not at its end")
    file.seek(place)
    mark, rest, _, _, disk, first_disk, here, entries, length, start = _BIG_END.unpack(file.read(_BIG_END.size))
    if mark != b"PK\6\6" or rest != _BIG_END.size - 12 or disk or first_disk or here != entries:
        raise _bad(path, "its zip64 records are damaged")
    for said, real, none in zip(short, (entries, length, start), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True):
        if said not in (real, none):
            raise _bad(path, "its zip64 records say something else than the others")
    return place, entries, length, start


def _check_size_of_app(path: Path, archive: zipfile.ZipFile) -> None:
    """What holds for applications only; of bigger things they name models."""
    size, total = path.stat().st_size, sum(info.file_size for info in archive.infolist())
    if size > MAX_PACKED:
        raise _bad(path, f"it has {size} bytes; {MAX_PACKED} are allowed")
    if total > MAX_UNPACKED:
        raise _bad(path, f"it unpacks to {total} bytes; {MAX_UNPACKED} are allowed")


def _package(path: Path, archive: zipfile.ZipFile) -> Package:
    infos = archive.infolist()
    names = [info.orig_filename for info in infos]
    if odd := next((i for i in infos if not i.flag_bits & 0x800 and not i.orig_filename.isascii()), None):
        raise _bad(path, f"the name {odd.orig_filename!r} is not marked as UTF-8")
    for info in infos:
        _check_entry(path, info)
    if problem := problem_of_names(names):
        raise FormatError(problem, hint=_ANEW)
    _check_sizes(path, infos)
    if HASHES not in names:
        raise _bad(path, f"it has no {HASHES}")
    hash_list = _small(path, archive, HASHES, MAX_FILES * 500)
    hashes = _hashes(path, hash_list)
    for name in names:
        if name not in hashes and name not in (HASHES, SIGNATURE):
            raise _bad(path, f"{name} is not in {HASHES}")
    for name in hashes:
        if name not in names:
            raise _bad(path, f"{name} is in {HASHES} and missing")
    if MANIFEST not in hashes:
        raise _bad(path, f"it has no {MANIFEST}")
    manifest = parse_manifest(_small(path, archive, MANIFEST, MAX_MANIFEST), f"{path.name}: {MANIFEST}")
    if manifest.kind == "app":
        _check_size_of_app(path, archive)
    if problem := problem_of_contents(manifest, hashes):
        raise _bad(path, problem.rstrip("."))
    signature = _small(path, archive, SIGNATURE, _MAX_SIGNATURE) if SIGNATURE in names else None
    package = Package(path, archive, hashes, hash_list, signature, manifest)
    package._copy(MANIFEST, lambda data: None)
    return package


def _check_entry(path: Path, info: zipfile.ZipInfo) -> None:
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        raise _bad(path, f"{name!r} is a symbolic link")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _bad(path, f"{name!r} is a device or another special file")
    if info.flag_bits & 0x41:
        raise _bad(path, f"{name!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _bad(path, f"{name!r} is packed in the way {info.compress_type}; only deflate is known")


def _check_sizes(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    total = sum(info.file_size for info in infos)
    if total > MAX_BIG:
        raise _bad(path, f"it unpacks to {total} bytes; {MAX_BIG} are allowed")
    for info in infos:
        if info.file_size > MAX_FREE and info.file_size > MAX_RATIO * info.compress_size:
            raise _bad(
                path, f"{info.orig_filename!r} unpacks to {info.file_size} bytes from {info.compress_size}: a bomb"
            )
    end = 0
    for info in sorted(infos, key=lambda one: one.header_offset):
        if info.header_offset < end or (end == 0 and info.header_offset != 0):
            raise _bad(path, f"{info.orig_filename!r} does not begin where the file before it ends")
        end = info.header_offset + 30 + len(info.orig_filename.encode()) + info.compress_size


def _small(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    with _reading(path, name), archive.open(name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _bad(path, f"{name} is longer than {limit} bytes")
    return data


def _hashes(path: Path, data: bytes) -> dict[str, str]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as e:
        raise _bad(path, f"{HASHES} is not UTF-8") from e
    found: dict[str, str] = {}
    for line in lines[:-1]:
        match = _LINE.fullmatch(line)
        if not match or match[2] in found or match[2] in RESERVED_FILES:
            raise _bad(path, f"{HASHES} has the line {line[:100]!r}")
        found[match[2]] = match[1]
    if lines[-1]:
        raise _bad(path, f"{HASHES} ends in the middle of a line")
    return found
