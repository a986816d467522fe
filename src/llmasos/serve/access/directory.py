"""The keys as this server knows them, and whose a given text is.

A request costs a keyed hash and a look into two tables. The argon2 hash of a key's secret is computed when the key is
first used; afterwards its text is known by a fast hash under a random key of this process, so that neither the tables
nor the time of a look-up tell anything about its secret. A wrong secret is told without argon2, so guessing costs the
server no more than any other refused request, and nobody has to be kept waiting for who else guesses from his address.

Other servers and the command line change keys, too: what changed is read every CHECK_AFTER seconds while there are
requests, beside them; no request is decided on knowledge older than STALE_AFTER seconds, unless the database can't be
reached: then what is known holds for GRACE seconds more. A key that nobody here knows may be as new as its request, so
it is looked for once more; all who send such keys share these readings.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from datetime import datetime

from llmasos.errors import StoreError
from llmasos.serve.access import registry
from llmasos.serve.access.errors import UnauthorizedError
from llmasos.serve.access.keys import PREFIX, Key, is_secret, may_be_secret, parts_of
from llmasos.store.database import Database, utc_now

CHECK_AFTER, STALE_AFTER, GRACE = 0.4, 0.9, 60.0
LOOK_EVERY, LOOK_FOR = 0.1, 1.0
"""Seconds from one reading to the next that unknown keys cause, and that they wait for one at most."""

log = logging.getLogger("llmasos.serve.access")


class Directory:
    """Belongs to one event loop."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database, self._clock, self._now = database, clock, now
        self._keys: dict[str, Key] = {}
        self._version = -1
        self._read_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._error: StoreError | None = None
        self._texts: dict[bytes, str] = {}
        self._hash_key = secrets.token_bytes(32)
        self._verifying = asyncio.Semaphore(1)  # one core at most goes into hashing
        self._looking = asyncio.Lock()

    async def find(self, text: str) -> Key:
        """The key of this text. Raises UnauthorizedError if there is none, or if it is over; StoreError if the database
        can't be asked."""
        await self._be_fresh()
        digest = hashlib.blake2b(text.encode(), key=self._hash_key, digest_size=32).digest()
        id = self._texts.get(digest)
        if id is None:
            id = await self._verified(text)
            self._texts[digest] = id  # one text per key can be right, so this does not grow
        key = self._keys[id]
        if (state := key.state(self._now())) != "active":
            raise UnauthorizedError(f"The key {key.name!r} ({id}) is {state}.", hint="Ask for a new one.")
        return key

    async def get(self, id: str) -> Key | None:
        """The key of this id, whatever its state."""
        await self._be_fresh()
        return self._keys.get(id)

    async def _verified(self, text: str) -> str:
        parts = parts_of(text)
        if parts and parts[0] not in self._keys:
            await self._look_again()
        key = self._keys.get(parts[0]) if parts else None
        if parts is None or key is None or key.revoked is not None or not may_be_secret(key.secret_hash, parts[1]):
            raise self._unknown(text)
        async with self._verifying:
            # a thread: the hash would hold up every other request
            is_right = await asyncio.to_thread(is_secret, key.secret_hash, parts[1])
        if not is_right:
            raise self._unknown(text)
        return key.id

    def _unknown(self, text: str) -> UnauthorizedError:
        parts = parts_of(text)
        what = f"The key {parts[0]} is" if parts else "This is"
        looks = "" if text.startswith(PREFIX) else f" Keys begin with {PREFIX}."
        return UnauthorizedError(f"{what} not one of this server's keys.{looks}", hint="Check the key that you send.")

    async def _be_fresh(self) -> None:
        age = self._clock() - self._read_at
        if age < CHECK_AFTER:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read())
        if age < STALE_AFTER:
            return
        # the task is everybody's: whoever stops waiting does not stop it
        await asyncio.wait({self._reading}, timeout=None if age > GRACE else 1.0)
        if self._error is not None and self._clock() - self._read_at > GRACE:
            raise self._error

    async def _look_again(self) -> None:
        """What changed until now. Raises StoreError if the database can't be asked: a key may be a new one."""
        asked = self._clock()
        try:
            async with asyncio.timeout(LOOK_FOR), self._looking:
                if self._read_at < asked and self._error is None:
                    await asyncio.sleep(min(LOOK_EVERY, max(0.0, self._read_at + LOOK_EVERY - self._clock())))
                    await self.refresh()
        except TimeoutError as e:
            raise StoreError("Keys could not be read in time.", hint="Try again.") from e
        if self._error is not None:
            raise self._error

    async def refresh(self) -> None:
        """Read what changed now: after this server itself has changed something."""
        if self._reading is not None:
            await asyncio.wait({self._reading})
        self._reading = asyncio.get_running_loop().create_task(self._read())
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        began, version = self._clock(), self._version
        try:
            self._version, changed = await self._database.run(
                lambda session: registry.changed_since(session, version), read_only=True
            )
        except Exception as e:  # whatever it is, nobody gets in on old knowledge for ever
            log.warning("keys could not be read; those that are known hold for up to %g s: %s", GRACE, e)
            self._error = e if isinstance(e, StoreError) else StoreError(f"Keys could not be read: {e!r}")
            return
        self._error = None
        self._keys |= {key.id: key for key in changed}
        self._read_at = began
