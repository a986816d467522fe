"""Conversations and what is in them, in the database.

Items are OpenAI's (Responses): messages, calls of functions, their outputs. Their texts stand once more beside them,
for searches; whoever writes items calls `add_texts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, Session, mapped_column

from llmasos.store.database import Base, BigInt, utc_now


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


class ConversationTextRow(Base):
    """The text of an item of a conversation."""

    __tablename__ = "conversation_texts"

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    conversation_id: Mapped[str] = mapped_column(index=True)
    item_id: Mapped[str]
    role: Mapped[str]
    text: Mapped[str]
    created: Mapped[datetime]


def add_texts(session: Session, conversation_id: str, items: Iterable[Mapping[str, Any]]) -> None:
    """What searches find of items that were added to a conversation."""
    now = utc_now()
    for item in items:
        if text := item_text(item):
            session.add(
                ConversationTextRow(
                    conversation_id=conversation_id, item_id=item["id"], role=item_role(item), text=text, created=now
                )
            )


def item_role(item: Mapping[str, Any]) -> str:
    return str(item.get("role", "assistant" if item["type"] == "function_call" else "tool"))


def item_text(item: Mapping[str, Any]) -> str:
    """Without NUL, which PostgreSQL does not take."""
    content: Any = ""
    if item["type"] == "message":
        content = item.get("content")
    elif item["type"] == "function_call":
        content = f"{item['name']} {item['arguments']}"
    elif item["type"] == "function_call_output":
        content = item.get("output")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text") or part.get("refusal") or "") for part in content)
    return str(content or "").replace("\0", "")
