"""Functions that run by the clock."""

import asyncio
import itertools
import threading
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from starlette.requests import Request

from llmasos.apps import Application, Depends, Session
from llmasos.errors import InvalidInputError


def test_it_runs_while_the_application_is_served_and_never_twice_at_once() -> None:
    app, runs, at_once, most = Application(), threading.Semaphore(0), [], []

    @app.schedule(every=0.01)
    def tick(n: Annotated[int, Depends(lambda: 3)], other: int = 4) -> None:
        """Tick."""
        at_once.append((n, other))
        most.append(len(at_once))
        threading.Event().wait(0.02)
        at_once.pop()
        runs.release()

    @app.schedule(every=0.01)
    async def tock() -> None:
        await asyncio.sleep(0)

    assert app.document()["schedules"][0] == {"name": "tick", "summary": "Tick.", "cron": None, "every": 0.01}
    with app.test_client() as client:
        for _ in range(4):
            assert runs.acquire(timeout=10)
        found = {one["name"]: one for one in client.get("/schedules").json()}
    assert set(most) == {1} and found["tick"]["num_runs"] >= 3 and found["tock"]["num_runs"] >= 1
    assert found["tick"]["next"] > "2026" and found["tick"]["error"] is None
    count = app._schedules[0].num_runs
    threading.Event().wait(0.05)
    assert app._schedules[0].num_runs == count  # it ended with the application


def test_a_failure_is_logged_and_the_next_time_comes(caplog: pytest.LogCaptureFixture) -> None:
    app, runs, others = Application(), threading.Semaphore(0), threading.Semaphore(0)

    @app.schedule(every=0.01)
    def broken() -> None:
        runs.release()
        raise ValueError("no luck")

    @app.schedule(every=0.01)
    def refused() -> None:
        others.release()
        raise InvalidInputError("Not today.")

    with app.test_client() as client:
        for _ in range(2):  # when one begins the second time, the first has ended
            assert runs.acquire(timeout=10) and others.acquire(timeout=10)
        errors = [one["error"] for one in client.get("/schedules").json()]
    assert "no luck" in caplog.text and "Not today." in caplog.text
    assert "err_" in errors[0] and errors[1] == "Not today."


def test_cron_says_the_next_time_in_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("croniter")
    app = Application()

    @app.schedule("30 4 * * *")
    def nightly() -> None:
        pass

    [schedule] = app._schedules
    found = schedule.after(datetime(2026, 3, 1, 12, 0, tzinfo=UTC)).astimezone()
    assert (found.hour, found.minute) == (4, 30) and found > datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    with app.test_client() as client:
        [state] = client.get("/schedules").json()
        assert state["next"] and state["num_runs"] == 0 and state["cron"] == "30 4 * * *"


@pytest.mark.parametrize("cron", ["", "hello", "* * *", "61 * * * *", "0 0 30 2 *", "* * * * * * * * *", "*/0 * * * *"])
def test_times_that_are_none_are_refused(cron: str) -> None:
    pytest.importorskip("croniter")
    with pytest.raises(InvalidInputError, match="no cron expression"):
        Application().schedule(cron)(lambda: None)


def test_what_can_not_run_by_itself_is_refused() -> None:
    app = Application()

    def generator() -> Any:
        yield 1

    def client(session: Session) -> None:
        pass

    def asked(request: Request) -> None:
        pass

    for every, function, words in (
        (1, lambda text: None, "wants 'text', and a schedule has no inputs"),
        (1, generator, "is a generator"),
        (1, client, "wants a session"),
        (1, asked, "wants a request"),
        (0, lambda: None, "every=0 is no number"),
        (float("nan"), lambda: None, "no number"),
        (None, lambda: None, "give one"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            app.schedule(every=every)(function)
    with pytest.raises(InvalidInputError, match="needs a time"):
        app.schedule(lambda: None)  # type: ignore[arg-type]
    app.schedule(every=1)(max_of := lambda: None)
    with pytest.raises(InvalidInputError, match="already"):
        app.schedule(every=1)(max_of)
    with pytest.raises(InvalidInputError, match="belongs to every"):
        app.route("/schedules")(lambda: 1)
    assert Application().test_client().get("/schedules").status_code == 404


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-03-28T12:00", "2026-03-29T02:00"),  # 04:00 in summer time, which begins in that night
        ("2026-10-24T12:00", "2026-10-25T03:00"),  # and winter's
        ("2026-07-01T01:59", "2026-07-01T02:00"),
        ("2026-07-01T02:00", "2026-07-02T02:00"),
    ],
)
def test_cron_follows_the_clock_on_the_wall(now: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    pytest.importorskip("croniter")
    app = Application()
    app.schedule("0 4 * * *")(lambda: None)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        found = app._schedules[0].after(datetime.fromisoformat(now).replace(tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found.astimezone(UTC).isoformat() == f"{expected}:00+00:00"


def test_the_hour_that_comes_twice_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    pytest.importorskip("croniter")
    app = Application()
    app.schedule("*/5 * * * *")(lambda: None)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now, times = datetime(2026, 10, 24, 23, 50, tzinfo=UTC), []
        while len(times) < 40:
            now = app._schedules[0].after(now)
            times.append(now)
    finally:
        monkeypatch.undo()
        time.tzset()
    gaps = {(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)}
    assert min(gaps) > 0 and gaps <= {300.0, 3600.0, 3900.0}
