"""Small applications to pack, and zips that nobody should have made."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from llmasos.store.packages import pack
from llmasos.store.packages.pack import HASHES, hash_lines


def manifest(version: str = "1.0.0", more: str = "", name: str = "ask") -> str:
    return f'[app]\nname = "{name}"\nversion = "{version}"\nsummary = "Answers it"\nlicense = "MIT"\n{more}\n'


def code(version: str = "1.0.0") -> str:
    return (
        "from llmasos.apps import Application\n"
        'app = Application(title="Ask")\n'
        '@app.route("/tell")\n'
        f'def tell(index: str = "") -> str:\n    "Tell the version."\n    return "{version}" + index\n'
    )


def files_of(version: str = "1.0.0", more: str = "", name: str = "ask") -> dict[str, bytes]:
    return {"llmasos.toml": manifest(version, more, name).encode(), "app.py": code(version).encode()}


def write_app(folder: Path, version: str = "1.0.0", more: str = "", name: str = "ask") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in files_of(version, more, name).items():
        (folder / path).write_bytes(data)
    return folder


def package(folder: Path, version: str = "1.0.0", more: str = "", name: str = "ask") -> Path:
    """A whole package in `folder`."""
    source = write_app(folder / f"{name}-{version}-source", version, more, name)
    return pack(source, folder / f"{name}-{version}.llmapp").path


def listed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {**files, HASHES: hash_lines({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})}


def raw_zip(path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    """A zip with these entries as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path
