"""Rate limits and quotas: arithmetic without a clock, a lock or a database, all of which the caller has.

A request is admitted before it is known what it costs. So tokens are taken when it has ended, a bucket may fall below
zero, and what comes next waits until it is above again: over time the limit holds, at one moment the requests in flight
may exceed it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

from llmasos.serve.access.errors import LimitError, QuotaError
from llmasos.serve.access.keys import Limits

MINUTE = 60.0


class TokenBucket:
    """Holds up to `capacity`, refilled evenly: an empty one is full after `period` seconds. Begins full."""

    def __init__(self, capacity: float, now: float, *, period: float = MINUTE) -> None:
        self.capacity, self.period = capacity, period
        self._level, self._at = capacity, now

    @property
    def _rate(self) -> float:
        return self.capacity / self.period

    def level(self, now: float) -> float:
        # a clock that is set back takes nothing away
        return min(self.capacity, self._level + max(0.0, now - self._at) * self._rate)

    def take(self, amount: float, now: float) -> None:
        """Also more than there is: the rest is owed."""
        self._level, self._at = self.level(now) - amount, max(now, self._at)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken without owing, or the bucket is full; 0: now."""
        missing = min(amount, self.capacity) - self.level(now)
        if missing <= 1e-9 * self.capacity:  # what rounding left
            return 0.0
        return missing / self._rate

    def resize(self, capacity: float, now: float) -> None:
        if capacity != self.capacity:
            used = self.capacity - self.level(now)
            self.capacity = capacity
            self._level, self._at = capacity - used, max(now, self._at)


@dataclass(frozen=True)
class Spent:
    """What a key has used, as of `day`."""

    day: date
    requests_today: int = 0
    tokens_today: int = 0
    tokens_this_month: int = 0

    def on(self, day: date) -> Spent:
        """The same, seen from `day`: what lies before its day or month no longer counts."""
        if day == self.day:
            return self
        same_month = (day.year, day.month) == (self.day.year, self.day.month)
        return Spent(day, tokens_this_month=self.tokens_this_month if same_month else 0)

    def plus(self, day: date, requests: int, tokens: int) -> Spent:
        """With more usage of `day`."""
        if (day.year, day.month) != (self.day.year, self.day.month):
            return self
        today = day == self.day
        return Spent(
            self.day,
            self.requests_today + requests * today,
            self.tokens_today + tokens * today,
            self.tokens_this_month + tokens,
        )


@dataclass
class Meter:
    """What one key is doing just now."""

    limits: Limits
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_parallel: int = field(default=0, init=False)

    @classmethod
    def of(cls, limits: Limits, now: float) -> Meter:
        meter = cls(limits)
        meter.change(limits, now)
        return meter

    def change(self, limits: Limits, now: float) -> None:
        """New limits hold from now on; what was used stays used."""
        self.limits = limits
        self.requests = _bucket(self.requests, limits.requests_per_minute, now)
        self.tokens = _bucket(self.tokens, limits.tokens_per_minute, now)

    def admit(self, spent: Spent | None, now: float, moment: datetime) -> None:
        """Count one request in; `release` counts it out. Raises LimitError or QuotaError, and then counts nothing.

        `spent`: from the usage so far, for keys with quotas; `now` is monotonic, `moment` the time of day.
        """
        limits = self.limits
        if limits.max_parallel is not None and self.num_parallel >= limits.max_parallel:
            raise LimitError(
                f"This key has {self.num_parallel} requests running, the most it may have at once.",
                hint="Wait until one of them has ended.",
            )
        if self.requests is not None and (wait := self.requests.wait(1, now)):
            raise _too_fast("requests", limits.requests_per_minute, wait)
        if self.tokens is not None and (wait := self.tokens.wait(1, now)):
            raise _too_fast("tokens", limits.tokens_per_minute, wait)
        if spent is not None:
            self._check_quota(spent, moment)
        if self.requests is not None:
            self.requests.take(1, now)
        self.num_parallel += 1

    def _check_quota(self, spent: Spent, moment: datetime) -> None:
        limits = self.limits
        # those in flight are not among the requests that were counted
        requests_today = spent.requests_today + self.num_parallel
        if limits.requests_per_day is not None and requests_today >= limits.requests_per_day:
            raise _used_up(f"{limits.requests_per_day} requests", "day", until_tomorrow(moment))
        if limits.tokens_per_day is not None and spent.tokens_today >= limits.tokens_per_day:
            raise _used_up(f"{limits.tokens_per_day} tokens", "day", until_tomorrow(moment))
        if limits.tokens_per_month is not None and spent.tokens_this_month >= limits.tokens_per_month:
            raise _used_up(f"{limits.tokens_per_month} tokens", "month", until_next_month(moment))

    def release(self) -> None:
        self.num_parallel -= 1

    def charge(self, num_tokens: int, now: float) -> None:
        if self.tokens is not None:
            self.tokens.take(num_tokens, now)

    def headers(self, now: float) -> Mapping[str, str]:
        """OpenAI's `x-ratelimit-*`, for the limits that the key has."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(round(bucket.capacity))
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now) + 1e-9)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.capacity, now):.3f}s"
        return found


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


def _too_fast(what: str, limit: int | None, wait: float) -> LimitError:
    seconds = max(1, math.ceil(wait))
    return LimitError(
        f"This key may use {limit} {what} per minute, and has.", hint=f"Try again in {seconds} s.", retry_after=seconds
    )


def _used_up(what: str, period: str, wait: float) -> QuotaError:
    return QuotaError(
        f"This key may use {what} per {period}, and has.",
        hint="The count begins anew at midnight UTC."
        if period == "day"
        else "The count begins anew on the first day of the month, UTC.",
        retry_after=max(1, math.ceil(wait)),
    )


def until_tomorrow(moment: datetime) -> float:
    """Seconds until midnight, UTC."""
    return _until(moment.astimezone(UTC).date() + timedelta(days=1), moment)


def until_next_month(moment: datetime) -> float:
    today = moment.astimezone(UTC).date()
    return _until((today.replace(day=1) + timedelta(days=32)).replace(day=1), moment)


def _until(day: date, moment: datetime) -> float:
    return (datetime.combine(day, time(), UTC) - moment).total_seconds()
