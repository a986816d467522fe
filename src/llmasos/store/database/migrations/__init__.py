"""The database's history: one file per step in `versions/`, in one line.

To add a table or change one:

1. Write the class on `Base` in your own module.
2. Add `versions/NNNN_what.py` with the next number: `revision = "NNNN"`, `down_revision` the number before,
   `upgrade()` that makes the change by alembic's `op`. A step stands for itself: it imports nothing of the rest of the
   package, whose classes go on changing. Use the types of `base` (`BigInt`, `UtcDateTime`), and
   `op.batch_alter_table` to alter a table (SQLite can't otherwise). There is no way back down: a backup is.

tests/store/test_database_migrations.py compares what the steps make with what all classes say, on SQLite and
PostgreSQL. A step that was released is never edited; the next one corrects it.
"""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from llmasos.errors import StoreError


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(Path(__file__).parent)


def head() -> str:
    """The newest step that this build knows."""
    found = _scripts().get_current_head()
    assert found is not None
    return found


def upgrade(connection: Connection, where: str) -> None:
    """Bring the database to this build's newest step, inside the connection's transaction.

    Raises StoreError for a database that a newer build has changed. `where` names it in the message.
    """
    scripts = _scripts()
    current = MigrationContext.configure(connection).get_current_revision()
    newest = scripts.get_current_head()
    if current == newest:
        return
    if current is not None and current not in {step.revision for step in scripts.walk_revisions()}:
        raise StoreError(
            f"The database {where} was written by a newer LLMasOS (step {current}; this one knows up to {newest}).",
            hint="Upgrade LLMasOS, or name another database: LLMASOS_DATABASE=sqlite:////path/to/other.db",
        )
    with EnvironmentContext(
        Config(), scripts, fn=lambda revision, _: scripts._upgrade_revs("head", revision)
    ) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()
