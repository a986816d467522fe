"""Keys, their usage, and the audit log."""

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "access_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("secret_hash", sa.Text, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("models", sa.JSON),
        sa.Column("apps", sa.JSON),
        sa.Column("requests_per_minute", BigInt),
        sa.Column("tokens_per_minute", BigInt),
        sa.Column("requests_per_day", BigInt),
        sa.Column("tokens_per_day", BigInt),
        sa.Column("tokens_per_month", BigInt),
        sa.Column("max_parallel", BigInt),
        sa.Column("priority", BigInt, nullable=False),
        sa.Column("share_cache", sa.Boolean, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("expires", UtcDateTime),
        sa.Column("revoked", UtcDateTime),
        sa.Column("last_used", UtcDateTime),
        sa.Column("version", BigInt, nullable=False),
    )
    op.create_index("ix_access_keys_version", "access_keys", ["version"])
    clock = op.create_table(
        "access_clock",
        sa.Column("id", BigInt, primary_key=True),
        sa.Column("version", BigInt, nullable=False),
    )
    op.bulk_insert(clock, [{"id": 1, "version": 0}])
    op.create_table(
        "access_usage",
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("requests", BigInt, nullable=False),
        sa.Column("errors", BigInt, nullable=False),
        sa.Column("prompt_tokens", BigInt, nullable=False),
        sa.Column("cached_tokens", BigInt, nullable=False),
        sa.Column("output_tokens", BigInt, nullable=False),
    )
    op.create_index("ix_access_usage_key_id_day", "access_usage", ["key_id", "day"])
    op.create_table(
        "access_audit",
        sa.Column("id", BigInt, primary_key=True, autoincrement=True),
        sa.Column("at", UtcDateTime, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("request_id", sa.Text),
    )
    op.create_index("ix_access_audit_at", "access_audit", ["at"])
