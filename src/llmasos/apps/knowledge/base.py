"""`KnowledgeBase`: documents in, passages with citations out.

One folder `<home>/knowledge/<name>` with one SQLite file, which can be moved and copied while nobody writes. A file is
read, cut and embedded first and then put in place of its old chunks in one transaction: whoever reads, and whatever is
killed, sees the file as it was or as it is now.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmasos.apps.knowledge.chunks import Chunk, chunks
from llmasos.apps.knowledge.encoder import CrossEncoder, Encoder, Vectors, counter, encoder_of, vectors_of
from llmasos.apps.knowledge.index import Engine, Index, separated
from llmasos.apps.knowledge.readers import MAX_BYTES, READERS, read_document
from llmasos.errors import (
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NotFoundError,
    StoreError,
    UnsupportedError,
)
from llmasos.settings import settings

if TYPE_CHECKING:
    import sqlite3

    from llmasos.inference.remote import RemoteLLM

DEFAULT_MODEL = "all-minilm-l6-v2"
CHUNK_TOKENS = 192
"""Of a chunk with its headings; less where the encoder's context holds less."""
OVERLAP_TOKENS = 32
CANDIDATES = 50
"""Passages of each search that hybrid search puts together, and that a cross-encoder reads."""
RANK_CONSTANT = 10
"""k of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009, who take 60): small, so that the first of one
list stands before what is in the middle of both. Chosen on 59 questions that are none of the benchmark's."""
MAX_RESULTS = 1000
FILE = "knowledge.db"

Mode = Literal["hybrid", "vector", "text"]
MODES: tuple[Mode, ...] = ("hybrid", "vector", "text")


@dataclass(frozen=True)
class Progress:
    """`path` is being added: `done` of its `total` chunks are embedded. It is file number `number` of `files`."""

    path: str
    number: int
    files: int
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass
class Changes:
    """What became of each file, by path; of a failed one, why."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """A chunk that was found. `score` is of the mode that found it: cosine similarity, bm25, sums of reciprocal ranks,
    or what a cross-encoder gave; compare scores of one search only. `start` and `end` are places in the text that was
    read from the file, `page` counts from 1."""

    id: int
    text: str
    score: float
    path: str
    title: str
    headings: tuple[str, ...]
    page: int | None
    start: int
    end: int

    @property
    def citation(self) -> str:
        """Where it stands, for people."""
        return self.path + self._place

    @property
    def short_citation(self) -> str:
        """Without the folder, which is nobody else's business and costs tokens: for models."""
        return PurePath(self.path).name + self._place

    @property
    def _place(self) -> str:
        page = f", p. {self.page}" if self.page is not None else ""
        return page + (f", {' > '.join(self.headings)}" if self.headings else "")


@dataclass(frozen=True)
class FileInfo:
    path: str
    title: str
    size: int
    sha256: str
    added: str
    """When it was last read, ISO 8601 in UTC."""
    chunks: int


@dataclass(frozen=True)
class Stats:
    """`engine`: what searches the vectors here. `dimensions` is 0 until the first chunk. `size`: bytes on the disk."""

    name: str
    model: str
    dimensions: int
    files: int
    chunks: int
    size: int
    engine: Engine


class KnowledgeBase:
    """One knowledge base. Any thread may use it, and several processes at once."""

    def __init__(self, path: Path, encoder: Encoder | None = None, *, engine: Engine | None = None) -> None:
        self.path, self.name = path, path.name
        self.index = Index(path / FILE, engine)
        self._encoder = encoder
        self._is_own = False
        with self.index.reading() as db:
            self.model = _fact(db, "model") or ""

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        model: str | Encoder | RemoteLLM | None = None,
        create: bool = True,
        engine: Engine | None = None,
    ) -> KnowledgeBase:
        """The base of this name in the home, or in this folder if it is a path (one with a separator).

        `model`: the encoder, by name or loaded; default: the base's own, all-minilm-l6-v2 for a new one. By name it is
        loaded when it is first needed. Raises InvalidInputError for another one than the base was made with,
        NotFoundError without `create` where there is none, FormatError for a file that is no base.
        """
        path = folder_of(name)
        if not create and not (path / FILE).exists():
            raise NotFoundError(
                f"There is no knowledge base {str(name)!r}.", hint=f"`llmasos kb add {name} FILE` makes one."
            )
        if model is not None and not isinstance(model, str):
            model = encoder_of(model)
        wanted = model if isinstance(model, str) or model is None else model.name
        index = Index(path / FILE, engine)
        if not (path / FILE).exists():
            index.create()
            with index.writing() as db:
                db.execute("INSERT OR IGNORE INTO facts VALUES ('model', ?)", (wanted or DEFAULT_MODEL,))
        base = cls(path, None if isinstance(model, str) else model, engine=engine)
        if wanted is not None and wanted != base.model:
            raise InvalidInputError(
                f"The vectors of {base.name} were made by {base.model}, not by {wanted}: they can't be compared.",
                hint=f"Leave the model out, or delete the base (`llmasos kb rm {name}`) and add the files again.",
                param="model",
            )
        return base

    # adding

    def add(self, source: str | Path, *, on_progress: OnProgress | None = None) -> Changes:
        """Add a file, or all files of known kinds in a folder (not hidden ones, not links). What has not changed since
        is left as it is. `sync` will look at the same place again.

        Raises NotFoundError, and for a single file what `read_document` raises; in a folder such a file is told in
        `failed` and the others are added.
        """
        root = Path(os.path.abspath(Path(source).expanduser()))
        if not root.exists():
            raise NotFoundError(f"There is no file or folder {str(source)!r}.", hint="Check the path.")
        changes = Changes()
        self._add_files(files_in(root), changes, on_progress, is_strict=root.is_file())
        with self.index.writing() as db:
            db.execute("INSERT OR IGNORE INTO roots VALUES (?)", (str(root),))
        return changes

    def add_text(self, text: str, name: str, *, on_progress: OnProgress | None = None) -> Changes:
        """Add a text under a name, read as Markdown if the name ends so, else as plain text."""
        known = name if Path(name).suffix.lower() in (".md", ".markdown", ".txt") else f"{name}.txt"
        return self._add_bytes(name, known, text.encode("utf-8", "replace"), on_progress)

    def add_bytes(self, name: str, data: bytes, *, on_progress: OnProgress | None = None) -> Changes:
        """Add a file's bytes under its name, as an upload comes. Raises what `read_document` raises."""
        return self._add_bytes(name, name, data, on_progress)

    def _add_bytes(self, name: str, known: str, data: bytes, on_progress: OnProgress | None) -> Changes:
        if not name.strip() or len(name) > 1000 or not name.isprintable():
            raise InvalidInputError(f"{name[:100]!r} can't be the name of a document.", param="name")
        changes = Changes()
        self._put(name, known, data, changes, _Reporter(on_progress, name, 1, 1))
        return changes

    def sync(self, *, on_progress: OnProgress | None = None) -> Changes:
        """Look at all files and folders that were added again: what is new is added, what has changed is replaced, what
        is gone is removed. A folder that is gone as a whole may lie on a disk that is not there: it is told in
        `failed`, and its files are kept."""
        changes = Changes()
        with self.index.reading() as db:
            roots = [Path(row["path"]) for row in db.execute("SELECT path FROM roots ORDER BY path")]
            known = [row["path"] for row in db.execute("SELECT path FROM files ORDER BY path")]
        found: dict[str, Path] = {}
        for root in roots:
            here = files_in(root) if root.exists() else []
            found |= {str(path): path for path in here}
            below = [path for path in known if _is_below(path, root)]
            if not root.exists() and (below != [str(root)] or not root.parent.exists()):
                changes.failed[str(root)] = "It is not there; its files are kept."
                found |= dict.fromkeys(below, root)
                continue
            changes.removed += [path for path in below if path not in found and not Path(path).exists()]
        changes.removed = [path for path in dict.fromkeys(changes.removed) if path not in found]
        for path in changes.removed:
            self._drop([path])
        present = [path for name, path in found.items() if name == str(path) and path.exists()]
        self._add_files(present, changes, on_progress, is_strict=False)
        return changes

    def _add_files(
        self, files: Sequence[Path], changes: Changes, on_progress: OnProgress | None, *, is_strict: bool
    ) -> None:
        for number, path in enumerate(files, 1):
            try:
                size = path.stat().st_size
                if size > MAX_BYTES:
                    raise InvalidInputError(
                        f"{path} has {size >> 20} MiB; {MAX_BYTES >> 20} are read at most.", hint="Split it."
                    )
                data = path.read_bytes()
                self._put(str(path), path.name, data, changes, _Reporter(on_progress, str(path), number, len(files)))
            except OSError as e:
                problem = StoreError(f"{path} can't be read: {e.strerror or e}.", hint="Check its permissions.")
                if is_strict:
                    raise problem from e
                changes.failed[str(path)] = problem.message
            except LLMasOSError as e:
                if is_strict or not _is_of_file(e):
                    raise
                changes.failed[str(path)] = e.message

    def _put(self, path: str, known: str, data: bytes, changes: Changes, report: _Reporter) -> None:
        digest = hashlib.sha256(data).hexdigest()
        with self.index.reading() as db:
            old = db.execute("SELECT sha256 FROM files WHERE path = ?", (path,)).fetchone()
        if old is not None and old["sha256"] == digest:
            changes.unchanged.append(path)
            return
        document = read_document(known, data)
        encoder = self.encoder()
        most = min(CHUNK_TOKENS, encoder.context_length)
        parts = chunks(document, counter(encoder), max_tokens=most, overlap=min(OVERLAP_TOKENS, most // 6))
        report(0, len(parts))
        vectors = vectors_of(encoder, [part.embedded for part in parts], on_batch=lambda done: report(done, len(parts)))
        with self.index.writing() as db:
            _check_dimensions(db, vectors.shape[1], self.model)
            _delete(db, path)
            _insert(db, path, document.title, digest, len(data), parts, vectors)
        (changes.added if old is None else changes.replaced).append(path)

    # looking and removing

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        mode: Mode = "hybrid",
        rerank: CrossEncoder | None = None,
    ) -> list[Passage]:
        """The `k` best passages, the best first. `mode`: by meaning (vector), by words (text), or both put together by
        reciprocal rank fusion. `rerank`: a cross-encoder that reads the best 50 and decides their order.

        Raises InvalidInputError for an empty query, and one that is longer than the encoder's context.
        """
        if not query.strip():
            raise InvalidInputError("The query is empty.", param="query")
        if mode not in MODES:
            raise InvalidInputError(f"mode={mode!r} is not known.", hint=f"Use {', '.join(MODES)}.", param="mode")
        if not 1 <= k <= MAX_RESULTS:
            raise InvalidInputError(f"k={k} is not between 1 and {MAX_RESULTS}.", param="k")
        vector = vectors_of(self.encoder(), [query]) if mode != "text" else None
        wide = max(k, CANDIDATES) if mode == "hybrid" or rerank is not None else k
        with self.index.reading() as db:
            lists: list[list[tuple[int, float]]] = []
            if vector is not None:
                _check_query(db, vector.shape[1], self.model)
                lists.append(self.index.nearest(db, vector, wide))
            if mode != "vector":
                lists.append(self.index.matching(db, query, wide))
            ranked = fused(lists) if len(lists) > 1 else lists[0]
            found = _passages(db, ranked[: wide if rerank is not None else k])
        if rerank is not None and found:
            scores = rerank.score_pairs(query, [passage.text for passage in found])
            found = [_scored(passage, score) for passage, score in zip(found, scores, strict=True)]
            found.sort(key=lambda passage: -passage.score)
        return found[:k]

    def remove(self, path: str | Path) -> list[str]:
        """Remove a document, or all of a folder, from the base (not from the disk) and from what `sync` looks at;
        returns what was removed. Raises NotFoundError."""
        absolute = Path(os.path.abspath(Path(path).expanduser()))
        with self.index.writing() as db:
            known = [row["path"] for row in db.execute("SELECT path FROM files ORDER BY path")]
            gone = [one for one in known if one == str(path) or _is_below(one, absolute)]
            for one in gone:
                _delete(db, one)
            roots = [row["path"] for row in db.execute("SELECT path FROM roots")]
            gone_roots = [(root,) for root in roots if _is_below(root, absolute)]
            db.executemany("DELETE FROM roots WHERE path = ?", gone_roots)
        if not gone and not gone_roots:
            raise NotFoundError(f"{self.name} has no document {str(path)!r}.", hint=f"llmasos kb ls {self.name}")
        return gone

    def remove_document(self, name: str) -> None:
        """Remove the document of exactly this name. Raises NotFoundError."""
        with self.index.writing() as db:
            if db.execute("SELECT 1 FROM files WHERE path = ?", (name,)).fetchone() is None:
                raise NotFoundError(f"{self.name} has no document {name!r}.", hint=f"llmasos kb ls {self.name}")
            _delete(db, name)

    def files(self) -> list[FileInfo]:
        """The documents, by path."""
        sql = (
            """SELECT files.*, (SELECT COUNT(*) FROM chunks WHERE file = files.id) AS chunks FROM files ORDER BY path"""
        )
        names = ("path", "title", "size", "sha256", "added", "chunks")
        with self.index.reading() as db:
            return [FileInfo(**{name: row[name] for name in names}) for row in db.execute(sql)]

    def stats(self) -> Stats:
        with self.index.reading() as db:
            files = db.execute("SELECT COUNT(*) FROM files").fetchone()[0]
            num_chunks = db.execute("SELECT COUNT(*) FROM chunks").fetchone()[0]
            dimensions = int(_fact(db, "dimensions") or 0)
        size = sum(path.stat().st_size for path in self.path.glob(f"{FILE}*"))
        return Stats(self.name, self.model, dimensions, files, num_chunks, size, self.index.engine)

    def encoder(self) -> Encoder:
        """The model that makes the vectors; loaded now if it was given by name. Raises what `LLM.from_pretrained`
        raises."""
        if self._encoder is None:
            from llmasos.inference.llm import LLM

            self._encoder = LLM.from_pretrained(self.model)
            self._is_own = True
        return self._encoder

    def use(self, encoder: Encoder) -> None:
        """Let this model, which is the base's by another way, make the vectors. It stays the caller's."""
        self.close()
        self._encoder = encoder

    def close(self) -> None:
        """Let go of the encoder, if it was loaded here."""
        if self._is_own and (encoder := self._encoder) is not None:
            self._encoder, self._is_own = None, False
            encoder.close()  # type: ignore[attr-defined]  # what is loaded here is an LLM

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop(self, paths: Iterable[str]) -> None:
        with self.index.writing() as db:
            for path in paths:
                _delete(db, path)


# bases of the home


def folder_of(name: str | Path) -> Path:
    """Of a base by name, or the path itself. Raises InvalidInputError for what can't be a name."""
    if isinstance(name, Path) or os.sep in name or "/" in name:
        return Path(os.path.abspath(Path(name).expanduser()))
    return folder_named(name)


def folder_named(name: str) -> Path:
    """Of a base of the home; no path is a name. Raises InvalidInputError."""
    from llmasos.store.card import check_name

    try:
        return settings().home / "knowledge" / check_name(name)
    except InvalidInputError as e:
        raise InvalidInputError(f"{name!r} cannot be the name of a knowledge base.", hint=e.hint, param="name") from e


def names() -> list[str]:
    """The bases of the home."""
    return sorted(path.parent.name for path in (settings().home / "knowledge").glob(f"*/{FILE}"))


def delete(name: str | Path) -> None:
    """Delete a base with all that it holds; the files that were added stay where they are. Raises NotFoundError."""
    path = folder_of(name)
    if not (path / FILE).exists():
        raise NotFoundError(f"There is no knowledge base {str(name)!r}.", hint="llmasos kb ls")
    for one in path.glob(f"{FILE}*"):
        one.unlink(missing_ok=True)
    if not any(path.iterdir()):
        shutil.rmtree(path, ignore_errors=True)


# inside


class _Reporter:
    def __init__(self, on_progress: OnProgress | None, path: str, number: int, files: int) -> None:
        self._on_progress, self._path, self._number, self._files = on_progress, path, number, files

    def __call__(self, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self._path, self._number, self._files, done, total))


def files_in(root: Path) -> list[Path]:
    """The file itself, or what can be read in a folder, in order."""
    if not root.is_dir():
        return [root]
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in READERS and not path.is_symlink():
                yield path


def _is_below(path: str, root: Path) -> bool:
    return Path(path) == root or root in Path(path).parents


def _is_of_file(error: LLMasOSError) -> bool:
    """Whether another file may go better."""
    return isinstance(error, FormatError | InvalidInputError) and not isinstance(error, UnsupportedError)


def fused(lists: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: each list gives what stands at rank r (from 1) 1 / (k + r)."""
    scores: dict[int, float] = {}
    for one in lists:
        for rank, (id, _) in enumerate(one, 1):
            scores[id] = scores.get(id, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def _fact(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _check_dimensions(db: sqlite3.Connection, dimensions: int, model: str) -> None:
    if _fact(db, "dimensions") is None:
        db.execute("INSERT INTO facts VALUES ('dimensions', ?)", (str(dimensions),))
    _check_query(db, dimensions, model)


def _check_query(db: sqlite3.Connection, dimensions: int, model: str) -> None:
    if (known := _fact(db, "dimensions")) is not None and int(known) != dimensions:
        raise InvalidInputError(
            f"The base holds vectors of {known} dimensions, and {model} now makes {dimensions}: it is another model.",
            hint="Bring the old model back, or delete the base and add the files again.",
            param="model",
        )


def _delete(db: sqlite3.Connection, path: str) -> None:
    wanted = "IN (SELECT chunks.id FROM chunks JOIN files ON file = files.id WHERE path = ?)"
    db.execute(f"DELETE FROM words WHERE rowid {wanted}", (path,))
    db.execute(f"DELETE FROM vectors WHERE id {wanted}", (path,))
    db.execute("DELETE FROM chunks WHERE file = (SELECT id FROM files WHERE path = ?)", (path,))
    db.execute("DELETE FROM files WHERE path = ?", (path,))


def _insert(
    db: sqlite3.Connection, path: str, title: str, digest: str, size: int, parts: Sequence[Chunk], vectors: Vectors
) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file = db.execute(
        "INSERT INTO files(path, title, sha256, size, added) VALUES (?, ?, ?, ?, ?)", (path, title, digest, size, now)
    ).lastrowid
    for position, (part, vector) in enumerate(zip(parts, vectors, strict=True)):
        id = db.execute(
            'INSERT INTO chunks(file, position, "start", "end", page, headings, context, text) '
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                file,
                position,
                part.start,
                part.end,
                part.page,
                json.dumps(part.headings, ensure_ascii=False),
                part.context,
                part.text,
            ),
        ).lastrowid
        db.execute("INSERT INTO vectors VALUES (?, ?)", (id, np.ascontiguousarray(vector).tobytes()))
        words = (id, separated(part.context), separated(part.text))
        db.execute("INSERT INTO words(rowid, context, text) VALUES (?, ?, ?)", words)


def _passages(db: sqlite3.Connection, ranked: Sequence[tuple[int, float]]) -> list[Passage]:
    sql = """SELECT chunks.*, path, title FROM chunks JOIN files ON file = files.id WHERE chunks.id = ?"""
    return [_passage(db.execute(sql, (id,)).fetchone(), score) for id, score in ranked]


def _passage(row: Any, score: float) -> Passage:
    return Passage(
        id=row["id"],
        text=row["text"],
        score=score,
        path=row["path"],
        title=row["title"],
        headings=tuple(json.loads(row["headings"])),
        page=row["page"],
        start=row["start"],
        end=row["end"],
    )


def _scored(passage: Passage, score: float) -> Passage:
    return replace(passage, score=score)
