"""HTTP with retries, time limits, typed errors and the offline switch; one policy for the sync and the async door."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx

from llmasos.client.address import is_unix, place_of, split_unix
from llmasos.client.sse import Event, EventParser
from llmasos.errors import (
    AuthenticationError,
    BadRequestError,
    NetworkError,
    OfflineError,
    PermissionDeniedError,
    ProviderError,
    ProviderNotFoundError,
    RateLimitError,
    UnavailableError,
)
from llmasos.settings import settings

RETRIED_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
NOT_DONE_STATUS = frozenset({408, 409, 429, 503, 529})
"""Those that say that the server has not done the work: nothing is made twice."""
_PIECE = 1 << 20
MAX_WAIT = 60.0
"""Seconds. A server that asks for a longer pause gets no retry: the caller should decide."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_TYPES: Mapping[int, type[ProviderError]] = {
    **dict.fromkeys((400, 413, 415, 422), BadRequestError),
    401: AuthenticationError,
    403: PermissionDeniedError,
    **dict.fromkeys((404, 410), ProviderNotFoundError),
    429: RateLimitError,
    **dict.fromkeys((502, 503, 504, 529), UnavailableError),
}


@dataclass(frozen=True)
class Target:
    """Where requests go: `http(s)://host/path`, or `unix:/path/of.sock:/path`. `label` names it in messages;
    `key_variable` is what a 401 hint tells people to set."""

    base_url: str
    label: str
    headers: Mapping[str, str] = field(default_factory=dict)
    key_variable: str = ""
    timeout: float = 600.0
    max_retries: int = 2

    @property
    def socket(self) -> str | None:
        """The Unix socket that it listens on, if it does."""
        return split_unix(self.base_url)[0] if is_unix(self.base_url) else None

    @property
    def is_local(self) -> bool:
        return is_unix(self.base_url) or is_loopback(host_of(self.base_url))

    def url(self, path: str) -> str:
        if is_unix(self.base_url):
            return f"http://localhost{split_unix(self.base_url)[1].rstrip('/')}{path}"
        return self.base_url.rstrip("/") + path

    def check_allowed(self) -> None:
        """Raises OfflineError when the settings forbid requests to the outside and this is one."""
        if settings().offline and not self.is_local:
            raise OfflineError(
                f"Offline mode is on, so {self.label} ({host_of(self.base_url)}) was not asked.",
                hint="Unset LLMASOS_OFFLINE and HF_HUB_OFFLINE to allow it, or use a local model.",
            )

    def options(self) -> dict[str, Any]:
        """httpx client options. A proxy from the environment is never put before a loopback address."""
        return {
            "headers": {"user-agent": "llmasos", **self.headers},
            "timeout": httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            "trust_env": not self.is_local,
            "verify": _tls(settings().ca_bundle) if self.base_url.startswith("https") else False,
        }


def path_of(*parts: str, **query: Any) -> str:
    """`/part/part?name=value` of parts and values that may hold anything; values that are None are left out."""
    path = "".join(f"/{quote(part, safe='')}" for part in parts)
    given = {k: str(v).lower() if isinstance(v, bool) else v for k, v in query.items() if v is not None}
    return f"{path}?{urlencode(given)}" if given else path


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses of IPv4 and IPv6; names are not resolved."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=4)
def _tls(ca_bundle: str) -> ssl.SSLContext:
    """Building one costs tens of milliseconds, so clients share it."""
    return ssl.create_default_context(cafile=ca_bundle or None)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: seconds or a date); None if it does not say."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def pause_before(attempt: int, asked: float | None) -> float | None:
    """Seconds to wait before retry number `attempt` (from 0): as asked, else 0.5 s doubling to 8 s, less up to a
    quarter so that many clients do not come back at once. None: the asked pause is too long."""
    if asked is not None:
        return asked if asked <= MAX_WAIT else None
    pause: float = min(8.0, 0.5 * 2**attempt)
    return pause * random.uniform(0.75, 1.0)


def error_message(body: str) -> str:
    """The message inside an error body of any of the usual shapes, else the start of the text."""
    try:
        data = json.loads(body)
    except ValueError:
        return " ".join(body.split())[:300]
    found = data
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)[:300]


def error_detail(body: str) -> dict[str, str]:
    """The texts beside the message of an error body: `code`, `type`, `param`, where it has them."""
    try:
        data = json.loads(body)
    except ValueError:
        return {}
    inner = data.get("error") if isinstance(data, dict) else None
    found = inner if isinstance(inner, dict) else data
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def response_error(target: Target, status: int, body: str, headers: Mapping[str, str] | None = None) -> ProviderError:
    headers = headers or {}
    hint = ""
    if status in (401, 403) and target.key_variable:
        hint = f"Check the key in {target.key_variable}."
    elif status == 429:
        hint = "Wait, or ask for less at once."
    detail = error_detail(body)
    return _TYPES.get(status, ProviderError)(
        f"{target.label} answered {status}: {error_message(body) or 'no reason given'}",
        hint=hint,
        status=status,
        server_code=detail.get("code") or detail.get("type") or "",
        param=detail.get("param"),
        request_id=headers.get("x-request-id") or headers.get("request-id") or "",
        retry_after=retry_after(headers),
    )


def connection_error(target: Target, e: httpx.HTTPError) -> NetworkError:
    if isinstance(e, httpx.TimeoutException) and not isinstance(e, httpx.ConnectTimeout):
        return NetworkError(
            f"{target.label} did not answer within {target.timeout:g} s.",
            hint="Ask for fewer tokens or raise timeout=.",
        )
    if isinstance(e, httpx.ConnectError | httpx.ConnectTimeout):
        return NetworkError(
            f"{target.label} at {place_of(target.base_url)} could not be reached: {e}.",
            hint="Is it running, and the URL right?",
        )
    return NetworkError(f"The connection to {target.label} broke: {e or type(e).__name__}.", hint="Try again.")


class EventReader(Protocol[T_co]):
    """Makes a protocol's objects of events. `done` is true once the stream has said that it is complete."""

    done: bool

    def read(self, event: Event) -> Iterable[T_co]: ...


@dataclass(frozen=True)
class Request:
    """One request: JSON in `body`, or the bytes of `file`, or `data`, or the parts of a multipart `form` (`httpx`'s
    data and files). `once`: it makes something, so it is not asked again where the server may have begun."""

    method: str
    path: str
    body: Any = None
    file: Path | None = None
    data: bytes | None = None
    form: tuple[Mapping[str, str], Mapping[str, Any]] | None = None
    once: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Arguments of httpx's build_request, but for bytes."""
        headers = dict(self.headers)
        if self.file is not None:
            length = str(self.file.stat().st_size)
            return {"headers": headers | {"content-type": "application/octet-stream", "content-length": length}}
        if self.data is not None:
            return {"headers": headers | {"content-type": "application/octet-stream"}}
        if self.form is not None:
            return {"headers": headers, "data": self.form[0], "files": self.form[1]}
        return {"headers": headers, "json": self.body}


@dataclass
class _Attempts:
    """Decides after each failure whether to go on; holds no I/O."""

    target: Target
    request: Request
    number: int = 0

    def after_status(self, status: int, headers: Mapping[str, str]) -> float | None:
        retried = NOT_DONE_STATUS if self.request.once else RETRIED_STATUS
        return self._next(retry_after(headers)) if status in retried else None

    def after_exception(self, e: httpx.HTTPError) -> float | None:
        """Only where the server can't have begun to work: generating twice costs money."""
        return self._next(None) if isinstance(e, httpx.ConnectError | httpx.ConnectTimeout) else None

    def _next(self, asked: float | None) -> float | None:
        if self.number >= self.target.max_retries:
            return None
        self.number += 1
        return pause_before(self.number - 1, asked)


class Http:
    """Blocking requests to one target. Safe to use from several threads."""

    def __init__(
        self, target: Target, transport: httpx.BaseTransport | None = None, *, client: httpx.Client | None = None
    ) -> None:
        self.target = target
        if transport is None and target.socket is not None:
            transport = httpx.HTTPTransport(uds=target.socket)
        self._client = client or httpx.Client(transport=transport, **target.options())

    def at(self, target: Target) -> Http:
        """Another base URL of the same server, over the same connections."""
        return Http(target, client=self._client)

    def json(self, method: str, path: str, body: Any = None, *, once: bool = False) -> Any:
        """The decoded body of a 2xx answer. Raises OfflineError, NetworkError or ProviderError."""
        return self.send(Request(method, path, body, once=once))

    def send(self, request: Request) -> Any:
        """The same for any request."""
        with self._response(request) as response:
            return _decode(self.target, response.read())

    def send_file(self, method: str, path: str, file: Path) -> Any:
        """The decoded answer to a file's bytes, which are sent as they are read."""
        return self.send(Request(method, path, file=file))

    def pieces(self, method: str, path: str) -> Generator[bytes, None, None]:
        """The bytes of a 2xx answer as they come."""
        with self._response(Request(method, path)) as response:
            yield from response.iter_bytes()

    def events(self, method: str, path: str, body: Any = None, *, once: bool = False) -> Generator[Event, None, None]:
        """Server-sent events of a 2xx answer. Closing the iterator closes the connection."""
        return self.events_of(Request(method, path, body, once=once))

    def events_of(self, request: Request) -> Generator[Event, None, None]:
        """The same for any request."""
        parser = EventParser()
        with self._response(request) as response:
            for piece in response.iter_bytes():
                yield from parser.feed(piece)

    def stream(
        self, reader: EventReader[T], method: str, path: str, body: Any = None, *, once: bool = False
    ) -> Generator[T, None, None]:
        """What `reader` makes of the events. Raises NetworkError if the stream ends before it is done."""
        with closing(self.events(method, path, body, once=once)) as events:
            for event in events:
                yield from reader.read(event)
        if not reader.done:
            raise broken_off(self.target)

    @contextmanager
    def _response(self, asked: Request) -> Iterator[httpx.Response]:
        self.target.check_allowed()
        attempts = _Attempts(self.target, asked)
        while True:
            content = asked.data if asked.file is None else _pieces(asked.file)
            url = self.target.url(asked.path)
            request = self._client.build_request(asked.method, url, content=content, **asked.options())
            try:
                response = self._client.send(request, stream=True)
            except httpx.HTTPError as e:
                if (pause := attempts.after_exception(e)) is None:
                    raise connection_error(self.target, e) from e
                time.sleep(pause)
                continue
            try:
                if response.is_success:
                    yield response  # errors while the caller reads arrive here, too
                    return
                pause = attempts.after_status(response.status_code, response.headers)
                if pause is None:
                    text = (response.read()).decode("utf-8", "replace")
                    raise response_error(self.target, response.status_code, text, response.headers)
            except httpx.HTTPError as e:
                raise connection_error(self.target, e) from e
            finally:
                response.close()
            time.sleep(pause)

    def close(self) -> None:
        self._client.close()


class AsyncHttp:
    """The same for asyncio. Belongs to the event loop that it is first used in."""

    def __init__(
        self,
        target: Target,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self.target = target
        if transport is None and target.socket is not None:
            transport = httpx.AsyncHTTPTransport(uds=target.socket)
        self._client = client or httpx.AsyncClient(transport=transport, **target.options())

    def at(self, target: Target) -> AsyncHttp:
        return AsyncHttp(target, client=self._client)

    async def json(self, method: str, path: str, body: Any = None, *, once: bool = False) -> Any:
        return await self.send(Request(method, path, body, once=once))

    async def send(self, request: Request) -> Any:
        async with self._response(request) as response:
            return _decode(self.target, await response.aread())

    async def send_file(self, method: str, path: str, file: Path) -> Any:
        return await self.send(Request(method, path, file=file))

    async def pieces(self, method: str, path: str) -> AsyncGenerator[bytes, None]:
        async with self._response(Request(method, path)) as response:
            async for piece in response.aiter_bytes():
                yield piece

    def events(self, method: str, path: str, body: Any = None, *, once: bool = False) -> AsyncGenerator[Event, None]:
        return self.events_of(Request(method, path, body, once=once))

    async def events_of(self, request: Request) -> AsyncGenerator[Event, None]:
        parser = EventParser()
        async with self._response(request) as response:
            async for piece in response.aiter_bytes():
                for event in parser.feed(piece):
                    yield event

    async def stream(
        self, reader: EventReader[T], method: str, path: str, body: Any = None, *, once: bool = False
    ) -> AsyncGenerator[T, None]:
        async with aclosing(self.events(method, path, body, once=once)) as events:
            async for event in events:
                for item in reader.read(event):
                    yield item
        if not reader.done:
            raise broken_off(self.target)

    @asynccontextmanager
    async def _response(self, asked: Request) -> AsyncIterator[httpx.Response]:
        self.target.check_allowed()
        attempts = _Attempts(self.target, asked)
        while True:
            content = asked.data if asked.file is None else _apieces(asked.file)
            url = self.target.url(asked.path)
            request = self._client.build_request(asked.method, url, content=content, **asked.options())
            try:
                response = await self._client.send(request, stream=True)
            except httpx.HTTPError as e:
                if (pause := attempts.after_exception(e)) is None:
                    raise connection_error(self.target, e) from e
                await asyncio.sleep(pause)
                continue
            try:
                if response.is_success:
                    yield response  # errors while the caller reads arrive here, too
                    return
                pause = attempts.after_status(response.status_code, response.headers)
                if pause is None:
                    text = (await response.aread()).decode("utf-8", "replace")
                    raise response_error(self.target, response.status_code, text, response.headers)
            except httpx.HTTPError as e:
                raise connection_error(self.target, e) from e
            finally:
                await response.aclose()
            await asyncio.sleep(pause)

    async def close(self) -> None:
        await self._client.aclose()


def broken_off(target: Target) -> NetworkError:
    return NetworkError(f"{target.label} ended the stream before the answer was complete.", hint="Try again.")


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as f:
        while piece := f.read(_PIECE):
            yield piece


async def _apieces(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as f:
        while piece := await asyncio.to_thread(f.read, _PIECE):
            yield piece


def _decode(target: Target, body: bytes) -> Any:
    if not body:
        return None  # 204
    try:
        return json.loads(body)
    except ValueError as e:
        start = body[:80].decode("utf-8", "replace")
        raise ProviderError(
            f"{target.label} answered with something that is not JSON: {start!r}.",
            hint="Is the base URL right? It usually ends in /v1.",
        ) from e
