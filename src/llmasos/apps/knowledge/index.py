"""The SQLite file of a knowledge base: files, chunks, vectors, full text; and the two searches in it.

Vectors are float32 blobs in a plain table, so every Python reads every base. Search among them is exact: by sqlite-vec
where this Python can load it, else by numpy on a copy in memory; both give the nearest by cosine, equals by age.
Full text is FTS5 (bm25). Characters of Chinese and Japanese are words of their own in it, and asked for in pairs.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from llmasos.apps.knowledge.encoder import Vectors
from llmasos.errors import BusyError, DiskFullError, FormatError, StoreError

FORMAT = 1
BUSY_SECONDS = 30.0
SPARE = 16
"""Neighbours beyond those that are wanted, as far as rounding may exchange any."""
Engine = Literal["sqlite-vec", "numpy"]

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE roots (path TEXT PRIMARY KEY);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, title TEXT NOT NULL, sha256 TEXT NOT NULL,
    size INTEGER NOT NULL, added TEXT NOT NULL
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files(id), position INTEGER NOT NULL,
    "start" INTEGER NOT NULL, "end" INTEGER NOT NULL, page INTEGER, headings TEXT NOT NULL, context TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX chunks_by_file ON chunks(file);
CREATE TABLE vectors (id INTEGER PRIMARY KEY REFERENCES chunks(id), vector BLOB NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(context, text, tokenize = "porter unicode61");
"""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_ALONE = re.compile(f"([{_CJK}])")
_TERM = re.compile(f"[{_CJK}]+|[^\\W{_CJK}]+")
_COMMON = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "do",
        "does",
        "for",
        "from",
        "has",
        "have",
        "how",
        "i",
        "if",
        "in",
        "is",
        "it",
        "its",
        "me",
        "my",
        "not",
        "of",
        "on",
        "or",
        "that",
        "the",
        "their",
        "there",
        "this",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "you",
        "your",
    }
)


@cache
def sqlite_vec_path() -> str | None:
    """The extension's file; None where the package is not installed or this Python loads no extensions."""
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        return None
    try:
        import sqlite_vec
    except ImportError:
        return None
    return str(sqlite_vec.loadable_path())


class Index:
    """One base's file. A connection is opened for every block of work: any thread and process may read while one
    writes, and sees the whole of a file's change or nothing of it. `engine`: default the best there is."""

    def __init__(self, path: Path, engine: Engine | None = None) -> None:
        self.path = path
        self._extension = sqlite_vec_path() if engine != "numpy" else None
        if engine == "sqlite-vec" and self._extension is None:
            raise StoreError("This Python can't load sqlite-vec.", hint="pip install llmasos[knowledge]")
        self.engine: Engine = "numpy" if self._extension is None else "sqlite-vec"
        self._copy: tuple[str, list[int], Vectors] | None = None

    def create(self) -> None:
        """Make the file if it is not there."""
        with self._translated():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connected() as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone():
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute("INSERT INTO facts VALUES ('format', ?), ('change', hex(randomblob(8)))", (str(FORMAT),))
                db.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the base for the whole block."""
        with self._translated(), self._connected() as db:
            db.execute("BEGIN")
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All of the block or, if it raises or the process dies, nothing of it."""
        with self._translated(), self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("UPDATE facts SET value = hex(randomblob(8)) WHERE name = 'change'")
            db.execute("COMMIT")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA mmap_size = 1073741824")  # vectors are read where they lie
            if self._extension is not None:
                db.enable_load_extension(True)
                db.load_extension(self._extension)
                db.enable_load_extension(False)
            yield db
        finally:
            db.close()  # which undoes what is not committed

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            if "locked" in str(e):
                raise BusyError(
                    f"Another process has been writing to {self.path} for {BUSY_SECONDS:g} s.", hint="Try again."
                ) from e
            if "full" in str(e):
                raise DiskFullError(f"The disk is full: {self.path} could not be written.") from e
            raise StoreError(f"{self.path}: {e}.", hint="Check the folder's permissions.") from e
        except sqlite3.DatabaseError as e:
            raise FormatError(
                f"{self.path} is no knowledge base: {e}.", hint="Delete it and add the files again."
            ) from e

    # searches: ids of chunks, the best first, each with its score

    def nearest(self, db: sqlite3.Connection, query: Vectors, k: int) -> list[tuple[int, float]]:
        """By cosine similarity to `query` [1, D], in double precision among those that come near the first k: what the
        engines round differently changes no order."""
        few = self._near(db, query, k + SPARE)
        exact = query[0].astype(np.float64)
        scores = {}
        for id in few:
            blob = db.execute("SELECT vector FROM vectors WHERE id = ?", (id,)).fetchone()[0]
            scores[id] = float((np.frombuffer(blob, dtype=np.float32) * exact).sum())
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]

    def _near(self, db: sqlite3.Connection, query: Vectors, k: int) -> list[int]:
        if self.engine == "sqlite-vec":
            sql = (
                "SELECT id, COALESCE(vec_distance_cosine(vector, ?), 1.0) AS far FROM vectors ORDER BY far, id LIMIT ?"
            )
            return [row["id"] for row in db.execute(sql, (query.tobytes(), k))]
        ids, matrix = self._in_memory(db)
        if len(ids) <= k:
            return ids
        scores = matrix @ query[0]
        least = np.partition(scores, len(ids) - k)[len(ids) - k]
        found = np.flatnonzero(scores >= least)  # with all that are equal to the last one
        return [ids[i] for i in sorted(found.tolist(), key=lambda i: (-scores[i], ids[i]))[:k]]

    def _in_memory(self, db: sqlite3.Connection) -> tuple[list[int], Vectors]:
        change = db.execute("SELECT value FROM facts WHERE name = 'change'").fetchone()[0]
        copy = self._copy
        if copy is None or copy[0] != change:
            rows = db.execute("SELECT id, vector FROM vectors ORDER BY id").fetchall()
            matrix = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float32)
            copy = self._copy = (change, [row[0] for row in rows], matrix.reshape(len(rows), -1) if rows else matrix)
        return copy[1], copy[2]

    def matching(self, db: sqlite3.Connection, query: str, k: int) -> list[tuple[int, float]]:
        """By bm25 of any of the query's words, with English endings taken off."""
        if not (wanted := match_expression(query)):
            return []
        sql = "SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?"
        return [(row["rowid"], -row["rank"]) for row in db.execute(sql, (wanted, k))]


def separated(text: str) -> str:
    """The text with every Chinese and Japanese character as a word of its own."""
    return _ALONE.sub(r" \1 ", text)


def match_expression(query: str) -> str:
    """The query in FTS5's language: any of its words, quoted, so that nothing in it is an operator. Words that stand in
    every text are left out, unless there are no others."""
    terms = list(dict.fromkeys(term.lower() for term in _TERM.findall(query)))[:64]
    terms = [term for term in terms if term not in _COMMON] or terms
    phrases: list[str] = []
    for term in terms:
        if _ALONE.match(term):
            pairs = [term[i : i + 2] for i in range(max(1, len(term) - 1))]
            phrases += [f'"{" ".join(pair)}"' for pair in pairs]
        else:
            phrases.append(f'"{term}"')
    return " OR ".join(dict.fromkeys(phrases))
