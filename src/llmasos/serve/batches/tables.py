"""The table of this room."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base

ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")


class BatchRow(Base):
    """A batch. Its results stand, one a line, in `<home>/files/<output_id>` and `<error_id>` from the moment that they
    are there; those become files when the batch is over. `moments`: when it became what, in seconds since 1970."""

    __tablename__ = "batches"
    __table_args__ = (Index(None, "key_id", "created"), Index(None, "status"))

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    input_file_id: Mapped[str] = mapped_column(index=True)
    endpoint: Mapped[str]
    completion_window: Mapped[str]
    status: Mapped[str]
    model: Mapped[str | None]
    labels: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    errors: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    output_id: Mapped[str]
    error_id: Mapped[str]
    has_output: Mapped[bool]
    has_errors: Mapped[bool]
    output_seconds: Mapped[int | None]
    total: Mapped[int]
    completed: Mapped[int]
    failed: Mapped[int]
    usage: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[datetime]
    expires: Mapped[datetime]
    moments: Mapped[dict[str, Any]]
