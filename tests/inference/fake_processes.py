"""Stand-ins for model processes, their memory and the clock: the host's tests never sleep and start nothing."""

import asyncio
import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llmasos.errors import ModelCrashedError
from llmasos.inference.host.forecast import Forecast
from llmasos.inference.host.host import Host
from llmasos.inference.host.memory import Budgets, Prediction, Seen
from llmasos.inference.host.residency import Place


@dataclass(frozen=True)
class Spec:
    name: str
    reference: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    load_format: str = "auto"
    engine: dict = field(default_factory=dict)
    adapters: dict = field(default_factory=dict)


class FakeClock:
    def __init__(self):
        self.now, self._timers, self._ids = 1000.0, [], itertools.count()

    def time(self):
        return self.now

    def call_at(self, when, callback):
        timer = SimpleNamespace(callback=callback, cancelled=False)
        timer.cancel = lambda: setattr(timer, "cancelled", True)
        heapq.heappush(self._timers, (when, next(self._ids), timer))
        return timer

    def advance(self, seconds):
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            if not timer.cancelled:
                timer.callback()
        self.now = end


class FakeLLM:
    """Answers when told to (`gate`), with "a", "b", "c"."""

    def __init__(self, process):
        self.process, self.name = process, process.spec.name
        self.gate, self.num_asked = asyncio.Event(), 0
        self.gate.set()

    async def _go_on(self):
        waiting = asyncio.ensure_future(self.gate.wait())
        try:
            await asyncio.wait([waiting, self.process.ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.process.ended.done():
            raise ModelCrashedError(f"{self.name} has ended.", hint="Send the request again.")

    async def astream_complete(self, prompt, params=None, **request):
        self.num_asked += 1
        for piece in "abc":
            await self._go_on()
            yield piece

    async def acomplete(self, prompts, params=None, **request):
        self.num_asked += 1
        await self._go_on()
        return ["abc" for _ in prompts]


class FakeProcess:
    pids = itertools.count(100)

    def __init__(self, world, spec):
        self.world, self.spec, self.pid, self.load_seconds = world, spec, next(self.pids), 2.0
        self.crashed, self.memory_limit = False, None
        self.step_seconds, self.why = 0.0, "signal SIGKILL."
        self.ended = asyncio.get_running_loop().create_future()
        self.llm = FakeLLM(self)
        size = world.sizes[spec.name]
        self.memory = SimpleNamespace(rss_bytes=size, peak_rss_bytes=size, device_bytes=0, peak_device_bytes=0)

    async def wait(self):
        return await asyncio.shield(self.ended)

    async def stop(self, grace):
        self.world.stops.append((self.spec.name, grace))
        await asyncio.sleep(0)
        self.end(0)

    def end(self, code=-9):
        if not self.ended.done():
            self.world.alive.remove(self)
            self.ended.set_result(code)


class World:
    """A machine for models of the given sizes. Loads end at once, or when `gates[name]` opens; `errors[name]` is
    raised by the loads of that model. The world itself checks that memory suffices and that nothing is loaded twice."""

    def __init__(self, budget, **sizes):
        self.sizes, self.budget = sizes, budget
        self.clock = FakeClock()
        self.alive: list[FakeProcess] = []
        self.loading: Counter[str] = Counter()
        self.starts: list[Any] = []
        self.stops: list[tuple[str, float]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.replicas: dict[str, int] = {}
        self.limits: list[int] = []

    def host(self, **options):
        self.budgets = Budgets({"cpu": self.budget})
        host = Host(memory=FakeMemory(self), start=self.start, clock=self.clock, **options)
        for name in self.sizes:
            host.add(Spec(name), replicas=self.replicas.get(name, 1))
        return host

    def check(self):
        held = sum(self.sizes[p.spec.name] for p in self.alive)
        held += sum(self.sizes[name] * num for name, num in self.loading.items())
        assert held <= self.budget, "more memory is held than there is"
        for name in self.sizes:
            num = self.loading[name] + sum(p.spec.name == name for p in self.alive)
            assert num <= self.replicas.get(name, 1), f"{name} is loaded twice"

    async def start(self, spec, *, memory_limit, on_progress):
        self.starts.append(spec)
        self.limits.append(memory_limit)
        self.report = on_progress
        self.loading[spec.name] += 1
        self.check()
        try:
            await asyncio.sleep(0)
            if spec.name in self.gates:
                await self.gates[spec.name].wait()
            if spec.name in self.errors:
                raise self.errors[spec.name]
        finally:
            self.loading[spec.name] -= 1
        process = FakeProcess(self, spec)
        self.alive.append(process)
        self.check()
        return process

    def process(self, name):
        return next(p for p in self.alive if p.spec.name == name)

    def names(self):
        return sorted(p.spec.name for p in self.alive)


class FakeMemory:
    """Predicts sizes exactly; half of a model's are pages if `paged`."""

    def __init__(self, world, paged=False):
        self.world, self.budgets, self.paged, self.predictions = world, world.budgets, paged, 0

    async def predict(self, spec):
        self.predictions += 1
        await asyncio.sleep(0)
        size = self.world.sizes[spec.name]
        place = Place("cpu", {"cpu": size})
        if self.paged:
            place = Place("cpu", {"cpu": size // 2}, ("cpu",), size // 2, size, 100)
        told = Forecast("cpu", 1, size, 0, 0, 0, 0, 0, 100, {}, {})
        return Prediction(spec.name, told, None, (place,), 2.0)

    def loaded(self, prediction, use, *, pages, load_seconds):
        return Seen(use.rss_bytes, use.rss_bytes, 0, 0, load_seconds, 0.0)

    def error(self, prediction, use, *, pages):
        return 0.25

    def lived(self, prediction, seen, use, *, pages, limit):
        pass


async def until(condition, tries=20_000):
    """Let everything else run until the condition holds."""
    for _ in range(tries):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


async def idle(rounds=50):
    """Let everything run that can."""
    for _ in range(rounds):
        await asyncio.sleep(0)
