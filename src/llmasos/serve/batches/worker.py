"""What runs batches: a few lines at a time, shared fairly, at low priority, until all are done or their time is over.

One server works on the batches of a place (a home: where their input lies) at a time; it holds a lock on
`<home>/files/.worker.lock`, which the system takes back from a server that dies. Others of the place wait for it and go
on from what the files say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter, deque
from collections.abc import Iterator
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial

from filelock import FileLock, Timeout

from llmasos.client.types.files import Batch, BatchCounts, BatchError, BatchList, BatchRequest
from llmasos.errors import DiskFullError, LLMasOSError
from llmasos.serve.aside import Aside
from llmasos.serve.batches import store
from llmasos.serve.batches.answers import Answers, TryLaterError
from llmasos.serve.batches.ledger import Ledger
from llmasos.serve.batches.lines import SHOWN_ERRORS, Line, LineError, Report, check, read
from llmasos.serve.caller import Caller
from llmasos.serve.files.store import Files
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.problems import problem_of
from llmasos.serve.storage import Storage
from llmasos.store.database import utc_now

log = logging.getLogger("llmasos.serve.batches")

CONCURRENCY = 16
"""Lines that are answered at once, of all batches together."""
MAX_CRASHES = 3
"""How often a line is tried again after its model's process ended. Alone: else it would take others with it."""
LONGEST_PAUSE = 60.0
SAVE_SECONDS = 1.0
"""How often results are synced to disk and progress is noted in the database."""
POLL_SECONDS = 2.0
"""How often the database is asked for what other servers were told."""


@dataclass
class Try:
    line: Line
    num: int = 0
    num_crashes: int = 0


@dataclass
class Running:
    """A batch that is being worked on. `ending`: what it becomes as soon as nothing of it is in flight any more."""

    job: store.Job
    caller: Caller
    ledger: Ledger
    rest: Iterator[Line | LineError]
    again: deque[Try] = field(default_factory=deque)
    flying: set[asyncio.Task[None]] = field(default_factory=set)
    ending: str | None = None
    error: BatchError | None = None
    exhausted: bool = False
    careful: bool = False
    not_before: float = 0.0
    saved: tuple[int, int] = (-1, -1)

    @property
    def counts(self) -> tuple[int, int]:
        return self.ledger.num_completed, self.ledger.num_failed

    @property
    def is_over(self) -> bool:
        return not self.flying and (self.ending is not None or (self.exhausted and not self.again))

    def may_go_on(self, now: float, share: int) -> bool:
        has_more = not self.exhausted or bool(self.again)
        limit = 1 if self.careful else share
        return self.ending is None and has_more and len(self.flying) < limit and self.not_before <= now

    def next_try(self) -> Try | None:
        """What is still to be answered, in the order of the file."""
        if self.again:
            return self.again.popleft()
        for line in self.rest:
            if isinstance(line, Line) and line.custom_id not in self.ledger.done:
                return Try(line)
        self.exhausted = True
        return None


class Batches:
    """`start` and `stop` belong to the server's life. Between them batches are run; what is not finished at `stop` goes
    on after the next `start`, here or in another process."""

    def __init__(
        self,
        storage: Storage,
        files: Files,
        models: Models,
        answers: Answers,
        aside: Aside,
        *,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self.storage, self.files, self.models = storage, files, models
        self._answers, self._aside = answers, aside
        self._concurrency = concurrency
        # one batch alone leaves room for the next one to begin
        self._share = max(1, concurrency * 3 // 4)
        self._running: dict[str, Running] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._num_flying = 0
        self._news = asyncio.Event()  # the database has something new
        self._room = asyncio.Event()  # perhaps a line can be handed out
        self._lock = FileLock(files.folder / ".worker.lock", thread_local=False)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._live(), context=Context())]

    async def stop(self) -> None:
        """Nothing new is begun, what is in flight is dropped: it will be answered after the next start."""
        tasks, self._tasks = self._tasks, []
        await _end(tasks)
        await _end([*self._preparing.values(), *(task for one in self._running.values() for task in one.flying)])
        for batch in self._running.values():
            with contextlib.suppress(LLMasOSError):
                await asyncio.to_thread(batch.ledger.sync)
            batch.ledger.close()
        self._running.clear()
        self._lock.release()

    # what clients ask

    async def create(self, caller: Caller, body: BatchRequest) -> Batch:
        """Raises InvalidInputError, TooLargeError for a key that stores as much as it may, DiskFullError."""
        await self.files.admit(caller)
        batch = await self.storage.run(lambda session: store.create(session, caller.key_id, body))
        self._news.set()
        return batch

    async def get(self, caller: Caller, id: str) -> Batch:
        """Raises BatchNotFoundError."""
        batch = await self.storage.run(lambda session: store.get(session, id, caller.key_id), read_only=True)
        return self._as_it_is(batch)

    async def list(self, caller: Caller, after: str | None, limit: int) -> BatchList:
        page = await self.storage.run(lambda s: store.list_page(s, caller.key_id, after, limit), read_only=True)
        page.data = [self._as_it_is(batch) for batch in page.data]
        return page

    async def cancel(self, caller: Caller, id: str) -> Batch:
        batch = await self.storage.run(lambda session: store.cancel(session, id, caller.key_id))
        self._cancel(id)
        return self._as_it_is(batch)

    def _as_it_is(self, batch: Batch) -> Batch:
        """With the counts of this moment; the database has those of a second ago."""
        if (running := self._running.get(batch.id)) is not None:
            completed, failed = running.counts
            total = batch.request_counts.total
            batch.request_counts = BatchCounts(total=total, completed=completed, failed=failed)
        return batch

    # the life of the worker

    async def _live(self) -> None:
        while True:
            try:
                await self._become_the_worker()
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._look())
                    group.create_task(self._hand_out())
                    group.create_task(self._save())
            except* Exception:
                log.exception("the batch worker failed; it begins again")
            await asyncio.sleep(POLL_SECONDS)

    async def _become_the_worker(self) -> None:
        await asyncio.to_thread(self.files.folder.mkdir, parents=True, exist_ok=True)
        while not self._lock.is_locked:
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        """Take up what the database has, and what is cancelled or late."""
        place = self.storage.place
        while True:
            self._news.clear()
            for job in await self.storage.run(lambda session: store.active(session, place), read_only=True):
                if job.id not in self._running and job.id not in self._preparing:
                    task = asyncio.create_task(self._prepare(job))
                    self._preparing[job.id] = task
                    task.add_done_callback(partial(self._prepared, job.id))
                elif job.status == "cancelling":
                    self._cancel(job.id)
            now = utc_now()
            for batch in list(self._running.values()):
                if batch.job.expires <= now:
                    self._end_early(batch, "expired")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_SECONDS)

    def _prepared(self, id: str, task: asyncio.Task[None]) -> None:
        del self._preparing[id]
        if not task.cancelled() and (e := task.exception()) is not None:
            log.error("the batch %s could not be begun", id, exc_info=e)

    async def _prepare(self, job: store.Job) -> None:
        """Check a batch that is new; go on with one that was begun."""
        ledger = await asyncio.to_thread(Ledger, self.files.path(job.output_id), self.files.path(job.error_id))
        path = self.files.path(job.input_id)
        status = job.status
        try:
            caller = await self._aside.caller(job.key_id)
            if job.status == "validating":
                ledger.clear()
                report = await asyncio.to_thread(check, path, job.endpoint)
                await self._check_models(caller, report)
                if report.errors:
                    await self._refuse(job, ledger, report)
                    return
                model = next(iter(report.models)) if len(report.models) == 1 else None
                status = await self.storage.run(lambda s: store.begun(s, job.id, report.total, model))
        except (LLMasOSError, OSError) as e:
            if getattr(e, "retry_after", None) is not None:  # the database is busy, say: the next look begins again
                ledger.close()
                raise
            if isinstance(e, OSError):
                error = BatchError(code="input_file_unreadable", message=f"The input could not be read: {e.strerror}.")
            else:
                error = _error_of(e)
            await self.storage.run(lambda session: store.over(session, job, "failed", ledger, self.files, [error]))
            ledger.close()
            return
        except BaseException:
            ledger.close()
            raise
        self._running[job.id] = Running(job, caller, ledger, read(path, job.endpoint))
        if status == "cancelling":
            self._cancel(job.id)
        self._news.set()  # its time may be over
        self._room.set()

    async def _check_models(self, caller: Caller, report: Report) -> None:
        for name, line in report.models.items():
            try:
                await self.models.look(name)
                self.models.check(name, caller)
            except LLMasOSError as e:
                error = _error_of(e)
                if isinstance(e, ModelNotFoundError):
                    error.code = "model_not_found"
                report.errors.append((error.model_copy(update={"line": line, "param": "body.model"}), None))

    async def _refuse(self, job: store.Job, ledger: Ledger, report: Report) -> None:
        def work() -> None:
            for error, custom_id in report.errors:
                ledger.failed(custom_id, error)
            ledger.sync()
            ledger.num_failed = 0  # lines that were wrong are no requests that failed

        await asyncio.to_thread(work)
        shown = [error for error, _ in report.errors[:SHOWN_ERRORS]]
        await self.storage.run(lambda session: store.over(session, job, "failed", ledger, self.files, shown))
        ledger.close()

    async def _hand_out(self) -> None:
        while True:
            self._room.clear()
            if (over := next((batch for batch in self._running.values() if batch.is_over), None)) is not None:
                await self._finish(over)
                continue
            if (batch := self._next_batch()) is None:
                await self._room.wait()
                continue
            # in a thread: going over the lines of a long file that are done takes a while
            asking = asyncio.ensure_future(asyncio.to_thread(batch.next_try))
            try:
                one = await asyncio.shield(asking)
            except asyncio.CancelledError:  # the worker begins again or stops: a line that was taken goes back
                if (taken := await asking) is not None:
                    batch.again.append(taken)
                raise
            if one is not None and batch.ending is None:
                self._num_flying += 1
                task = asyncio.create_task(self._answer(batch, one))
                batch.flying.add(task)
                task.add_done_callback(partial(self._landed, batch))

    def _next_batch(self) -> Running | None:
        """Whose turn it is: of the keys the one with the least in flight, of its batches likewise; then the oldest."""
        if self._num_flying >= self._concurrency:
            return None
        now = asyncio.get_running_loop().time()
        by_key: Counter[str | None] = Counter()
        for batch in self._running.values():
            by_key[batch.job.key_id] += len(batch.flying)
        ready = [batch for batch in self._running.values() if batch.may_go_on(now, self._share)]
        return min(ready, key=lambda batch: (by_key[batch.job.key_id], len(batch.flying)), default=None)

    async def _answer(self, batch: Running, one: Try) -> None:
        request_id = f"req_{secrets.token_hex(12)}"
        alone = batch.careful
        try:
            answer = await self._answers.answer(batch.job.endpoint, one.line.body, batch.caller, request_id)
        except TryLaterError as later:
            one.num += 1
            one.num_crashes += later.crashed and alone
            batch.careful = batch.careful or later.crashed
            if one.num_crashes < MAX_CRASHES:
                self._pause(batch, min(LONGEST_PAUSE, later.seconds * 2.0 ** min(one.num - 1, 16)))
                batch.again.append(one)
                return
            answer = later.answer
        try:
            batch.ledger.answered(one.line.custom_id, answer.status, request_id, answer.body)
        except LLMasOSError as e:  # a full disk, say: what is there is kept
            batch.error = _error_of(e)
            self._end_early(batch, "failed")
        if not batch.again:
            batch.careful = False

    def _pause(self, batch: Running, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        batch.not_before = max(batch.not_before, loop.time() + seconds)
        loop.call_at(batch.not_before + 0.001, self._room.set)

    def _landed(self, batch: Running, task: asyncio.Task[None]) -> None:
        batch.flying.discard(task)
        self._num_flying -= 1
        self._room.set()
        if not task.cancelled() and (e := task.exception()) is not None:
            log.error("a line of %s failed", batch.job.id, exc_info=e)
            batch.error = BatchError(code="internal_error", message="The server failed on a line; its log has why.")
            self._end_early(batch, "failed")

    def _cancel(self, id: str) -> None:
        if (batch := self._running.get(id)) is not None:
            self._end_early(batch, "cancelled")

    def _end_early(self, batch: Running, status: str) -> None:
        """What is in flight is dropped; what is done stays."""
        if batch.ending is None:
            batch.ending = status
            for task in batch.flying:
                task.cancel()
            self._room.set()

    async def _finish(self, batch: Running) -> None:
        """Results become files. What was not answered is named in the error file."""
        status = batch.ending or "completed"
        errors = [batch.error] if batch.error else None

        def settle() -> None:
            if status in ("cancelled", "expired"):
                for found in read(self.files.path(batch.job.input_id), batch.job.endpoint):
                    if isinstance(found, Line) and found.custom_id not in batch.ledger.done:
                        batch.ledger.failed(found.custom_id, _UNANSWERED[status])
            batch.ledger.sync()

        try:
            await asyncio.to_thread(settle)
        except (LLMasOSError, OSError):
            log.exception("not all lines that were not answered could be named for %s", batch.job.id)
        await self.storage.run(lambda session: store.over(session, batch.job, status, batch.ledger, self.files, errors))
        del self._running[batch.job.id]
        batch.ledger.close()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            for batch in list(self._running.values()):
                if batch.counts == batch.saved or batch.is_over:
                    continue
                counts = batch.counts
                with contextlib.suppress(DiskFullError):  # the next line says so
                    await asyncio.to_thread(batch.ledger.sync)
                id, (completed, failed) = batch.job.id, counts
                await self.storage.run(partial(store.progressed, id=id, completed=completed, failed=failed))
                batch.saved = counts


_UNANSWERED = {
    "cancelled": BatchError(code="batch_cancelled", message="The batch was cancelled before this request's turn."),
    "expired": BatchError(code="batch_expired", message="The completion window was over before this request's turn."),
}


def _error_of(e: LLMasOSError) -> BatchError:
    problem = problem_of(e)
    return BatchError(code=problem["code"], message=problem["message"], param=problem["param"])


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
