"""The arithmetic of rate limits and quotas."""

import asyncio
from datetime import UTC, date, datetime, timedelta

import pytest
from access_world import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.serve.access.errors import LimitError, QuotaError
from llmasos.serve.access.keys import Limits
from llmasos.serve.access.limits import Meter, Spent, TokenBucket, until_next_month, until_tomorrow
from llmasos.serve.access.usage import Counts, Ledger
from llmasos.store.database import Database

NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)
seconds = st.floats(0, 200, allow_nan=False)


@given(capacity=st.integers(1, 1000), waits=st.lists(seconds, max_size=60))
def test_no_stretch_of_time_sees_more_requests_than_a_bucket_holds_and_gets(capacity: int, waits: list[float]) -> None:
    now, taken = 0.0, []
    bucket = TokenBucket(capacity, now)
    for wait in waits:
        now += wait
        if bucket.wait(1, now) == 0:
            bucket.take(1, now)
            taken.append(now)
    for i, start in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= capacity + (taken[j] - start) * capacity / 60 + 1e-6


@given(capacity=st.integers(1, 1000), steps=st.lists(st.tuples(seconds, st.integers(0, 5000)), max_size=40))
def test_debts_are_paid_before_more_is_given(capacity: int, steps: list[tuple[float, int]]) -> None:
    now, spent, largest = 0.0, 0, 0
    bucket = TokenBucket(capacity, now)
    for wait, cost in steps:
        now += wait
        if bucket.wait(1, now) == 0:
            bucket.take(cost, now)
            spent, largest = spent + cost, max(largest, cost)
        assert spent <= capacity + now * capacity / 60 + largest + 1e-6
        assert bucket.level(now) <= capacity


@given(capacity=st.integers(1, 1000), cost=st.integers(0, 5000), amount=st.integers(1, 1000))
def test_after_the_wait_that_is_told_there_is_room_and_not_a_moment_before(
    capacity: int, cost: int, amount: int
) -> None:
    bucket = TokenBucket(capacity, 0.0)
    bucket.take(cost, 0.0)
    wait = bucket.wait(amount, 0.0)
    assert bucket.wait(amount, wait) == pytest.approx(0, abs=1e-6)
    if wait > 0.01:
        assert bucket.wait(amount, wait * 0.99) > 0


@given(st.lists(st.floats(-100, 100, allow_nan=False), max_size=30))
def test_a_clock_that_is_set_back_neither_fills_nor_empties(moves: list[float]) -> None:
    now, bucket = 1000.0, TokenBucket(60, 1000.0)
    bucket.take(30, now)
    passed = latest = 0.0
    for move in moves:
        now += move
        passed = max(passed, now - 1000.0)
        latest = bucket.level(now)
        bucket.take(0, now)
        assert 30 - 1e-6 <= latest <= min(60, 30 + passed) + 1e-6


def test_new_limits_keep_what_was_used() -> None:
    meter = Meter.of(Limits(requests_per_minute=10), 0.0)
    for _ in range(10):
        meter.admit(None, 0.0, NOON)
    meter.change(Limits(requests_per_minute=12), 0.0)
    meter.admit(None, 0.0, NOON)
    meter.admit(None, 0.0, NOON)
    with pytest.raises(LimitError, match="12 requests per minute"):
        meter.admit(None, 0.0, NOON)
    meter.change(Limits(), 0.0)
    meter.admit(None, 0.0, NOON)


def test_each_limit_refuses_with_the_time_that_it_takes() -> None:
    meter = Meter.of(Limits(requests_per_minute=2), 0.0)
    meter.admit(None, 0.0, NOON)
    meter.admit(None, 0.0, NOON)
    with pytest.raises(LimitError, match="2 requests per minute") as caught:
        meter.admit(None, 0.0, NOON)
    assert caught.value.retry_after == 30

    meter = Meter.of(Limits(tokens_per_minute=600), 0.0)
    meter.admit(None, 0.0, NOON)
    meter.charge(1200, 0.0)
    with pytest.raises(LimitError, match="600 tokens per minute") as caught:
        meter.admit(None, 0.0, NOON)
    assert caught.value.retry_after == 61

    meter = Meter.of(Limits(max_parallel=1), 0.0)
    meter.admit(None, 0.0, NOON)
    with pytest.raises(LimitError, match="at once"):
        meter.admit(None, 0.0, NOON)
    meter.release()
    meter.admit(None, 0.0, NOON)


@pytest.mark.parametrize(
    ("limits", "spent", "wait"),
    [
        (Limits(tokens_per_day=100), Spent(NOON.date(), tokens_today=100), 12 * 3600),
        (Limits(requests_per_day=5), Spent(NOON.date(), requests_today=5), 12 * 3600),
        (Limits(tokens_per_month=100), Spent(NOON.date(), tokens_this_month=100), (17 * 24 + 12) * 3600),
    ],
)
def test_a_used_up_quota_refuses_until_its_period_ends(limits: Limits, spent: Spent, wait: int) -> None:
    meter = Meter.of(limits, 0.0)
    with pytest.raises(QuotaError) as caught:
        meter.admit(spent, 0.0, NOON)
    assert caught.value.retry_after == wait
    meter.admit(Spent(NOON.date()), 0.0, NOON)


def test_requests_in_flight_count_against_the_day() -> None:
    meter = Meter.of(Limits(requests_per_day=3), 0.0)
    for _ in range(3):
        meter.admit(Spent(NOON.date()), 0.0, NOON)
    with pytest.raises(QuotaError):
        meter.admit(Spent(NOON.date()), 0.0, NOON)


def test_what_is_refused_takes_nothing() -> None:
    meter = Meter.of(Limits(requests_per_minute=1, tokens_per_day=1), 0.0)
    for _ in range(5):
        with pytest.raises(QuotaError):
            meter.admit(Spent(NOON.date(), tokens_today=1), 0.0, NOON)
    meter.admit(Spent(NOON.date()), 0.0, NOON)
    assert meter.num_parallel == 1


@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)))
def test_periods_end_at_midnight_utc(moment: datetime) -> None:
    midnight = moment + timedelta(seconds=until_tomorrow(moment))
    assert midnight.time() == datetime.min.time() and timedelta() < midnight - moment <= timedelta(days=1)
    first = moment + timedelta(seconds=until_next_month(moment))
    assert (first.day, first.time()) == (1, datetime.min.time()) and midnight <= first <= moment + timedelta(days=31)


def test_usage_of_other_days_and_months_counts_where_it_belongs() -> None:
    spent = Spent(date(2026, 3, 14), 1, 10, 100)
    assert spent.plus(date(2026, 3, 13), 1, 5) == Spent(date(2026, 3, 14), 1, 10, 105)
    assert spent.plus(date(2026, 2, 14), 1, 5) == spent
    assert spent.on(date(2026, 3, 15)) == Spent(date(2026, 3, 15), 0, 0, 100)
    assert spent.on(date(2026, 4, 1)) == Spent(date(2026, 4, 1), 0, 0, 0)
    assert spent.on(date(2027, 3, 14)) == Spent(date(2027, 3, 14), 0, 0, 0)


events = st.one_of(
    st.tuples(st.just("record"), st.sampled_from(["a", "b"]), st.integers(0, 50)),
    st.tuples(st.just("flush"), st.just(""), st.just(0)),
    st.tuples(st.just("fail"), st.just(""), st.just(0)),
    st.tuples(st.just("pass"), st.just(""), st.integers(0, 40 * 3600)),
    st.tuples(st.just("restart"), st.just(""), st.just(0)),
)


@settings(max_examples=40)
@given(st.lists(events, max_size=25))
def test_quotas_see_every_token_once_however_flushes_failures_days_and_restarts_fall(steps) -> None:
    async def check() -> None:
        clock = Clock(datetime(2026, 3, 30, 20, tzinfo=UTC))
        naive: list[tuple[date, str, int]] = []
        with Database.open("sqlite://") as database:
            ledger = Ledger(database, now=clock.now)
            for what, key, amount in steps:
                if what == "record":
                    ledger.record(key, "m", Counts(requests=1, prompt_tokens=amount, output_tokens=1))
                    naive.append((clock.now().date(), key, amount + 1))
                elif what == "flush":
                    await ledger.flush()
                elif what == "fail":
                    run, database.run = database.run, _broken
                    await ledger.flush()
                    database.run = run
                elif what == "pass":
                    clock.pass_(amount)
                else:
                    await ledger.close()
                    ledger = Ledger(database, now=clock.now)
                today = clock.now().date()
                for one in ("a", "b"):
                    mine = [(day, tokens) for day, id, tokens in naive if id == one]
                    assert await ledger.spent(one) == Spent(
                        today,
                        sum(day == today for day, _ in mine),
                        sum(tokens for day, tokens in mine if day == today),
                        sum(tokens for day, tokens in mine if day.month == today.month),
                    )
            await ledger.close()

    asyncio.run(check())


async def _broken(*_: object, **__: object) -> None:
    from llmasos.errors import StoreError

    raise StoreError("the disk is on fire")
