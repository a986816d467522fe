"""Which home files lie in, and which server works on a background response."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("files", sa.Column("place", sa.Text, nullable=False, server_default=""))
    op.add_column("responses", sa.Column("place", sa.Text, nullable=False, server_default=""))
    op.add_column("responses", sa.Column("server", sa.Text, nullable=False, server_default=""))
