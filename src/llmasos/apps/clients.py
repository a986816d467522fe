"""Whose call it is, where a server with keys stands before the application: jobs and sessions of one key are not
another's.

The server names its caller in a header, by a text that stands for the key and says nothing of it. Only
`llmasos.apps.process`, which nobody but the server can reach, believes that header; elsewhere there is no name, and all
callers are one.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

CLIENT = "llmasos-client"
EVERYBODY = "*"
"""The server itself: it sees what belongs to any of them."""

current: ContextVar[str | None] = ContextVar("llmasos_client", default=None)


def name_for(app: str, key_id: str | None) -> str | None:
    """What an application is told of a key: another text than any other application is told."""
    return None if key_id is None else hashlib.sha256(f"{app}\0{key_id}".encode()).hexdigest()[:32]


def may_see(owner: str | None) -> bool:
    """Whether who calls now may see what belongs to `owner`."""
    return current.get() in (EVERYBODY, owner)


def scoped(id: str) -> str:
    """A name that a caller has chosen, as it is kept: two keys may choose the same."""
    client = current.get()
    return id if client is None else f"{client}:{id}"
