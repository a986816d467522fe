"""Addresses of servers on a Unix socket: `unix:/run/llmasos.sock:/v1`, the socket's path and, behind a colon, the
URL's."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from llmasos.errors import InvalidInputError

_UNIX = re.compile(r"unix:(?://(?=/))?(?P<socket>/[^:?#]+)(?::(?P<path>/[^?#]*)?)?")


def is_unix(url: str) -> bool:
    return url.startswith("unix:")


def split_unix(url: str) -> tuple[str, str]:
    """The socket's path and the URL's. Raises InvalidInputError for an address of another form."""
    match = _UNIX.fullmatch(url)
    if match is None:
        raise InvalidInputError(
            f"{url!r} is not the address of a Unix socket.",
            hint="Write unix:/path/of.sock, or unix:/path/of.sock:/v1; the path has no colon.",
            param="base_url",
        )
    return match["socket"], match["path"] or ""


def place_of(url: str) -> str:
    """Host and port, or the socket: what a message says of where it was asked."""
    if is_unix(url):
        return split_unix(url)[0]
    parts = urlsplit(url)
    return f"{parts.hostname or ''}:{parts.port}" if parts.port else parts.hostname or ""
