"""The table of this room."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base


class PullRow(Base):
    """A pull. `place` is the home that it fills (`Storage.place`)."""

    __tablename__ = "pull_jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    place: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    name: Mapped[str]
    state: Mapped[str]
    done: Mapped[int]
    total: Mapped[int | None]
    error: Mapped[str | None]
    error_code: Mapped[str | None]
    created: Mapped[datetime]
    updated: Mapped[datetime]
