"""The values of `[config]` that a user has set for an installed application: `<home>/apps/NAME/config.json`, which the
application can read and not change. For the server and the command line alike."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmasos.client.types.apps import AppConfigEntry
from llmasos.errors import FormatError, InvalidInputError
from llmasos.store.library import model_lock
from llmasos.store.packages import Apps, Installed
from llmasos.store.packages.manifest import ConfigEntry

FILE = "config.json"
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def path_of(apps: Apps, name: str) -> Path:
    return apps.root / name / FILE


def values_of(apps: Apps, app: Installed) -> dict[str, Any]:
    """Those that are set. Blocking. Raises FormatError."""
    path = path_of(apps, app.name)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise FormatError(f"{path} can't be read: {e}.", hint="Correct or delete the file.") from e
    known = _entries(app)
    return {name: value for name, value in found.items() if name in known} if isinstance(found, dict) else {}


def change(apps: Apps, app: Installed, changes: Mapping[str, Any]) -> None:
    """Set values; None takes one back. All or nothing. Blocking. Raises InvalidInputError for one that is not
    allowed."""
    for name, value in changes.items():
        entry = entry_of(app.name, _entries(app), name)
        if value is not None:
            _check(name, entry, value)
    with model_lock(apps.home, f"app.{app.name}"):
        values = {name: value for name, value in {**values_of(apps, app), **changes}.items() if value is not None}
        path = path_of(apps, app.name)
        whole = path.with_suffix(".new")
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(values, file, ensure_ascii=False)
        os.replace(whole, path)


def entry_of(app: str, known: Mapping[str, ConfigEntry], name: str) -> ConfigEntry:
    """Raises InvalidInputError for a setting that the application does not have."""
    if name not in known:
        raise InvalidInputError(
            f"{app} has no setting {name[:100]!r}.",
            hint=f"Known: {', '.join(known) or 'none'}.",
            param="config",
        )
    return known[name]


def _entries(app: Installed) -> Mapping[str, ConfigEntry]:
    return app.manifest.config if app.manifest else {}


def _check(name: str, entry: ConfigEntry, value: Any) -> None:
    try:
        if entry.type == "secret":
            if not isinstance(value, str):
                raise ValueError("a secret is text")  # and is not repeated
            value.encode()
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value!r} is no number")
        entry.check(value)
        str(value).encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{name}: the value is not Unicode text.", param="config") from None
    except ValueError as e:
        raise InvalidInputError(f"{name}: {e}.", param="config") from None


def of_text(name: str, entry: ConfigEntry, text: str, *, here: bool = True) -> Any:
    """What was typed, as the entry's type. `here`: folders and files are this machine's. Raises InvalidInputError."""
    value: Any = text
    if entry.type == "bool" and text.lower() in _YES + _NO:
        value = text.lower() in _YES
    elif entry.type == "number":
        with contextlib.suppress(ValueError):  # the check says it
            value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    elif here and entry.type in ("folder", "file"):
        path = Path(text).expanduser().absolute()
        if not (path.is_dir() if entry.type == "folder" else path.is_file()):
            raise InvalidInputError(f"{name}: there is no {entry.type} {str(path)!r}.", param="config")
        value = str(path)
    _check(name, entry, value)
    return value


def shown(apps: Apps, app: Installed) -> dict[str, AppConfigEntry]:
    """The settings with their values; of a secret only whether it is set. Blocking. Raises FormatError."""
    values = values_of(apps, app)
    return {
        name: AppConfigEntry(
            **entry.model_dump(exclude={"default"}),
            default=entry.default,
            is_set=values.get(name) is not None,
            value=None if entry.type == "secret" else values.get(name),
        )
        for name, entry in _entries(app).items()
    }
