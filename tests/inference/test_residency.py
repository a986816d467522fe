"""Which models are resident: what is evicted, what never is, and that everybody's turn comes."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmasos.inference.host.residency import (
    HALF_LIFE,
    Load,
    Place,
    Refuse,
    Replica,
    Residency,
    State,
    Stop,
    cheapest_cover,
)

FOREVER = math.inf


def cpu(num_bytes: int, least: int = 0, most: int = 0, context: int = 0) -> list[Place]:
    return [Place("cpu", {"cpu": num_bytes}, ("cpu",) if most else (), least, most, context)]


class Machine:
    """A residency with its budgets and a clock; loads and stops end when told to."""

    def __init__(self, **budgets: int) -> None:
        self.now, self.budgets = 0.0, {name.replace("_", ":"): n for name, n in budgets.items()}
        self.residency = Residency()
        self.refused: list[str] = []

    def want(self, model: str, places: list[Place], **options: object) -> None:
        self.residency.want(model, places, **{"load_seconds": 1.0, **options})

    def step(self) -> list[object]:
        actions = self.residency.step(self.now, self.budgets)
        self.refused += [a.model for a in actions if isinstance(a, Refuse)]
        return actions

    def ready(self, model: str, *, load_seconds: float = 1.0, keep_alive: float = FOREVER) -> Replica:
        """The first load of a model that is under way ends."""
        replica = next(r for r in self.residency.of(model) if r.state is State.LOADING)
        self.residency.ready(replica, self.now, load_seconds=load_seconds, keep_alive=keep_alive)
        return replica

    def load(self, model: str, places: list[Place], **options: float) -> Replica:
        self.want(model, places)
        assert any(isinstance(a, Load) and a.replica.model == model for a in self.step())
        return self.ready(model, **options)


def stops(actions: list[object]) -> list[tuple[str, str]]:
    return [(a.replica.model, a.reason) for a in actions if isinstance(a, Stop)]


def test_a_model_is_loaded_once_however_often_it_is_wanted() -> None:
    machine = Machine(cpu=100)
    for _ in range(3):
        machine.want("a", cpu(40))
    assert [type(a) for a in machine.step()] == [Load]
    machine.want("a", cpu(40))
    assert machine.step() == []
    machine.ready("a")
    machine.want("a", cpu(40))
    assert machine.step() == [] and len(machine.residency.replicas) == 1


def test_the_idle_model_whose_reload_costs_least_for_its_use_makes_room() -> None:
    machine = Machine(cpu=100)
    slow = machine.load("slow, used once", cpu(40), load_seconds=60)
    fast = machine.load("fast, used often", cpu(40), load_seconds=1)
    for _ in range(9):
        machine.residency.begin(fast, machine.now)
        machine.residency.end(fast, machine.now, keep_alive=FOREVER)
    assert fast.cost(0) < slow.cost(0)
    machine.want("new", cpu(40))
    assert stops(machine.step()) == [("fast, used often", "room")]


def test_uses_of_long_ago_count_less() -> None:
    machine = Machine(cpu=100)
    once_popular = machine.load("a", cpu(40))
    for _ in range(7):
        machine.residency.begin(once_popular, 0.0)
        machine.residency.end(once_popular, 0.0, keep_alive=FOREVER)
    machine.now = 4 * HALF_LIFE
    machine.load("b", cpu(40))
    assert once_popular.recent_uses(machine.now) == pytest.approx(8 / 16)
    machine.want("c", cpu(40))
    assert stops(machine.step()) == [("a", "room")]


def test_one_model_that_is_large_enough_goes_before_two_that_cost_more_together() -> None:
    machine = Machine(cpu=100)
    machine.load("small 1", cpu(25), load_seconds=2)
    machine.load("small 2", cpu(25), load_seconds=2)
    machine.load("large", cpu(50), load_seconds=3)
    machine.want("new", cpu(50))
    assert stops(machine.step()) == [("large", "room")]


def test_a_load_begins_when_the_evicted_process_is_gone_and_not_before() -> None:
    machine = Machine(cpu=100)
    old = machine.load("old", cpu(60))
    machine.want("new", cpu(60))
    assert stops(machine.step()) == [("old", "room")]
    assert machine.step() == []
    machine.residency.gone(old)
    assert [type(a) for a in machine.step()] == [Load]


def test_pinned_and_loading_models_are_not_evicted() -> None:
    machine = Machine(cpu=100)
    machine.load("pinned", cpu(40))
    machine.residency.pin("pinned", True)
    machine.want("loading", cpu(40))
    machine.step()
    machine.want("new", cpu(40))
    assert machine.step() == []
    machine.ready("loading")
    assert stops(machine.step()) == [("loading", "room")]


def test_what_fits_beside_no_pinned_model_is_refused_with_the_numbers_and_what_would_fit() -> None:
    machine = Machine(cpu=100_000_000)
    machine.load("kept", cpu(60_000_000))
    machine.residency.pin("kept", True)
    machine.want("new", cpu(60_000_000))
    [refusal] = machine.step()
    assert isinstance(refusal, Refuse) and not machine.residency.wants
    assert str(refusal.error) == (
        "new needs 60.0 MB on cpu; 100.0 MB may be used there, 60.0 MB of it by pinned models (kept). "
        "Unpin one of them, or choose a smaller model."
    ).replace("100.0 MB", "0.10 GB")
    machine.want("long", cpu(20_000_000, least=80_000_000, most=90_000_000, context=8000))
    [refusal] = machine.step()
    assert "80.0 MB of them for a context of 8000 tokens" in refusal.error.message
    assert refusal.error.hint == "A context of 2000 tokens would fit: max_model_len=2000."
    machine.residency.pin("kept", False)
    machine.want("new", cpu(60_000_000))
    assert stops(machine.step()) == [("kept", "room")]


def test_an_impossible_want_does_not_evict_anybody() -> None:
    machine = Machine(cpu=100)
    machine.load("a", cpu(50))
    machine.want("huge", cpu(101))
    machine.step()
    assert machine.refused == ["huge"] and machine.residency.of("a")[0].state is State.READY


def test_busy_models_drain_when_only_they_can_make_room_but_run_a_while_first() -> None:
    machine = Machine(cpu=100)
    busy = machine.load("busy", cpu(60), load_seconds=20)
    machine.residency.begin(busy, machine.now)
    machine.want("new", cpu(60))
    assert machine.step() == [] and machine.residency.takes(busy)
    assert machine.residency.next_event(machine.now) == 20
    machine.now = 20.0
    assert machine.step() == [] and not machine.residency.takes(busy)
    machine.residency.end(busy, machine.now, keep_alive=FOREVER)
    assert stops(machine.step()) == [("busy", "room")]


def test_who_drains_goes_on_draining_though_another_would_cost_less_by_now() -> None:
    machine = Machine(cpu=100)
    first = machine.load("first", cpu(60), load_seconds=8)
    machine.residency.begin(first, machine.now)
    machine.now = 8.0
    second = machine.load("second", cpu(40), load_seconds=1)
    machine.residency.begin(second, machine.now)
    machine.want("new", cpu(40))
    machine.step()
    assert first.draining and not second.draining  # the second has not had its time yet
    machine.now = 100.0
    assert second.cost(machine.now) < first.cost(machine.now)
    machine.step()
    assert first.draining and not second.draining
    machine.residency.end(second, machine.now, keep_alive=FOREVER)
    assert stops(machine.step()) == [("second", "room")] and not first.draining  # it can go at once


def test_draining_ends_when_nobody_waits_any_more() -> None:
    machine = Machine(cpu=100)
    busy = machine.load("busy", cpu(60))
    machine.residency.begin(busy, machine.now)
    machine.want("new", cpu(60))
    machine.now = 10.0
    machine.step()
    machine.residency.withdraw("new")
    assert machine.residency.is_due(machine.now)
    machine.step()
    assert machine.residency.takes(busy)


def test_those_behind_take_only_room_that_those_before_them_do_not_need() -> None:
    machine = Machine(cpu=100)
    busy = machine.load("busy", cpu(60))
    machine.residency.begin(busy, machine.now)
    machine.now = 10.0
    machine.want("large", cpu(90))
    machine.want("medium", cpu(30))
    machine.want("small", cpu(10))
    loads = [a.replica.model for a in machine.step() if isinstance(a, Load)]
    assert loads == [] and busy.draining  # the medium one fits now, and would be in the large one's way
    machine.residency.withdraw("medium")
    assert [a.replica.model for a in machine.step() if isinstance(a, Load)] == ["small"]


def test_idle_models_go_when_their_keep_alive_is_over_unless_pinned() -> None:
    machine = Machine(cpu=100)
    replica = machine.load("a", cpu(10), keep_alive=30)
    kept = machine.load("b", cpu(10), keep_alive=30)
    machine.residency.pin("b", True)
    assert machine.residency.next_event(0.0) == 30
    machine.residency.begin(replica, 20.0)
    machine.now = 40.0
    assert machine.step() == []
    machine.residency.end(replica, 40.0, keep_alive=0.0)
    assert stops(machine.step()) == [("a", "idle")] and kept.state is State.READY


def test_pages_take_their_share_of_the_room_within_least_and_most() -> None:
    machine = Machine(cpu=1000)
    first = machine.load("a", cpu(100, least=100, most=10_000))
    assert first.pages == 100 + 400 and first.memory == {"cpu": 600}
    second = machine.load("b", cpu(100, least=100, most=150))
    assert second.pages == 150
    machine.residency.page_share = 1.0
    third = machine.load("c", cpu(10, least=10, most=10_000))
    assert machine.residency.held() == {"cpu": 1000} and third.pages == 140


def test_of_several_devices_the_emptiest_is_taken_then_the_one_whose_eviction_costs_least() -> None:
    def anywhere(num_bytes: int) -> list[Place]:
        return [Place(f"cuda:{i}", {"cpu": 1, f"cuda:{i}": num_bytes}) for i in range(2)]

    machine = Machine(cpu=100, cuda_0=80, cuda_1=100)
    first = machine.load("a", anywhere(50), load_seconds=9)
    second = machine.load("b", anywhere(50), load_seconds=5)
    assert (first.device, second.device) == ("cuda:1", "cuda:0")
    machine.want("c", anywhere(60))
    assert stops(machine.step()) == [("b", "room")]


def test_further_replicas_take_free_room_only() -> None:
    machine = Machine(cpu=100)
    machine.load("other", cpu(40))
    machine.want("a", cpu(30), num_replicas=3)
    actions = machine.step()
    assert [type(a) for a in actions] == [Load, Load] and not stops(actions)
    assert len(machine.residency.wants) == 1
    machine.want("b", cpu(30))
    assert stops(machine.step()) == [("other", "room")]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=7
    ),
    st.integers(0, 25),
    st.integers(0, 25),
)  # fmt: skip
def test_the_cheapest_cover_is_the_cheapest_of_all_sets(options, lack_a, lack_b) -> None:
    named = [(float(cost), {"a": a, "b": b}, i) for i, (cost, a, b) in enumerate(options)]
    lacking = {name: n for name, n in (("a", lack_a), ("b", lack_b)) if n}
    costs = []
    for mask in range(1 << len(named)):
        chosen = [o for i, o in enumerate(named) if mask >> i & 1]
        if all(sum(o[1][d] for o in chosen) >= n for d, n in lacking.items()):
            costs.append(sum(o[0] for o in chosen))
    found = cheapest_cover(named, lacking)
    if found is None:
        assert not costs
    else:
        assert found[0] == min(costs)
        assert all(sum(named[i][1][d] for i in found[1]) >= n for d, n in lacking.items())


def test_a_cover_of_very_many_models_is_found_in_bounded_time() -> None:
    rng = random.Random(0)
    options = [(rng.random(), {"a": rng.randrange(1, 50)}, i) for i in range(60)]
    found = cheapest_cover(options, {"a": 700})
    assert found is not None and sum(options[i][1]["a"] for i in found[1]) >= 700


SIZES = {"a": 30, "b": 40, "c": 45, "d": 60, "e": 25}
BUDGET = {"cpu": 100}


class Life(RuleBasedStateMachine):
    """Wants, leases, ends, crashes and pins in any order."""

    @initialize()
    def begin(self) -> None:
        self.residency, self.now = Residency(), 0.0
        self.counts = dict.fromkeys(SIZES, 1)

    def places(self, model: str) -> list[Place]:
        size = SIZES[model]
        return cpu(size - 5, least=5, most=20, context=100)

    def carry_out(self) -> None:
        before = {r.id: (r.busy, r.pinned, r.state) for r in self.residency.replicas.values()}
        for action in self.residency.step(self.now, BUDGET):
            if isinstance(action, Stop):
                busy, pinned, state = before[action.replica.id]
                assert not busy and not pinned and state is State.READY
            elif isinstance(action, Load):
                assert action.replica.id not in before
            else:
                assert isinstance(action, Refuse)
                pinned_bytes = sum(r.memory["cpu"] for r in self.residency.replicas.values() if r.pinned)
                assert pinned_bytes + SIZES[action.model] > BUDGET["cpu"]

    def replicas(self, state: State) -> list[Replica]:
        return [r for r in self.residency.replicas.values() if r.state is state]

    @rule(model=st.sampled_from(sorted(SIZES)), urgent=st.booleans(), num=st.integers(1, 2))
    def want(self, model, urgent, num) -> None:
        self.counts[model] = max(num, self.counts[model])
        pinned = any(r.pinned for r in self.residency.of(model))
        self.residency.want(model, self.places(model), load_seconds=1.0, num_replicas=num, urgent=urgent, pinned=pinned)
        self.carry_out()

    @rule(model=st.sampled_from(sorted(SIZES)))
    def withdraw(self, model) -> None:
        self.residency.withdraw(model)
        self.carry_out()

    @precondition(lambda self: self.replicas(State.LOADING))
    @rule(data=st.data(), keep_alive=st.sampled_from([0.0, 10.0, FOREVER]), seconds=st.sampled_from([0.5, 30.0]))
    def loaded(self, data, keep_alive, seconds) -> None:
        replica = data.draw(st.sampled_from(self.replicas(State.LOADING)))
        self.residency.ready(replica, self.now, load_seconds=seconds, keep_alive=keep_alive)
        self.carry_out()

    @precondition(lambda self: self.residency.replicas)
    @rule(data=st.data())
    def process_ends(self, data) -> None:
        replica = data.draw(st.sampled_from(list(self.residency.replicas.values())))
        self.residency.gone(replica)
        self.carry_out()

    @precondition(lambda self: any(self.residency.takes(r) for r in self.residency.replicas.values()))
    @rule(data=st.data())
    def lease(self, data) -> None:
        usable = [r for r in self.residency.replicas.values() if self.residency.takes(r)]
        self.residency.begin(data.draw(st.sampled_from(usable)), self.now)
        self.carry_out()

    @precondition(lambda self: any(r.busy for r in self.residency.replicas.values()))
    @rule(data=st.data(), keep_alive=st.sampled_from([0.0, 10.0, FOREVER]))
    def end(self, data, keep_alive) -> None:
        busy = [r for r in self.residency.replicas.values() if r.busy]
        self.residency.end(data.draw(st.sampled_from(busy)), self.now, keep_alive=keep_alive)
        self.carry_out()

    @rule(model=st.sampled_from(sorted(SIZES)), pinned=st.booleans())
    def pin(self, model, pinned) -> None:
        self.residency.pin(model, pinned)
        self.carry_out()

    @rule(seconds=st.sampled_from([0.1, 3.0, 40.0]))
    def wait(self, seconds) -> None:
        self.now += seconds
        self.carry_out()

    @invariant()
    def nothing_is_over_budget_or_loaded_twice(self) -> None:
        assert self.residency.held().get("cpu", 0) <= BUDGET["cpu"]
        for model, most in self.counts.items():
            there = [r for r in self.residency.of(model) if r.state is not State.STOPPING]
            lined = [w for w in self.residency.wants if w.model == model]
            assert len(there) + len(lined) <= most

    def teardown(self) -> None:
        """However busy all others are kept from now on, everybody's turn comes."""
        if not hasattr(self, "residency"):
            return
        for model in SIZES:
            self.residency.pin(model, False)
        waiting = {w.model for w in self.residency.wants if w.urgent}
        for _ in range(20 * (len(waiting) + 1)):
            self.now += 100.0
            for replica in list(self.residency.replicas.values()):
                if replica.state is State.STOPPING:
                    self.residency.gone(replica)
                elif replica.state is State.LOADING:
                    self.residency.ready(replica, self.now, load_seconds=30.0, keep_alive=FOREVER)
                    waiting.discard(replica.model)
                busy = replica.busy
                if self.residency.takes(replica):  # the next request comes before the last one ends
                    self.residency.begin(replica, self.now)
                for _ in range(busy):
                    self.residency.end(replica, self.now, keep_alive=FOREVER)
            self.carry_out()
        assert not waiting


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40)
