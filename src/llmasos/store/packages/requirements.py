"""`requirements.lock`: packages that an application needs, each with its version, as `uv pip compile` writes it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from llmasos.errors import FormatError, UnsupportedError

LOCK_FILE = "requirements.lock"
WHEELS = "wheels"
_HASH = re.compile(r"\s--hash=(\S+)")


@dataclass(frozen=True)
class Locked:
    """A line of the lock. `hashes`: sha256 of the files that may be installed for it; any may, where there is none."""

    requirement: Requirement
    hashes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([str(self.requirement), *(f"--hash=sha256:{one}" for one in self.hashes)])


def parse_lock(data: bytes, file: str = LOCK_FILE) -> list[Locked]:
    """One requirement a line; comments and `--hash=sha256:…` may follow. If one has hashes all have, as pip wants it.
    Raises FormatError that names the line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise FormatError(f"{file} is not UTF-8: {e}.", hint="Write it with `uv pip compile`.") from e
    found = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).strip()
        stem = re.sub(r"\s--hash=\S+", "", words).strip()
        if not stem:
            continue
        try:
            found.append(Locked(Requirement(stem), tuple(_sha256(one, stem, file) for one in _HASH.findall(words))))
        except InvalidRequirement as e:
            raise FormatError(
                f"{file}: {stem[:100]!r} is no requirement.",
                hint="Each line names a package and its version: httpx==0.28.1; options of pip have no place there.",
            ) from e
    without = [one for one in found if not one.hashes and canonicalize_name(one.requirement.name) != "llmasos"]
    if without and any(one.hashes for one in found):
        raise FormatError(
            f"{file}: {without[0]} has no hash, and others have.",
            hint="`uv pip compile --generate-hashes` writes all of them.",
        )
    return found


def _sha256(written: str, stem: str, file: str) -> str:
    if not (match := re.fullmatch(r"sha256:([0-9a-fA-F]{64})", written)):
        raise FormatError(
            f"{file}: {stem[:100]}: {written[:100]!r} is no sha256.",
            hint="Write --hash=sha256: and 64 hexadecimal digits, as `uv pip compile --generate-hashes` does.",
        )
    return match[1].lower()


def parse_requirements(data: bytes, file: str = LOCK_FILE) -> list[Requirement]:
    """What `parse_lock` reads, without the hashes."""
    return [one.requirement for one in parse_lock(data, file)]


def check_wheels(lock: Iterable[Locked], hashes: Mapping[str, str]) -> None:
    """`hashes`: sha256 by name of an application's files. Raises FormatError for one of its wheels that is not the one
    that the lock has."""
    hashed = [one for one in lock if one.hashes]
    for name, sha256 in hashes.items():
        folder, _, wheel = name.rpartition("/")
        if folder != WHEELS or not wheel.endswith(".whl"):
            continue
        try:
            project, version, _, _ = parse_wheel_filename(wheel)
        except InvalidWheelFilename as e:
            raise FormatError(
                f"{name} has no name of a wheel: {e}.", hint="Keep the names that wheels come with."
            ) from e
        wanted = [digest for one in hashed if is_for(one.requirement, project, version) for digest in one.hashes]
        if wanted and sha256 not in wanted:
            raise FormatError(
                f"{name} is not the file that {LOCK_FILE} has a hash of: expected sha256 {' or '.join(wanted)},"
                f" found {sha256}.",
                hint="Put the right wheel there, or write the lock anew.",
            )


def is_for(wanted: Requirement, project: str, version: Version) -> bool:
    """Whether this version of a project, by its canonical name, meets the requirement."""
    return canonicalize_name(wanted.name) == project and wanted.specifier.contains(version, prereleases=True)


def check_importable(folder: Path, name: str) -> None:
    """Raises UnsupportedError if the packages that the application in `folder` needs are not installed here."""
    path = folder / LOCK_FILE
    if not path.is_file():
        return
    missing = []
    for one in parse_requirements(path.read_bytes(), str(path)):
        if (one.marker and not one.marker.evaluate()) or canonicalize_name(one.name) == "llmasos":
            continue
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(one))
            continue
        if not one.specifier.contains(version, prereleases=True):
            missing.append(f"{one} (here: {version})")
    if missing:
        raise UnsupportedError(
            f"{name} needs packages that are not installed here: {', '.join(missing)}.",
            hint=f"pip install -r {path}",
        )
