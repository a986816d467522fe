"""State of one client, kept between its calls: `session: Session` as a parameter of a route.

    session["name"] = name          # any JSON; written when the call ends, also where the client has left a stream
    session.get("name")

Over HTTP the header `LLMasOS-Session` names a session (16 to 128 letters, digits, - and _), else a cookie does; a
client that has neither gets a new one by both. Command lines have `--session NAME`. Sessions lie in `sessions.sqlite3`
in the application's folder and expire when they have not been used for a while.

A call that fails changes nothing. Calls of one session take turns, each from its beginning to its end, a stream's
included, so none overwrites what another has written; one that does not get its turn in TURN_SECONDS is refused. Other
processes of the same folder (a command line beside a server) know nothing of these turns: of two of those, each writes
the keys that it has changed, and the later one counts.

Behind a server with keys, a name stands for another session under each key (see `clients.py`).
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from llmasos.errors import BusyError, InvalidInputError

HEADER = "llmasos-session"
LIFETIME = 30 * 24 * 3600.0
"""Seconds without use after which a session is forgotten."""
MOST = 10_000
"""Sessions that are kept; those that were not used for longest go first."""
TURN_SECONDS = 60.0
"""How long a call waits for others of its session."""
MAX_BYTES = 1024 * 1024
"""Of a session's values, as JSON."""
_ID = re.compile(r"[A-Za-z0-9_-]{16,128}")
_TABLES = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS sessions_used ON sessions (used);
CREATE TABLE IF NOT EXISTS session_values (
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (session, name)
) WITHOUT ROWID;
"""


class Session(MutableMapping[str, Any]):
    """JSON values by name. `id` names it; `clear()` forgets them all."""

    def __init__(self, id: str, values: dict[str, Any]) -> None:
        self.id, self._values = id, values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise InvalidInputError(f"A session has names that are text, not {name!r}.")
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Session({', '.join(self._values)})"


class _Turn:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_wanted = 0


class SessionStore:
    """The sessions in a folder, which is asked for when the first one is wanted."""

    def __init__(self, folder: Callable[[], Path], lifetime: float = LIFETIME, most: int = MOST) -> None:
        self.lifetime, self._most = lifetime, most
        self._folder, self._lock = folder, threading.Lock()
        self._file: Path | None = None
        self._turns: dict[tuple[int, str], _Turn] = {}

    async def turn(self, id: str | None) -> AsyncIterator[Session]:
        """`scope`, when no other call of this event loop has the session. Raises BusyError if that takes too long, and
        what `scope` raises."""
        scope = contextmanager(self.scope)(id)
        async with self._alone(id):
            session = await asyncio.to_thread(scope.__enter__)
            try:
                yield session
            except BaseException as e:
                with anyio.CancelScope(shield=True):
                    await asyncio.to_thread(scope.__exit__, type(e), e, e.__traceback__)
                raise
            with anyio.CancelScope(shield=True):
                await asyncio.to_thread(scope.__exit__, None, None, None)

    @asynccontextmanager
    async def _alone(self, name: str | None) -> AsyncIterator[None]:
        if name is None:  # a new one, which nobody else knows
            yield
            return
        key = id(asyncio.get_running_loop()), name
        found = self._turns.setdefault(key, _Turn())
        found.num_wanted += 1
        try:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await found.lock.acquire()
            except TimeoutError:
                raise BusyError(
                    f"Another call of this session has been at work for {TURN_SECONDS:g} s.",
                    hint="Wait until it is over, or use another session.",
                ) from None
            try:
                yield
            finally:
                found.lock.release()
        finally:
            found.num_wanted -= 1
            if not found.num_wanted:
                del self._turns[key]

    def scope(self, id: str | None) -> Iterator[Session]:
        """One session for one call; a new one without an id. Raises InvalidInputError for values that are no JSON or
        too large."""
        session = Session(id or new_id(), self._load(id) if id else {})
        before = _texts(session)
        try:
            yield session
        except (GeneratorExit, asyncio.CancelledError):
            self._save(session, before)  # the client has left: what was said so far counts
            raise
        self._save(session, before)

    def _connect(self) -> sqlite3.Connection:
        with self._lock:
            if self._file is None or not self._file.exists():
                file = self._folder() / "sessions.sqlite3"
                file.touch(mode=0o600)
                with closing(sqlite3.connect(file, timeout=10)) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(_TABLES)
                self._file = file
        connection = sqlite3.connect(self._file, timeout=10, isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _load(self, id: str) -> dict[str, Any]:
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT name, value FROM session_values JOIN sessions ON id = session WHERE session = ? AND used > ?",
                (id, time.time() - self.lifetime),
            ).fetchall()
        return {name: json.loads(value) for name, value in rows}

    def _save(self, session: Session, before: dict[str, str]) -> None:
        after = _texts(session)
        if (size := sum(len(name) + len(text) for name, text in after.items())) > MAX_BYTES:
            raise InvalidInputError(
                f"The session would hold {size:,} bytes; at most {MAX_BYTES:,} are kept.", hint="Keep less in it."
            )
        if not (before or after):
            return
        changed = [(session.id, name, text) for name, text in after.items() if before.get(name) != text]
        gone = [(session.id, name) for name in before if name not in after]
        now = time.time()
        with closing(self._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM sessions WHERE used <= ?", (now - self.lifetime,))
            connection.execute(
                "INSERT INTO sessions VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET used = excluded.used",
                (session.id, now),
            )
            connection.executemany("DELETE FROM session_values WHERE session = ? AND name = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO session_values VALUES (?, ?, ?)", changed)
            connection.execute(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions ORDER BY used DESC LIMIT -1 OFFSET ?)",
                (self._most,),
            )
            connection.execute("COMMIT")


def _texts(session: Session) -> dict[str, str]:
    found = {}
    for name, value in session.items():
        try:
            found[name] = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise InvalidInputError(f"session[{name!r}] can't be kept as JSON: {e}.") from e
    return found


def new_id() -> str:
    return secrets.token_urlsafe(24)


def cookie_of(app: str) -> str:
    return f"llmasos-session-{app}"


def find_id(request: Request, app: str) -> tuple[str, bool]:
    """The session that a request names, or a new one's id, and whether it is new. Raises InvalidInputError for a name
    that could be guessed."""
    named = request.headers.get(HEADER)
    if named is not None and not _ID.fullmatch(named):
        raise InvalidInputError(
            f"{named[:50]!r} can't name a session.", hint="16 to 128 letters, digits, - and _: chosen at random."
        )
    found = named or request.cookies.get(cookie_of(app), "")
    return (found, False) if _ID.fullmatch(found) else (new_id(), True)


def local_id(name: str) -> str:
    """The session that a command line names; requests can't name these."""
    if not 0 < len(name) <= 128:
        raise InvalidInputError(f"The session's name {name[:50]!r} is empty or too long.", param="session")
    return f"local:{name}"


def tell(response: Response, request: Request, app: str, id: str) -> Response:
    """Tell a client the id of its new session."""
    headers = [(HEADER, id), ("set-cookie", _cookie(request, app, id))]
    response.raw_headers.extend((name.encode(), value.encode("latin-1")) for name, value in headers)
    return response


def _cookie(request: Request, app: str, id: str) -> str:
    path = request.scope.get("root_path") or "/"
    path = path if re.fullmatch(r"[\w/.~-]+", path, re.ASCII) else "/"
    secure = "; Secure" if request.url.scheme == "https" else ""
    return f"{cookie_of(app)}={id}; Path={path}; Max-Age={int(LIFETIME)}; HttpOnly; SameSite=Lax{secure}"
