"""Pulls as jobs."""

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "pull_jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("done", BigInt, nullable=False),
        sa.Column("total", BigInt),
        sa.Column("error", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("updated", UtcDateTime, nullable=False),
    )
    op.create_index("ix_pull_jobs_place", "pull_jobs", ["place"])
