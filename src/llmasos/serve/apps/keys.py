"""Access keys of installed applications: made at the install, revoked at the uninstall.

Their texts lie in the home, `<home>/keys/apps/NAME.json`, readable by its owner only: an application is given its own
each time that it is started, by any of the home's servers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from llmasos.serve.access import registry
from llmasos.serve.access.registry import KeyNotFoundError
from llmasos.store.database import Database

_ACTOR = "server"


class AppKeys:
    def __init__(self, database: Database, home: Path) -> None:
        self._database = database
        self._folder = home / "keys" / "apps"

    def names(self) -> list[str]:
        """The applications that have one. Blocking."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def id_of(self, name: str) -> str | None:
        """Blocking."""
        found = self._read(name)
        return found[0] if found else None

    async def issue(self, name: str, allowed: Mapping[str, Any]) -> tuple[str, str]:
        """Id and text. `allowed`: fields of the key that the manifest decides; its limits are its owner's. Raises
        StoreError."""

        def work(session: Session) -> tuple[str, str]:
            if found := self._in_force(session, name, allowed):
                return found
            given = {"name": f"app/{name}", "scopes": ["app"], **allowed}
            key, text = registry.create(session, given, actor=_ACTOR)
            self._write(name, key.id, text)
            return key.id, text

        return await self._database.run(work)

    def _in_force(self, session: Session, name: str, allowed: Mapping[str, Any]) -> tuple[str, str] | None:
        if (found := self._read(name)) is None:
            return None
        try:
            key = registry.find(session, found[0])
        except KeyNotFoundError:  # the database is another one
            return None
        if key.revoked is not None or key.scopes != ("app",):
            return None
        changed = {field: value for field, value in allowed.items() if list(getattr(key, field) or []) != value}
        if changed:
            registry.update_key(session, key.id, changed, actor=_ACTOR)
        return found

    async def revoke(self, name: str, actor: str) -> None:
        def work(session: Session) -> None:
            if (found := self._read(name)) is not None:
                with contextlib.suppress(KeyNotFoundError):
                    registry.revoke(session, found[0], actor=actor)
            self._path(name).unlink(missing_ok=True)

        await self._database.run(work)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> tuple[str, str] | None:
        try:
            found = json.loads(self._path(name).read_bytes())
            return str(found["id"]), str(found["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, name: str, id: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(name)
        whole = path.with_suffix(".new")
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            json.dump({"id": id, "key": text}, file)
        os.replace(whole, path)
