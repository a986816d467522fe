"""Files as text: `data:image/png;name=cat.png;base64,iVBOR…` (RFC 2397, and its parameter `name` as forms write it).

In this form applications take and give files in JSON.
"""

from __future__ import annotations

import base64
import binascii
import mimetypes
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes

from llmasos.errors import InvalidInputError

FileLike = str | bytes | os.PathLike[str] | BinaryIO
"""What clients take where an application wants a file: a path object, bytes, an open file, or text in this form."""

_HEAD = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+*-]+)?(?P<parameters>(?:;[^;,]*)*),", re.ASCII)
_LONGEST_HEAD = 2000
_SLICE = 1 << 18  # characters; a multiple of 4


class Decoded(NamedTuple):
    data: bytes
    name: str
    media_type: str


def encode(data: bytes, name: str = "", media_type: str = "") -> str:
    """The text of a file; what is not said is left out."""
    named = f";name={quote(name, safe='')}" if name else ""
    return f"data:{media_type}{named};base64,{base64.b64encode(data).decode()}"


def encode_path(path: str | os.PathLike[str]) -> str:
    """The text of a file on this machine. Raises OSError."""
    path = Path(path)
    return encode(path.read_bytes(), path.name, mimetypes.guess_type(path.name)[0] or "")


def encode_file(value: Any) -> Any:
    """The text of what clients take as a file; any other value as it is. Raises OSError."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return encode(bytes(value))
    if isinstance(value, os.PathLike):
        return encode_path(value)
    if hasattr(value, "media_type") and isinstance(getattr(value, "data", None), bytes):  # a File of an application
        return encode(value.data, str(value.name), str(value.media_type))
    if hasattr(value, "read") and isinstance(data := value.read(), bytes):
        name = getattr(value, "name", "")
        name = os.path.basename(name) if isinstance(name, str) else ""
        return encode(data, name, mimetypes.guess_type(name)[0] or "")
    return value


def decode(text: str, *, max_bytes: int | None = None) -> Decoded:
    """The file that a text stands for: a data: URL, or base64 alone. Raises InvalidInputError for what is neither, and
    for more than `max_bytes`."""
    head = _HEAD.match(text[:_LONGEST_HEAD])
    if head is None and text.startswith("data:"):
        raise InvalidInputError("This data: URL has no comma behind its media type.")
    parameters = head["parameters"].split(";")[1:] if head else ["base64"]
    body = text[head.end() :] if head else text
    names = [one.partition("=")[2] for one in parameters if one.lower().startswith(("name=", "filename="))]
    is_base64 = any(one.strip().lower() == "base64" for one in parameters)
    if max_bytes is not None and len(body) > (max_bytes * 4 + 2) // 3 + 4 and is_base64:
        raise too_large(len(body) * 3 // 4, max_bytes)
    try:
        data = _from_base64(body) if is_base64 else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as e:
        raise InvalidInputError(
            f"This is no base64: {e}.",
            hint='Send a data: URL, base64, or {"name": ..., "media_type": ..., "data": ...}.',
        ) from e
    if max_bytes is not None and len(data) > max_bytes:
        raise too_large(len(data), max_bytes)
    return Decoded(data, unquote(names[0]) if names else "", (head["type"] or "").lower() if head else "")


def _from_base64(text: str) -> bytes:
    """In slices: other threads run between them. Raises ValueError."""
    if "=" in text[:-2]:
        raise ValueError("there is padding within it")
    return b"".join(base64.b64decode(text[at : at + _SLICE], validate=True) for at in range(0, len(text), _SLICE))


def too_large(size: int, limit: int) -> InvalidInputError:
    return InvalidInputError(f"The file has {size:,} bytes; at most {limit:,} are taken.")
