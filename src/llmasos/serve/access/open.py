"""Access control of a server that is about to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmasos.serve.access import registry
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.store.database import Database


@contextmanager
def open_access(
    url: str,
    host: str,
    *,
    require_key: bool = False,
    insecure: bool = False,
    origins: tuple[str, ...] = (),
) -> Iterator[Access]:
    """Open the database (`url` empty: the default one), decide who needs a key on a server that listens on `host`, and
    close the database in the end. Raises StoreError, InvalidInputError, and ServerError where keys are required and
    there is none."""
    with Database.open(url) as database:
        with database.session(read_only=True) as session:
            num_keys = registry.num_usable(session)
        policy = Policy.decide(host, num_keys=num_keys, require_key=require_key, insecure=insecure, origins=origins)
        yield Access(database, policy)
