"""The scheduler, driving a device that remembers what every slot of every page holds and checks all that is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmasos.inference.cache import Group, PageCache
from llmasos.inference.scheduler import Item, Plan, Scheduler, Sequence, Status, shared_prefixes

PAGE = 4
STOP = 0


def chain(ids: list[int], salt: Any) -> list[int]:
    """What the keys of a text hold: each stands for all tokens up to its own."""
    keys, key = [], hash(salt)
    for token in ids:
        key = hash((key, token))
        keys.append(key)
    return keys


def following(key: int) -> int:
    """The model's next token: it depends on all tokens before, and is the stop token now and then."""
    return STOP if key % 13 == 0 else 1 + key % 2


@dataclass
class Device:
    """Runs plans in order. A slot (group, page, offset) holds the chain of the text."""

    scheduler: Scheduler
    slots: dict[tuple[int, int, int], int] = field(default_factory=dict)
    pool: dict[int, tuple[Sequence, int, list[int]]] = field(default_factory=dict)

    def run(self, plan: Plan) -> list[list[int]]:
        """The tokens that each item gives."""
        for group, source, target in plan.copies:
            for offset in range(PAGE):
                self.slots[group, target, offset] = self.slots.get((group, source, offset), 0)
        texts = [self.text(item) for item in plan.items]
        written: Counter[tuple[int, int, int]] = Counter()
        for item, text in zip(plan.items, texts, strict=True):
            written.update(self.write(item, text))
        assert not written or max(written.values()) == 1, "two tokens of a pass share a slot"
        return [self.read(item, text) for item, text in zip(plan.items, texts, strict=True)]

    def text(self, item: Item) -> list[int]:
        seq = item.seq
        owner, run, row = self.pool.get(seq.slot, (None, 0, []))
        if owner is not seq or run != item.run:
            row = list(seq.token_ids)
            self.pool[seq.slot] = (seq, item.run, row)
        row[: len(seq.token_ids)] = seq.token_ids
        text = row[: item.end - len(item.drafts)] + list(item.drafts)
        assert len(text) == item.end, "an input token is known neither here nor on the device"
        return text

    def write(self, item: Item, text: list[int]) -> list[tuple[int, int, int]]:
        keys, written = chain(text, item.seq.salt), []
        for position in range(item.start, item.end):
            for group in range(len(item.seq.pages)):
                written.append(self.place(item.seq, group, position))
                self.slots[written[-1]] = keys[position]
        return written

    def place(self, seq: Sequence, group: int, position: int) -> tuple[int, int, int]:
        page = seq.pages[group][position // PAGE]
        assert page, f"sequence {seq.id} has no page for position {position}"
        return group, page, position % PAGE

    def read(self, item: Item, text: list[int]) -> list[int]:
        seq, keys = item.seq, chain(text, item.seq.salt)
        for group, pool in enumerate(self.scheduler.cache.pools):
            first = max(0, item.start - pool.window + 1) if pool.window else 0
            for position in range(first, item.end):
                held = self.slots[self.place(seq, group, position)]
                assert held == keys[position], f"sequence {seq.id} reads another text at {position}"
        if not item.samples:
            return []
        given: list[int] = []
        for position in range(item.end - len(item.drafts) - 1, item.end):
            given.append(following(keys[position]))
            if position + 1 < item.end and given[-1] != text[position + 1]:
                break
        self.pool[seq.slot][2][item.end - len(item.drafts) :] = given
        return given


@dataclass
class Engine:
    """The smallest engine: at most `depth` passes are in flight when the next is planned."""

    scheduler: Scheduler
    device: Device = field(init=False)
    flying: list[tuple[Plan, list[list[int]]]] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.device = Device(self.scheduler)

    def launch(self) -> Plan:
        scheduler = self.scheduler
        due = [s for s in scheduler._decodes if not s.paused and not s.verifying and s.num_tokens < end_of(s)]
        pending = {s: s.num_pending for s in scheduler.running}
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        planned = [item.seq for item in plan.items]
        assert {*due} <= {*planned, *plan.preempted}, "a decode was passed over"
        assert not any(item.drafts and pending[item.seq] for item in plan.items), "drafts behind an unknown token"
        self.num_steps += 1
        self.flying.append((plan, self.device.run(plan)))
        return plan

    def collect(self) -> None:
        plan, results = self.flying.pop(0)
        for item, tokens in zip(plan.items, results, strict=True):
            seq = item.seq
            if item.samples and self.scheduler.commit(item, tokens):
                first = len(seq.token_ids) - len(tokens)
                stops = [i for i in range(first, len(seq.token_ids)) if seq.token_ids[i] == STOP]
                del seq.token_ids[stops[0] + 1 if stops else end_of(seq) :]
                if stops or len(seq.token_ids) == end_of(seq):
                    self.scheduler.finish(seq)
            elif seq.max_tokens == 0 and item.end == seq.num_prompt:
                self.scheduler.finish(seq)

    def step(self) -> None:
        self.launch()
        self.collect()

    def drain(self, depth: int = 0, limit: int = 3000) -> None:
        """Until all is done. Every step computes something, and `limit` steps are enough."""
        for _ in range(limit):
            while len(self.flying) > depth:
                self.collect()
            if not self.scheduler.has_work:
                break
            idle = not self.flying
            plan = self.launch()
            assert plan.items or not idle, "nothing moves"
        assert not self.scheduler.has_work, "some requests starve"
        while self.flying:
            self.collect()


def end_of(seq: Sequence) -> int:
    return seq.num_prompt + seq.max_tokens


def check_plan(scheduler: Scheduler, plan: Plan) -> None:
    items = plan.items
    assert plan.num_tokens == sum(item.num_new for item in items)
    assert plan.num_tokens <= scheduler.max_num_batched_tokens, "over budget"
    assert all(item.num_new <= scheduler.chunk for item in items)
    assert len({id(item.seq) for item in items}) == len(items), "a sequence is in the pass twice"
    assert all(item.num_new == 1 and item.samples for item in items[: plan.num_decodes])
    for item in items:
        seq = item.seq
        assert seq.status is Status.RUNNING and seq.slot >= 0 and item.run == seq.num_preemptions
        assert item.num_new > 0 and item.end <= max(end_of(seq) - 1, seq.num_prompt), "keys nobody needs"
        assert item.samples == (seq.num_pending > 0 and item.end - len(item.drafts) == seq.num_tokens - 1)


def make(num_pages: int = 40, window: int = 0, **options: Any) -> Engine:
    groups = [Group(num_pages), Group(num_pages, window)] if window else [Group(num_pages)]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | options
    return Engine(Scheduler(PageCache(groups, PAGE), **options))


def check_text(seq: Sequence, given: set[int]) -> None:
    """Every token but the prompt's and the `given` ones follows from those before."""
    keys = chain(seq.token_ids, seq.salt)
    for position in range(seq.num_prompt, len(keys)):
        if position not in given:
            assert seq.token_ids[position] == following(keys[position - 1]), f"token {position} of {seq.id} is wrong"


class Requests(RuleBasedStateMachine):
    """Whatever is asked in whatever order: nothing leaks, nothing is written that another reads, all texts are those of
    a request alone, and all that is not aborted comes to its end."""

    @initialize(
        num_pages=st.integers(9, 24),
        windows=st.sampled_from([[0], [0], [0, 5], [0, 9, 2], [6]]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(0, 24),
        chunk=st.sampled_from([None, 3, 8]),
        prefix_reuse=st.sampled_from([True, True, True, False]),
        drafting=st.sampled_from([0, 1, 2, 3]),
        first=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 20)), max_size=6),
    )
    def start(
        self,
        num_pages: int,
        windows: list[int],
        max_num_seqs: int,
        budget: int,
        chunk: int | None,
        prefix_reuse: bool,
        drafting: int,
        first: list[tuple[int, int]],
    ) -> None:
        groups = [Group(num_pages if not i else max(9, num_pages - 4 * i), w) for i, w in enumerate(windows)]
        self.scheduler = Scheduler(
            PageCache(groups, PAGE, prefix_reuse=prefix_reuse),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + budget,
            chunk=chunk,
        )
        self.engine = Engine(self.scheduler)
        self.drafting = drafting
        self.sequences: list[Sequence] = []
        self.given: dict[Sequence, set[int]] = {}
        for num_prompt, max_tokens in first:  # in every run, also where hypothesis leaves out the rule that adds more
            self.add([], [1] * num_prompt, max_tokens, 1, 0, "", True, None)

    def new(self, prompt: list[int], num_prompt: int, max_tokens: int, **options: Any) -> Sequence:
        number = len(self.sequences)
        seq = Sequence(number, prompt, num_prompt, max_tokens, arrival=number // 2, **options)
        self.sequences.append(seq)
        self.given[seq] = set()
        return seq

    def some(self, data: st.DataObject, *statuses: Status) -> Sequence | None:
        found = [seq for seq in self.sequences if seq.status in statuses]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(
        prefix=st.sampled_from([[], [1] * 9, [1] * 8 + [2] * 8]),
        rest=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(0, 20),
        times=st.integers(1, 4),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "", "a"]),
        reuse=st.sampled_from([True, True, True, False]),
        max_reuse=st.sampled_from([None, None, 5]),
    )
    def add(
        self,
        prefix: list[int],
        rest: list[int],
        max_tokens: int,
        times: int,
        priority: int,
        salt: str,
        reuse: bool,
        max_reuse: int | None,
    ) -> None:
        prompt = prefix + rest
        if self.scheduler.cache.fits(len(prompt) + max_tokens):
            options = {"priority": priority, "salt": salt, "reuse": reuse, "max_reuse": max_reuse}
            for _ in range(times):
                self.scheduler.add(self.new(list(prompt), len(prompt), max_tokens, **options))

    @precondition(lambda self: len(self.engine.flying) < 2)
    @rule()
    def launch(self) -> None:
        self.draft()
        self.engine.launch()

    @precondition(lambda self: self.engine.flying)
    @rule()
    def collect(self) -> None:
        self.engine.collect()

    @precondition(lambda self: not self.engine.flying)
    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.draft()
            self.engine.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if seq := self.some(data, Status.WAITING, Status.RUNNING, Status.FINISHED):
            self.scheduler.finish(seq)
            seq.max_tokens = len(seq.token_ids) - seq.num_prompt

    @rule(data=st.data())
    def pause_or_go_on(self, data: st.DataObject) -> None:
        if seq := self.some(data, Status.WAITING, Status.RUNNING):
            seq.paused = not seq.paused

    def draft(self) -> None:
        """Some right drafts, then some that are most likely wrong."""
        for seq in self.scheduler.running if self.drafting else []:
            if not seq.num_pending:
                text = list(seq.token_ids)
                for _ in range((seq.id + len(text)) % 3):
                    text.append(following(chain(text, seq.salt)[-1]))
                seq.drafts = text[len(seq.token_ids) :] + [1] * (self.drafting - 1)

    @rule(data=st.data(), tokens=st.lists(st.integers(1, 2), min_size=1, max_size=5))
    def force(self, data: st.DataObject, tokens: list[int]) -> None:
        """A grammar leaves no choice: several tokens are known at once."""
        seq = self.some(data, Status.RUNNING)
        room = end_of(seq) - 1 - len(seq.token_ids) if seq else 0
        if seq and not seq.num_pending and room > 0:
            at = len(seq.token_ids)
            seq.token_ids.extend(tokens[:room])
            self.given[seq] |= {*range(at, len(seq.token_ids))}
            seq.drafts = []

    @rule(data=st.data(), last=st.integers(1, 2))
    def fork(self, data: st.DataObject, last: int) -> None:
        """A beam goes on in another way behind what its parent has computed; or the prompt is sampled once more."""
        parent = self.some(data, Status.RUNNING)
        if parent is None or not parent.num_computed or not parent.max_tokens:
            return
        at = min(parent.num_computed, len(parent.token_ids))
        ids = parent.token_ids[: max(at, parent.num_prompt)]
        branches = at >= parent.num_prompt and len(ids) < end_of(parent) - 1
        options = {"priority": parent.priority, "salt": parent.salt}
        child = self.new(ids + [last] * branches, parent.num_prompt, parent.max_tokens, **options)
        self.given[child] = {i for i in self.given[parent] if i < at} | ({at} if branches else set())
        if not branches:
            child.token_ids = child.token_ids[: parent.num_prompt]
        self.scheduler.fork(parent, child)

    @rule(lost=st.sampled_from([False, False, True]), forgotten=st.sampled_from([False, False, True]))
    def mishap(self, lost: bool, forgotten: bool) -> None:
        """A pass breaks, so that all keys are lost; or the weights change."""
        if lost:
            self.scheduler.restart()
            self.engine.flying.clear()
            self.engine.device.slots.clear()
        elif forgotten:
            self.scheduler.cache.reset_prefixes()

    @rule(depth=st.integers(0, 1))
    def finish_all(self, depth: int) -> None:
        for seq in self.sequences:
            seq.paused = False
        self.engine.drain(depth)
        assert all(pool.num_used == 0 for pool in self.scheduler.cache.pools), "pages leak"

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            for seq in self.sequences:
                assert len(seq.token_ids) <= end_of(seq)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.finish_all(0)
            for seq in self.sequences:
                check_text(seq, self.given[seq])
                assert len(seq.token_ids) == end_of(seq) or seq.token_ids[-1] == STOP, f"{seq.id} ended early"


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck))


def request(number: int, num_prompt: int, max_tokens: int = 8, **options: Any) -> Sequence:
    """Its prompt begins like no other's; tokens 1 and 2 only, as STOP is 0."""
    return Sequence(number, [100 + number] + [1] * (num_prompt - 1), num_prompt, max_tokens, **options)


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    return [(item.seq.id, item.start, item.num_new) for item in plan.items]


def commit(engine: Engine, plan: Plan, token: int = 1) -> None:
    """As if the model had said `token` everywhere."""
    for item in plan.items:
        if item.samples:
            engine.scheduler.commit(item, [token])


def test_decodes_come_first_and_prompts_fill_what_is_left_in_chunks() -> None:
    engine = make()
    scheduler = engine.scheduler
    scheduler.add(request(0, 6))
    commit(engine, scheduler.schedule())
    scheduler.add(request(1, 40))
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 6, 1), (1, 0, 15)] and plan.num_decodes == 1 and plan.num_tokens == 16
    assert [item.samples for item in plan.items] == [True, False]
    commit(engine, plan)
    scheduler.add(request(2, 4))
    commit(engine, scheduler.schedule())
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 8, 1), (1, 30, 10), (2, 0, 4)] and all(item.samples for item in plan.items)


def test_who_waits_goes_by_priority_then_arrival() -> None:
    engine = make(max_num_seqs=1)
    late, early, urgent = (
        request(0, 4, 1, arrival=2.0),
        request(1, 4, 1, arrival=1.0),
        request(2, 4, 1, priority=-1, arrival=3.0),
    )
    for seq in (late, early, urgent):
        engine.scheduler.add(seq)
    order = []
    while engine.scheduler.has_work:
        order += [item.seq for item in engine.launch().items]
        engine.collect()
    assert order == [urgent, early, late]


def test_a_prefix_shared_by_requests_of_one_pass_is_computed_once() -> None:
    engine = make(max_num_batched_tokens=64)
    for number in range(4):
        engine.scheduler.add(Sequence(number, [1] * 16 + [1 + number], 17, 4))
    plan = engine.launch()
    assert shape(plan) == [(0, 0, 17), (1, 16, 1), (2, 16, 1), (3, 16, 1)]
    assert plan.num_decodes == 0, "new sequences must not run ahead of what they read"
    assert [item.seq.num_cached for item in plan.items] == [0, 16, 16, 16]
    engine.collect()
    engine.drain()


def test_when_pages_run_out_the_last_by_priority_and_arrival_is_computed_again() -> None:
    engine = make(num_pages=9, max_num_seqs=3)
    scheduler = engine.scheduler
    first, second = request(0, 4, 24, arrival=1.0), request(1, 4, 24, arrival=0.0)
    scheduler.add(first)
    scheduler.add(second)
    preempted = []
    while not preempted:
        plan = scheduler.schedule()
        preempted = plan.preempted
        commit(engine, plan)
        scheduler.check_integrity()
    assert preempted == [first] and scheduler.waiting == [first] and first.num_preemptions == 1
    assert first.num_computed == 0 and len(first.token_ids) > 4, "what it said is kept, its keys are not"
    assert scheduler.num_preemptions == 1
    while second.status is Status.RUNNING:
        commit(engine, scheduler.schedule())
        if len(second.token_ids) == 28:
            scheduler.finish(second)
    again = scheduler.schedule()
    assert again.items[0].seq is first and again.items[0].start + again.items[0].num_new <= len(first.token_ids)


def test_nobody_is_let_in_who_would_at_once_push_another_out() -> None:
    engine = make(num_pages=8, max_num_batched_tokens=32)
    scheduler = engine.scheduler
    for number in (0, 1):
        scheduler.add(request(number, 12, 4))
    assert [item.seq.id for item in scheduler.schedule().items] == [0], "3 + 3 pages leave 1 for the two to go on"
    assert scheduler.num_waiting == 1


def test_who_was_refused_is_let_in_as_soon_as_pages_suffice_while_others_run_on() -> None:
    engine = make(num_pages=11, max_num_batched_tokens=40)
    scheduler = engine.scheduler
    seqs = [request(0, 4, 20), request(1, 12), request(2, 16)]
    for seq in seqs:
        scheduler.add(seq)
    commit(engine, scheduler.schedule())
    assert scheduler.waiting == [seqs[2]]
    commit(engine, scheduler.schedule())
    scheduler.finish(seqs[1])
    assert [item.seq for item in scheduler.schedule().items] == [seqs[0], seqs[2]]


def test_a_prompt_that_samples_nothing_is_computed_to_its_last_token() -> None:
    engine = make()
    engine.scheduler.add(request(0, 17, 0))
    plans = [engine.scheduler.schedule() for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[(0, 0, 16)], [(0, 16, 1)], []]
    assert not any(item.samples for plan in plans for item in plan.items)


def test_a_paused_sequence_gets_no_tokens_and_is_the_first_to_lose_its_pages() -> None:
    engine = make(num_pages=8)
    scheduler = engine.scheduler
    idle, busy = request(0, 4, 24), request(1, 4, 24)
    scheduler.add(idle)
    scheduler.add(busy)
    commit(engine, scheduler.schedule())
    idle.paused = True
    for _ in range(23):
        plan = scheduler.schedule()
        assert [item.seq for item in plan.items] == [busy]
        commit(engine, plan)
    assert idle.status is Status.WAITING and idle.num_preemptions == 1 and busy.num_preemptions == 0
    scheduler.finish(busy)
    assert not scheduler.schedule().items
    idle.paused = False
    assert [item.seq for item in scheduler.schedule().items] == [idle]


def test_paused_sequences_in_every_slot_do_not_block_those_who_could_run() -> None:
    engine = make(max_num_seqs=2)
    scheduler = engine.scheduler
    for number in (0, 1, 2):
        scheduler.add(request(number, 4))
    commit(engine, scheduler.schedule())
    for seq in scheduler.running:
        seq.paused = True
    plan = scheduler.schedule()
    assert shape(plan) == [(2, 0, 4)] and [seq.id for seq in plan.preempted] == [1]


@pytest.mark.parametrize("depth", [0, 1])
def test_no_token_is_computed_that_nobody_asked_for(depth: int) -> None:
    engine = make()
    seqs = [request(number, 4, max_tokens) for number, max_tokens in enumerate((0, 1, 2, 5))]
    computed: Counter[int] = Counter()
    for seq in seqs:
        engine.scheduler.add(seq)
    for _ in range(12):
        while len(engine.flying) > depth:
            plan = engine.flying[0][0]
            computed.update({item.seq.id: item.num_new for item in plan.items})
            commit(engine, engine.flying.pop(0)[0])
        engine.flying.append((engine.scheduler.schedule(), []))
    assert [computed[seq.id] for seq in seqs] == [4, 4, 5, 8]
    assert [len(seq.token_ids) for seq in seqs] == [4, 5, 6, 9]


def test_accepted_drafts_count_and_rejected_ones_are_computed_over() -> None:
    engine = make(max_num_batched_tokens=32)
    scheduler, seq = engine.scheduler, request(0, 4, 12)
    scheduler.add(seq)
    commit(engine, scheduler.schedule())
    seq.drafts = [1, 2, 1]
    item = scheduler.schedule().items[0]
    assert (item.start, item.num_new, item.drafts, item.samples) == (4, 4, [1, 2, 1], True)
    assert seq.num_computed == 5 and not scheduler.schedule().items, "how long it is must be known first"
    assert scheduler.commit(item, [1, 2, 2])
    assert seq.token_ids[-4:] == [1, 1, 2, 2] and seq.num_computed == 7 == seq.num_tokens - 1
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 7, 1)] and plan.num_decodes == 1, "the rejected draft's position comes again"
    seq.drafts = [1, 1]
    assert shape(scheduler.schedule()) == [(0, 8, 1)], "a token is still unknown: nothing can follow it"


def test_drafts_stop_before_the_last_token_that_may_be_sampled() -> None:
    engine = make()
    scheduler, seq = engine.scheduler, request(0, 4, 4)
    scheduler.add(seq)
    commit(engine, scheduler.schedule())
    seq.drafts = [1] * 9
    item = scheduler.schedule().items[0]
    assert len(item.drafts) == 2
    scheduler.commit(item, [1, 1, 1])
    assert len(seq.token_ids) == 8 and not scheduler.schedule().items


def test_drafts_get_what_decodes_leave_and_half_of_it_beside_a_prompt() -> None:
    engine = make(max_num_batched_tokens=8)
    scheduler, seqs = engine.scheduler, [request(0, 4, 20), request(1, 4, 20)]
    for seq in seqs:
        scheduler.add(seq)
    for new, sizes in ((None, [6, 2]), (request(2, 9), [4, 1, 3])):
        plan = scheduler.schedule()
        commit(engine, plan)
        if new:
            scheduler.add(new)
        for seq in seqs:
            seq.drafts = [1] * 5
        plan = scheduler.schedule()
        assert [item.num_new for item in plan.items] == sizes
        commit(engine, plan)


def test_a_fork_of_all_that_is_computed_leaves_its_last_token_to_compute() -> None:
    engine = make()
    scheduler, parent = engine.scheduler, request(0, 6)
    scheduler.add(parent)
    scheduler.schedule()
    child = Sequence(1, list(parent.token_ids), 6, 8)
    assert scheduler.fork(parent, child) and child.num_computed == 5
    assert (1, 5, 1) in shape(scheduler.schedule())


def test_forced_tokens_are_computed_in_one_go() -> None:
    engine = make()
    scheduler, seq = engine.scheduler, request(0, 4, 12)
    scheduler.add(seq)
    commit(engine, scheduler.schedule())
    seq.token_ids += [1, 2, 1]
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 4, 4)] and plan.items[0].samples and plan.num_decodes == 0


def test_a_value_that_comes_too_late_is_not_taken() -> None:
    engine = make()
    scheduler, seq, other = engine.scheduler, request(0, 4), request(1, 4)
    scheduler.add(seq)
    scheduler.add(other)
    plan = scheduler.schedule()
    scheduler.preempt(seq)
    scheduler.finish(other)
    scheduler.finish(other)
    assert [scheduler.commit(item, [7]) for item in plan.items] == [False, False]
    assert seq.num_tokens == 4 and other.status is Status.FINISHED
    again = scheduler.schedule()
    assert not scheduler.commit(plan.items[0], [7]), "it runs, but not as it did"
    assert scheduler.commit(again.items[0], [8]) and seq.token_ids[-1] == 8 and seq.num_tokens == 5


def test_a_fork_without_a_slot_waits_and_finds_its_pages_by_their_text() -> None:
    engine = make(max_num_seqs=1)
    scheduler, parent = engine.scheduler, request(0, 9)
    scheduler.add(parent)
    commit(engine, scheduler.schedule())
    child = Sequence(1, [*parent.token_ids[:9], 2], 9, 8)
    assert not scheduler.fork(parent, child) and child.status is Status.WAITING
    scheduler.finish(parent)
    assert shape(scheduler.schedule()) == [(1, 8, 2)]


def test_those_who_share_a_prefix_are_neighbours_and_are_reported() -> None:
    engine = make(num_pages=400, max_num_seqs=12, max_num_batched_tokens=4000)
    scheduler = engine.scheduler
    seqs = [Sequence(n, [3 + n % 2] * 256 + [1 + n], 257, 4) for n in range(10)]
    for seq in seqs:
        scheduler.add(seq)
    commit(engine, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan.prefixes == [(0, 5, 256), (5, 10, 256)]
    kinds = [item.seq.token_ids[0] for item in plan.items]
    assert len(set(kinds[:5])) == len(set(kinds[5:])) == 1
    commit(engine, plan)
    for seq in seqs[:8:2]:
        scheduler.finish(seq)
    plan = scheduler.schedule()
    assert len(plan.items) == 6 and [end - start for start, end, _ in plan.prefixes] == [5]


def test_of_nested_prefixes_those_are_taken_that_save_most() -> None:
    trunk = list(range(1, 21))
    wide = [[*trunk, 100 + n] for n in range(6)]
    assert shared_prefixes(wide, 16) == [(0, 6, 320)]
    branch = list(range(30, 130))
    deep = [[*trunk, *branch, 200 + n] for n in range(4)]
    assert shared_prefixes(wide + deep, 16) == [(0, 6, 320), (6, 10, 1920)]
    assert shared_prefixes(wide[:3], 16) == [], "three are too few"
    assert shared_prefixes([[*table[:15], n] for n, table in enumerate(wide, 100)], 16) == [], "240 keys are too few"
    assert shared_prefixes([], 16) == []


@given(st.lists(st.lists(st.integers(1, 2), max_size=6), max_size=12).map(sorted), st.integers(1, 3), st.integers(2, 4))
def test_reported_prefixes_are_shared_and_no_two_overlap(
    tables: list[list[int]], page_size: int, min_sequences: int
) -> None:
    last = 0
    for start, end, length in shared_prefixes(tables, page_size, min_sequences, min_keys=2):
        assert last <= start and end - start >= min_sequences and length >= 2 and length % page_size == 0
        heads = [table[: length // page_size] for table in tables[start:end]]
        assert all(head == heads[0] and len(head) == length // page_size for head in heads)
        last = end


def test_settings_that_would_starve_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="starve"):
        make(max_num_seqs=8, max_num_batched_tokens=7)
