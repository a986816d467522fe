"""multipart/form-data read as it comes: small fields into memory, the one file straight to disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from llmasos.errors import DiskFullError, InvalidInputError, StoreError
from llmasos.serve.storage import check_room

TEMPORARY = ".incoming-"
"""How names of files begin that are not whole yet."""
MAX_FIELD_BYTES = 64 * 2**10
MAX_PARTS = 64
MAX_HEADER_BYTES = 16 * 2**10
_WRITE_BYTES = 2**20


@dataclass
class Form:
    """`path` is a temporary file with the bytes of the file field; whoever keeps it moves it."""

    fields: dict[str, str]
    path: Path
    filename: str
    num_bytes: int


@dataclass
class _Reader:
    """Callbacks of the parser: it calls them in order while it is fed."""

    file_field: str
    fields: dict[str, bytearray] = field(default_factory=dict)
    filename: str | None = None
    pending: bytearray = field(default_factory=bytearray)
    complete: bool = False
    _num_parts: int = 0
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _into: bytearray | None = None

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidInputError(f"The form has more than {MAX_PARTS} fields.")
        self._headers.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header, data[start:end], MAX_HEADER_BYTES)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end], MAX_HEADER_BYTES)

    def on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name in self.fields or (name == self.file_field and self.filename is not None):
            raise InvalidInputError(f"The field {name!r} is given twice.", param=name)
        if name == self.file_field:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._into = self.pending
        else:
            self._into = self.fields.setdefault(name, bytearray())

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._into is not None
        if self._into is self.pending:
            self._into += data[start:end]
        else:
            self._grow(self._into, data[start:end], MAX_FIELD_BYTES)

    def on_end(self) -> None:
        self.complete = True

    @staticmethod
    def _grow(into: bytearray, data: bytes, limit: int) -> None:
        if len(into) + len(data) > limit:
            raise InvalidInputError(f"A field or header of the form is longer than {limit} bytes.")
        into += data


@contextlib.asynccontextmanager
async def received(request: Request, folder: Path, *, file_field: str, max_bytes: int) -> AsyncIterator[Form]:
    """The form of the request, its file in `folder`; what is still there when the block ends is removed.

    Raises InvalidInputError for what is no such form, DiskFullError; and starlette's ClientDisconnect.
    """
    reader = _Reader(file_field)
    parser = _parser(request, reader)
    path = folder / f"{TEMPORARY}{secrets.token_hex(16)}"
    try:
        with disk_errors():
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            check_room(folder, _declared(request))
            num_bytes = await _write(request, parser, reader, path, max_bytes)
        if reader.filename is None:
            raise InvalidInputError(f"The form has no field {file_field!r}.", param=file_field)
        fields = {name: _text(name, value) for name, value in reader.fields.items()}
        yield Form(fields, path, label(reader.filename), num_bytes)
    finally:
        path.unlink(missing_ok=True)


def _declared(request: Request) -> int:
    """Bytes of the body, as far as it is known."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _parser(request: Request, reader: _Reader) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInputError("The body must be a form: content-type multipart/form-data, with a boundary.")
    return MultipartParser(
        boundary,
        {
            "on_part_begin": reader.on_part_begin,
            "on_header_field": reader.on_header_field,
            "on_header_value": reader.on_header_value,
            "on_header_end": reader.on_header_end,
            "on_headers_finished": reader.on_headers_finished,
            "on_part_data": reader.on_part_data,
            "on_end": reader.on_end,
        },
    )


async def _write(request: Request, parser: MultipartParser, reader: _Reader, path: Path, max_bytes: int) -> int:
    num_bytes = 0
    with await asyncio.to_thread(path.open, "xb") as file:
        async for chunk in request.stream():
            try:
                parser.write(chunk)
            except FormParserError as e:
                raise InvalidInputError(f"The body is no valid form: {e}.") from e
            num_bytes = file.tell() + len(reader.pending)
            if num_bytes > max_bytes:
                raise TooLargeError(f"The file is longer than {max_bytes} bytes, this server's limit.")
            if len(reader.pending) >= _WRITE_BYTES:
                check_room(path.parent, len(reader.pending))
                await asyncio.to_thread(_flush, file, reader.pending)
        if not reader.complete:
            raise InvalidInputError("The body ends before its form does.")
        await asyncio.to_thread(_finish, file, reader.pending)
    return num_bytes


class TooLargeError(InvalidInputError):
    http_status = 413


def _flush(file: IO[bytes], pending: bytearray) -> None:
    file.write(pending)
    pending.clear()


def _finish(file: IO[bytes], pending: bytearray) -> None:
    _flush(file, pending)
    file.flush()
    os.fsync(file.fileno())


def _text(name: str, value: bytearray) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"The field {name!r} is not UTF-8 text.", param=name) from e


def label(filename: str) -> str:
    """What is kept of a client's file name: its last part, printable. It is shown, never opened."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in last if c.isprintable() and c != "\ufffd").strip()
    return shown[:255] if shown.strip(".") else "file"


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Trouble with the disk in our words."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError("There is no room for the file.", hint="DELETE /v1/files/{id} makes some.") from e
        raise StoreError(f"The file could not be kept: {e.strerror or e}.") from e
