"""The host: models are loaded when they are asked for, lent to requests, kept, evicted, and restarted.

`residency` decides, `memory` predicts; what is here carries it out with one process per replica. A request takes a
lease, which ends with its answer; a model with leases is busy and stays. Everything runs on one event loop, and every
change of state ends in `_step`, so there is no moment at which a decision is due and nobody takes it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmasos.errors import (
    BusyError,
    InsufficientMemoryError,
    LLMasOSError,
    ModelCrashedError,
    NotFoundError,
    ServerError,
)
from llmasos.inference.host import spare
from llmasos.inference.host.lending import ClosingError, LentModel, LoadFailedError, QueueFullError
from llmasos.inference.host.memory import Budgets, Memory
from llmasos.inference.host.records import (
    STOP_GRACE,
    Clock,
    Hosted,
    Lease,
    Life,
    Process,
    Start,
    Timer,
    status_of,
    used,
)
from llmasos.inference.host.residency import Load, Place, Refuse, Replica, Residency, State, Stop, gigabytes
from llmasos.inference.host.status import ModelStatus

if TYPE_CHECKING:
    from llmasos.inference.host.process import ModelSpec

_log = logging.getLogger("llmasos")

KEEP_ALIVE = 300.0
COOL_DOWN = 10.0, 300.0
"""Seconds for which a failed load is not tried again: after the first failure, doubled by each further one, at most."""
BACK_OFF = 0.5, 60.0
"""Seconds before a crashed model is started again, likewise."""
MOST_CRASHES = 5
"""In a row; then it counts as a failed load."""
STABLE = 60.0
"""Seconds after which a model's earlier crashes are forgotten."""
STICKY = 4
"""Leases that a replica may have more than the idlest one and still be chosen for what its cache holds."""
RETRIES = 1
"""Times that a request of which nothing was given yet is sent to another process. More would let one that ends every
process end many."""


class Host:
    """Models in processes, within `budget`. Use it from one event loop; `close` it at the end.

    `keep_alive`: seconds that an idle model stays, for models and leases that don't say; math.inf: for ever, until room
    is needed. `max_waiting`: leases that may wait for a model to be there. `page_share`: see `Residency`. `start`,
    `memory` and `clock` are for tests.
    """

    def __init__(
        self,
        *,
        budget: Budgets | None = None,
        start: Start | None = None,
        keep_alive: float = KEEP_ALIVE,
        max_waiting: int = 256,
        page_share: float = 0.5,
        memory: Memory | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.budget = budget or (memory.budgets if memory else Budgets.detect())
        self._memory = memory or Memory(self.budget)
        self._start = start or _start_process
        self._keep_alive, self._max_waiting = keep_alive, max_waiting
        self._given_clock = clock
        self._residency = Residency(page_share)
        self._models: dict[str, Hosted] = {}
        self._lined: dict[Hosted, None] = {}
        """Models with leases in line."""
        self._budgets: dict[str, int] = {}
        self._timer: Timer | None = None
        self._num_leases = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    # which models there are

    def add(self, spec: ModelSpec, *, replicas: int = 1, keep_alive: float | None = None, pinned: bool = False) -> None:
        """Make a model known; nothing is loaded. One that is known gets the new options with its next load."""
        keep = self._keep_alive if keep_alive is None else keep_alive
        if (known := self._models.get(spec.name)) is None:
            self._models[spec.name] = Hosted(spec, replicas, keep, pinned)
            return
        self.amend(spec)
        known.num_replicas, known.keep_alive = replicas, keep
        self.pin(spec.name, pinned)

    def amend(self, spec: ModelSpec) -> None:
        """From its next load on, a known model is `spec`."""
        hosted = self._hosted(spec.name)
        if hosted.spec == spec:
            return
        hosted.spec, hosted.stale = spec, True
        if hosted.predicting is not None:
            hosted.predicting.cancel()
            hosted.predicting = None
        self._step()

    async def remove(self, name: str) -> None:
        """Forget a model that nobody uses. Raises BusyError, NotFoundError."""
        hosted = self._hosted(name)
        await self.unload(name)
        while hosted.lives or hosted.waiting:  # somebody wanted it while its processes ended
            await self.unload(name)
        if hosted.predicting is not None:
            hosted.predicting.cancel()
        self._models.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def spec(self, name: str) -> ModelSpec:
        return self._hosted(name).spec

    def loaded(self) -> dict[str, list[Any]]:
        """The models that are ready, by name: the `llm` of each replica."""
        return {name: lives for name, hosted in list(self._models.items()) if (lives := self._llms(hosted))}

    def _llms(self, hosted: Hosted) -> list[Any]:
        lives = list(hosted.lives.values())  # other threads may ask
        return [one.process.llm for one in lives if one.process and one.replica.state is State.READY]

    def _hosted(self, name: str) -> Hosted:
        if name not in self._models:
            raise NotFoundError(f"There is no model {name!r} here.", hint=f"There are: {', '.join(self._models)}.")
        return self._models[name]

    # leases

    @asynccontextmanager
    async def lease(
        self, model: ModelSpec | str, *, keep_alive: float | None = None, sticky: Hashable = None
    ) -> AsyncIterator[Any]:
        """The model's `llm`, loaded before if need be; while the block runs, it stays.

        `keep_alive`: seconds that it stays afterwards (0: not at all), if no lease beside this one says otherwise
        later. Leases of equal `sticky` share a replica while it is not much busier than others. A request of the llm
        of which nothing was given yet when its process died is sent again, to the process that takes its place.
        Raises NotFoundError, QueueFullError, LoadFailedError, InsufficientMemoryError, ClosingError.
        """
        if not isinstance(model, str):
            if model.name not in self._models:
                self.add(model)
            model = model.name
        hosted = self._hosted(model)
        lease = Lease(hosted, hosted.keep_alive if keep_alive is None else keep_alive, sticky)
        await self._take(lease)
        try:
            yield LentModel(lambda: self._llm(lease), lambda: self._again(lease))
        finally:
            self._give_back(lease)

    async def _take(self, lease: Lease) -> None:
        hosted, now = lease.hosted, self._clock.time()
        if self._closed:
            raise ClosingError
        if not hosted.waiting and (replica := self._pick(lease)) is not None:
            return self._begin(lease, replica)
        if hosted.failure is not None and now < hosted.retry_at and not self._residency.of(hosted.name):
            raise self._failed(hosted)
        if len(hosted.waiting) >= self._max_waiting and not lease.retries:
            raise QueueFullError(
                f"{len(hosted.waiting)} requests wait for {hosted.name} to be loaded already.",
                retry_after=self._seconds_to_load(hosted),
            )
        lease.given = asyncio.get_running_loop().create_future()
        if lease.retries:
            hosted.waiting.appendleft(lease)
        else:
            hosted.waiting.append(lease)
        self._lined[hosted] = None
        self._step()
        try:
            await lease.given
        except asyncio.CancelledError:
            if lease.replica is not None:
                self._give_back(lease)
            else:
                self._leave_line(lease)
                if not lease.given.cancelled() and lease.given.done():
                    lease.given.exception()  # nobody else will look at it
            raise

    def _pick(self, lease: Lease) -> Replica | None:
        """The idlest replica, or one that is hardly busier and has answered requests of the same kind before."""
        usable = [r for r in self._residency.of(lease.hosted.name) if self._residency.takes(r)]
        if not usable:
            return None
        least = min(r.busy for r in usable)
        if lease.sticky is not None:
            liked = max(usable, key=lambda r: hash((lease.sticky, r.id)))
            if liked.busy <= least + STICKY:
                return liked
        return next(r for r in usable if r.busy == least)

    def _begin(self, lease: Lease, replica: Replica) -> None:
        self._residency.begin(replica, self._clock.time())
        lease.replica = replica
        lease.hosted.last_used = time.time()
        self._num_leases += 1
        self._empty.clear()

    def _give_back(self, lease: Lease) -> None:
        if (replica := lease.replica) is None:
            return
        lease.replica = None
        if replica.id in self._residency.replicas:
            self._residency.end(replica, self._clock.time(), keep_alive=lease.keep_alive)
        lease.hosted.last_used = time.time()
        self._num_leases -= 1
        if not self._num_leases:
            self._empty.set()
        self._step()

    def _leave_line(self, lease: Lease) -> None:
        hosted = lease.hosted
        with suppress(ValueError):
            hosted.waiting.remove(lease)
        if not hosted.waiting:
            self._lined.pop(hosted, None)
            if not hosted.restart:
                self._residency.withdraw(hosted.name)
        self._step()

    async def _again(self, lease: Lease) -> bool:
        """After a crash: another process for a request that had not begun. False if it was tried often enough."""
        dead = lease.replica
        if lease.retries >= RETRIES or dead is None or dead.state is State.STOPPING or self._closed:
            return False
        if self._models.get(lease.hosted.name) is not lease.hosted:  # forgotten since
            return False
        lease.retries += 1
        if dead.id in lease.hosted.lives:  # nobody has noticed yet
            self._ended(lease.hosted, lease.hosted.lives[dead.id])
        self._give_back(lease)
        await self._take(lease)
        return True

    def _llm(self, lease: Lease) -> Any:
        assert lease.replica is not None, "the lease has ended"
        life = lease.hosted.lives.get(lease.replica.id)
        if life is None or life.process is None:
            raise ModelCrashedError(f"The process of {lease.hosted.name} has ended.", hint="Send the request again.")
        return life.process.llm

    # orders

    async def load(self, name: str, *, pin: bool | None = None, keep_alive: float | None = None) -> None:
        """Have a model in memory now, even if its last load has just failed. Raises what `lease` does."""
        hosted = self._hosted(name)
        if pin is not None:
            self.pin(name, pin)
        hosted.failure, hosted.retry_at = None, -math.inf
        async with self.lease(name, keep_alive=keep_alive):
            pass

    async def unload(self, name: str, *, force: bool = False) -> None:
        """End a model's processes and wait until they have. Raises BusyError while requests use it, unless by `force`:
        they then fail with ModelCrashedError, and those in line with ClosingError."""
        hosted = self._hosted(name)
        busy = sum(r.busy for r in self._residency.of(name)) + len(hosted.waiting)
        if busy and not force:
            raise BusyError(f"{busy} requests use {name}.", hint="Wait for them, or use force.")
        hosted.restart = False
        self._residency.withdraw(name)
        self._refuse(hosted, lambda: ClosingError())
        lives = list(hosted.lives.values())
        for life in lives:
            if life.replica.state is not State.STOPPING:
                life.grace = 0.0 if force else STOP_GRACE
                self._stop(self._residency.stop(life.replica, "unloaded"))
        await asyncio.gather(*(life.task for life in lives if life.task is not None), return_exceptions=True)

    def keep(self, name: str, seconds: float) -> None:
        """From now on a model stays so long after its last lease, where that does not say otherwise. math.inf: until
        its room is needed."""
        self._hosted(name).keep_alive = seconds
        self._residency.keep(name, self._clock.time(), seconds)
        self._step()

    def pin(self, name: str, pinned: bool = True) -> None:
        """A pinned model is not evicted, and started again after a crash though nobody asks for it."""
        self._hosted(name).pinned = pinned
        self._residency.pin(name, pinned)
        self._step()

    async def close(self, grace: float = 0.0) -> None:
        """Take no more leases, give those that are out `grace` seconds, end all processes."""
        self._closed = True
        for hosted in self._models.values():
            hosted.restart = False
            self._residency.withdraw(hosted.name)
            self._refuse(hosted, ClosingError)
            if hosted.predicting is not None:
                hosted.predicting.cancel()
        if self._num_leases and grace > 0:
            timer = self._clock.call_at(self._clock.time() + grace, self._empty.set)
            await self._empty.wait()
            timer.cancel()
        tasks = []
        for hosted in self._models.values():
            for life in hosted.lives.values():
                if life.replica.state is not State.STOPPING:
                    life.grace = 0.0 if life.replica.busy else STOP_GRACE
                    self._stop(self._residency.stop(life.replica, "unloaded"))
                tasks.append(life.task)
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(spare.end_all)

    # what is

    def status(self) -> list[ModelStatus]:
        """Every known model, by name."""
        now = self._clock.time()
        return [status_of(self._models[name], now) for name in sorted(self._models)]

    # the one place where things are set going

    @property
    def _clock(self) -> Clock:
        return self._given_clock or asyncio.get_running_loop()

    def _step(self) -> None:
        if self._closed:
            return
        now = self._clock.time()
        self._lend()
        for hosted in self._models.values() if self._wanting() else ():
            self._want(hosted, now)
        if self._residency.is_due(now):
            for action in self._residency.step(now, self._budgets_now()):
                match action:
                    case Load(replica, place):
                        self._load(replica, place)
                    case Stop():
                        self._stop(action)
                    case Refuse(model, error):
                        self._refuse_for_memory(self._models[model], error)
            self._lend()
        self._set_timer(now)

    def _wanting(self) -> bool:
        return bool(self._lined) or any(hosted.restart for hosted in self._models.values())

    def _lend(self) -> None:
        """Leases in line get the replicas that are there."""
        for hosted in list(self._lined):
            while hosted.waiting and (replica := self._pick(hosted.waiting[0])) is not None:
                lease = hosted.waiting.popleft()
                assert lease.given is not None
                if not lease.given.done():  # cancelled, and not yet told
                    self._begin(lease, replica)
                    lease.given.set_result(None)
            if not hosted.waiting:
                self._lined.pop(hosted)

    def _want(self, hosted: Hosted, now: float) -> None:
        if not (hosted.waiting or hosted.restart) or now < hosted.retry_at:
            return
        if hosted.prediction is None or hosted.stale:
            if hosted.predicting is None:
                hosted.predicting = asyncio.create_task(self._predict(hosted))
            return
        self._residency.want(
            hosted.name,
            hosted.prediction.places,
            load_seconds=hosted.prediction.load_seconds,
            num_replicas=hosted.num_replicas,
            urgent=bool(hosted.waiting) or hosted.pinned,
            pinned=hosted.pinned,
        )

    async def _predict(self, hosted: Hosted) -> None:
        try:
            prediction = await self._memory.predict(hosted.spec)
        except Exception as e:
            hosted.predicting = None
            self._fail(hosted, e)
        else:
            hosted.prediction, hosted.stale, hosted.predicting = prediction, False, None
        self._step()

    def _budgets_now(self) -> dict[str, int]:
        """While a process begins or ends, what it uses is not known: what was free before then holds."""
        settled = all(r.state is State.READY for r in self._residency.replicas.values())
        if settled or any(device not in self._budgets for device in self.budget.limits):
            now_used = Counter[str](cpu=spare.memory())
            for hosted in self._models.values():
                for life in hosted.lives.values():
                    now_used.update(used(life))
            fresh = self.budget.now(now_used)
            self._budgets = fresh if settled else fresh | self._budgets
        return self._budgets

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [h.retry_at for h in self._models.values() if (h.waiting or h.restart) and h.retry_at > now]
        if (event := self._residency.next_event(now)) is not None:
            times.append(event)
        if times:
            self._timer = self._clock.call_at(min(times), self._step)

    # processes

    def _load(self, replica: Replica, place: Place) -> None:
        hosted = self._models[replica.model]
        assert hosted.prediction is not None
        life = Life(replica, place, hosted.prediction, self._clock.time())
        hosted.lives[replica.id] = life
        self._set_limits()
        life.task = asyncio.create_task(self._live(hosted, life))

    async def _live(self, hosted: Hosted, life: Life) -> None:
        """A replica from its start to its end."""
        replica = life.replica
        try:
            await self._bring_up(hosted, life)
        except asyncio.CancelledError:  # stopped while it loaded
            self._bury(hosted, life)
        except Exception as e:
            self._bury(hosted, life)
            if replica.state is not State.STOPPING:
                self._fail(hosted, e)
        else:
            assert life.process is not None
            await life.process.wait()
            self._ended(hosted, life)
            self._step()
            if replica.state is not State.STOPPING:  # else that is done
                await asyncio.to_thread(self._remember, life)
        self._step()

    async def _bring_up(self, hosted: Hosted, life: Life) -> None:
        replica, prediction = life.replica, life.prediction
        engine = dict(hosted.spec.engine)
        if life.place.paged:
            engine["kv_cache_memory"] = replica.pages
        spec = replace(hosted.spec, device=life.place.device, engine=engine)
        life.process = process = await self._start(
            spec, memory_limit=self._most(replica), on_progress=lambda progress: setattr(life, "progress", progress)
        )
        self._set_limits()
        await self._catch_up(hosted, spec.adapters, process.llm)
        life.seen = await asyncio.to_thread(
            self._memory.loaded, prediction, process.memory, pages=replica.pages, load_seconds=process.load_seconds
        )
        if replica.state is not State.LOADING:  # told to stop meanwhile
            return
        hosted.plan_error = self._memory.error(prediction, process.memory, pages=replica.pages)
        hosted.load_seconds = process.load_seconds
        hosted.loads += 1
        took = ", ".join(f"{gigabytes(n)} on {where}" for where, n in used(life).items())
        _log.info("%s is ready: loaded in %.1f s, it has %s.", hosted.name, process.load_seconds, took)
        hosted.failures, hosted.failure, hosted.restart = 0, None, False
        hosted.stale = True
        self._residency.ready(
            replica, self._clock.time(), load_seconds=process.load_seconds, keep_alive=hosted.keep_alive
        )
        self._step()

    async def _catch_up(self, hosted: Hosted, loaded: Mapping[str, str], llm: Any) -> None:
        """Load and unload the adapters that came and went while the process began."""
        while loaded != (wanted := hosted.spec.adapters):
            for name, path in loaded.items():
                if wanted.get(name) != path:
                    await asyncio.to_thread(llm.unload_adapter, name)
            for name, path in wanted.items():
                if loaded.get(name) != path:
                    await asyncio.to_thread(llm.load_adapter, name, path)
            loaded = wanted

    def _most(self, replica: Replica) -> int:
        """Main memory that is promised to no other replica: more, and the process is ended before it harms others."""
        held = self._residency.held().get("cpu", 0) - replica.memory.get("cpu", 0)
        return self.budget.limits.get("cpu", 0) - held

    def _set_limits(self) -> None:
        """What is promised to one is no longer the others'. None is ended for what it was free to take before."""
        for hosted in self._models.values():
            for life in hosted.lives.values():
                if life.process is not None:
                    life.process.memory_limit = max(self._most(life.replica), life.process.memory.rss_bytes)

    def _stop(self, stop: Stop) -> None:
        replica, hosted = stop.replica, self._models[stop.replica.model]
        hosted.evictions[stop.reason] += 1
        why = {
            "room": f"{stop.wanted_by} needed the room",
            "idle": "nobody used it for its keep-alive",
            "unloaded": "it was told to go",
        }
        hosted.why_evicted = why[stop.reason]
        _log.info("%s is unloaded: %s", hosted.name, hosted.why_evicted)
        life = hosted.lives[replica.id]
        if not (hosted.waiting or hosted.restart):
            self._residency.withdraw(hosted.name)  # further replicas that nobody asks for any more
        if life.process is None:
            assert life.task is not None
            life.task.add_done_callback(lambda _: self._unbegun(hosted, life))
            life.task.cancel()
        else:
            ending = asyncio.create_task(self._end(life, life.process))
            _background.add(ending)
            ending.add_done_callback(_background.discard)

    def _unbegun(self, hosted: Hosted, life: Life) -> None:
        """A task that is cancelled before it has run buries nothing itself."""
        self._bury(hosted, life)
        self._step()

    async def _end(self, life: Life, process: Process) -> None:
        try:
            await asyncio.to_thread(self._remember, life)
        except Exception:  # what can't be noted must not keep a process alive
            _log.exception("What %s took could not be noted.", life.replica.model)
        await process.stop(life.grace)

    def _remember(self, life: Life) -> None:
        if (process := life.process) is not None and life.seen is not None:
            limit = process.memory_limit
            self._memory.lived(life.prediction, life.seen, process.memory, pages=life.replica.pages, limit=limit)

    def _bury(self, hosted: Hosted, life: Life) -> None:
        hosted.lives.pop(life.replica.id, None)
        self._residency.gone(life.replica)
        self._set_limits()

    def _ended(self, hosted: Hosted, life: Life) -> None:
        """A process that was ready is no more. Called a second time, it does nothing."""
        if life.replica.id not in hosted.lives:
            return
        self._bury(hosted, life)
        if life.replica.state is State.STOPPING or self._closed:
            return
        replica, now = life.replica, self._clock.time()
        hosted.crashes = 1 if now - replica.ready_at > STABLE else hosted.crashes + 1
        assert life.process is not None
        hosted.last_error = f"Its process (pid {life.process.pid}) has ended: {life.process.why}"
        _log.error("%s: %s", hosted.name, hosted.last_error)
        if hosted.crashes > MOST_CRASHES:
            hosted.crashes = 0
            what = f"it ended {MOST_CRASHES + 1} times in a row, the last time: {life.process.why}"
            self._fail(hosted, ServerError(what, hint="Its log may say more."))
            return
        hosted.retry_at = now + min(BACK_OFF[0] * 2 ** (hosted.crashes - 1), BACK_OFF[1])
        if replica.busy or replica.pinned or replica.expires_at > now:
            hosted.restart = True
            hosted.restarts += 1

    def _fail(self, hosted: Hosted, cause: BaseException) -> None:
        hosted.failure, hosted.restart = cause, False
        hosted.retry_at = self._clock.time() + min(COOL_DOWN[0] * 2**hosted.failures, COOL_DOWN[1])
        hosted.failures += 1
        error = self._failed(hosted)
        hosted.last_error = error.message
        _log.error("%s", error.message, exc_info=None if isinstance(cause, LLMasOSError) else cause)
        self._residency.withdraw(hosted.name)
        if not any(r.state is State.LOADING for r in self._residency.of(hosted.name)):
            self._refuse(hosted, lambda: self._failed(hosted))

    def _failed(self, hosted: Hosted) -> LoadFailedError:
        assert hosted.failure is not None
        return LoadFailedError(hosted.name, hosted.failure, _seconds(hosted.retry_at - self._clock.time()))

    def _refuse_for_memory(self, hosted: Hosted, error: InsufficientMemoryError) -> None:
        hosted.last_error, hosted.restart = str(error), False
        self._refuse(hosted, lambda: InsufficientMemoryError(error.message, hint=error.hint))

    def _refuse(self, hosted: Hosted, error: Callable[[], Exception]) -> None:
        """Everybody in line for the model gets an error of their own."""
        while hosted.waiting:
            given = hosted.waiting.popleft().given
            if given is not None and not given.done():
                given.set_exception(error())
        self._lined.pop(hosted, None)

    def _seconds_to_load(self, hosted: Hosted) -> int:
        whole = hosted.load_seconds or (hosted.prediction.load_seconds if hosted.prediction else 10.0)
        began = [life.began for life in hosted.lives.values() if life.replica.state is State.LOADING]
        return _seconds(whole - (self._clock.time() - min(began)) if began else whole)


_background: set[asyncio.Task[None]] = set()
"""Held here, or they might be collected."""


def _seconds(seconds: float) -> int:
    """For Retry-After."""
    return max(1, min(300, math.ceil(seconds)))


async def _start_process(spec: ModelSpec, **options: Any) -> Process:
    from llmasos.inference.host.process import ModelProcess  # not loaded by those that bring their own

    process: Process = await ModelProcess.start(spec, **options)
    return process
