"""Makes a `.llmapp`: a zip of an application's folder with `files.sha256`, a list of all its files in the form that
`sha256sum -c` reads.

The same files give the same bytes: names are sorted, times and modes are fixed, packing is deflate at level 9 (of one
version of zlib); weights and the like, which it would not make smaller, are stored. Left out are version control,
caches, virtual environments, packages, and what `.llmappignore` names: a pattern with `*` and `?` a line, for a path or
any part of one. Links, and files that look like secrets, are refused.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmasos.errors import FormatError, InvalidInputError, NotFoundError
from llmasos.formats import sync
from llmasos.store.packages.kinds import MAX_BIG, is_dense, problem_of_contents
from llmasos.store.packages.manifest import MANIFEST, Manifest, read_manifest
from llmasos.store.packages.names import RESERVED_FILES, problem_of_names
from llmasos.store.packages.requirements import LOCK_FILE, check_wheels, parse_lock
from llmasos.store.transfer import disk_errors, file_sha256

SUFFIX = ".llmapp"
HASHES = "files.sha256"
SIGNATURE = "signature.json"
IGNORE = ".llmappignore"
MAX_FILES = 10_000
MAX_UNPACKED = 1 << 30  # bytes of all files
MAX_PACKED = 512 << 20  # bytes of the package

_SKIPPED = {".git", ".hg", ".svn", "__pycache__", ".venv", "venv", "node_modules", ".DS_Store", IGNORE}
_SKIPPED |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".idea", ".vscode"}
_SKIPPED_ENDS = (".pyc", ".pyo", SUFFIX)
_SECRET_NAMES = re.compile(
    r"\.env(\.(?!example$|sample$|template$).*)?|id_(rsa|dsa|ecdsa|ed25519)|\.netrc|\.pypirc|\.npmrc|credentials\.json"
    r"|.*\.(key|p12|pfx|jks|kdbx)",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|\bhf_[A-Za-z]{34}\b"
    rb"|\bsk-[A-Za-z0-9_-]{32,}"
)
_SEARCHED = 4 << 20  # bytes of a file in which secrets are looked for
_CHUNK = 1 << 20
_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644


@dataclass(frozen=True)
class Packed:
    path: Path
    manifest: Manifest
    files: tuple[str, ...]
    sha256: str


def pack(folder: Path, out: Path | None = None) -> Packed:
    """Pack the application in `folder` into `out` (default: NAME-VERSION.llmapp in the working folder).

    Raises NotFoundError without the folder, FormatError for what may not be in a package, InvalidInputError for a file
    that looks like a secret.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder}.", hint="`llmasos app new NAME` makes one to begin with.")
    manifest = read_manifest(folder)
    names = list(_names(folder, manifest))
    if problem := problem_of_names(names):
        raise FormatError(problem, hint="Rename the file.")
    if problem := problem_of_contents(manifest, names):
        raise FormatError(f"{MANIFEST}: {problem}", hint="Correct it.")
    for name in names:
        _check_secret(folder, name)
    hashes = {name: file_sha256(folder / name) for name in names}
    if LOCK_FILE in names:
        check_wheels(parse_lock((folder / LOCK_FILE).read_bytes(), str(folder / LOCK_FILE)), hashes)
    out = out or Path(f"{manifest.app.name}-{manifest.app.version}{SUFFIX}")
    sources = {name: file_source(folder / name, hashes[name]) for name in names}
    write_zip(out, {**sources, HASHES: bytes_source(hash_lines(hashes))}, manifest)
    return Packed(out, manifest, tuple(names), file_sha256(out))


def hash_lines(hashes: Mapping[str, str]) -> bytes:
    """`SHA-256  NAME` a line, by name."""
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


@dataclass(frozen=True)
class Source:
    """What becomes a file of a package, read as it is written. `sha256`: what it must be; None: not known before."""

    size: int
    open: Callable[[], AbstractContextManager[IO[bytes]]]
    sha256: str | None = None


def file_source(path: Path, sha256: str) -> Source:
    return Source(path.stat().st_size, lambda: path.open("rb"), sha256)


def bytes_source(data: bytes) -> Source:
    return Source(len(data), lambda: io.BytesIO(data))


def write_zip(out: Path, files: Mapping[str, Source], manifest: Manifest) -> None:
    """The files as a zip, in one step: `out` is whole or as it was. Nothing is held in memory."""
    with write_whole(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _TIME)
            info.compress_type = zipfile.ZIP_STORED if is_dense(name) else zipfile.ZIP_DEFLATED
            info.external_attr, info.create_system, info.file_size = _MODE << 16, 3, files[name].size
            info._compresslevel = 9  # type: ignore[attr-defined]  # only `writestr` has an argument for it
            _write(archive, info, files[name])
    if out.stat().st_size > (MAX_PACKED if manifest.kind == "app" else MAX_BIG):
        size = out.stat().st_size
        out.unlink()
        raise FormatError(
            f"The package would have {size} bytes; {MAX_PACKED} are allowed.",
            hint=f"Name what it does not need in {IGNORE}; models are pulled, not packed.",
        )


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Source) -> None:
    digest, size = hashlib.sha256(), 0
    with source.open() as file, archive.open(info, "w") as target:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            target.write(chunk)
    if size != source.size or source.sha256 not in (None, digest.hexdigest()):
        raise FormatError(f"{info.filename} was changed while it was packed.", hint="Repeat the command.")


@contextlib.contextmanager
def write_whole(out: Path) -> Iterator[Path]:
    """A file beside `out` to write to, that takes its place on success, safe on the disk."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _names(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Paths below `folder` that belong into its package, sorted."""
    patterns = _patterns(folder / IGNORE)
    found, total = [], 0
    for where, folders, files in os.walk(folder):
        place = Path(where)
        relative = place.relative_to(folder)
        kept = []
        for name in sorted(folders):
            if _is_skipped(relative / name, patterns) or (place / name / "pyvenv.cfg").exists():
                continue
            if (place / name).is_symlink():
                raise _link(relative / name)
            kept.append(name)
        folders[:] = kept
        for name in files:
            path, shown = place / name, (relative / name).as_posix()
            if _is_skipped(relative / name, patterns):
                continue
            if path.is_symlink():
                raise _link(relative / name)
            if not path.is_file():
                raise FormatError(f"{shown} is neither a file nor a folder.", hint=f"Name it in {IGNORE}.")
            if shown in RESERVED_FILES:
                raise FormatError(f"{shown} is written by the packer and can't be a file of yours.", hint="Rename it.")
            found.append(shown)
            total += path.stat().st_size
    most = MAX_UNPACKED if manifest.kind == "app" else MAX_BIG
    if len(found) > MAX_FILES or total > most:
        raise FormatError(
            f"{folder} has {len(found)} files with {total} bytes; {MAX_FILES} with {most} are allowed.",
            hint=f"Name what the application does not need in {IGNORE}; models are pulled, not packed.",
        )
    yield from sorted(found)


def _link(path: Path) -> FormatError:
    return FormatError(
        f"{path.as_posix()} is a symbolic link, which a package can't hold.",
        hint=f"Put a copy in its place, or name it in {IGNORE}.",
    )


def _patterns(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, OSError) as e:
        raise FormatError(f"{path} can't be read: {e}.", hint="Write one pattern a line, in UTF-8.") from e
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if negated := next((line for line in found if line.startswith("!")), None):
        raise FormatError(f"{path}: {negated!r}: patterns only leave out.", hint="Write patterns without `!`.")
    return [line.strip("/") for line in found]


def _is_skipped(path: Path, patterns: list[str]) -> bool:
    if path.name in _SKIPPED or path.name.endswith(_SKIPPED_ENDS):
        return True
    return any(fnmatch.fnmatchcase(one, pattern) for pattern in patterns for one in (path.as_posix(), path.name))


def secret_in(name: str, file: IO[bytes]) -> str:
    """Why a file looks like a secret; empty if it does not."""
    if _SECRET_NAMES.fullmatch(name.rsplit("/", 1)[-1]):
        return "its name is one of those that hold secrets"
    data = file.read(_SEARCHED)
    if (found := _SECRET_TEXT.search(data)) is None:
        return ""
    return f"line {data.count(bytes([10]), 0, found.start()) + 1} has {found[0][:10].decode()}…"


def _check_secret(folder: Path, name: str) -> None:
    with (folder / name).open("rb") as file:
        why = secret_in(name, file)
    if not why:
        return
    raise InvalidInputError(
        f"{name} looks like a secret, which everybody could read in the package: {why}.",
        hint=f'Name it in {IGNORE}; the user sets secrets through [config] with type = "secret".',
        param="folder",
    )
