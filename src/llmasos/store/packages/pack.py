"""Makes a `.llmapp`: a zip of an application's folder with `files.sha256`, a list of all its files in the form that
`sha256sum -c` reads.

The same files give the same bytes: names are sorted, times and modes are fixed, packing is deflate at level 9 (of one
version of zlib). Left out are version control, caches, virtual environments, packages, and what `.llmappignore` names:
a pattern with `*` and `?` a line, for a path or any part of one. Links, and files that look like secrets, are refused.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmasos.errors import FormatError, InvalidInputError, NotFoundError
from llmasos.store.packages.manifest import MANIFEST, Manifest, read_manifest
from llmasos.store.packages.names import RESERVED_FILES, problem_of_names
from llmasos.store.packages.requirements import LOCK_FILE, parse_requirements
from llmasos.store.transfer import disk_errors

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
    names = list(_names(folder))
    if problem := problem_of_names(names):
        raise FormatError(problem, hint="Rename the file.")
    entry = manifest.app.entry.partition(":")[0]
    if entry not in names:
        raise FormatError(f"{MANIFEST}: app.entry = {manifest.app.entry!r}: there is no such file.", hint="Correct it.")
    if LOCK_FILE in names:
        parse_requirements((folder / LOCK_FILE).read_bytes(), str(folder / LOCK_FILE))
    files = {name: _content(folder, name) for name in names}
    out = out or Path(f"{manifest.app.name}-{manifest.app.version}{SUFFIX}")
    write_zip(out, {**files, HASHES: hash_list(files)})
    return Packed(out, manifest, tuple(names), hashlib.sha256(out.read_bytes()).hexdigest())


def hash_list(files: Mapping[str, bytes]) -> bytes:
    """`SHA-256  NAME` a line, by name."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def write_zip(out: Path, files: Mapping[str, bytes]) -> None:
    """The files as a zip, in one step: `out` is whole or as it was."""
    with write_whole(out) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=False) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _TIME)
            info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, _MODE << 16, 3
            archive.writestr(info, files[name], compresslevel=9)
    if out.stat().st_size > MAX_PACKED:
        size = out.stat().st_size
        out.unlink()
        raise FormatError(
            f"The package would have {size} bytes; {MAX_PACKED} are allowed.",
            hint=f"Name what it does not need in {IGNORE}; models are pulled, not packed.",
        )


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


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk afterwards."""
    if os.name == "nt" and path.is_dir():
        return  # folders can't be opened there
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> Iterator[str]:
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
    if len(found) > MAX_FILES or total > MAX_UNPACKED:
        raise FormatError(
            f"{folder} has {len(found)} files with {total} bytes; {MAX_FILES} with {MAX_UNPACKED} are allowed.",
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


def _content(folder: Path, name: str) -> bytes:
    """The bytes of a file that is no secret."""
    data = (folder / name).read_bytes()
    if _SECRET_NAMES.fullmatch(name.rsplit("/", 1)[-1]):
        why = "its name is one of those that hold secrets"
    elif found := _SECRET_TEXT.search(data, 0, _SEARCHED):
        line = data.count(b"\n", 0, found.start()) + 1
        why = f"line {line} has {found[0][:10].decode()}…"
    else:
        return data
    raise InvalidInputError(
        f"{name} looks like a secret, which everybody could read in the package: {why}.",
        hint=f'Name it in {IGNORE}; the user sets secrets through [config] with type = "secret".',
        param="folder",
    )
