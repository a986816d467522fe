"""The tables of this room, and those of conversations."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.apps.memory.tables import ConversationRow, ItemRow
from llmasos.store.database import Base

__all__ = ["ConversationRow", "ItemRow", "ResponseRow"]


class ResponseRow(Base):
    """A response. `body` is all of it but the output, which is among the items; `request` is there as long as a
    background response is not finished, `events` when one that was streamed is. `place` and `server` say who works on
    one in the background (`Storage`); they are empty for others."""

    __tablename__ = "responses"
    __table_args__ = (Index(None, "status", "background"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    created: Mapped[datetime] = mapped_column(index=True)
    status: Mapped[str]
    background: Mapped[bool]
    previous_id: Mapped[str | None]
    body: Mapped[dict[str, Any]]
    request: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    events: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    place: Mapped[str]
    server: Mapped[str]
