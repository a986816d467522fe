"""Work that goes on without its request (batches, background responses): for whom it is, and what it uses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llmasos.serve import inflight
from llmasos.serve.access.usage import Counts
from llmasos.serve.caller import ANYONE, Caller

if TYPE_CHECKING:
    from llmasos.serve.access.access import Access
    from llmasos.serve.access.limits import Meter


class Aside:
    """Without `access` everything belongs to anyone, and nothing is written down."""

    def __init__(self, access: Access | None = None) -> None:
        self._access = access

    async def caller(self, key_id: str | None) -> Caller:
        """Raises UnauthorizedError for a key that is over."""
        if key_id is None:
            return ANYONE
        return await self._access.caller_with(key_id) if self._access is not None else Caller(key_id=key_id)

    @contextlib.asynccontextmanager
    async def request(self, caller: Caller, path: str, request_id: str) -> AsyncIterator[None]:
        """The block is a request of `caller`: its key's limits hold, and what it uses is written down.

        Raises LimitError, QuotaError, UnauthorizedError.
        """
        state = {"request_id": request_id, "caller": caller}
        flight = inflight.InFlight({"type": "http", "method": "POST", "path": path, "state": state}, None)
        if self._access is None:
            with inflight.noting(flight):
                yield
            return
        good = False
        meter = await self._admitted(caller)
        try:
            with inflight.noting(flight):
                yield
            good = True
        finally:
            if meter is not None:
                meter.release()
            self._access.record(caller, *_used(flight, good))

    async def _admitted(self, caller: Caller) -> Meter | None:
        assert self._access is not None
        if caller.key_id is None:
            return None
        return await self._access.admit(await self._access.active_key(caller.key_id))


def _used(flight: inflight.InFlight, good: bool) -> tuple[str, Counts]:
    """Model and counts. No model is named for a request that reached none."""
    counts = Counts(
        requests=1,
        errors=int(not good),
        prompt_tokens=flight.num_prompt_tokens,
        cached_tokens=flight.num_cached_tokens,
        output_tokens=flight.num_output_tokens,
    )
    return flight.model or "" if counts.tokens else "", counts
