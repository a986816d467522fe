"""Rows of datasets: files of any usual kind, folders, datasets of the hub, installed ones. Rows come one by one, each
with its line, and a file is never held in memory.

    jsonl ndjson json    objects, one a line, or an array of them (or of nothing else: `json` may be spread over lines)
    parquet              needs `pip install llmasos[train]`
    csv tsv              the first line names the columns, unless `columns` does
    txt md               documents, divided by lines that hold `<|doc|>` or `<|endoftext|>`; long ones come in parts

Each may be compressed (.gz, or .zst with `llmasos[train]`), but for parquet.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeAlias

from llmasos.errors import FormatError, InvalidInputError, NotFoundError, OfflineError, UnsupportedError
from llmasos.settings import settings

KINDS = ("jsonl", "ndjson", "json", "parquet", "csv", "tsv", "txt", "text", "md")
SEPARATORS = frozenset({"<|doc|>", "<|endoftext|>"})
PART = 1 << 16
"""Characters of a document that make one row; a longer one is divided at the end of a line."""
BEGINS, ENDS = "__begins__", "__ends__"
"""Fields of a part of a document: whether it is the first, the last. Left out where it is."""
_BLOCK = 1 << 20
_INSTALL = "Install it: pip install 'llmasos[train]'."
_LONGEST_OBJECT = 1 << 28
_FRESH = 2.0
"""Seconds: a file that changed as lately may change again without another time stamp."""

Raw: TypeAlias = "bytes | dict[str, Any]"
"""A row as the reader has it: a line of JSON that is parsed where it is needed, or its fields."""
Columns: TypeAlias = "Mapping[str, str] | Sequence[str] | None"
"""Names of fields: ours -> the file's; or, of a table without a line of names, the columns in their order."""


@dataclass(frozen=True)
class DataFile:
    """One file, or one split of a dataset of the hub (`path` is None then)."""

    name: str
    """As people know it: errors begin with it."""
    kind: str
    path: Path | None = None
    columns: tuple[tuple[str, str], ...] | tuple[str, ...] = ()
    hub: tuple[str, str | None, str] | None = None
    """Its repository, configuration and split."""

    def __post_init__(self) -> None:
        if self.kind not in ("csv", "tsv") and any(isinstance(one, str) for one in self.columns):
            raise InvalidInputError(
                f"columns={','.join(map(str, self.columns))} name a table's columns in their order, and {self.name} is "
                "no csv or tsv: its rows have names.",
                hint="Say which is which: --columns prompt=question,completion=answer.",
                param="columns",
            )

    def raw(self) -> Iterator[tuple[int, Raw]]:
        """Line (or the row's number, from 1, where there are no lines) and row. Raises FormatError, NotFoundError."""
        if self.hub:
            return enumerate(_hub_rows(*self.hub), 1)
        assert self.path is not None
        if self.kind == "parquet":
            return enumerate(_parquet_rows(self.path), 1)
        if self.kind in ("jsonl", "ndjson"):
            return _lines(self)
        read = {"json": _json_values, "csv": _table, "tsv": _table}.get(self.kind, _documents)
        return read(self)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, raw in self.raw():
            yield line, self.fields(line, raw)

    def fields(self, line: int, raw: Raw) -> dict[str, Any]:
        """The row's fields under our names. Raises FormatError with file and line."""
        row = raw if isinstance(raw, dict) else self._parse(line, raw)
        for pair in self.columns:
            if isinstance(pair, str):
                continue
            ours, theirs = pair
            if theirs not in row:
                known = ", ".join(map(str, row))
                raise FormatError(f"{self.name}:{line}: there is no column {theirs!r}.", hint=f"It has: {known}.")
            row = {**row, ours: row[theirs]}
        return row

    def _parse(self, line: int, raw: bytes) -> dict[str, Any]:
        try:
            row = json.loads(raw)
        except UnicodeDecodeError as e:
            raise _not_utf8(self.name, line) from e
        except (ValueError, RecursionError) as e:
            what = getattr(e, "msg", None) or "too deep"
            raise FormatError(
                f"{self.name}:{line}: not JSON ({what}): {_shown(raw)}.", hint="Every line holds one JSON object."
            ) from e
        if not isinstance(row, dict):
            raise FormatError(f"{self.name}:{line}: a {type(row).__name__} and no object: {_shown(raw)}.")
        return row

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where nobody knows."""
        return self.path.stat().st_size if self.path else None

    def digest(self) -> str:
        """Of what it holds: a changed file is another one."""
        if self.hub:
            return _hub_revision(self.hub[0])
        assert self.path is not None
        stat = self.path.stat()
        if time.time() - stat.st_mtime < _FRESH:
            return _hash(self.path)
        return _remembered_hash(self.path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def open_dataset(ref: str | Path, *, columns: Columns = None) -> list[DataFile]:
    """The files that `ref` names: a file, a folder (all files of known kinds in it, by name), an installed dataset, or
    `hf:OWNER/NAME[:CONFIG][:SPLIT]`.

    Raises NotFoundError, UnsupportedError for a kind that is not known, InvalidInputError for columns in an order where
    there is no table.
    """
    named: Any = tuple(columns.items()) if isinstance(columns, Mapping) else tuple(columns or ())
    if str(ref).startswith("hf:"):
        return [DataFile(str(ref), "hub", columns=named, hub=_hub_parts(str(ref)))]
    path = Path(ref).expanduser()
    installed = settings().home / "datasets" / str(ref)
    if not path.exists() and "/" not in str(ref) and installed.is_dir():
        path = installed
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.is_file() and _kind(one) and not _is_hidden(one, path))
        if not found:
            raise NotFoundError(f"The folder {path} has no data.", hint=f"Known are files of {', '.join(KINDS)}.")
        return [DataFile(str(one), _kind(one), one.absolute(), named) for one in found]
    if not path.is_file():
        if _kind(path):
            raise NotFoundError(f"There is no file {ref}.", hint=_similar(path))
        raise NotFoundError(
            f"There is no dataset {str(ref)!r}.",
            hint="Name a file, a folder, an installed dataset, or hf:OWNER/NAME for one of the hub.",
        )
    if not (kind := _kind(path)):
        raise UnsupportedError(
            f"{path} is of no known kind.", hint=f"Known: {', '.join(KINDS)}, also with .zst or .gz.", param="data"
        )
    return [DataFile(str(ref), kind, path.absolute(), named)]


def _similar(path: Path) -> str:
    """What to name instead of a file that is not there: those beside it whose names are like it."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent}, either; name a file that is there."
    there = sorted(one.name for one in path.parent.iterdir() if one.is_file() and _kind(one))
    if near := difflib.get_close_matches(path.name, there, n=2):
        return f"Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?"
    return f"Make it first, or name a file that is there; the folder is {path.absolute().parent}."


def parse_columns(text: str) -> Columns:
    """`prompt=question,completion=answer`, or `prompt,completion` for a table without a line of names."""
    words = [word.strip() for word in text.split(",")]
    if any("=" in word for word in words):
        pairs = [tuple(map(str.strip, word.split("=", 1))) for word in words]
        if all(len(pair) == 2 and all(pair) for pair in pairs):
            return dict(pairs)  # type: ignore[arg-type]
    elif all(words):
        return words
    raise InvalidInputError(
        f"--columns {text!r} is not understood.", hint="Example: --columns prompt=question,completion=answer.",
        param="columns",
    )  # fmt: skip


def _kind(path: Path) -> str:
    """Empty: none that is known."""
    name = path.name.lower()
    packed = name.endswith((".zst", ".gz"))
    kind = name.rsplit(".", 2 if packed else 1)[1] if name.count(".") > packed else ""
    return kind if kind in KINDS and not (packed and kind == "parquet") else ""


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


# --- bytes and lines


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), _BLOCK)
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as e:
            raise UnsupportedError(f"{path} needs the package zstandard.", hint=_INSTALL, param="data") from e
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(_Readable(stream), _BLOCK)
    return path.open("rb", buffering=_BLOCK)


class _Readable(io.RawIOBase):
    """What `io.BufferedReader` takes, from anything with `readinto`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._stream.close()
        super().close()


def _byte_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    assert file.path is not None
    line = 0
    with _open(file.path) as stream:
        try:
            for line, text in enumerate(stream, 1):
                yield line, text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
        except (OSError, EOFError) as e:
            raise _damaged(file.name, line, e) from e
        except Exception as e:
            if type(e).__name__ != "ZstdError":
                raise
            raise _damaged(file.name, line, e) from e


def _text_lines(file: DataFile) -> Iterator[tuple[int, str]]:
    for line, raw in _byte_lines(file):
        try:
            yield line, raw.decode()
        except UnicodeDecodeError as e:
            raise _not_utf8(file.name, line) from e


def _damaged(name: str, line: int, e: Exception) -> FormatError:
    return FormatError(f"{name} is damaged after line {line}: {e}.", hint="Fetch or compress the file again.")


def _not_utf8(name: str, line: int) -> FormatError:
    return FormatError(f"{name}:{line}: not UTF-8.", hint="Convert the file: iconv -f ENCODING -t UTF-8.")


def _shown(raw: bytes) -> str:
    text = raw.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- kinds of files


def _lines(file: DataFile) -> Iterator[tuple[int, Raw]]:
    for line, raw in _byte_lines(file):
        if raw.strip():
            yield line, raw


def _json_values(file: DataFile) -> Iterator[tuple[int, Raw]]:
    """The objects of an array, or one after the other."""
    decoder, buffer, line, is_over = json.JSONDecoder(), "", 1, False
    lines = _text_lines(file)
    while True:
        rest = buffer.lstrip(" \t\r\n,[]")
        line += buffer.count("\n", 0, len(buffer) - len(rest))
        buffer = rest
        if buffer:
            try:
                value, end = decoder.raw_decode(buffer)
            except (ValueError, RecursionError) as e:
                if is_over or len(buffer) > _LONGEST_OBJECT or not _is_cut(e, len(buffer)):
                    raise FormatError(
                        f"{file.name}:{line}: not JSON ({e}): {_shown(buffer[:99].encode())}.",
                        hint="The file holds an array of objects, or objects one after the other.",
                    ) from e
            else:
                if not isinstance(value, dict):
                    raise FormatError(f"{file.name}:{line}: {_shown(buffer[:end].encode())} is no object.")
                yield line, value
                line, buffer = line + buffer.count("\n", 0, end), buffer[end:]
                continue
        elif is_over:
            return
        # at least doubled, so that an object of many lines is tried few times
        more, wanted = [], max(len(buffer), 1 << 12)
        while wanted > 0 and (got := next(lines, None)):
            more.append(got[1])
            wanted -= len(got[1])
        is_over = not more
        buffer += "".join(more)


def _is_cut(e: Exception, length: int) -> bool:
    """Whether more text may cure what is wrong with the JSON."""
    return isinstance(e, json.JSONDecodeError) and (e.msg.startswith("Unterminated") or e.pos > length - 8)


def _table(file: DataFile) -> Iterator[tuple[int, Raw]]:
    named = [one for one in file.columns if isinstance(one, str)]
    csv.field_size_limit((1 << 31) - 1)  # of the process: nobody else may rely on Python's 128 KiB
    reader = csv.reader(
        (text for _, text in _text_lines(file)),
        delimiter="\t" if file.kind == "tsv" else ",",
        quoting=csv.QUOTE_NONE if file.kind == "tsv" else csv.QUOTE_MINIMAL,
    )
    names, last = named, 0
    while True:
        try:
            values = next(reader, None)
        except csv.Error as e:
            raise FormatError(f"{file.name}:{reader.line_num}: {e}.") from e
        if values is None:
            return
        line, last = last + 1, reader.line_num
        if not names:
            names = values
        elif len(values) == len(names):
            yield line, dict(zip(names, values, strict=True))
        elif values:
            raise FormatError(
                f"{file.name}:{line}: {len(values)} values and {len(names)} columns ({', '.join(names)}).",
                hint="Correct the line, or name the columns of a table that has no line of names.",
            )


def _documents(file: DataFile) -> Iterator[tuple[int, Raw]]:
    """Parts of a document end at line ends where they can; a blank row is none."""
    part: list[str] = []
    size, first, begins = 0, 1, True

    def row(text: str, ends: bool) -> dict[str, Any]:
        flags = {BEGINS: False} if not begins else {}
        return {"text": text, **flags} | ({} if ends else {ENDS: False})

    for line, text in _text_lines(file):
        if text.strip() in SEPARATORS:
            if (whole := "".join(part).rstrip("\n")) or not begins:
                yield first, row(whole, True)
            part, size, first, begins = [], 0, line + 1, True
            continue
        for at in range(0, len(text), PART):
            piece = text[at : at + PART]
            if size + len(piece) > PART and part:
                yield first, row("".join(part), False)
                part, size, first, begins = [], 0, line, False
            if part or not begins or piece.strip():
                part.append(piece)
                size += len(piece)
            else:
                first = line + 1
    if (whole := "".join(part)).strip() or not begins:
        yield first, row(whole, True)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UnsupportedError(f"{path} needs the package pyarrow.", hint=_INSTALL, param="data") from e
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as e:
        why = str(e).rstrip(".")
        raise FormatError(f"{path} is not a parquet file: {why}.", hint="Fetch the file again.") from e


# --- the hub


def _hub_parts(ref: str) -> tuple[str, str | None, str]:
    repo, *rest = ref.removeprefix("hf:").split(":")
    if repo.count("/") != 1 or len(rest) > 2 or not all([*repo.split("/"), *rest]):
        raise InvalidInputError(
            f"{ref!r} names no dataset of the hub.", hint="Write hf:OWNER/NAME[:CONFIG][:SPLIT].", param="data"
        )
    return repo, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _online(repo: str) -> None:
    if settings().offline:
        raise OfflineError(f"hf:{repo} is on the hub, and this is offline mode.", hint="Unset LLMASOS_OFFLINE.")


def _hub_rows(repo: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    _online(repo)
    try:
        import datasets
    except ImportError as e:
        raise UnsupportedError(f"hf:{repo} needs the package datasets.", hint=_INSTALL, param="data") from e
    try:
        yield from datasets.load_dataset(
            repo, config, split=split, streaming=True, token=settings().hf_token or None, revision=_hub_revision(repo)
        )
    except (OSError, ValueError) as e:
        raise NotFoundError(
            f"hf:{repo} could not be read: {e}.", hint="See its name, configurations and splits on the hub."
        ) from e


@lru_cache(maxsize=64)
def _hub_revision(repo: str) -> str:
    _online(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi(token=settings().hf_token or None).dataset_info(repo).sha)
    except (HfHubHTTPError, OSError) as e:
        raise NotFoundError(f"There is no dataset hf:{repo}: {e}.", hint="See its name on the hub.") from e


@lru_cache(maxsize=4096)
def _remembered_hash(path: Path, size: int, mtime: int, inode: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
