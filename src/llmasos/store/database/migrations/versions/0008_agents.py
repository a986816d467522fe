"""Runs of agents; the texts of conversations, for searches."""

import json

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "agent_runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("input", sa.Text, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("updated", UtcDateTime, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_index("ix_agent_runs_key_id", "agent_runs", ["key_id"])
    op.create_index("ix_agent_runs_created", "agent_runs", ["created"])
    texts = op.create_table(
        "conversation_texts",
        sa.Column("id", BigInt, primary_key=True),
        sa.Column("conversation_id", sa.Text, nullable=False),
        sa.Column("item_id", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
    )
    op.create_index("ix_conversation_texts_conversation_id", "conversation_texts", ["conversation_id"])
    _fill(texts)


def _fill(texts: sa.Table) -> None:
    """The texts of messages that are there already."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text(
            "SELECT i.owner_id, i.id, i.item, c.created FROM response_items i "
            "JOIN conversations c ON c.id = i.owner_id ORDER BY i.owner_id, i.position"
        ).columns(created=UtcDateTime)
    ).all()
    for owner, id, given, created in rows:
        item = json.loads(given) if isinstance(given, str) else given
        parts = item.get("content") if item.get("type") == "message" else None
        words = "\n".join(str(part.get("text") or "") for part in parts or () if isinstance(part, dict))
        if words:
            row = {"conversation_id": owner, "item_id": id, "role": item["role"], "text": words.replace("\0", "")}
            connection.execute(texts.insert(), row | {"created": created})
