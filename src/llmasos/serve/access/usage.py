"""What was used, per key, model and day (UTC): counted in memory, written in batches, read for quotas and reports.

Requests only add to a table in memory. A task writes it every FLUSH_SECONDS while there is something to write, and
`close` writes the rest; a server that is killed loses at most those seconds. When the database can't be written, counts
stay and the next attempt has them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from llmasos.errors import StoreError
from llmasos.serve.access import audit, registry
from llmasos.serve.access.limits import Spent
from llmasos.serve.access.tables import UsageRow
from llmasos.store.database import Database, utc_now

FLUSH_SECONDS = 2.0
NO_KEY = ""
"""`key_id` of requests without a key."""

log = logging.getLogger("llmasos.serve.access")


@dataclass
class Counts:
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def add(self, other: Counts) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


_COUNTED = tuple(one.name for one in fields(Counts))


Table = dict[str, dict[tuple[date, str], Counts]]
"""By key, then by day and model: a key's part is found without looking at others'."""


def _add(table: Table, key_id: str, day: date, model: str, counts: Counts) -> None:
    table.setdefault(key_id, {}).setdefault((day, model), Counts()).add(counts)


@dataclass(frozen=True)
class Batch:
    """What is written in one transaction: all of it or nothing."""

    counts: Table
    used: dict[str, datetime]
    audits: list[dict[str, Any]]

    @property
    def is_empty(self) -> bool:
        return not (self.counts or self.used or self.audits)

    def write(self, session: Session) -> None:
        rows = [
            {"day": day, "key_id": key_id, "model": model, **asdict(counts)}
            for key_id, places in sorted(self.counts.items())
            for (day, model), counts in sorted(places.items())  # one order for all servers: no deadlock
        ]
        if rows:
            insert = (sqlite if session.get_bind().dialect.name == "sqlite" else postgresql).insert(UsageRow)
            sums = {name: getattr(UsageRow, name) + getattr(insert.excluded, name) for name in _COUNTED}
            session.execute(insert.on_conflict_do_update(index_elements=["day", "key_id", "model"], set_=sums), rows)
        registry.note_used(session, self.used)
        for one in self.audits:
            audit.note(session, **one)


class Ledger:
    """Usage that is not yet in the database, and the sums of what is, for the keys that have quotas.

    Belongs to one event loop; only transactions run in threads, on what was handed to them.
    """

    def __init__(self, database: Database, *, now: Callable[[], datetime] = utc_now) -> None:
        self._database, self._now = database, now
        self._new: Table = {}
        self._writing: Table = {}
        self._used: dict[str, datetime] = {}
        self._audits: list[dict[str, Any]] = []
        self._spent: dict[str, Spent] = {}
        self._lock = asyncio.Lock()  # of `_writing` and `_spent` against the database's state
        self._timer: asyncio.Task[None] | None = None

    def record(self, key_id: str | None, model: str, counts: Counts) -> None:
        """Add to today's counts. Costs microseconds; written later."""
        moment = self._now()
        _add(self._new, key_id or NO_KEY, moment.date(), model, counts)
        if key_id is not None:
            self._used[key_id] = moment
        self._wake()

    def note(self, actor: str, action: str, target: str, details: dict[str, Any], request_id: str | None) -> None:
        """A line for the audit log, written with the next batch."""
        one = {"actor": actor, "action": action, "target": target, "details": details}
        self._audits.append({**one, "request_id": request_id, "at": self._now()})
        self._wake()

    async def spent(self, key_id: str) -> Spent:
        """What the key has used today and this month, written or not."""
        today = self._now().date()
        if key_id not in self._spent:
            async with self._lock:
                self._spent |= await self._database.run(lambda s: spent(s, [key_id], today), read_only=True)
        total = self._spent[key_id].on(today)
        for table in (self._writing, self._new):
            for (day, _), counts in table.get(key_id, {}).items():
                total = total.plus(day, counts.requests, counts.tokens)
        return total

    def _wake(self) -> None:
        if self._timer is None or self._timer.done():
            self._timer = asyncio.get_running_loop().create_task(self._flush_while_needed())

    async def _flush_while_needed(self) -> None:
        while self._new or self._used or self._audits:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what there is; what can't be written stays for the next time."""
        # whoever waits may be cancelled; whether a batch is written must be known all the same
        await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._lock:
            batch = Batch(self._new, self._used, self._audits)
            if batch.is_empty:
                return
            self._writing = batch.counts
            self._new, self._used, self._audits = {}, {}, []
            key_ids, today = list(self._spent), self._now().date()

            def work(session: Session) -> dict[str, Spent]:
                batch.write(session)
                return spent(session, key_ids, today)  # other servers on this database count, too

            try:
                found = await self._database.run(work)
            except Exception as e:
                log.warning("usage could not be written and is kept for the next attempt: %s", e)
                self._put_back(batch)
            else:
                self._spent |= found
            self._writing = {}

    def _put_back(self, batch: Batch) -> None:
        for key_id, places in batch.counts.items():
            for (day, model), counts in places.items():
                _add(self._new, key_id, day, model, counts)
        self._used = batch.used | self._used
        self._audits = batch.audits + self._audits

    async def close(self) -> None:
        """Write the rest. Raises StoreError if some of it could not be written."""
        await self.flush()
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        if self._new or self._audits:
            raise StoreError("The usage of the last seconds could not be written; the log says why.")


def spent(session: Session, key_ids: Iterable[str], today: date) -> dict[str, Spent]:
    """What is written of these keys' usage, as of `today`."""
    wanted = list(key_ids)
    if not wanted:
        return {}
    tokens = UsageRow.prompt_tokens + UsageRow.output_tokens
    is_today = UsageRow.day == today
    query = (
        select(
            UsageRow.key_id,
            func.sum(case((is_today, UsageRow.requests), else_=0)),
            func.sum(case((is_today, tokens), else_=0)),
            func.sum(tokens),
        )
        .where(UsageRow.key_id.in_(wanted), UsageRow.day >= today.replace(day=1), UsageRow.day <= today)
        .group_by(UsageRow.key_id)
    )
    found = {key_id: Spent(today, *map(int, sums)) for key_id, *sums in session.execute(query)}
    return {key_id: found.get(key_id, Spent(today)) for key_id in wanted}


def report(
    session: Session,
    *,
    since: date | None = None,
    until: date | None = None,
    key_id: str | None = None,
    model: str | None = None,
) -> list[UsageRow]:
    """Rows from day `since` to day `until`, both included; the oldest first."""
    query = select(UsageRow).order_by(UsageRow.day, UsageRow.key_id, UsageRow.model)
    if since is not None:
        query = query.where(UsageRow.day >= since)
    if until is not None:
        query = query.where(UsageRow.day <= until)
    if key_id is not None:
        query = query.where(UsageRow.key_id == key_id)
    if model is not None:
        query = query.where(UsageRow.model == model)
    return list(session.scalars(query))
