"""The tables of this room."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base


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


class ConversationRow(Base):
    __tablename__ = "conversations"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    created: Mapped[datetime]
    labels: Mapped[dict[str, Any]]


class ItemRow(Base):
    """An item of a response (`is_output`: it was the answer's) or of a conversation, in order of `position`."""

    __tablename__ = "response_items"
    __table_args__ = (Index(None, "id"),)

    owner_id: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str]
    key_id: Mapped[str | None]
    is_output: Mapped[bool]
    item: Mapped[dict[str, Any]]
