"""Keys in the database: made, read, changed, revoked. Each change stands in the audit log of the same transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.serve.access import audit
from llmasos.serve.access.keys import Key, Limits, hash_of, new_text, text_of
from llmasos.serve.access.tables import ClockRow, KeyRow
from llmasos.store.database import utc_now

LIMITS = tuple(limit.name for limit in fields(Limits))
CHANGEABLE = ("name", "scopes", "models", "apps", "priority", "share_cache", "expires", *LIMITS)


class KeyNotFoundError(NotFoundError):
    pass


def create(session: Session, given: Mapping[str, Any], *, actor: str, request_id: str | None = None) -> tuple[Key, str]:
    """A new key and its text, which nothing can tell again. `given`: of CHANGEABLE, at least name and scopes."""
    id, secret = new_text()
    values = {"models": None, "apps": None, "priority": 0, "share_cache": False, "expires": None}
    values |= dict.fromkeys(LIMITS) | dict(given)
    row = KeyRow(
        id=id,
        secret_hash=hash_of(secret),
        created=utc_now(),
        revoked=None,
        last_used=None,
        version=_tick(session),
        **values,
    )
    session.add(row)
    audit.note(session, actor, "key.create", id, _shown(given), request_id=request_id)
    session.flush()
    return key_of(row), text_of(id, secret)


def update_key(
    session: Session, id: str, given: Mapping[str, Any], *, actor: str, request_id: str | None = None
) -> Key:
    """Raises KeyNotFoundError, InvalidInputError for a revoked one."""
    row = _row(session, id)
    if row.revoked is not None:
        raise InvalidInputError(f"The key {row.id} was revoked; it stays so.", hint="Make a new one.")
    assert set(given) <= set(CHANGEABLE)
    row.version = _tick(session)
    for name, value in given.items():
        setattr(row, name, value)
    audit.note(session, actor, "key.update", row.id, _shown(given), request_id=request_id)
    session.flush()
    return key_of(row)


def revoke(session: Session, id: str, *, actor: str, request_id: str | None = None) -> Key:
    """For good. Revoking twice changes nothing."""
    row = _row(session, id)
    if row.revoked is None:
        row.version = _tick(session)
        row.revoked = utc_now()
        audit.note(session, actor, "key.revoke", row.id, {"name": row.name}, request_id=request_id)
        session.flush()
    return key_of(row)


def find(session: Session, id: str) -> Key:
    """By id, or by a name that only one key in force has. Raises KeyNotFoundError."""
    return key_of(_row(session, id))


def keys(session: Session) -> list[Key]:
    """All of them, the oldest first."""
    return [key_of(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]


def changed_since(session: Session, version: int) -> tuple[int, list[Key]]:
    """The keys that changed after `version`, and the version that this brings the reader to."""
    rows = list(session.scalars(select(KeyRow).where(KeyRow.version > version)))
    return max((row.version for row in rows), default=version), [key_of(row) for row in rows]


def num_usable(session: Session) -> int:
    """Keys that open something now."""
    in_force = or_(KeyRow.expires.is_(None), KeyRow.expires > utc_now())
    rows = session.scalars(select(KeyRow.scopes).where(KeyRow.revoked.is_(None), in_force))
    return sum(scopes != ["app"] for scopes in rows)


def note_used(session: Session, used: Mapping[str, datetime]) -> None:
    """`used`: last moments by key id. No change in the sense of `version`."""
    for id, moment in sorted(used.items()):
        session.execute(update(KeyRow).where(KeyRow.id == id).values(last_used=moment))


def _tick(session: Session) -> int:
    query = update(ClockRow).where(ClockRow.id == 1).values(version=ClockRow.version + 1).returning(ClockRow.version)
    return session.execute(query).scalar_one()


def _row(session: Session, id: str) -> KeyRow:
    if not id.isprintable():  # no key's id or name, and not all of it could be asked for
        raise KeyNotFoundError("There is no such key.")
    if (row := session.get(KeyRow, id)) is not None:
        return row
    named = list(session.scalars(select(KeyRow).where(KeyRow.name == id, KeyRow.revoked.is_(None))))
    if len(named) == 1:
        return named[0]
    if named:
        ids = ", ".join(row.id for row in named)
        raise KeyNotFoundError(f"Several keys are named {id!r}: {ids}.", hint="Name one by its id.")
    raise KeyNotFoundError(f"There is no key {id!r}.", hint="`llmasos key ls` shows all of them.")


def key_of(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        secret_hash=row.secret_hash,
        scopes=tuple(row.scopes),  # type: ignore[arg-type]  # only scopes are written
        created=row.created,
        models=None if row.models is None else tuple(row.models),
        apps=None if row.apps is None else tuple(row.apps),
        limits=Limits(**{name: getattr(row, name) for name in LIMITS}),
        priority=row.priority,
        share_cache=row.share_cache,
        expires=row.expires,
        revoked=row.revoked,
        last_used=row.last_used,
    )


def facts(key: Key) -> dict[str, Any]:
    """A key as its wire type has it: flat, without the hash."""
    found = asdict(key)
    del found["secret_hash"]
    limits = found.pop("limits")
    return {**found, **limits, "state": key.state(utc_now())}


def _shown(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}
