"""What the migrations make is what the tables' classes say, on both kinds of database."""

import importlib
import re
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from llmasos.store.database import Base, Database
from llmasos.store.database.migrations import head

VERSIONS = Path(importlib.import_module("llmasos.store.database").__file__).parent / "migrations" / "versions"


def modules_with_tables() -> list[str]:
    source = VERSIONS.parents[3]
    return [
        ".".join(("llmasos", *path.relative_to(source).with_suffix("").parts))
        for path in source.rglob("*.py")
        if re.search(r"^class \w+\(Base\):", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_migrations_make_the_tables_that_the_classes_describe(database: Database) -> None:
    for module in modules_with_tables():
        importlib.import_module(module)
    assert "access_keys" in Base.metadata.tables
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_the_history_is_one_line_of_numbers() -> None:
    steps = sorted(VERSIONS.glob("[0-9]*.py"))
    found = []
    for path in steps:
        text = path.read_text(encoding="utf-8")
        revision = re.search(r'^revision = "(\d+)"$', text, re.MULTILINE)[1]
        assert path.name.startswith(f"{revision}_")
        found.append((revision, re.search(r"^down_revision = (.+)$", text, re.MULTILINE)[1].strip('"')))
    numbers = [f"{i:04}" for i in range(1, len(steps) + 1)]
    assert found == list(zip(numbers, ["None", *numbers], strict=False))
    assert head() == numbers[-1]


def test_a_step_of_the_history_stands_for_itself() -> None:
    for path in VERSIONS.glob("[0-9]*.py"):
        imports = re.findall(r"from (llmasos\S*) import", path.read_text(encoding="utf-8"))
        assert set(imports) <= {"llmasos.store.database.base"}, path
