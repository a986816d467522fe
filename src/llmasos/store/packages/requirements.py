"""`requirements.lock`: packages that an application needs, each with its version, as `uv pip compile` writes it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from llmasos.errors import FormatError, UnsupportedError

LOCK_FILE = "requirements.lock"


def parse_requirements(data: bytes, file: str = LOCK_FILE) -> list[Requirement]:
    """One requirement a line; comments and `--hash=…` may follow. Raises FormatError that names the line."""
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
            found.append(Requirement(stem))
        except InvalidRequirement as e:
            raise FormatError(
                f"{file}: {stem[:100]!r} is no requirement.",
                hint="Each line names a package and its version: httpx==0.28.1; options of pip have no place there.",
            ) from e
    return found


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
