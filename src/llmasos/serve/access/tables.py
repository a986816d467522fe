"""The tables of this room."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base


class KeyRow(Base):
    """A key. `id` is the public part of its text; of the secret part only a hash is kept (`keys`).

    Rows are never deleted: usage and audit log go on naming them. None means: no limit, no end, every model.
    `version` is the clock's value at the row's last change, so that servers read only what changed.
    """

    __tablename__ = "access_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret_hash: Mapped[str]
    scopes: Mapped[list[str]]
    models: Mapped[list[str] | None]
    apps: Mapped[list[str] | None]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    requests_per_day: Mapped[int | None]
    tokens_per_day: Mapped[int | None]
    tokens_per_month: Mapped[int | None]
    max_parallel: Mapped[int | None]
    priority: Mapped[int]
    share_cache: Mapped[bool]
    created: Mapped[datetime]
    expires: Mapped[datetime | None]
    revoked: Mapped[datetime | None]
    last_used: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(index=True)


class ClockRow(Base):
    """One row. Who changes keys raises it first, and so holds its lock until the change is committed: versions become
    visible in order."""

    __tablename__ = "access_clock"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]


class UsageRow(Base):
    """What one key did with one model on one day (UTC). `key_id` is empty for requests without a key."""

    __tablename__ = "access_usage"
    __table_args__ = (Index(None, "key_id", "day"),)

    day: Mapped[date] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int]
    errors: Mapped[int]
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    output_tokens: Mapped[int]


class AuditRow(Base):
    """Who did what to keys, models and settings. `actor` is `key:ID`, `local:USER` (the command line) or `anyone`."""

    __tablename__ = "access_audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str]
    action: Mapped[str]
    target: Mapped[str]
    details: Mapped[dict[str, Any]]
    request_id: Mapped[str | None]
