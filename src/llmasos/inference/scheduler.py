"""Which tokens of which sequences the next forward pass computes. Plain Python policy, no torch.

There are no phases: a sequence has num_computed catching up with num_tokens under one token budget per pass.
Invariants for a sequence that runs, between calls:

- token_ids are the known tokens; num_pending more were sampled by passes in flight, their values are on the device.
  num_tokens = len(token_ids) + num_pending. A pass gives keys to positions start .. start + num_new - 1.
- 0 <= num_computed <= num_tokens, and num_computed = num_tokens - 1 once a sequence has caught up: the newest token is
  always the next pass's input. (With max_tokens = 0 nothing is sampled: num_computed reaches num_tokens.)
- Without overlap num_pending is 0 when schedule() is called and 1 until commit(). With overlap of depth 1 schedule() is
  called while one pass is in flight: num_pending is 1 before, 2 after. num_tokens never passes num_prompt + max_tokens,
  so no pass computes a token nobody asked for.
- Drafts follow the last known token, so they are used only when nothing is pending and the item catches up. Their keys
  are written but not counted: schedule() adds num_new - len(drafts) to num_computed, commit() adds the accepted ones.
  What rejected drafts wrote lies behind num_computed, is never published and is overwritten; its pages stay with the
  sequence. How long the sequence is is not known until commit(): it sits out the passes planned before.
- Known tokens may be appended by the engine (forced by a grammar) while nothing is pending: num_computed just lags.
- Preemption forgets keys and pending tokens: they are sampled again. Items carry the run they were planned in, and
  commit() takes no value for a sequence that was preempted or finished since.
- Pages, prefixes and slots change hands when a pass is planned, not when it ends. That is safe because passes run in
  the order in which they were planned; every plan must be run, whatever happened to its sequences since.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Ordered
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from itertools import pairwise
from operator import attrgetter
from typing import Any

from llmasos.inference.cache import CachedSequence, Copy, PageCache

_NESTING = 16
"""Levels of prefixes inside prefixes that are looked at."""


class Status(Enum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence(CachedSequence):
    """One completion on its way. The engine sets the fields above `status`, the scheduler the others."""

    num_prompt: int
    max_tokens: int
    """New tokens at most; 0 computes the prompt and samples nothing (embeddings, scores)."""
    owner: Any = None
    _: KW_ONLY
    priority: int = 0
    """Smaller is sooner."""
    arrival: float = 0.0
    drafts: list[int] = field(default_factory=list)
    """Speculative tokens to verify in the next pass; taken, or dropped, by the next plan that has the sequence."""
    paused: bool = False
    """Stays resident but gets no tokens."""
    status: Status = Status.NEW
    slot: int = -1
    """Row of the device's token pool while it runs."""
    num_pending: int = 0
    num_cached: int = 0
    """Prompt tokens found in the cache at first admission."""
    num_preemptions: int = 0
    verifying: bool = False
    """Drafts are in flight."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def rank(self) -> tuple[int, float, int]:
        """Smaller goes first, the largest is preempted first."""
        return (self.priority, self.arrival, self.id)


@dataclass(eq=False, slots=True)
class Item:
    """A pass computes positions start .. start + num_new - 1 of a sequence; the last len(drafts) of them are drafts."""

    seq: Sequence
    start: int
    num_new: int
    samples: bool
    """It catches up: the logits of its last 1 + len(drafts) tokens are wanted, commit() will be told the outcome."""
    run: int
    drafts: Ordered[int] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_new


@dataclass(eq=False, slots=True)
class Plan:
    """One forward pass. The first `num_decodes` items have one new token each. A later item may read what an earlier
    one writes (a prefix both have), so the pass must write a layer's keys before it reads them, and may be split only
    into passes that run in this order."""

    items: list[Item] = field(default_factory=list)
    num_decodes: int = 0
    num_tokens: int = 0
    copies: list[Copy] = field(default_factory=list)
    """To run before the pass."""
    preempted: list[Sequence] = field(default_factory=list)
    """Lost slot and keys while this was planned; to be handled before the items, which may have one again."""
    prefixes: list[tuple[int, int, int]] = field(default_factory=list)
    """Shared prefixes among the decodes, as shared_prefixes() gives them."""


class Scheduler:
    """Decodes first, then unfinished prompts, then waiting sequences by rank (priority, arrival, id). `chunk` caps the
    tokens a sequence gets in one pass."""

    def __init__(
        self,
        cache: PageCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunk: int | None = None,
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(f"{max_num_batched_tokens} tokens a pass starve prompts beside {max_num_seqs} sequences")
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunk = min(chunk or max_num_batched_tokens, max_num_batched_tokens)
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        # sorted by page table, so that those who share a prefix are neighbours
        self._decodes: list[Sequence] = []
        self._prompts: list[Sequence] = []
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._refused: tuple[Sequence, int, int] | None = None
        self._shared_group = next((g for g, pool in enumerate(cache.pools) if not pool.window), -1)
        self._prefixes: list[tuple[int, int, int]] = []
        self._sharers: list[Sequence] = []

    @property
    def running(self) -> list[Sequence]:
        return self._decodes + self._prompts

    @property
    def num_running(self) -> int:
        return len(self._decodes) + len(self._prompts)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._decodes or self._prompts)

    # sequences come and go

    def add(self, seq: Sequence) -> None:
        """All its keys must fit into the cache."""
        assert seq.status is Status.NEW and seq.token_ids
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=attrgetter("rank"))

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Start `child` (new, its token_ids set and equal to parent's as far as those are computed) on parent's pages.
        False: it waits like any other, because the parent does not run or no slot is free."""
        assert child.status is Status.NEW
        if parent.status is not Status.RUNNING or not self._slots:
            self.add(child)
            return False
        child.num_computed = min(parent.num_computed, len(child.token_ids) - 1)
        self.cache.fork(parent, child)
        self._start(child)
        self._file(child)
        return True

    def finish(self, seq: Sequence) -> None:
        """Let go of a sequence in any state; again does nothing. Pages and slot are free at once, also in flight."""
        if seq.status is Status.RUNNING:
            self._stop(seq)
        elif seq.status is Status.WAITING:
            self._unqueue(seq)
        seq.status = Status.FINISHED

    def preempt(self, seq: Sequence) -> None:
        """Back to waiting, to be computed anew."""
        if seq.status is not Status.RUNNING:
            return
        self._stop(seq)
        seq.num_computed = seq.num_pending = 0
        seq.drafts = []
        seq.verifying = False
        seq.num_preemptions += 1
        self.num_preemptions += 1
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=attrgetter("rank"))

    def restart(self) -> None:
        """Every key is lost (a pass failed, the pages' memory was given away): forget all prefixes and compute all that
        runs anew. Plans in flight must not be committed."""
        self.cache.reset_prefixes()
        for seq in self.running:
            self.preempt(seq)

    def _start(self, seq: Sequence) -> None:
        seq.status, seq.slot = Status.RUNNING, self._slots.pop()

    def _stop(self, seq: Sequence) -> None:
        (self._decodes if seq in self._decodes else self._prompts).remove(seq)
        self.cache.free(seq)
        self._slots.append(seq.slot)
        seq.slot = -1

    def _unqueue(self, seq: Sequence) -> None:
        del self.waiting[bisect_left(self.waiting, seq.rank, key=attrgetter("rank"))]

    def _file(self, seq: Sequence) -> None:
        """Into the list where a running sequence belongs."""
        if _lags(seq):
            insort(self._prompts, seq, key=attrgetter("rank"))
        elif self._shared_group >= 0:
            insort(self._decodes, seq, key=self._table)
        else:
            self._decodes.append(seq)

    def _table(self, seq: Sequence) -> list[int]:
        return seq.pages[self._shared_group]

    # one pass

    def schedule(self) -> Plan:
        """Plan the next pass. Empty while nothing is in flight: all that is left is paused or not yet finished."""
        plan = Plan()
        self._plan_decodes(plan)
        if self._plan_prompts(plan):
            self._plan_waiting(plan)
        plan.copies = self.cache.take_copies()
        if self._shared_group >= 0:
            sharers = [item.seq for item in plan.items[: plan.num_decodes]]
            if sharers != self._sharers:
                tables = [self._table(seq) for seq in sharers]
                self._prefixes, self._sharers = shared_prefixes(tables, self.cache.page_size), sharers
            plan.prefixes = self._prefixes
        return plan

    def commit(self, item: Item, tokens: Ordered[int]) -> bool:
        """What an item that samples gave: the accepted drafts and one token after them. False: the sequence finished or
        was preempted since, nothing was taken. Commit in the order of the plans."""
        seq = item.seq
        if seq.status is not Status.RUNNING or seq.num_preemptions != item.run:
            return False
        seq.num_pending -= 1
        seq.num_computed += len(tokens) - 1
        seq.token_ids.extend(tokens)
        if item.drafts:
            seq.verifying = False
        if seq.num_computed // self.cache.page_size > seq.num_published:
            self.cache.publish(seq)
        return True

    def _plan_decodes(self, plan: Plan) -> None:
        ready = [
            seq
            for seq in self._decodes
            if not seq.paused
            and not seq.verifying
            and len(seq.token_ids) + seq.num_pending < seq.num_prompt + seq.max_tokens
        ]
        short = [seq for seq in ready if seq.num_computed >= seq.num_writable]
        if short and not self._make_room(short, plan):
            ready = [seq for seq in ready if seq.status is Status.RUNNING]
        items, longer = plan.items, []
        for seq in ready:
            num_tokens = len(seq.token_ids) + seq.num_pending
            start = seq.num_computed
            if num_tokens - start > 1 or seq.drafts:
                longer.append(seq)
                continue
            items.append(Item(seq, start, 1, True, seq.num_preemptions))
            seq.num_computed = num_tokens
            seq.num_pending += 1
        plan.num_decodes = len(items)
        plan.num_tokens = len(ready)
        if longer:
            self._plan_longer(longer, plan)

    def _make_room(self, short: list[Sequence], plan: Plan) -> bool:
        """A page for the next key of each; whoever ranks last is preempted for it. False if anyone was."""
        num_preempted = len(plan.preempted)
        for seq in sorted(short, key=attrgetter("rank")):
            # those before ranked better, so no victim already has its page for this pass
            while seq.status is Status.RUNNING and not self.cache.allocate(seq, seq.num_computed + 1):
                self._preempt(_worst(self.running), plan)
        return len(plan.preempted) == num_preempted

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        self.preempt(seq)
        plan.preempted.append(seq)

    def _plan_longer(self, longer: list[Sequence], plan: Plan) -> None:
        """Decodes that have drafts to verify or several known tokens to catch up with: one token each is counted and
        has its page, more come from what the decodes left (half of it if prompts want some)."""
        extra = self.max_num_batched_tokens - plan.num_tokens
        if self.waiting or self._prompts:
            extra //= 2
        for seq in longer:
            drafts = [] if seq.num_pending else seq.drafts
            known = seq.num_tokens - seq.num_computed
            most = seq.num_prompt + seq.max_tokens - 1 - seq.num_computed  # the token after the drafts must be allowed
            size = min(known + len(drafts), extra + 1, self.chunk, most)
            if size > 1:
                size = min(size, max(1, self.cache.room(seq, self.num_running) - seq.num_computed))
                allocated = self.cache.allocate(seq, seq.num_computed + size)
                assert allocated
            extra -= size - 1
            plan.num_tokens += size - 1
            self._append(plan, seq, size, drafts[: max(0, size - known)])

    def _append(self, plan: Plan, seq: Sequence, size: int, drafts: Ordered[int] = ()) -> None:
        start = seq.num_computed
        seq.num_computed = start + size - len(drafts)
        samples = seq.num_computed == seq.num_tokens < seq.num_prompt + seq.max_tokens
        plan.items.append(Item(seq, start, size, samples, seq.num_preemptions, drafts))
        if samples:
            seq.num_pending += 1
        seq.verifying = bool(drafts)
        seq.drafts = []
        self.cache.publish(seq)

    def _plan_prompts(self, plan: Plan) -> bool:
        """Chunks for prompts that were begun. False: one could not get its pages, so nobody else should be let in."""
        for seq in list(self._prompts):
            left = self.max_num_batched_tokens - plan.num_tokens
            if left <= 0:
                return False
            if seq.paused or seq.status is not Status.RUNNING:
                continue
            size = min(seq.num_tokens - seq.num_computed, self.chunk, left)
            spare = len(plan.items)  # the pages their next keys need
            while (room := self.cache.room(seq, spare) - seq.num_computed) < size:
                victims = [s for s in self._decodes if s.paused]
                victims += [s for s in self._prompts if s.paused or s.rank > seq.rank]
                if not victims:
                    break
                self._preempt(_worst(victims), plan)
            if room <= 0:
                if self.num_running > 1:
                    return False
                self._preempt(seq, plan)  # it cannot copy the page it shares: it fits if it begins anew
                return True
            self._grant(plan, seq, min(size, room))
        return True

    def _grant(self, plan: Plan, seq: Sequence, size: int) -> None:
        allocated = self.cache.allocate(seq, seq.num_computed + size)
        assert allocated
        plan.num_tokens += size
        self._append(plan, seq, size)
        if not _lags(seq):
            self._prompts.remove(seq)
            self._file(seq)

    def _plan_waiting(self, plan: Plan) -> None:
        while plan.num_tokens < self.max_num_batched_tokens:
            seq = next((s for s in self.waiting if not s.paused), None)
            if seq is None or (plan.preempted and plan.items):
                return
            while not self._admit(seq, plan):
                # nothing moves: those who wait for others, or for a slow reader, must not block those who could go
                if plan.items or not self.num_running or not all(s.paused for s in self.running):
                    return
                self._preempt(_worst(self.running), plan)

    def _admit(self, seq: Sequence, plan: Plan) -> bool:
        """Let a waiting sequence in if, beside it, every running one can still have a page and every begun prompt all
        of its pages; alone it is let in with what there is."""
        others = self.num_running
        state = (seq, self.cache.num_available, others)
        if not self._slots or (self._refused and others and self._refuses(state)):
            return False
        num_cached = self.cache.match(seq)
        left = self.max_num_batched_tokens - plan.num_tokens
        size = min(seq.num_tokens - seq.num_computed, self.chunk, left)
        if others:
            pages_for, begun = self.cache.pages_for, seq.num_computed + size
            claimed = pages_for(seq.num_tokens - begun) + sum(
                pages_for(s.num_tokens - s.num_computed) for s in self._prompts
            )
            room = self.cache.room(seq, others + 1, claimed)
        else:
            room = self.cache.room(seq)
        room -= seq.num_computed
        if room < size and (others or room <= 0):
            self.cache.free(seq)
            seq.num_computed = 0
            self._refused = state
            return False
        self._unqueue(seq)
        if not seq.num_preemptions:
            seq.num_cached = num_cached
        self._start(seq)
        insort(self._prompts, seq, key=attrgetter("rank"))
        self._grant(plan, seq, min(size, room))
        return True

    def _refuses(self, state: tuple[Sequence, int, int]) -> bool:
        """The same was refused before, with at least as many pages: spare the lookup of its prefix."""
        assert self._refused
        seq, num_available, num_running = self._refused
        return state[0] is seq and state[1] <= num_available and state[2] >= num_running

    def check_integrity(self) -> None:
        """Raise AssertionError that says what is wrong with the book-keeping."""
        self.cache.check_integrity()
        running = self.running
        assert len(set(running)) == len(running) and not set(running) & set(self.waiting), "a sequence is listed twice"
        slots = sorted([seq.slot for seq in running] + self._slots)
        assert slots == list(range(self.max_num_seqs)), f"slots {slots} are not each one's own"
        assert [seq.rank for seq in self.waiting] == sorted(seq.rank for seq in self.waiting), "waiting is out of order"
        for seq in self.waiting:
            assert seq.status is Status.WAITING and not seq.pages and seq.slot < 0, (
                f"sequence {seq.id} waits with pages"
            )
            assert not seq.num_computed and not seq.num_pending, f"sequence {seq.id} waits with keys"
        for seq in running:
            assert seq.status is Status.RUNNING, f"sequence {seq.id} is {seq.status} and runs"
            assert seq.num_computed <= seq.num_tokens, f"sequence {seq.id} computed more than it has"
            assert seq.num_tokens <= max(seq.num_prompt + seq.max_tokens, len(seq.token_ids)), f"{seq.id} is too long"
            assert seq.num_computed <= len(seq.pages[0]) * self.cache.page_size, f"sequence {seq.id} lacks pages"


def _lags(seq: Sequence) -> bool:
    return seq.num_computed < seq.num_prompt or seq.num_tokens - seq.num_computed > 1


def _worst(sequences: list[Sequence]) -> Sequence:
    """Whom to preempt: the paused first, then who ranks last."""
    return max(sequences, key=lambda seq: (seq.paused, seq.rank))


def shared_prefixes(
    tables: Ordered[Ordered[int]], page_size: int, min_sequences: int = 4, min_keys: int = 256
) -> list[tuple[int, int, int]]:
    """Runs (start, end, length): tables start .. end - 1 begin with the same length / page_size pages. Of nested runs
    those are chosen that save the most key reads. Tables are of full-attention groups and of sequences whose new keys
    have pages of their own, so a shared page lies before every query."""
    common, hint = [], 0
    for a, b in pairwise(tables):
        hint = _common(a, b, hint)
        common.append(hint)
    least = -(-min_keys // page_size)

    def best(start: int, end: int, depth: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Pages saved among neighbours start .. end - 1, and the runs that save them. They share `low` pages; where no
        two share more they are cut, and every part either has runs of its own or joins a run of length `low`."""
        if end - start < min_sequences or not depth:
            return 0, []
        inside = common[start : end - 1]
        low = min(inside)
        saved, runs = 0, list[tuple[int, int, int]]()
        if low == max(inside):
            return (len(inside) * low, [(start, end, low * page_size)]) if low >= least else (saved, runs)
        joint, before, first = -end * low, runs, start  # a run that goes on: saved with it, runs before it, its start
        for cut in [*(start + i + 1 for i, count in enumerate(inside) if count == low), end]:
            part = best(start, cut, depth - 1)
            joint += (cut - start) * low
            if saved + (cut - start - 1) * low > joint:
                joint, before, first = saved + (cut - start - 1) * low, runs, start
            saved, runs, start = saved + part[0], runs + part[1], cut
            if joint >= saved and low >= least and cut - first >= min_sequences:
                saved, runs = joint, [*before, (first, cut, low * page_size)]
        return saved, runs

    return best(0, len(tables), _NESTING)[1]


def _common(a: Ordered[int], b: Ordered[int], hint: int) -> int:
    """Length of the common beginning; fast if it is `hint`."""
    count = hint if a[:hint] == b[:hint] else 0
    most = min(len(a), len(b))
    while count < most and a[count] == b[count]:
        count += 1
    return count
