"""Fixtures: an empty database of either kind. PostgreSQL is started for the session, on a socket in its own folder."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmasos.store.database import Database

_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "16MB"}


def _binaries() -> Path | None:
    """The folder of Debian's newest PostgreSQL, else of the one on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _user() -> str | None:
    """PostgreSQL refuses to run as root; None: whoever we are."""
    if os.geteuid() != 0:
        return None
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a running server, without the database's name."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="pip install llmasos[postgres]")
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="llmasos-pg-"))  # not below pytest's, which others may not enter
    try:
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        run = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
        # C.UTF-8: nothing of the locale of whoever runs the tests
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        subprocess.run([binaries / "initdb", "-D", data, *arguments], **run)
        settings = {**_FAST, "listen_addresses": "", "unix_socket_directories": folder}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, *options],
            user=user,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = [binaries / "pg_isready", "-h", folder, "-t", "30"]
            for _ in range(300):
                if subprocess.run(ready, stdout=subprocess.DEVNULL).returncode == 0:
                    break
                assert server.poll() is None, "PostgreSQL ended while it started"
                try:
                    server.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            yield f"postgresql://postgres@/%s?host={folder}"
        finally:
            server.send_signal(2)  # "fast": does not wait for open connections
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """URL of an empty database."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect((postgres % "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]  # a name of ours
        yield postgres % name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with Database.open(database_url) as opened:
        yield opened
