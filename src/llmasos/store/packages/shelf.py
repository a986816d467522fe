"""Models, adapters and datasets that came as packages: `<home>/packages/NAME/VERSION/`, as applications lie in `apps`,
and the current version linked to where it is looked for.

    <home>/models/NAME      a model of the library: `llmasos run NAME`
    <home>/adapters/NAME    an adapter, by its name
    <home>/datasets/NAME    a dataset

Links are hard ones where the file system has them, so nothing is there twice; else copies.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmasos.errors import LLMasOSError, StoreError
from llmasos.store.card import read_card, write_card
from llmasos.store.library import Library, discard, import_into
from llmasos.store.packages.index import Index, choose
from llmasos.store.packages.installed import RECORD, Accept, Apps, Installed
from llmasos.store.packages.manifest import Kind, Manifest
from llmasos.store.packages.unpack import open_package
from llmasos.store.transfer import disk_errors

PLACES: dict[Kind, str] = {"model": "models", "adapter": "adapters", "dataset": "datasets"}


class Shelf(Apps):
    """Packages that are no applications."""

    kinds = ("model", "adapter", "dataset")
    folder = "packages"

    def placed(self, manifest: Manifest) -> Path:
        """Where a package is looked for."""
        return self.home / PLACES[manifest.kind] / manifest.app.name

    def _show(self, manifest: Manifest, folder: Path) -> None:
        """Raises StoreError where something else has the name, and for a model what opening it raises."""
        self._check_free(manifest)
        if manifest.kind == "model":
            self._show_model(manifest, folder)
            return
        target = self.placed(manifest)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
            try:
                _link_all(folder, staged)
                staged.chmod(0o755)
                discard(target)
                os.rename(staged, target)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise

    def _show_model(self, manifest: Manifest, folder: Path) -> None:
        """Checked before the one that is there goes."""
        app, target = manifest.app, self.placed(manifest)
        card = import_into(Library(self.home), folder, _unused(app.name, target.parent))
        imported = target.parent / card.name
        try:
            write_card(imported, card.model_copy(update={"name": app.name, "licence": app.license}))
            discard(target)
            with disk_errors(target):
                os.rename(imported, target)
        except BaseException:
            discard(imported)
            raise

    def _check_free(self, manifest: Manifest) -> None:
        target = self.placed(manifest)
        if target.exists() and not self._is_ours(manifest.kind, target):
            raise StoreError(
                f"{target} is there already and came from elsewhere.",
                hint="Rename or remove it, then repeat the command.",
            )

    def _is_ours(self, kind: Kind, target: Path) -> bool:
        if kind != "model":
            return (target / RECORD).is_file()
        try:
            source = read_card(target).source
        except LLMasOSError:
            return False
        return source.startswith(f"file:{(self.root / target.name).resolve()}{os.sep}")

    def _hide(self, name: str) -> None:
        for kind, place in PLACES.items():
            target = self.home / place / name
            if target.is_dir() and self._is_ours(kind, target):
                discard(target)


def _unused(name: str, folder: Path) -> str:
    """A name for the time of an import that no model has."""
    return next(one for i in range(1000) if not (folder / (one := f"{name}.package-{i}")).exists())


def _link_all(source: Path, target: Path) -> None:
    for where, _, files in os.walk(source):
        there = target / Path(where).relative_to(source)
        there.mkdir(exist_ok=True)
        for name in files:
            try:
                os.link(Path(where, name), there / name)
            except OSError:
                shutil.copyfile(Path(where, name), there / name)


class Packages:
    """All that is installed as a package, each on its own shelf."""

    def __init__(self, home: Path | None = None) -> None:
        self.apps, self.shelf = Apps(home), Shelf(home)

    def list(self) -> Sequence[Installed]:
        return [*self.apps.list(), *self.shelf.list()]

    def of(self, name: str) -> Apps:
        """The shelf that has the name; that of applications where none has."""
        return self.shelf if self.shelf.has(name) and not self.apps.has(name) else self.apps

    def get(self, name: str) -> Installed:
        return self.of(name).get(name)

    def install(
        self,
        reference: str | Path,
        asked: Sequence[Index] = (),
        *,
        accept: Accept | bool = False,
        trust: str | None = None,
    ) -> Installed:
        """As `Apps.install`, for every kind."""
        return self.for_install(reference, asked).install(reference, asked, accept=accept, trust=trust)

    def for_install(self, reference: str | Path, asked: Sequence[Index] = ()) -> Apps:
        """The shelf that a package belongs on. Raises StoreError where the other one has the name."""
        if str(reference).endswith(".llmapp"):
            with open_package(Path(reference)) as package:
                kind, name = package.manifest.kind, package.manifest.app.name
        else:
            found = choose(asked, str(reference))
            kind, name = found.release.kind, found.app
        ours, theirs = (self.apps, self.shelf) if kind == "app" else (self.shelf, self.apps)
        if theirs.has(name):
            other = theirs.get(name).manifest
            raise StoreError(
                f"{name} is the name of another package here{f', of the kind {other.kind}' if other else ''}.",
                hint=f"`llmasos app uninstall {name}` first.",
            )
        return ours
