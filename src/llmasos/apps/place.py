"""Where an application lives: its name, its folder of data and the values that its user has set.

Who runs it says so (`settings.app_host`). Where nobody does, as in `python app.py`, the manifest beside its file counts
(`llmasos.toml`), and its data lie in the home folder: of an installed one in `apps/NAME/data`, else in
`apps-data/NAME`. Values of `[config]` come from a file of JSON: of an installed one `apps/NAME/config.json`, else
`config.json` in the folder of data, unless the host names another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.errors import FormatError, InvalidInputError
from llmasos.settings import app_host, settings

if TYPE_CHECKING:
    from llmasos.store.packages.manifest import ConfigEntry, Manifest

_ABOVE = 3
"""Folders that are looked at for the manifest: an entry may lie in a package of its own."""


class Config(Mapping[str, Any]):
    """The values by their names: `app.config.style` or `app.config["style"]`. Secrets are not shown."""

    def __init__(self, values: Mapping[str, Any], secrets: frozenset[str] = frozenset()) -> None:
        self._values, self._secrets = dict(values), secrets

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            known = ", ".join(values) or "none"
            raise AttributeError(f"There is no setting {name!r}. Known: {known}. [config] of llmasos.toml has them.")
        return values[name]

    def __repr__(self) -> str:
        shown = {name: "..." if name in self._secrets else value for name, value in self._values.items()}
        return f"Config({shown})"


class Place:
    """Of an application that is defined in `file`, if it is known, under `title`, if it has one."""

    def __init__(self, file: str | None, title: str | None) -> None:
        self._file, self._title = Path(file).absolute() if file else None, title

    @cached_property
    def manifest(self) -> Manifest | None:
        """The one beside the application's file or just above. Raises FormatError if it is damaged."""
        folders = self._file.parents[:_ABOVE] if self._file is not None else ()
        folder = next((one for one in folders if (one / "llmasos.toml").is_file()), None)
        if folder is None:
            return None
        from llmasos.store.packages.manifest import read_manifest

        return read_manifest(folder)

    @property
    def name(self) -> str:
        """What it is called in addresses and folders: lower-case letters, digits, hyphens."""
        if given := app_host().name:
            return given
        if self.manifest is not None:
            return self.manifest.name
        words = (self._title or "", self._file.stem if self._file else "", "app")
        return next(name for name in map(_slug, words) if name)

    @property
    def data(self) -> Path:
        """Its own folder, which is there."""
        folder = Path(given) if (given := app_host().data) else self._own_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    @property
    def config(self) -> Config:
        """Raises InvalidInputError for a value that is missing or not allowed, FormatError for a file that can't be
        read."""
        file = Path(app_host().config or self._config_file())
        values = _read(file)
        if self.manifest is None:
            return Config(values)
        entries = self.manifest.config
        if unknown := sorted(set(values) - set(entries)):
            known = ", ".join(entries) or "none"
            raise InvalidInputError(
                f"{file} has {unknown[0]!r}, which {self.name} does not ask for.", hint=f"Known: {known}."
            )
        found = {name: _value(name, entry, values.get(name), file) for name, entry in entries.items()}
        return Config(found, frozenset(name for name, entry in entries.items() if entry.type == "secret"))

    def _own_folder(self) -> Path:
        installed = self._installed()
        return installed / "data" if installed else settings().home / "apps-data" / self.name

    def _config_file(self) -> Path:
        """Of an installed one beside its folder, where it can't write on a server."""
        return (self._installed() or self._own_folder()) / "config.json"

    def _installed(self) -> Path | None:
        apps = settings().home / "apps"
        if self._file is None or apps not in self._file.parents[2:]:
            return None
        return apps / self._file.relative_to(apps).parts[0]


def _slug(words: str) -> str:
    found = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60].strip("-")
    return found if not found or found[0].isalpha() else f"app-{found}"


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise FormatError(f"The settings in {file} can't be read: {e}.", hint="Correct or delete the file.") from e
    if not isinstance(values, dict):
        raise FormatError(f"{file} holds no JSON object.", hint='Such as {"style": "short"}.')
    return values


def _value(name: str, entry: ConfigEntry, value: Any, file: Path) -> Any:
    value = entry.default if value is None else value
    if value is None:
        if entry.required:
            raise InvalidInputError(f"The setting {name!r} has no value.", hint=f"Write it to {file}.", param=name)
        return None
    try:
        checked = entry.check(value) if entry.type != "secret" else value
    except ValueError as e:
        raise InvalidInputError(f"The setting {name!r} in {file}: {e}.", param=name) from None
    if entry.type == "secret" and not isinstance(checked, str):
        raise InvalidInputError(f"The setting {name!r} in {file} is no text.", param=name)
    return Path(checked).expanduser() if entry.type in ("folder", "file") else checked
