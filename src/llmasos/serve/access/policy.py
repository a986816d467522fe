"""Who needs no key: what is decided once, when the server starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope as Connection

from llmasos.apps.hosting import foreign_host
from llmasos.client.http import is_loopback
from llmasos.errors import ServerError
from llmasos.serve.caller import ANYONE, Caller

STRANGER = Caller(scopes=frozenset({"inference"}))
"""Somebody without a key from elsewhere, on a server that was opened to everyone: may ask models, not manage."""
NOBODY = Caller(name="nobody", scopes=frozenset(), models=(), apps=())
"""Whoever asks for what is open to everybody, where everything else needs a key."""
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True)
class Policy:
    """`require_key`: nobody goes without. `exposed`: the server listens beyond loopback. `origins`: web pages that may
    call it from a browser (CORS); `*`: all."""

    require_key: bool = False
    exposed: bool = False
    origins: tuple[str, ...] = ()

    @classmethod
    def decide(
        cls,
        host: str,
        *,
        num_keys: int,
        require_key: bool = False,
        insecure: bool = False,
        origins: tuple[str, ...] = (),
    ) -> Policy:
        """What holds for a server that listens on `host`. `num_keys`: keys that open something now.

        Keys are required where others can reach the server, unless it is `insecure`; on loopback only with
        `require_key`. Raises ServerError where they are and there is none: nobody could get in.
        """
        exposed = not is_loopback(host)
        required = require_key or (exposed and not insecure)
        if required and not num_keys:
            why, ways = "Keys are required, and there is none.", ["Make one: llmasos key create NAME."]
            if exposed and not require_key:
                why = f"host {host!r} can be reached from other machines, so keys are required, and there is none."
                ways.append("Or use --host 127.0.0.1, or --insecure if everyone who can reach it may use it.")
            raise ServerError(why, hint=" ".join(ways))
        return cls(required, exposed, origins)

    def without_key(self, connection: Connection) -> Caller | None:
        """Whom a request without a key is taken for; None: it needs one."""
        if self.require_key:
            return None
        if is_local(connection):
            return ANYONE
        # On a loopback server only a proxy can have brought it, and from where is not known.
        return STRANGER if self.exposed else None

    def is_foreign_page(self, connection: Connection) -> bool:
        """Whether a web page of another origin sends this, in its visitor's name.

        A browser sends some requests without asking first; only their answers are kept from the page. Without keys the
        server could not tell them from its owner's.
        """
        headers = Headers(scope=connection)
        origin = headers.get("origin")
        if origin is None or connection["method"] in ("GET", "HEAD", "OPTIONS"):
            return False
        own = f"{connection.get('scheme', 'http')}://{headers.get('host', '')}"
        return origin != own and origin not in self.origins and "*" not in self.origins


def is_local(connection: Connection) -> bool:
    """Whether a request was sent on this machine, by nobody else's order: it comes from a loopback address, names a
    loopback host (no web page's), and no proxy says that it passes it on."""
    client = connection.get("client")
    headers = Headers(scope=connection)
    return (
        client is not None
        and is_loopback(client[0])
        and foreign_host(connection) is None
        and not any(name in headers for name in _FORWARDED)
    )


def key_in(headers: Mapping[str, str]) -> str | None:
    """The key that a request carries: `Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`."""
    kind, _, text = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and text.strip():
        return text.strip()
    return headers.get("x-api-key", "").strip() or None
