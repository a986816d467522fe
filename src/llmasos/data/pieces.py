"""Some rows of a file as tokens, in a file of its own: two NumPy arrays one after the other, ROW records and int32
tokens, where a token that is trained stands as itself and any other one as its complement (`~token`, negative).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmasos.data.masks import Masker
from llmasos.data.order import row_key
from llmasos.data.readers import DataFile, Raw
from llmasos.data.schemas import SCHEMAS, RowError, read
from llmasos.errors import InvalidInputError, StoreError
from llmasos.text import Tokenizer

ROW = np.dtype(
    [("start", "<i8"), ("length", "<i4"), ("trained", "<i4"), ("first", "<i4"), ("line", "<i8"), ("key", "<u8")]
)
"""One sample: where its tokens begin in the piece, how many, how many of them are trained and which is the first; the
line that it is of; its key for the split."""


@dataclass(frozen=True)
class Totals:
    """Of a file's pieces so far, or of all."""

    num_pieces: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    longest: int = 0

    def __add__(self, other: Totals) -> Totals:
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Totals(**{**sums, "longest": max(self.longest, other.longest)})


@dataclass(frozen=True)
class Recipe:
    """How rows of one file become samples; sent to the workers as it is."""

    file: DataFile
    schema: str
    tokenizer: Tokenizer
    template: str | None = None


@dataclass(frozen=True)
class Piece:
    rows: NDArray[np.void]
    """ROW [n]."""
    signed: NDArray[np.int32]
    """A map of the file."""

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """int32 [n], and bool [n]: which are trained."""
        start = int(self.rows["start"][row])
        signed = np.asarray(self.signed[start : start + int(self.rows["length"][row])])
        return np.where(signed < 0, ~signed, signed), signed >= 0


def write_piece(masker: Masker, recipe: Recipe, rows: list[tuple[int, Raw]], path: Path) -> None:
    """Raises RowError with file and line, for the first row that is wrong."""
    schema = SCHEMAS[recipe.schema]
    records, tokens, start = [], [], 0
    for line, raw in rows:
        where = f"{recipe.file.name}:{line}"
        fields = recipe.file.fields(line, raw)
        example = read(schema, fields, where)
        try:
            samples = masker(example)
        except RowError as e:
            raise e.at(where) from None
        except InvalidInputError as e:
            raise type(e)(f"{where}: {e.message}", hint=e.hint, param=e.param) from None
        content = raw if isinstance(raw, bytes) else json.dumps(fields, default=str).encode()
        key = row_key(content.strip())
        for sample in samples:
            num_trained, first = int(sample.trained.sum()), int(sample.trained.argmax())
            records.append((start, len(sample.tokens), num_trained, first, line, key))
            tokens.append(np.where(sample.trained, sample.tokens, ~sample.tokens))
            start += len(sample.tokens)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, np.array(records, ROW))
        np.save(file, np.concatenate(tokens) if tokens else np.zeros(0, np.int32))
    temporary.replace(path)


@lru_cache(maxsize=128)  # each holds an open file, and some systems allow 256
def load_piece(path: Path) -> Piece:
    try:
        with path.open("rb") as file:
            rows = np.load(file)
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((0,), False, None)
            if dtype != np.int32 or rows.dtype != ROW:
                raise ValueError("of another kind")
            signed = np.memmap(file, np.int32, "r", file.tell(), shape) if shape[0] else np.zeros(0, np.int32)
    except (ValueError, OSError, EOFError) as e:
        raise StoreError(
            f"{path} is damaged: {e}.", hint=f"Delete the folder {path.parent}; it is made again when it is needed."
        ) from e
    return Piece(rows, signed)


def totals_of(piece: Piece) -> Totals:
    rows = piece.rows
    num_tokens, num_trained = (int(rows[name].sum(dtype=np.int64)) for name in ("length", "trained"))
    return Totals(1, len(rows), num_tokens, num_trained, int(rows["length"].max(initial=0)))
