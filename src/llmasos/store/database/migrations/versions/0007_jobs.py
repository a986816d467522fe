"""Jobs of all kinds in one table; pulls move into it."""

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    jobs = op.create_table(
        "jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("server", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("progress", sa.Double),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("updated", UtcDateTime, nullable=False),
    )
    op.create_index("ix_jobs_place", "jobs", ["place"])
    pulls = sa.table(
        "pull_jobs",
        *(sa.column(name, sa.Text) for name in ("id", "place", "model", "name", "state", "error", "error_code")),
        *(sa.column(name, BigInt) for name in ("done", "total")),
        *(sa.column(name, UtcDateTime) for name in ("created", "updated")),
    )
    connection = op.get_bind()
    moved = [
        {
            "id": row.id,
            "place": row.place,
            "server": "",
            "key_id": None,
            "kind": "pull",
            "name": row.name,
            "state": "queued" if row.state == "waiting" else row.state,
            "progress": row.done / row.total if row.total else None,
            "message": "",
            "spec": {"model": row.model, "name": row.name},
            "details": {"done": row.done, "total": row.total},
            "result": None,
            "error": {"code": row.error_code, "message": row.error} if row.error else None,
            "created": row.created,
            "updated": row.updated,
        }
        for row in connection.execute(sa.select(pulls))
    ]
    if moved:
        connection.execute(sa.insert(jobs), moved)
    op.drop_table("pull_jobs")
