import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import select, text

from llmasos.errors import BusyError, InvalidInputError, StoreError
from llmasos.serve.access.tables import AuditRow
from llmasos.store.database import Database, database, utc_now


def audit_row(**fields) -> AuditRow:
    return AuditRow(**{"at": utc_now(), "actor": "a", "action": "b", "target": "c", "details": {}} | fields)


def actions(database: Database) -> list[str]:
    with database.session(read_only=True) as session:
        return list(session.scalars(select(AuditRow.action).order_by(AuditRow.id)))


def test_the_default_is_a_file_in_the_home_that_only_its_owner_reads(home: Path) -> None:
    with Database.open() as opened:
        assert Path(opened.where) == home / "llmasos.db"
    assert (home / "llmasos.db").stat().st_mode & 0o077 == 0


def test_the_settings_name_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_DATABASE", f"sqlite:///{tmp_path}/deep/er/my.db")
    with Database.open() as opened:
        assert Path(opened.where) == tmp_path / "deep" / "er" / "my.db"


@pytest.mark.parametrize("url", ["mysql://u@h/d", "llmasos.db", "::", "sqlite+nothing://x", "postgresql+other://h/d"])
def test_a_url_of_another_kind_is_refused_with_the_two_that_work(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"sqlite:.*postgresql:"):
        Database.open(url)


def test_what_is_committed_is_there_when_it_is_opened_again(database_url: str) -> None:
    with Database.open(database_url) as first, first.session() as session:
        session.add(audit_row(action="kept"))
    with Database.open(database_url) as second:
        assert actions(second) == ["kept"]


def test_an_error_undoes_the_whole_transaction(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.session() as session:
        session.add(audit_row())
        session.flush()
        1 / 0  # noqa: B018
    assert actions(database) == []


def test_moments_come_back_in_utc_and_naive_ones_are_refused(database: Database) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=8)))
    with database.session() as session:
        session.add(audit_row(at=moment))
    with database.session(read_only=True) as session:
        found = session.scalars(select(AuditRow.at)).one()
    assert found == moment and found.tzinfo is UTC
    with pytest.raises(sqlalchemy.exc.StatementError, match="no time zone"), database.session() as session:
        session.add(audit_row(at=datetime(2026, 1, 1)))


def test_a_transaction_that_only_reads_can_not_write(database: Database) -> None:
    with pytest.raises((sqlalchemy.exc.DBAPIError, StoreError)), database.session(read_only=True) as session:
        session.add(audit_row())
    with database.session() as session:  # the same connection may write again
        session.add(audit_row(action="later"))
    assert actions(database) == ["later"]


def test_sqlite_checks_foreign_keys_and_keeps_a_log_of_writes(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path}/a.db") as opened, opened.session() as session:
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.session() as session:
        session.add(audit_row())
        session.flush()
        assert actions(database) == []


async def test_async_work_leaves_the_loop_free_and_runs_at_once(database: Database) -> None:
    together = threading.Barrier(2, timeout=20)

    def read(session) -> int:
        together.wait()  # only two at the same time get past it
        return session.scalar(select(sqlalchemy.func.count()).select_from(AuditRow))

    assert await asyncio.gather(*(database.run(read, read_only=True) for _ in range(2))) == [0, 0]


async def test_many_writers_lose_nothing(database: Database) -> None:
    async def write(i: int) -> None:
        def work(session) -> None:
            count = session.scalar(select(sqlalchemy.func.count()).select_from(AuditRow))  # reads before it writes
            session.add(audit_row(action=f"{i} after {count}"))

        await database.run(work)

    await asyncio.gather(*(write(i) for i in range(40)))
    assert len(actions(database)) == 40


async def test_a_database_in_memory_serves_several_threads() -> None:
    with Database.open("sqlite://") as opened:
        await asyncio.gather(*(opened.run(lambda s: s.add(audit_row())) for _ in range(8)))
        assert len(actions(opened)) == 8


def test_processes_that_start_at_once_make_the_tables_once(database_url: str) -> None:
    script = (
        "import sys; from llmasos.store.database import Database\n"
        "sys.stdin.readline()\n"
        "with Database.open(sys.argv[1]) as d, d.session() as s:\n"
        "    from llmasos.serve.access.tables import AuditRow; from llmasos.store.database import utc_now\n"
        "    s.add(AuditRow(at=utc_now(), actor='a', action='b', target='c', details={}))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, database_url],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    with Database.open(database_url) as opened:
        assert len(actions(opened)) == 3


def test_a_database_of_a_newer_build_is_refused_and_left_alone(database_url: str) -> None:
    with Database.open(database_url) as opened, opened.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"newer LLMasOS \(step 9999.*Upgrade"):
        Database.open(database_url)


@pytest.mark.parametrize("damage", ["text", "middle"])
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.db"
    if damage == "text":
        path.write_bytes(b"this is no database\n" * 1000)
    else:
        Database.open(f"sqlite:///{path}").close()
        raw = bytearray(path.read_bytes())
        raw[4096:40960] = os.urandom(40960 - 4096)
        path.write_bytes(raw)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"is damaged.*backup.*move it aside") as caught:
        Database.open(f"sqlite:///{path}")
    assert str(path) in str(caught.value) and path.read_bytes() == before


def test_a_lock_that_is_held_too_long_is_said_to_be_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with Database.open(f"sqlite:///{tmp_path}/a.db") as opened:
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError, match="busy") as caught, opened.session() as session:
            session.add(audit_row())
        other.close()
    assert caught.value.http_status == 503 and caught.value.retry_after >= 1


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/deeper could not be made"):
        Database.open(f"sqlite:///{tmp_path}/file/deeper/a.db")


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="could not be used") as caught:
        Database.open(f"postgresql://ann:s3cret@/x?host={tmp_path}")
    assert "s3cret" not in str(caught.value) and "ann" in str(caught.value)
    assert caught.value.http_status == 503


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install llmasos\[postgres\]"):
        Database.open("postgresql://h/d")
