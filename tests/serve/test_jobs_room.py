"""The room of jobs: turns, progress, pause, restarts, whose they are; with a kind that waits until it is let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from llmasos.client.types.jobs import Job
from llmasos.errors import BusyError, InvalidInputError, NotFoundError
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.jobs import room
from llmasos.serve.jobs.room import Jobs, Kept, Kind, Work
from llmasos.serve.storage import Storage
from llmasos.store.database import Database

ANN, BOB = (Caller(key_id=name, scopes=frozenset({"inference"})) for name in ("ann", "bob"))
BOSS = Caller(key_id="boss", scopes=frozenset({"manage"}))


class Waiting(Kind):
    name, at_once = "waiting", 2

    def __init__(self, jobs: Jobs) -> None:
        self.go: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []
        self.cleared: list[tuple[str, bool]] = []
        self.error: Exception | None = None
        jobs.add(self)

    async def run(self, work: Work) -> Any:
        name = work.job.name
        self.begun.append(name)
        work.change(progress=0.5, message="half")
        await self.go.setdefault(name, asyncio.Event()).wait()
        if self.error:
            raise self.error
        return {"said": work.job.spec["word"]}

    async def give_up(self, job: Kept) -> Any:
        return "as far as it got"

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        self.cleared.append((job.name, is_forgotten))

    def finish(self, name: str) -> None:
        self.go.setdefault(name, asyncio.Event()).set()


class Proud(Waiting):
    name, can_pause, after_restart, scope = "proud", False, "paused", "manage"


@pytest.fixture
async def storage() -> AsyncIterator[Storage]:
    with Database.open() as database:
        yield Storage(database)


def rooms(storage: Storage) -> tuple[Jobs, Waiting]:
    jobs = Jobs(storage)
    return jobs, Waiting(jobs)


async def until(jobs: Jobs, id: str, state: str) -> Job:
    async with asyncio.timeout(10):
        while (job := await jobs.get(BOSS, id)).state != state:
            await asyncio.sleep(0.002)
    return job


async def test_a_job_runs_tells_and_ends(storage: Storage) -> None:
    jobs, kind = rooms(storage)
    work = await jobs.begin("waiting", "one", {"word": "hi"}, ANN)
    seen: list[Job] = []

    async def follow() -> None:
        async for job in jobs.follow(ANN, work.job.id):
            seen.append(job)

    following = asyncio.create_task(follow())
    await until(jobs, work.job.id, "running")
    kind.finish("one")
    await following
    states = list(dict.fromkeys(job.state for job in seen))
    assert states[-2:] == ["running", "done"]
    end = seen[-1]
    assert (end.progress, end.result, end.error, end.message) == (1.0, {"said": "hi"}, None, "")
    assert await jobs.list(ANN) == [end]
    while not kind.cleared:
        await asyncio.sleep(0.001)
    assert kind.cleared == [("one", False)]
    with pytest.raises(BusyError, match="is done; it can't be cancelled"):
        await jobs.act(ANN, end.id, "cancel")


async def test_turns_pause_resume_and_cancel(storage: Storage) -> None:
    jobs, kind = rooms(storage)
    works = [await jobs.begin("waiting", str(i), {"word": i}, ANN) for i in range(4)]
    ids = [work.job.id for work in works]
    await until(jobs, ids[1], "running")
    await asyncio.sleep(0.02)
    assert [job.state for job in await jobs.list(ANN)][::-1] == ["running", "running", "queued", "queued"]
    paused = await jobs.act(ANN, ids[0], "pause")
    assert (paused.state, paused.can_pause) == ("paused", True)
    await until(jobs, ids[2], "running")
    assert (await jobs.act(ANN, ids[0], "pause")).state == "paused"
    cancelled = await jobs.act(ANN, ids[3], "cancel")
    assert (cancelled.state, cancelled.result) == ("cancelled", "as far as it got")
    with pytest.raises(BusyError, match="cancelled"):
        await jobs.act(ANN, ids[3], "resume")
    await jobs.act(ANN, ids[0], "resume")
    for name in "012":
        kind.finish(name)
    assert (await until(jobs, ids[0], "done")).result == {"said": 0}
    assert kind.begun.count("0") == 2


async def test_what_fails_says_why_and_can_go_on(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    jobs, kind = rooms(storage)
    kind.finish("one")
    for error, code, words in (
        (InvalidInputError("Too long.", hint="Cut it."), "invalid_input", ("Too long.", "Cut it.")),
        (ZeroDivisionError("x"), "internal_error", ("The server failed on this job; its log has the cause.", "")),
    ):
        kind.error = error
        work = await jobs.begin("waiting", "one", {"word": ""}, ANN)
        failed = await until(jobs, work.job.id, "failed")
        assert failed.error is not None
        assert (failed.error.code, (failed.error.message, failed.error.hint)) == (code, words)
    kind.error = None
    await jobs.act(ANN, work.job.id, "resume")
    assert (await until(jobs, work.job.id, "done")).error is None


async def test_a_key_sees_and_ends_its_own_jobs_and_a_manager_all(storage: Storage) -> None:
    jobs, _ = rooms(storage)
    Proud(jobs)
    mine = (await jobs.begin("waiting", "ann's", {}, ANN)).job.id
    theirs = (await jobs.begin("waiting", "bob's", {}, BOB)).job.id
    high = (await jobs.begin("proud", "high", {}, ANN)).job.id
    assert [job.id for job in await jobs.list(ANN)] == [mine]  # the kind of the other is for managers
    assert {job.id for job in await jobs.list(BOSS)} == {mine, theirs, high}
    assert [job.id for job in await jobs.list(BOSS, kind="proud")] == [high]
    for call in (jobs.get(ANN, theirs), jobs.act(ANN, theirs, "cancel"), jobs.get(ANN, high), jobs.get(ANN, "none")):
        with pytest.raises(NotFoundError, match="There is no job"):
            await call
    await until(jobs, high, "running")
    with pytest.raises(BusyError, match="can't be paused"):
        await jobs.act(BOSS, high, "pause")
    assert (await jobs.act(BOSS, theirs, "cancel")).state == "cancelled"
    await jobs.close()


@pytest.mark.parametrize("is_killed", [True, False])
async def test_after_a_restart_jobs_go_on_or_are_paused(storage: Storage, is_killed: bool) -> None:
    first, kind = rooms(storage)
    Proud(first)
    a, b = [await first.begin(name, name, {"word": 1}, ANN) for name in ("waiting", "proud")]
    for work in (a, b):
        await until(first, work.job.id, "running")
    while not kind.begun:
        await asyncio.sleep(0.001)
    if not is_killed:
        await first.close()
    second, again = rooms(storage)
    Proud(second)
    await second.start()
    again.finish("waiting")
    assert (await until(second, a.job.id, "done")).result == {"said": 1}
    assert (await second.get(BOSS, b.job.id)).state == "paused"
    assert kind.begun == again.begun == ["waiting"]
    await second.close()
    await first.close()


async def test_another_servers_jobs_are_seen_and_taken_over_when_it_is_gone(storage: Storage) -> None:
    first, _ = rooms(storage)
    work = await first.begin("waiting", "x", {"word": 1})
    await until(first, work.job.id, "running")
    database = storage._database
    other = Storage(database)
    second, again = rooms(other)
    assert (await second.get(ANYONE, work.job.id)).state in ("queued", "running") and not again.begun
    with pytest.raises(BusyError, match="another server"):
        await second.act(ANYONE, work.job.id, "cancel")
    paused = await first.act(ANYONE, work.job.id, "pause")
    assert (await second.get(ANYONE, work.job.id)).state == paused.state == "paused"
    await second.act(ANYONE, work.job.id, "resume")
    again.finish("x")
    await until(second, work.job.id, "done")
    assert (await first.get(ANYONE, work.job.id)).state == "done"
    await second.close()
    await first.close()
    for one in (storage, other):
        await one.close()


async def test_only_the_latest_are_remembered_and_only_so_many_wait(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "KEPT", 3)
    monkeypatch.setattr(room, "MOST_ACTIVE", 2)
    jobs, kind = rooms(storage)
    kind.finish("x")
    for _ in range(5):
        await until(jobs, (await jobs.begin("waiting", "x", {"word": 1}, ANN)).job.id, "done")
    assert len(await jobs.list(ANN)) == 3 and kind.cleared.count(("x", True)) == 2
    for _ in range(2):
        await jobs.begin("waiting", "y", {"word": 1}, ANN)
    with pytest.raises(BusyError, match="not over yet"):
        await jobs.begin("waiting", "y", {"word": 1}, ANN)
    await jobs.begin("waiting", "y", {"word": 1}, BOB)
    await jobs.close()


class Elsewhere:
    """Jobs that somebody else keeps: an application's."""

    def __init__(self) -> None:
        now = datetime(2030, 1, 1, tzinfo=UTC)
        self.job = Job(id="app_1", kind="app", name="ask", state="running", created=now, updated=now)

    async def list(self, caller: Caller) -> Sequence[Job]:
        return [self.job]

    async def get(self, caller: Caller, id: str) -> Job | None:
        return self.job if id == self.job.id else None

    async def cancel(self, caller: Caller, id: str) -> Job | None:
        if id != self.job.id:
            return None
        self.job = self.job.model_copy(update={"state": "cancelled"})
        return self.job

    async def follow(self, caller: Caller, id: str) -> AsyncGenerator[Job, None] | None:
        async def told() -> AsyncGenerator[Job, None]:
            yield self.job

        return told() if id == self.job.id else None


async def test_jobs_of_other_origins_stand_in_the_list(storage: Storage) -> None:
    jobs, _ = rooms(storage)
    jobs.sources.append(Elsewhere())
    mine = await jobs.begin("waiting", "x", {}, ANN)
    assert [job.id for job in await jobs.list(ANN)] == ["app_1", mine.job.id]
    assert [job.id async for job in jobs.follow(ANN, "app_1")] == ["app_1"]
    assert (await jobs.act(ANN, "app_1", "cancel")).state == "cancelled"
    assert (await jobs.get(ANN, "app_1")).state == "cancelled"
    with pytest.raises(BusyError, match="can't be paused"):
        await jobs.act(ANN, "app_1", "pause")
    await jobs.close()
