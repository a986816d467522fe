"""Tokens of a file, made once and kept: `<home>/cache/tokens/KEY/`, where KEY is a hash of all that they depend on (the
file's content, tokenizer, chat template, schema, columns).

    about.json     what the folder is of, for people
    00012.piece    some rows: see `pieces`
    done.json      there are no more pieces, and what they hold in all

Pieces are made in their order by one process at a time, which holds `build.lock`, and by workers of its; any process
may read them while more are made. Each appears whole or not at all, so whoever is killed loses no more than the pieces
in work. The folders can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from llmasos.data.masks import portable
from llmasos.data.pieces import Piece, Recipe, Totals, load_piece, totals_of
from llmasos.data.readers import DataFile, Raw
from llmasos.data.schemas import schema_of
from llmasos.data.workers import Workers
from llmasos.errors import DiskFullError, LLMasOSError, StoreError
from llmasos.settings import settings
from llmasos.text import Tokenizer

PIECE_BYTES, PIECE_ROWS = 1 << 20, 1024
"""A piece ends when it has as much of either."""
SMALL = 4 << 20
"""Bytes of a file for which no worker process is worth its start."""
AHEAD = 512
"""Pieces of a dataset without a known end that are made before they are wanted."""
_VERSION = 1
_POLL = 0.02

OnProgress = Callable[[Totals], None]


class TokenCache:
    """The pieces of one file. `num_processes`: workers; 0: as many as there are cores, none for a small file."""

    def __init__(
        self,
        file: DataFile,
        tokenizer: Tokenizer,
        *,
        schema: str | None = None,
        template: str | None = None,
        num_processes: int = 0,
    ) -> None:
        self.file = file
        self.schema = schema_of(file, schema).name
        self.recipe = Recipe(file, self.schema, portable(tokenizer), template)
        about = {
            "file": file.name,
            "content": file.digest(),
            "columns": file.columns,
            "schema": self.schema,
            "tokenizer": fingerprint(tokenizer),
            "template": template,
            "version": _VERSION,
        }
        self.key = hashlib.sha256(json.dumps(about | {"file": file.kind}).encode()).hexdigest()[:32]
        self.folder = settings().home / "cache" / "tokens" / self.key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").exists():
                _write(self.folder / "about.json", json.dumps(about, indent=2).encode())
        except OSError as e:
            raise _store_error(self.folder, e) from e
        self._lock = FileLock(self.folder / "build.lock", thread_local=False)
        self._num_processes = num_processes or _default_processes(file)
        self._builder: threading.Thread | None = None
        self._failure: LLMasOSError | None = None
        self._wanted = 0

    def piece(self, at: int) -> Piece | None:
        """Piece `at`, made now if need be; None behind the last. Raises what is wrong with the data."""
        self._wanted = max(self._wanted, at)
        path = self.folder / f"{at:05d}.piece"
        while not path.exists():
            if (totals := self.totals) and at >= totals.num_pieces:
                return None
            if self._failure:
                failure, self._failure = self._failure, None
                raise failure
            if not self._is_building():
                self._build()
            time.sleep(_POLL)
        return load_piece(path)

    def pieces(self) -> Iterator[Piece]:
        at = 0
        while piece := self.piece(at):
            yield piece
            at += 1

    def build(self, on_progress: OnProgress | None = None) -> Totals:
        """Make what is missing. Raises what is wrong with the data."""
        sums, at = Totals(), 0
        while not (totals := self.totals):
            if not (piece := self.piece(at)):
                continue
            sums, at = sums + totals_of(piece), at + 1
            if on_progress:
                on_progress(sums)
        return totals

    @property
    def totals(self) -> Totals | None:
        """Of the whole file; None while there are pieces to make."""
        try:
            return Totals(**json.loads((self.folder / "done.json").read_bytes()))
        except FileNotFoundError:
            return None

    def _is_building(self) -> bool:
        return self._builder is not None and self._builder.is_alive()

    def _build(self) -> None:
        """Start to, unless another process does."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return
        except OSError as e:
            raise _store_error(self.folder, e) from e
        if self.totals or self._failure:
            self._lock.release()
            return
        self._builder = threading.Thread(target=self._run, name=f"tokens of {self.file.name}", daemon=True)
        self._builder.start()

    def _run(self) -> None:
        try:
            for stale in self.folder.glob("*.tmp"):
                stale.unlink(missing_ok=True)
            num = self._make_pieces()
            sums = Totals()
            for at in range(num):
                sums += totals_of(load_piece(self.folder / f"{at:05d}.piece"))
            _write(self.folder / "done.json", json.dumps(asdict(sums)).encode())
        except LLMasOSError as e:
            self._failure = e
        except OSError as e:
            self._failure = _store_error(self.folder, e)
        except Exception as e:
            self._failure = StoreError(f"{self.file.name} could not be tokenised: {type(e).__name__}: {e}.")
        finally:
            self._lock.release()

    def _make_pieces(self) -> int:
        """How many there are."""
        num = 0
        with Workers(self.recipe, self._num_processes) as workers:
            for at, rows in enumerate(_pieces_of(self.file)):
                num = at + 1
                path = self.folder / f"{at:05d}.piece"
                if not path.exists():
                    workers.do(rows, path)
                while self.file.size is None and at > self._wanted + AHEAD:
                    time.sleep(_POLL)
        return num


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of all that decides about the tokens of a text or a chat."""
    parts = (tokenizer.backend.to_str(), tokenizer.special_tokens, sorted(tokenizer.eos_token_ids))
    return hashlib.sha256(repr((*parts, sorted(tokenizer.chat_templates.items()))).encode()).hexdigest()


def _pieces_of(file: DataFile) -> Iterator[list[tuple[int, Raw]]]:
    rows: list[tuple[int, Raw]] = []
    size = 0
    for line, raw in file.raw():
        rows.append((line, raw))
        size += len(raw) if isinstance(raw, bytes) else sum(_size(value) for value in raw.values())
        if size >= PIECE_BYTES or len(rows) >= PIECE_ROWS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_size, value))
    return sum(map(_size, value.values())) if isinstance(value, dict) else 8


def _default_processes(file: DataFile) -> int:
    size = file.size
    if size is not None and file.path and file.path.suffix.lower() in (".zst", ".gz"):
        size *= 4
    return 1 if size is not None and size < SMALL else min(os.cpu_count() or 1, 16)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _store_error(folder: Path, e: OSError) -> StoreError:
    import errno

    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"No room for tokens in {folder}.", hint="Delete other folders beside it, or free space.")
    return StoreError(f"Tokens could not be kept in {folder}: {e}.", hint="See that the folder can be written to.")
