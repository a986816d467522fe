"""How commands reach a running server: `--url` and `--api-key`, else LLMASOS_URL and LLMASOS_API_KEY."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmasos.cli.messages import t
from llmasos.errors import InvalidInputError, NetworkError, ProviderError
from llmasos.settings import api_key, settings

if TYPE_CHECKING:
    from llmasos.client.http import Http
    from llmasos.client.native import Native


@dataclass(frozen=True)
class Address:
    url: str
    key: str


def address(url: str | None, key: str | None) -> Address:
    """Where the server is. Raises InvalidInputError for what is no URL."""
    where = (url or settings().url).rstrip("/")
    parts = urlsplit(where)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInputError(t("server.url", url=where), hint="http://127.0.0.1:8000", param="url")
    for tail in ("/llmasos/v1", "/v1"):
        where = where.removesuffix(tail)
    return Address(where, key or api_key("llmasos"))


@contextlib.contextmanager
def server(url: str | None, key: str | None) -> Iterator[Native]:
    """The server's own API. Raises NetworkError that says how to start one where none answers."""
    from llmasos.client.native import Native

    with own_api(url, key) as http:
        yield Native(http)


@contextlib.contextmanager
def own_api(url: str | None, key: str | None) -> Iterator[Http]:
    """HTTP to it, for the other parts of the SDK."""
    from llmasos.client.http import Http, Target
    from llmasos.client.native import native_target

    found = address(url, key)
    headers = {"authorization": f"Bearer {found.key}"} if found.key else {}
    target = Target(f"{found.url}/v1", "LLMasOS", headers, "LLMASOS_API_KEY (or --api-key)", max_retries=0)
    http = Http(native_target(target))
    try:
        yield http
    except NetworkError as e:
        if isinstance(e, ProviderError) or not is_unreachable(e):
            raise
        raise NetworkError(t("server.none", url=found.url), hint=t("server.none.hint")) from e
    finally:
        http.close()


def is_unreachable(e: NetworkError) -> bool:
    import httpx

    return isinstance(e.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
