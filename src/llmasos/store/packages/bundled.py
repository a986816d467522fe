"""The index that comes with LLMasOS: the examples in `llmasos/apps/examples`, packed when somebody asks for them.

It is there without a setting, offline, behind all others; `bundled` names it (`--index bundled`). The same files give
the same package, so nothing has to be stored beside them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import llmasos
from llmasos.errors import ChecksumError, InvalidInputError
from llmasos.settings import settings
from llmasos.store.packages.index import Document, Found, Index, Release
from llmasos.store.packages.pack import SUFFIX, Packed, pack

NAME = "bundled"
FOLDER = Path(llmasos.__file__).parent / "apps" / "examples"


class Bundled(Index):
    """The examples as an index; read-only."""

    def __init__(self) -> None:
        super().__init__(FOLDER)

    def __str__(self) -> str:
        return NAME

    def _read(self) -> Document:
        document = Document()
        with tempfile.TemporaryDirectory(prefix="llmasos-") as room:
            for folder in sorted(path.parent for path in FOLDER.glob("*/llmasos.toml")):
                packed = _packed(folder, Path(room))
                app = packed.manifest.app
                document.apps[app.name] = {
                    app.version: Release(
                        file=f"{folder.name}/llmasos.toml",
                        sha256=packed.sha256,
                        size=packed.path.stat().st_size,
                        summary=app.summary,
                        license=app.license,
                    )
                }
        return document

    @contextlib.contextmanager
    def package(self, found: Found, cache: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="llmasos-") as room:
            packed = _packed((FOLDER / found.release.file).parent, Path(room))
            if packed.sha256 != found.release.sha256:
                raise ChecksumError(f"{found.name} was changed while it was read.", hint="Repeat the command.")
            yield packed.path

    def _folder(self) -> Path:
        raise InvalidInputError(
            f"The index {NAME!r} comes with LLMasOS and can't be written to.", hint="--index FOLDER", param="index"
        )


def indexes(places: Sequence[str] = (), *, bundled: bool = True) -> list[Index]:
    """Those named, else those of the settings and, behind them, the examples that come with LLMasOS (`bundled`).

    Raises InvalidInputError if there are none.
    """
    found = list(places) or [one.strip() for one in settings().app_index.split(",") if one.strip()]
    if bundled and not places:
        found.append(NAME)
    if not found:
        raise InvalidInputError(
            "No index of applications is known.",
            hint="Name one with --index, a folder or a URL, or set LLMASOS_APP_INDEX.",
            param="index",
        )
    return [Bundled() if place == NAME else Index(place) for place in found]


def _packed(folder: Path, room: Path) -> Packed:
    return pack(folder, room / f"{folder.name}{SUFFIX}")
