"""Responses, conversations and their items."""

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("background", sa.Boolean, nullable=False),
        sa.Column("previous_id", sa.Text),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("request", sa.JSON),
        sa.Column("events", sa.JSON),
    )
    op.create_index("ix_responses_created", "responses", ["created"])
    op.create_index("ix_responses_status_background", "responses", ["status", "background"])
    op.create_table(
        "conversations",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
    )
    op.create_table(
        "response_items",
        sa.Column("owner_id", sa.Text, primary_key=True),
        sa.Column("position", BigInt, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("is_output", sa.Boolean, nullable=False),
        sa.Column("item", sa.JSON, nullable=False),
    )
    op.create_index("ix_response_items_id", "response_items", ["id"])
