"""`llmasos app config NAME [KEY=VALUE ...]`: the values that an installed application asks its user for."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, table
from llmasos.cli.running import Where, clean
from llmasos.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from llmasos.client.types.apps import AppConfigEntry
    from llmasos.store.packages.manifest import ConfigEntry

_USAGE = "llmasos app config NAME [KEY=VALUE ...]"


def config(words: Sequence[str], where: Where, as_json: bool) -> None:
    """Of this machine's home, with --url of a server's. A word without `=` is a secret that is asked for; a value that
    is left out takes the setting back; `-` and `@file` stand for what is in standard input and in a file."""
    if not words:
        raise InvalidInputError(t("usage.missing", option="NAME"), hint=_USAGE, param="file")
    found = (_here if where.url is None else _on_server)(words[0], words[1:], where)
    if as_json:
        emit({key: entry.model_dump(mode="json") for key, entry in found.items()})
    elif not found:
        say(t("config.none", name=words[0]))
    else:
        heads = [t(f"head.{head}") for head in ("name", "value", "type", "default", "remark")]
        print(table(heads, [_row(key, entry) for key, entry in found.items()]))


def _here(name: str, typed: Sequence[str], where: Where) -> Mapping[str, AppConfigEntry]:
    from llmasos.serve.apps import values
    from llmasos.store.packages import Apps

    if where.api_key is not None:
        raise InvalidInputError(t("key.stray", option="--api-key", command="llmasos app config"), hint="--url URL")
    apps = Apps()
    app = apps.get(name)
    if changes := _changes(name, typed, app.manifest.config if app.manifest else {}):
        values.change(apps, app, changes)
        _tell(name, changes)
    return values.shown(apps, app)


def _on_server(name: str, typed: Sequence[str], where: Where) -> Mapping[str, AppConfigEntry]:
    from llmasos.cli.server import server
    from llmasos.store.packages.manifest import ConfigEntry

    with server(where.url, where.api_key) as native:
        app = native.app(name)
        known = {
            key: ConfigEntry.model_validate(entry.model_dump(include=set(ConfigEntry.model_fields)))
            for key, entry in app.config.items()
        }
        if changes := _changes(name, typed, known, here=False):
            app = native.configure_app(name, **changes)
            _tell(name, changes)
    return app.config


def _changes(name: str, typed: Sequence[str], known: Mapping[str, ConfigEntry], *, here: bool = True) -> dict[str, Any]:
    from llmasos.serve.apps import values

    changes: dict[str, Any] = {}
    for key, text in _pairs(typed):
        entry = values.entry_of(name, known, key)
        changes[key] = None if text == "" else values.of_text(key, entry, _read(key, text, entry.type), here=here)
    return changes


def _tell(name: str, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        say(t("config.unset" if value is None else "config.set", setting=key, name=name))


def _pairs(typed: Sequence[str]) -> list[tuple[str, str | None]]:
    """A text of None: nothing but the name was typed."""
    found: dict[str, str | None] = {}
    for word in typed:
        key, equals, text = word.partition("=")
        if key in found:
            raise InvalidInputError(t("usage.repeated", option=key), hint=_USAGE, param="config")
        found[key] = text if equals else None
    return list(found.items())


def _read(key: str, text: str | None, kind: str) -> str:
    if text is None:
        if kind != "secret":
            raise InvalidInputError(t("config.no_value", setting=key), hint=f"{key}=…", param="config")
        return getpass.getpass(f"{key}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if text == "-":
        return sys.stdin.read().rstrip("\r\n")
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        try:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as e:
            raise NotFoundError(t("config.no_file", file=str(path), why=str(e)), hint=f"{key}=…") from e
    return text


def _row(key: str, entry: AppConfigEntry) -> tuple[str, ...]:
    hidden = t("config.is_set") if entry.is_set else "-"
    value = hidden if entry.type == "secret" else _text(entry.value)
    kind = "|".join(entry.choices) if entry.choices else entry.type
    limits = [f"{sign} {limit:g}" for sign, limit in (("≥", entry.minimum), ("≤", entry.maximum)) if limit is not None]
    missing = entry.required and not entry.is_set and entry.default is None
    remark = ". ".join(filter(None, (t("config.required") if missing else "", entry.label, entry.description)))
    return tuple(map(clean, (key, value, " ".join([kind, *limits]), _text(entry.default), remark)))


def _text(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
