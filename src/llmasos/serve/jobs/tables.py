"""The table of this room."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base


class JobRow(Base):
    """A job. `place` is the home that it works for (`Storage.place`), `server` the one that runs it. `spec` is what was
    asked, `details` what the kind tells of its progress."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    place: Mapped[str] = mapped_column(index=True)
    server: Mapped[str]
    key_id: Mapped[str | None]
    kind: Mapped[str]
    name: Mapped[str]
    state: Mapped[str]
    progress: Mapped[float | None]
    message: Mapped[str]
    spec: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]]
    result: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[datetime]
    updated: Mapped[datetime]
