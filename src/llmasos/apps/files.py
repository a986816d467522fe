"""Files, pictures and sound as inputs and results.

    @app.route("/size")
    def size(picture: Image, table: Annotated[File, Upload(max_size="1MB", accept=("text/csv",))]) -> int:
        return picture.size

In JSON a file is a text: a data: URL, base64, or (as an input) an object {"name", "media_type", "data"}. Forms
(`multipart/form-data`) may bring it as it is, and a result is sent as it is to who accepts its media type rather than
JSON. Command lines write `@path`, tools for models get and give image and audio content.

Names are made harmless: no folders, no control characters. What a picture or sound is, its first bytes say, not its
sender; others are refused. A file is held in memory, so its size is limited: MAX_BYTES unless `Upload` says otherwise.
"""

from __future__ import annotations

import contextlib
import io
import json
import mimetypes
import os
import re
import unicodedata
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from llmasos.apps import problems
from llmasos.client import dataurl
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.apps.routes import Route

MAX_BYTES = 24 * 1024 * 1024
"""Of one file, unless its input says otherwise."""
MAX_BODY = 32 * 1024 * 1024
"""Of a request's body; more where files are wanted that may be larger."""
MARK, MAX_MARK = "x-llmasos-media", "x-llmasos-max-bytes"
"""In a JSON Schema: this text is a file, of these media types (as HTML's `accept`), of at most so many bytes."""
_MAX_PARTS = 200
_MAX_NAME = 200
_UNNAMED = "file"
_SNIFFED = 512

_MAGIC: tuple[tuple[str, int, bytes], ...] = (
    ("image/png", 0, b"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", 0, b"\xff\xd8\xff"),
    ("image/gif", 0, b"GIF8"),
    ("image/bmp", 0, b"BM"),
    ("image/tiff", 0, b"II*\0"),
    ("image/tiff", 0, b"MM\0*"),
    ("image/webp", 8, b"WEBP"),
    ("image/avif", 4, b"ftypavif"),
    ("image/heic", 4, b"ftypheic"),
    ("audio/wav", 8, b"WAVE"),
    ("audio/mpeg", 0, b"ID3"),
    ("audio/mpeg", 0, b"\xff\xfb"),
    ("audio/mpeg", 0, b"\xff\xf3"),
    ("audio/mpeg", 0, b"\xff\xf2"),
    ("audio/aac", 0, b"\xff\xf1"),
    ("audio/aac", 0, b"\xff\xf9"),
    ("audio/flac", 0, b"fLaC"),
    ("audio/ogg", 0, b"OggS"),
    ("audio/mp4", 4, b"ftypM4A"),
    ("audio/webm", 0, b"\x1a\x45\xdf\xa3"),
)
"""First bytes of formats: media type, where, what. Sources: the formats' specifications, WHATWG MIME Sniffing."""
_EXTENSIONS = {
    "audio/wav": ".wav",
    "audio/aac": ".aac",
    "audio/flac": ".flac",
    "audio/mp4": ".m4a",
    "audio/webm": ".webm",
}
_SVG = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE\s+svg[^>]*>\s*)?<svg[\s>]", re.DOTALL)


@dataclass(frozen=True)
class File:
    """A file: its bytes, a harmless name, its media type."""

    data: bytes
    name: str = ""
    media_type: str = ""

    KIND: ClassVar[str] = ""
    """The kind of media type that it must have; empty: any."""

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes):
            raise InvalidInputError(f"A {type(self).__name__} is made of bytes, not {type(self.data).__name__}.")
        name = clean_name(self.name)
        said = self.media_type.partition(";")[0].strip().lower() if isinstance(self.media_type, str) else ""
        said = said if re.fullmatch(r"[\w.+-]+/[\w.+-]+", said, re.ASCII) else ""
        found = said or mimetypes.guess_type(name)[0] or sniff(self.data) or "application/octet-stream"
        if self.KIND:
            known = sniff(self.data)
            if known is None or not known.startswith(f"{self.KIND}/"):
                words = {"image": "a picture", "audio": "sound"}[self.KIND]
                kinds = ", ".join(dict.fromkeys(kind for kind, _, _ in _MAGIC if kind.startswith(self.KIND)))
                raise InvalidInputError(f"The file is not {words} of a known format.", hint=f"Known: {kinds}.")
            found = known
        extension = _EXTENSIONS.get(found) or mimetypes.guess_extension(found) or ""
        object.__setattr__(self, "name", name or _UNNAMED + extension)
        object.__setattr__(self, "media_type", found)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Self:
        """A file of this machine. Raises OSError."""
        return cls(Path(path).read_bytes(), Path(path).name)

    @classmethod
    def from_text(cls, text: str, *, max_bytes: int | None = None) -> Self:
        """Of a data: URL or of base64. Raises InvalidInputError."""
        return cls(*dataurl.decode(text, max_bytes=max_bytes))

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def text(self) -> str:
        """As UTF-8. Raises InvalidInputError where it is not."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise InvalidInputError(f"{self.name} is not UTF-8 text: {e.reason} at byte {e.start}.") from e

    @property
    def url(self) -> str:
        """As a data: URL, which JSON can hold."""
        return dataurl.encode(self.data, self.name, self.media_type)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write it into a folder under its name, or another where that is taken; the path. Raises OSError."""
        stem, suffix = os.path.splitext(self.name)
        for number in range(1, 10_000):
            path = Path(folder) / (self.name if number == 1 else f"{stem}-{number}{suffix}")
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                file.write(self.data)
                return path
        raise FileExistsError(f"{folder} has too many files called {self.name}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.media_type}, {self.size} bytes)"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls, Upload())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _json_schema(cls, Upload(), handler.mode)


class Image(File):
    """A picture: PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF, HEIC or SVG. A route that returns one may also return an image
    of the package Pillow."""

    KIND = "image"


class Audio(File):
    """Sound: WAV, MP3, FLAC, Ogg, AAC, MPEG-4 or WebM."""

    KIND = "audio"


@dataclass(frozen=True)
class Upload:
    """Limits of a file input: `Annotated[File, Upload(max_size="1MB", accept=("text/*", ".pdf"))]`: media types, or
    endings of names."""

    max_size: str | int = MAX_BYTES
    accept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.accept, str):
            object.__setattr__(self, "accept", (self.accept,))
        if isinstance(self.max_size, str):
            from llmasos.apps.llm import bytes_of

            object.__setattr__(self, "max_size", bytes_of(self.max_size))
        for one in self.accept:
            if not re.fullmatch(r"[\w.+-]+/([\w.+-]+|\*)|\.[\w.+-]+", one, re.ASCII):
                raise InvalidInputError(
                    f"accept: {one!r} is no media type.", hint='Write "text/csv", "text/*" or ".csv".', param="accept"
                )

    @property
    def max_bytes(self) -> int:
        assert isinstance(self.max_size, int)
        return self.max_size

    def check(self, file: File) -> None:
        """Raises InvalidInputError for a file that is too large or of another media type."""
        if file.size > self.max_bytes:
            raise dataurl.too_large(file.size, self.max_bytes)
        if self.accept and not any(self._takes(file, one) for one in self.accept):
            raise InvalidInputError(f"{file.name} is {file.media_type}; {' or '.join(self.accept)} is taken.")

    @staticmethod
    def _takes(file: File, accepted: str) -> bool:
        return file.name.lower().endswith(accepted) if accepted[0] == "." else fits(file.media_type, accepted)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not (isinstance(source, type) and issubclass(source, File)):
            raise InvalidInputError(
                f"Upload(...) stands at {source!r}, which is no file.", hint="list[Annotated[File, Upload(...)]]"
            )
        return _schema(source, self)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _json_schema(schema["metadata"]["llmasos_file"], self, handler.mode)


def _schema(kind: type[File], upload: Upload) -> CoreSchema:
    def validate(value: Any) -> File:
        try:
            file = _made(kind, value, upload)
            upload.check(file)
        except InvalidInputError as e:
            message = " ".join(filter(None, (e.message.rstrip("."), f"({e.hint.rstrip('.')})" if e.hint else "")))
            raise PydanticCustomError("file", "{reason}", {"reason": message}) from None
        return file

    return core_schema.no_info_plain_validator_function(
        validate,
        metadata={"llmasos_file": kind},
        serialization=core_schema.plain_serializer_function_ser_schema(lambda file: file.url),
    )


def _made(kind: type[File], value: Any, upload: Upload) -> File:
    """A file of what callers and functions give for one."""
    if isinstance(value, File):
        return value if isinstance(value, kind) else kind(value.data, value.name, value.media_type)
    if isinstance(value, str):
        return kind.from_text(value, max_bytes=upload.max_bytes)
    if isinstance(value, Mapping):
        return _of_object(kind, value, upload)
    if isinstance(value, bytes):
        return kind(value)
    if isinstance(value, Path):
        return kind.from_path(value)
    if kind is Image and hasattr(value, "save") and hasattr(value, "mode"):  # Pillow's
        with io.BytesIO() as file:
            value.save(file, "PNG")
            return Image(file.getvalue(), "image.png")
    raise InvalidInputError(f"A file is expected, not {type(value).__name__}.", hint="A data: URL, or base64.")


def _of_object(kind: type[File], value: Mapping[str, Any], upload: Upload) -> File:
    known = ("name", "media_type", "data")
    if unknown := [name for name in value if name not in known]:
        raise InvalidInputError(f"A file has no {str(unknown[0])[:50]!r}.", hint=f"It has: {', '.join(known)}.")
    if wrong := [name for name in known if not isinstance(value.get(name, ""), str)]:
        raise InvalidInputError(f"{wrong[0]} of a file is a text.")
    if "data" not in value:
        raise InvalidInputError("A file has data, as base64.")
    found = dataurl.decode(value["data"], max_bytes=upload.max_bytes)
    return kind(found.data, value.get("name") or found.name, value.get("media_type") or found.media_type)


def _json_schema(kind: type[File], upload: Upload, mode: str) -> JsonSchemaValue:
    accept = ",".join(upload.accept) or (f"{kind.KIND}/*" if kind.KIND else "*/*")
    kinds = accept if "." not in {one[0] for one in upload.accept} else "*/*"  # endings of names are no media types
    schema: JsonSchemaValue = {"type": "string", "format": "data-url", "contentMediaType": kinds, MARK: accept}
    return schema | ({MAX_MARK: upload.max_bytes} if mode == "validation" else {})


def clean_name(name: str) -> str:
    """A name that is a file's and nothing else on every system: no folders, no control or format characters, no
    devices; empty if nothing is left."""
    last = re.split(r"[/\\]", name)[-1]
    kept = "".join(c for c in last if unicodedata.category(c)[0] != "C" and c not in '<>:"|?*').strip(" .")
    stem, suffix = os.path.splitext(kept)
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", stem.partition(".")[0].lower()):
        stem = f"_{stem}"
    while len((stem + suffix).encode("utf-8")) > _MAX_NAME:
        stem, suffix = (stem[:-1], suffix) if stem and len(suffix) < 20 else (stem, suffix[:-1])
    return stem + suffix


def sniff(data: bytes) -> str | None:
    """The media type of a picture or sound, by its first bytes."""
    head = data[:_SNIFFED]
    for kind, at, magic in _MAGIC:
        if head[at : at + len(magic)] == magic and (magic not in (b"WEBP", b"WAVE") or head[:4] == b"RIFF"):
            return kind
    return "image/svg+xml" if _SVG.match(head) else None


def fits(media_type: str, pattern: str) -> bool:
    """Whether `pattern` (`text/csv`, `text/*`, `*/*`) takes the media type."""
    kind, _, rest = pattern.partition("/")
    return pattern == "*/*" or media_type == pattern or (rest == "*" and media_type.startswith(f"{kind}/"))


def mark_of(schema: Any) -> Literal["one", "many"] | None:
    """Whether a JSON Schema is of a file or of a list of files."""
    if not isinstance(schema, Mapping):
        return None
    if MARK in schema:
        return "one"
    if members := schema.get("anyOf"):
        found = {mark_of(one) for one in members if one.get("type") != "null"}
        return found.pop() if len(found) == 1 else None
    return "many" if schema.get("type") == "array" and mark_of(schema.get("items")) == "one" else None


def body_limit(schemas: list[Mapping[str, Any]]) -> int:
    """Bytes that a request with these inputs may have, files as base64; a list of files counts as its limit of items,
    eight where it has none."""
    total = 0
    for schema in schemas:
        kind = mark_of(schema)
        if kind is not None:
            total += _largest(schema) * (1 if kind == "one" else min(_items(schema), _MAX_PARTS))
    return max(MAX_BODY, total * 4 // 3 + 1024 * 1024) if total else MAX_BODY


def _largest(schema: Mapping[str, Any]) -> int:
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if isinstance(schema.get("items"), Mapping) else ())]
    return max([int(schema.get(MAX_MARK, 0)), *(_largest(one) for one in inner)])


def _items(schema: Mapping[str, Any]) -> int:
    return max([int(schema.get("maxItems", 0)), *(_items(one) for one in schema.get("anyOf", ()))]) or 8


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises RequestError for more than `limit` bytes, before they are read where it is said."""
    return b"".join([piece async for piece in limited(request, limit)])


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    count = 0
    async for piece in request.stream():
        count += len(piece)
        if count > limit:
            raise _too_large(count, limit)
        yield piece


def _too_large(size: int, limit: int) -> problems.RequestError:
    message = f"The body has {size:,} bytes or more; at most {limit:,} are taken."
    return problems.RequestError(problems.problem(413, "too_large", message))


async def read_form(request: Request, route: Route) -> dict[str, Any]:
    """The inputs in a form. Raises RequestError for a form that can't be read, and for one that a page of another site
    sends: browsers send forms without asking the site that they go to."""
    if is_foreign(request.headers):
        body = problems.problem(403, "forbidden", "Pages of other sites may not send forms here.")
        raise problems.RequestError(body)
    parser = MultiPartParser(
        request.headers,
        limited(request, body_limit([i.schema for i in route.inputs])),
        max_files=_MAX_PARTS,
        max_fields=_MAX_PARTS,
        max_part_size=MAX_BODY,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as e:
        message = f"The form can't be read: {getattr(e, 'message', None) or e}."
        raise problems.RequestError(problems.problem(400, "malformed_form", message)) from e
    try:
        inputs = {i.name: i for i in route.inputs}
        values: dict[str, Any] = {}
        for name in form:
            parts = [await _part(part) for part in form.getlist(name) if not _is_empty(part)]
            entry = inputs.get(name)
            if entry is None:
                values[name] = None if not parts else "a file" if isinstance(parts[0], File) else parts[0]
            elif parts:
                values[name] = _value(entry.schema, bool(entry.shapes), entry.shapes == {"many"}, parts)
        return values
    finally:
        await form.close()


def _is_empty(part: UploadFile | str) -> bool:
    """What browsers send for a file that nobody chose."""
    return isinstance(part, UploadFile) and not part.filename and not part.size


async def _part(part: UploadFile | str) -> File | str:
    if isinstance(part, str):
        return part
    return File(await part.read(), part.filename or "", part.content_type or "")


def _value(schema: Mapping[str, Any], is_plain: bool, is_many: bool, parts: list[File | str]) -> Any:
    kind = mark_of(schema)
    if kind == "many" or (is_many and kind is None):
        return parts
    if len(parts) > 1:
        return parts
    if kind is None and not is_plain and isinstance(parts[0], str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(parts[0])
    return parts[0]


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another site sent the request. Browsers say so; programs send neither header."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def wants_raw(accept: str, media_type: str) -> bool:
    """Whether an Accept header names the media type (or `image/*`) above JSON; `*/*` alone names nothing."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        media, *parameters = (one.strip() for one in part.split(";"))
        quality = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        try:
            weights[media] = float(quality)
        except ValueError:
            weights[media] = 1.0
    named = max((weight for one, weight in weights.items() if one != "*/*" and fits(media_type, one)), default=0.0)
    return named > weights.get("application/json", 0.0)


def raw_response(file: File) -> Response:
    """The file as it is. A browser may show it, and run nothing of it."""
    headers = {
        "content-disposition": f"inline; filename*=UTF-8''{quote(file.name, safe='')}",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }
    return Response(file.data, media_type=file.media_type, headers=headers)
