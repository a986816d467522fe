"""Files, uploads and batches."""

import sqlalchemy as sa
from alembic import op

from llmasos.store.database.base import BigInt, UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("bytes", BigInt, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("expires", UtcDateTime),
    )
    op.create_index("ix_files_key_id_created", "files", ["key_id", "created"])
    op.create_index("ix_files_expires", "files", ["expires"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("bytes", BigInt, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("expires", UtcDateTime, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("file_seconds", BigInt),
        sa.Column("file_id", sa.Text),
    )
    op.create_index("ix_uploads_expires", "uploads", ["expires"])
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("upload_id", sa.Text, nullable=False),
        sa.Column("bytes", BigInt, nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])
    op.create_table(
        "batches",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text),
        sa.Column("input_file_id", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("completion_window", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("labels", sa.JSON),
        sa.Column("errors", sa.JSON),
        sa.Column("output_id", sa.Text, nullable=False),
        sa.Column("error_id", sa.Text, nullable=False),
        sa.Column("has_output", sa.Boolean, nullable=False),
        sa.Column("has_errors", sa.Boolean, nullable=False),
        sa.Column("output_seconds", BigInt),
        sa.Column("total", BigInt, nullable=False),
        sa.Column("completed", BigInt, nullable=False),
        sa.Column("failed", BigInt, nullable=False),
        sa.Column("usage", sa.JSON),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("expires", UtcDateTime, nullable=False),
        sa.Column("moments", sa.JSON, nullable=False),
    )
    op.create_index("ix_batches_key_id_created", "batches", ["key_id", "created"])
    op.create_index("ix_batches_status", "batches", ["status"])
    op.create_index("ix_batches_input_file_id", "batches", ["input_file_id"])
