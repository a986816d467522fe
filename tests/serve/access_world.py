"""Keys, clients and clocks for the tests of access."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
from fake_llm import FakeLLM

from llmasos.serve.access import registry
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.server import create_app
from llmasos.store.database import Database

REQUIRED = Policy(require_key=True, exposed=True)
LOOPBACK = Policy()
INSECURE = Policy(exposed=True)
BODY = {"model": "fake", "prompt": "hi"}


def make_key(database: Database, name: str = "ann", scopes: tuple[str, ...] = ("inference",), **fields) -> str:
    """The text of a new key."""
    with database.session() as session:
        return registry.create(session, {"name": name, "scopes": list(scopes), **fields}, actor="local:test")[1]


def id_of(text: str) -> str:
    return text.split("-")[2]


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


class Clock:
    """Both kinds of time, which pass only when told to."""

    def __init__(self, moment: datetime = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)) -> None:
        self.moment, self.seconds = moment, 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.moment

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds
        self.moment += timedelta(seconds=seconds)


def client_of(app, *, address: str = "127.0.0.1", host: str = "127.0.0.1:8000") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 50000))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


def guarded(
    database: Database, policy: Policy = REQUIRED, *, clock: Clock | None = None, llms=None, **options
) -> tuple[Access, httpx.AsyncClient]:
    """An application behind access control, and a client that may be used with `async with`."""
    times = {"clock": clock.monotonic, "now": clock.now} if clock else {}
    access = Access(database, policy, **times)
    app = create_app(llms or FakeLLM(), access=access, **options)
    return access, client_of(app)
