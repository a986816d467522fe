"""Bytes from elsewhere: one HTTP client, resumable downloads, ranged reads, progress.

A download lives in a folder of partial files: `<file>.part` holds the bytes so far, `<file>.part.json` says of which
version of the resource they are. A later process goes on from there when the server still has the same version
(`If-Range`, RFC 9110 §13.1.5) and starts again otherwise. Finished and checked files lose the `.part`.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import io
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from llmasos.errors import (
    ChecksumError,
    DiskFullError,
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NetworkError,
    NotFoundError,
    OfflineError,
    StoreError,
)
from llmasos.settings import settings
from llmasos.store.pip import pip_option

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT = 5.0  # seconds; a hub that cannot be reached must not hold up the next source
READ_TIMEOUT = 30.0  # seconds without a byte
MAX_TRIES = 6  # in a row without a new byte
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
REPORT_EVERY = 0.1  # seconds between reports of progress
MAX_DOCUMENT = 64 << 20  # bytes; index pages and JSON files are far smaller
_CHUNK = 1 << 20
_RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}

Phase = Literal["note", "wait", "download", "check", "unpack", "done", "load"]


@dataclass(frozen=True)
class Progress:
    """One report of a pull: `done` of `total` bytes over all its files; `file` is the one that moved.

    `total` is None while it is not known. `message` is a line for people; phase `note` is nothing but its message.
    """

    phase: Phase
    file: str = ""
    done: int = 0
    total: int | None = None
    message: str = ""


OnProgress = Callable[[Progress], None]


class Stopped(Exception):
    """Raised inside download threads after another file failed or the user interrupted; never seen outside."""


class Meter:
    """Adds up the bytes of parallel downloads and calls `on_progress` from one thread at a time."""

    def __init__(self, on_progress: OnProgress | None, total: int | None = None) -> None:
        self._call, self.total = on_progress, total
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._last = 0.0
        self.stop = threading.Event()

    def alive(self, _: int = 0) -> None:
        """Raises Stopped once the pull has been given up: for work between two reports."""
        if self.stop.is_set():
            raise Stopped

    def begin(self, total: int | None) -> None:
        """A new round over the files, of `total` bytes."""
        self.total, self._done = total, {}

    def note(self, message: str, *, phase: Phase = "note") -> None:
        self._send(Progress(phase, done=sum(self._done.values()), total=self.total, message=message))

    def at(self, file: str, done: int, *, phase: Phase = "download", final: bool = False) -> None:
        """`file` now has `done` bytes. Calls back at most ten times a second, and always when `final`."""
        self.alive()
        self._done[file] = done
        now = time.monotonic()
        if final or now - self._last >= REPORT_EVERY:
            self._last = now
            self._send(Progress(phase, file, sum(list(self._done.values())), self.total))

    def _send(self, progress: Progress) -> None:
        if self._call:
            with self._lock:
                self._call(progress)


def redact(url: str) -> str:
    """`url` without a user name, password or query, for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_here(url: str) -> bool:
    """Whether a URL is of this machine's loopback."""
    from llmasos.client.http import host_of, is_loopback

    return is_loopback(host_of(url))


def check_online(url: str) -> None:
    """Raises OfflineError when the settings forbid requests to the outside, and this is one."""
    if settings().offline and not is_here(url):
        raise OfflineError(
            f"{redact(url)} was not asked: offline mode is on.",
            hint="Unset LLMASOS_OFFLINE (and HF_HUB_OFFLINE), or use a model that `llmasos ls` shows.",
        )


_clients: dict[str, httpx.Client] = {}  # by certificates and offline mode; kept so that connections are used again


@atexit.register
def close_clients() -> None:
    """Close the connections that are kept for the next request."""
    while _clients:
        _clients.popitem()[1].close()


def _client(ca_bundle: str, *, offline: bool) -> httpx.Client:
    """`offline`: without the environment's proxies, which are outside; a redirect is looked at as the request is."""
    import httpx

    verify: ssl.SSLContext | bool = True
    if ca_bundle:
        folder = os.path.isdir(ca_bundle)
        try:
            verify = ssl.create_default_context(
                cafile=None if folder else ca_bundle, capath=ca_bundle if folder else None
            )
        except (OSError, ssl.SSLError) as e:
            raise InvalidInputError(
                f"The certificate bundle {ca_bundle!r} cannot be read: {e}.",
                hint="Set SSL_CERT_FILE to a PEM file, or unset it.",
                param="ca_bundle",
            ) from e
    timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    return httpx.Client(
        verify=verify,
        timeout=timeout,
        follow_redirects=True,
        headers={"Accept-Encoding": "identity"},
        trust_env=not offline,
        event_hooks={"request": [lambda request: check_online(str(request.url))]},
    )


def _http() -> httpx.Client:
    bundle, offline = settings().ca_bundle or pip_option("cert"), settings().offline
    key = f"{'offline' if offline else ''}:{bundle}"
    return _clients.setdefault(key, _clients.get(key) or _client(bundle, offline=offline))


@contextmanager
def request(
    url: str, headers: Mapping[str, str] | None = None, method: str = "GET", *, partial_ok: bool = False
) -> Iterator[httpx.Response]:
    """One streamed request, its failures turned into our errors. `partial_ok` lets 416 through."""
    import httpx

    check_online(url)
    try:
        with _http().stream(method, url, headers=dict(headers or {})) as response:
            if response.status_code >= 400 and not (partial_ok and response.status_code == 416):
                raise _status_error(url, response)
            yield response
    except (httpx.TransportError, httpx.TooManyRedirects, httpx.DecodingError) as e:
        raise NetworkError(
            f"{redact(url)} could not be read: {_reason(e)}.", hint="Check the connection; `llmasos doctor` tests it."
        ) from e
    except httpx.InvalidURL as e:
        raise InvalidInputError(f"{redact(url)!r} is not a valid URL: {e}.") from e


def _reason(e: Exception) -> str:
    return str(e).rstrip(".") or {"ConnectTimeout": "no connection in time", "ReadTimeout": "no answer in time"}.get(
        type(e).__name__, type(e).__name__
    )


class StatusError(NetworkError):
    """A host answered with an HTTP error; `retry_after` in seconds if it said when to come back."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.status, self.retry_after = status, retry_after


def _status_error(url: str, response: httpx.Response) -> LLMasOSError:
    status, where = response.status_code, redact(url)
    if status in (404, 410):
        return NotFoundError(f"{where} does not exist (HTTP {status}).", hint="Check the name and the revision.")
    if status in (401, 403):
        return StatusError(f"{where} refused access (HTTP {status}).", hint="Check the credentials.", status=status)
    after = response.headers.get("Retry-After", "")
    wait = min(float(after), 30.0) if after.isdigit() else 0.0
    return StatusError(
        f"{where} answered with HTTP {status}.", hint="Try again later.", status=status, retry_after=wait
    )


def _passing(error: NetworkError) -> bool:
    if isinstance(error, OfflineError):
        return False
    return error.status in _RETRY_STATUS if isinstance(error, StatusError) else error.__cause__ is not None


def fetch(url: str, headers: Mapping[str, str] | None = None, *, tries: int = 3) -> tuple[bytes, httpx.Response]:
    """A whole small document and its response. A host that cannot be reached is not asked twice."""
    import httpx

    for attempt in range(1, tries + 1):
        try:
            with request(url, headers) as response:
                body = bytearray()
                for chunk in response.iter_bytes(_CHUNK):
                    body += chunk
                    if len(body) > MAX_DOCUMENT:
                        raise FormatError(f"{redact(url)} is longer than {MAX_DOCUMENT} bytes: not what was asked for.")
                return bytes(body), response
        except NetworkError as e:
            unreachable = isinstance(e.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
            if unreachable or not _passing(e) or attempt == tries:
                raise
            time.sleep(getattr(e, "retry_after", 0.0) or BACKOFF * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


class RangeReader(io.RawIOBase):
    """A remote file as a seekable binary file: reads ask for ranges of at least 256 KiB and keep the last ones.

    Raises UnsupportedRange on construction when the server does not answer with ranges.
    """

    _BLOCK = 1 << 18

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._headers = url, dict(headers or {})
        self._position, self._blocks = 0, dict[int, bytes]()
        self.size = 0
        self._blocks[0] = self._get(0, self._BLOCK)

    def _get(self, start: int, stop: int) -> bytes:
        with request(self._url, {**self._headers, "Range": f"bytes={start}-{stop - 1}"}, partial_ok=True) as response:
            if response.status_code == 416:  # an empty resource has no first byte
                return b""
            found = _content_range(response)
            if response.status_code != 206 or found is None or found[0] != start:
                raise UnsupportedRange(f"{redact(self._url)} cannot be read in parts.")
            self.size = found[1]
            body = b""
            for chunk in response.iter_bytes(_CHUNK):
                body += chunk
                if len(body) > stop - start:
                    raise NetworkError(f"{redact(self._url)} sent more bytes than were asked for.")
            return body

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        index, offset = divmod(self._position, self._BLOCK)
        if self._position >= self.size:
            return 0
        if index not in self._blocks:
            if len(self._blocks) > 64:
                self._blocks.clear()
            ahead = max(1, min(16, len(view) // self._BLOCK + 1))
            data = self._get(index * self._BLOCK, min(self.size, (index + ahead) * self._BLOCK))
            for i in range(0, len(data), self._BLOCK):
                self._blocks[index + i // self._BLOCK] = data[i : i + self._BLOCK]
        piece = self._blocks.get(index, b"")[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


class UnsupportedRange(NetworkError):
    pass


def _content_range(response: httpx.Response) -> tuple[int, int] | None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else None


def file_sha256(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `on_bytes` gets the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as f:
        while chunk := f.read(4 * _CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if on_bytes:
                on_bytes(done)
    return digest.hexdigest()


def file_git_sha1(path: Path) -> str:
    """The id that git gives the file's content: what the hub publishes for files outside its large-file store."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(4 * _CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def system_error(e: Exception) -> tuple[int | None, str] | None:
    """Number and words of what the operating system said, also where a library in Rust (tokenizers, safetensors) tells
    of it in words; None for other errors."""
    if isinstance(e, OSError):
        return e.errno, e.strerror or str(e)
    told = re.search(r"(.*?)\s*\(os error (\d+)\)", str(e))
    return (int(told[2]), told[1]) if told else None


def is_full(number: int | None) -> bool:
    """Whether an error of this number says that a disk, or somebody's share of it, is full."""
    return number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def disk_errors(path: Path, then: str | None = None) -> Iterator[None]:
    """Turns the operating system's complaints about writing `path` or below it into our errors: DiskFullError,
    StoreError. then: how to go on when there is room; default: as a pull does."""
    try:
        yield
    except LLMasOSError:
        raise
    except Exception as e:
        if (said := system_error(e)) is None:
            raise
        number, words = said
        message = f"{path} could not be written: {words}."
        if is_full(number):
            room = f"in {path.parent}" if then else "(`llmasos ls` shows sizes, `llmasos rm` removes)"
            hint = f"Free some space {room}; {then or 'a repeated pull goes on'}."
            raise DiskFullError(f"The disk is full: {message}", hint=hint) from e
        hint = f"See that files can be written in {path.parent}{f'; {then}' if then else ''}."
        raise StoreError(message, hint=hint) from e


@dataclass(frozen=True)
class Download:
    """What to fetch: `path` below the folder of partial files, and how to know that it arrived whole."""

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


def download(item: Download, folder: Path, meter: Meter) -> Path:
    """Fetch `item` below `folder`, going on from a partial file, and check it. Returns the finished file.

    Raises NetworkError after MAX_TRIES in a row brought no byte (the partial file stays), ChecksumError (the partial
    file is removed) and DiskFullError.
    """
    target = folder / item.path
    part, state = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    if target.exists() and (item.size is None or target.stat().st_size == item.size):
        meter.at(item.path, target.stat().st_size, final=True)
        return target
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    failures, best = 0, -1
    while True:
        try:
            _attempt(item, part, state, meter)
            break
        except NetworkError as e:
            size = part.stat().st_size if part.exists() else 0
            failures, best = (1, size) if size > best else (failures + 1, best)
            if not _passing(e) or failures >= MAX_TRIES:
                raise
            if meter.stop.wait(getattr(e, "retry_after", 0.0) or min(BACKOFF * 2 ** (failures - 1), 8.0)):
                raise Stopped from e
    _check(item, part, state, meter)
    with disk_errors(target):
        os.replace(part, target)
        state.unlink(missing_ok=True)
    meter.at(item.path, target.stat().st_size, final=True)
    return target


def _attempt(item: Download, part: Path, state: Path, meter: Meter) -> None:
    """One request, appended to `part` where the server allows it."""
    offset, version = _resume_point(item, part, state)
    if offset and offset == item.size:
        return
    headers = dict(item.headers)
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    with request(item.url, headers, partial_ok=True) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{offset}":
                return  # everything had arrived; only the last step was missing
            part.unlink(missing_ok=True)
            raise NetworkError(f"{redact(item.url)} has changed since the download began.") from EOFError()
        found = _content_range(response)
        if response.status_code != 206 or found is None or found[0] != offset:
            offset = 0
        total = found[1] if offset and found else _length(response)
        if item.size is not None and total is not None and total != item.size:
            raise ChecksumError(
                f"{item.path} should have {item.size} bytes and {redact(item.url)} offers {total}.",
                hint="Try again; if it stays so, the source was changed after it was catalogued.",
            )
        with disk_errors(part), part.open("r+b" if offset else "wb") as f:
            _write_state(state, item, response, total)
            f.seek(offset)
            for chunk in response.iter_raw():
                f.write(chunk)
                offset += len(chunk)
                if total is not None and offset > total:
                    raise NetworkError(f"{redact(item.url)} sent more than its {total} bytes.")
                meter.at(item.path, offset)
        if total is not None and offset != total:
            raise NetworkError(f"{redact(item.url)} ended after {offset} of {total} bytes.") from EOFError()


def _length(response: httpx.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and "Content-Encoding" not in response.headers else None


def _resume_point(item: Download, part: Path, state: Path) -> tuple[int, str]:
    """Bytes that can be kept and the version they are of; (0, "") to start again.

    Without a version the bytes are kept only if a hash will tell whether the pieces belong together.
    """
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        size = part.stat().st_size
    except (OSError, ValueError):
        return 0, ""
    same = isinstance(known, dict) and known.get("url") == redact(item.url) and known.get("sha256") == item.sha256
    version = str(known.get("version", "")) if same else ""
    if not same or not (version or item.sha256 or item.git_sha1) or (item.size is not None and size > item.size):
        return 0, ""
    return size, version


def _write_state(state: Path, item: Download, response: httpx.Response, total: int | None) -> None:
    etag = response.headers.get("ETag", "")
    version = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    facts = {"url": redact(item.url), "sha256": item.sha256, "version": version, "size": total}
    state.write_text(json.dumps(facts), encoding="utf-8")


def _check(item: Download, part: Path, state: Path, meter: Meter) -> None:
    if item.size is not None and part.stat().st_size != item.size:
        wrong = f"has {part.stat().st_size} bytes instead of {item.size}"
    elif item.sha256 and (found := file_sha256(part, on_bytes=meter.alive)) != item.sha256:
        wrong = f"has the SHA-256 {found[:16]}… instead of {item.sha256[:16]}…"
    elif item.git_sha1 and not item.sha256 and (found := file_git_sha1(part)) != item.git_sha1:
        wrong = f"has the git id {found[:16]}… instead of {item.git_sha1[:16]}…"
    else:
        return
    part.unlink(missing_ok=True)
    state.unlink(missing_ok=True)
    raise ChecksumError(
        f"{item.path} from {redact(item.url)} {wrong}.",
        hint="The damaged download was removed; repeat the command.",
    )
