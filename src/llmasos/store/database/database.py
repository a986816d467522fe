"""One database, opened: its engine, its sessions, its errors in our words.

SQLAlchemy is used synchronously, and everything that touches the database runs in threads: async code awaits
`database.run(work)`, where `work` takes a session, does its reading and writing in one transaction and returns plain
values. That is one way of writing queries for server, command line and tests, and one driver per database (`sqlite3`,
`psycopg`); SQLite's async drivers are threads as well.

    database = Database.open()
    with database.session() as session: ...           # one transaction; committed at the end, rolled back by an error
    found = await database.run(lambda session: ...)   # the same, from async code
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from filelock import FileLock
from filelock import Timeout as LockTimeout
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from llmasos.errors import BusyError, DiskFullError, InvalidInputError, StoreError
from llmasos.settings import settings
from llmasos.store.database import migrations

T = TypeVar("T")

NUM_THREADS = 4
"""Transactions at once from async code. SQLite writes one at a time anyway."""
BUSY_SECONDS = 30.0
"""How long a transaction waits for another process's."""
CHECKED_BYTES = 64 * 2**20
"""A SQLite file up to this size is checked as a whole when it is opened (some tens of milliseconds)."""
_ADVISORY_LOCK = 0x11_4D_A5_05
"""PostgreSQL's lock while one process brings the tables up to date: any number that others do not use."""


class DatabaseBusyError(BusyError):
    """Another process holds the database; a request may be tried again."""

    http_status = 503
    retry_after = 1


class DatabaseUnavailableError(StoreError):
    """The database's server does not answer, or refuses us."""

    http_status = 503
    retry_after = 5


class Database:
    """Sessions on one database. Safe to use from several threads; several processes may open the same one."""

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine = engine
        self.where = where
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="database")

    @classmethod
    def open(cls, url: str | None = None) -> Database:
        """Open `url`, make it if it is new, and bring its tables up to this build's.

        `sqlite:////absolute/path.db`, `sqlite://` (in memory) or `postgresql://user:password@host/name`; by default
        LLMASOS_DATABASE, else `llmasos.db` in the home folder. Raises InvalidInputError for a URL that makes no sense,
        StoreError for a database that can't be reached, is damaged, or was written by a newer build.
        """
        parsed = _parse(url or settings().database)
        where = parsed.database or "in memory" if parsed.get_backend_name() == "sqlite" else parsed.render_as_string()
        database = cls(_sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgres(parsed), where)
        try:
            database._prepare(parsed)
        except BaseException:
            database.close()
            raise
        return database

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def session(self, *, read_only: bool = False) -> Iterator[Session]:
        """One transaction. With `read_only` it waits for no writer, and writing is an error."""
        with self._errors(), Session(self._bind(read_only), expire_on_commit=False) as session, session.begin():
            yield session

    async def run(self, work: Callable[[Session], T], *, read_only: bool = False) -> T:
        """`work(session)` in a thread, in one transaction. When the awaiting task is cancelled the work still ends,
        whole."""

        def whole() -> T:
            with self.session(read_only=read_only) as session:
                return work(session)

        return await asyncio.get_running_loop().run_in_executor(self._threads, whole)

    def close(self) -> None:
        """What runs ends first. The database can't be used afterwards."""
        self._threads.shutdown()
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self, read_only: bool) -> Engine:
        if not read_only:
            return self.engine
        return self.engine.execution_options(**{"read_only": True} if self.is_sqlite else {"postgresql_readonly": True})

    def _prepare(self, url: URL) -> None:
        with self._errors(), contextlib.ExitStack() as stack:
            if self.is_sqlite and url.database:
                stack.enter_context(_file_lock(Path(url.database)))
                _prepare_file(self.engine, Path(url.database))
            connection = stack.enter_context(self.engine.begin())
            if not self.is_sqlite:
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            migrations.upgrade(connection, self.where)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the database says in our words. Mistakes of ours (wrong SQL, broken constraints) stay as they are."""
        try:
            yield
        except (DBAPIError, sqlite3.DatabaseError) as e:
            error = self._translated(e)
            if error is None:
                raise
            raise error from e

    def _translated(self, e: DBAPIError | sqlite3.DatabaseError) -> StoreError | None:
        cause = e.orig if isinstance(e, DBAPIError) else e
        if isinstance(cause, sqlite3.DatabaseError):
            return _sqlite_error(cause, self.where)
        assert isinstance(e, DBAPIError)
        if isinstance(e, OperationalError) or e.connection_invalidated:
            reason = str(cause).strip().splitlines()
            return DatabaseUnavailableError(
                f"The database {self.where} could not be used: {reason[0] if reason else type(cause).__name__}",
                hint="Is the server running, and do user, password and name in LLMASOS_DATABASE fit?",
            )
        return None


def _parse(text: str) -> URL:
    home = settings().home
    if not text:
        return URL.create("sqlite", database=str(home / "llmasos.db"))
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(text)
        if url.drivername == "sqlite":
            return url.set(database=str(Path(url.database).expanduser().absolute())) if url.database else url
        if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
            return url.set(drivername="postgresql+psycopg")
    kind = text.partition(":")[0]
    raise InvalidInputError(
        f"{kind!r} is no database that LLMasOS can use.",
        hint="Write sqlite:////path/to/file.db or postgresql://user:password@host/name.",
        param="database",
    )


def _sqlite(url: URL) -> Engine:
    in_memory = not url.database
    if not in_memory:
        assert url.database
        _make_folder(Path(url.database).parent)
    engine = sqlalchemy.create_engine(
        url,
        poolclass=sqlalchemy.QueuePool,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        # a database in memory lives in its one connection
        **({"pool_size": 1, "max_overflow": 0} if in_memory else {}),
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = NORMAL")  # with WAL: a power cut may take the last commits, never the file
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: sqlalchemy.Connection) -> None:
        # One that reads first and then writes could not get the lock any more if somebody else had written: so those
        # that may write say so at once.
        read_only = bool(connection.get_execution_options().get("read_only"))
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgres(url: URL) -> Engine:
    try:
        return sqlalchemy.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except (ModuleNotFoundError, ImportError, NoSuchModuleError) as e:
        raise StoreError(
            "PostgreSQL needs the package psycopg, which is not installed.", hint="pip install llmasos[postgres]"
        ) from e


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(
            f"{folder} could not be made for the database: {e.strerror or e}.",
            hint="Set LLMASOS_HOME to a folder that you can write to.",
        ) from e


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Of several processes that start at once, one makes the file and its tables."""
    try:
        with FileLock(f"{path}.lock", timeout=BUSY_SECONDS, thread_local=False):
            yield
    except LockTimeout as e:
        raise BusyError(
            f"Another process has been opening {path} for {BUSY_SECONDS:g} s.", hint="Try again, or end that process."
        ) from e


def _prepare_file(engine: Engine, path: Path) -> None:
    """Raises sqlite3.DatabaseError for a file that is none of SQLite's, or damaged."""
    if not path.exists():
        path.touch(mode=0o600)  # it will hold hashes of keys
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
        if path.stat().st_size <= CHECKED_BYTES:
            [found] = cursor.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")
    finally:
        connection.close()


def _sqlite_error(e: sqlite3.DatabaseError, where: str) -> StoreError | None:
    text = " ".join(str(e).split())
    if "malformed" in text or "not a database" in text:
        return StoreError(
            f"The database {where} is damaged: {text}.",
            hint="Put a backup in its place; or move it aside, together with its -wal and -shm files, to begin with an "
            "empty one (`sqlite3 FILE .recover` prints what can be saved).",
        )
    if "locked" in text:
        return DatabaseBusyError(
            f"Another process has kept the database {where} busy for {BUSY_SECONDS:g} s.", hint="Try again in a moment."
        )
    if "full" in text:
        return DiskFullError(f"There is no room for the database {where}.", hint="`llmasos ls` shows sizes.")
    if "readonly" in text or "unable to open" in text or "disk I/O" in text:
        return StoreError(f"The database {where} could not be used: {text}.", hint="May this user write there?")
    return None
