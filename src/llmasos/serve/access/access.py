"""Everything about access of one running server: which keys there are, what they may still do, what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from starlette.datastructures import Headers
from starlette.types import Scope as Connection

from llmasos.serve.access.directory import Directory
from llmasos.serve.access.errors import ForbiddenError, UnauthorizedError
from llmasos.serve.access.keys import PREFIX, Key
from llmasos.serve.access.limits import Meter
from llmasos.serve.access.policy import NOBODY, Policy, is_local, key_in
from llmasos.serve.access.routes import KNOWLEDGE_SEARCH, Rule, is_for_apps
from llmasos.serve.access.usage import Counts, Ledger
from llmasos.serve.caller import ANYONE, Caller
from llmasos.store.database import Database, utc_now

TENANT = "llmasos.tenant"
"""Where a connection from an application's process has its `Tenant`."""


@dataclass(frozen=True)
class Tenant:
    """An installed application that asks at its own socket. `knowledge`: the bases that it may search."""

    name: str
    key_id: str
    knowledge: tuple[str, ...] = ()


class Access:
    """Belongs to one event loop. `close` it there before the database."""

    def __init__(
        self,
        database: Database,
        policy: Policy = Policy(),  # noqa: B008  # frozen
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.database, self.policy = database, policy
        self._clock, self._now = clock, now
        self.directory = Directory(database, clock=clock, now=now)
        self.ledger = Ledger(database, now=now)
        self._meters: dict[str, Meter] = {}

    async def caller(self, connection: Connection, rule: Rule) -> tuple[Caller, Key | None]:
        """Who sends this request, and that it may. Raises UnauthorizedError, ForbiddenError, LimitError."""
        tenant: Tenant | None = connection.get(TENANT)
        if tenant is not None:
            return await self._of_app(tenant, connection, rule)
        if rule.access == "open":
            return self.policy.without_key(connection) or NOBODY, None
        text = key_in(Headers(scope=connection))
        # Clients of open servers send any word for a key; one of ours is meant, and its limits hold.
        if text is not None and (self.policy.require_key or text.startswith(PREFIX)):
            key = await self.directory.find(text)
            if "app" in key.scopes:
                raise UnauthorizedError(f"The key {key.id} belongs to an application, whose process alone can use it.")
            caller = key.caller
        else:
            key, caller = None, self._without_key(connection, rule, sent=text is not None)
        match rule.access:
            case "inference" | "manage":
                caller.check_scope(rule.access)
            case "publish" if "manage" not in caller.scopes:
                caller.check_scope("publish")
            case "metrics" if key is not None or not is_local(connection):
                caller.check_scope("manage")
        return caller, key

    async def _of_app(self, tenant: Tenant, connection: Connection, rule: Rule) -> tuple[Caller, Key]:
        """Who asks at the socket of an application is that application, if it has its key, and may do what it was
        granted of what is for applications. Raises UnauthorizedError, ForbiddenError."""
        text = key_in(Headers(scope=connection))
        if text is None:
            raise UnauthorizedError("An application's key is needed.", hint="It is in LLMASOS_API_KEY.")
        key = await self.directory.find(text)
        if key.id != tenant.key_id or "app" not in key.scopes:
            raise UnauthorizedError(f"The key {key.id} is not that of the application {tenant.name}.")
        if not is_for_apps(rule):
            raise ForbiddenError(f"Applications may not ask for {connection['method']} {connection['path']}.")
        if rule.path == KNOWLEDGE_SEARCH and connection["path"].split("/")[4] not in tenant.knowledge:
            raise ForbiddenError(
                f"{tenant.name} may not search this knowledge base.",
                hint="permissions.knowledge of its llmasos.toml names those that it may.",
            )
        return replace(key.caller, scopes=frozenset({"inference"}), apps=()), key

    def _without_key(self, connection: Connection, rule: Rule, *, sent: bool) -> Caller:
        caller = self.policy.without_key(connection)
        if caller is None and rule.access == "metrics" and is_local(connection):
            caller = ANYONE
        if caller is None and sent:
            raise UnauthorizedError(f"The key sent is none of this server's: they begin with {PREFIX}.")
        if caller is None:
            raise UnauthorizedError(
                "A key is needed.",
                hint="Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`; `llmasos key create NAME` makes one.",
            )
        if self.policy.is_foreign_page(connection):
            raise ForbiddenError(
                "A web page of another origin may not do this.", hint="Allow its origin when the server is started."
            )
        return caller

    async def caller_with(self, key_id: str) -> Caller:
        """The caller of a key, for work that goes on without its request (a batch). Raises UnauthorizedError if the key
        is over."""
        return (await self.active_key(key_id)).caller

    async def active_key(self, key_id: str) -> Key:
        """Raises UnauthorizedError if the key is over."""
        key = await self.directory.get(key_id)
        if key is None or key.state(self._now()) != "active":
            raise UnauthorizedError(f"The key {key_id} is revoked or expired.")
        return key

    async def admit(self, key: Key) -> Meter:
        """Count a request of this key in. The meter's `release` counts it out. Raises LimitError, QuotaError."""
        meter = self.meter(key)
        spent = await self.ledger.spent(key.id) if key.limits.has_quota else None
        meter.admit(spent, self._clock(), self._now())
        return meter

    def meter(self, key: Key) -> Meter:
        meter = self._meters.get(key.id)
        if meter is None:
            meter = self._meters[key.id] = Meter.of(key.limits, self._clock())
        elif meter.limits is not key.limits:
            meter.change(key.limits, self._clock())
        return meter

    def limit_headers(self, meter: Meter) -> Mapping[str, str]:
        return meter.headers(self._clock())

    def record(self, caller: Caller, model: str, counts: Counts) -> None:
        """What a request, or one of a batch, has used."""
        if caller.key_id is not None and (meter := self._meters.get(caller.key_id)) is not None:
            meter.charge(counts.tokens, self._clock())
        self.ledger.record(caller.key_id, model, counts)

    async def close(self) -> None:
        """Write what is not yet written. Raises StoreError if that fails."""
        await self.ledger.close()
