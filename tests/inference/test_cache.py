"""The page cache: what is found again is exact, nobody's keys are written over, nothing leaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmasos.inference.cache import CachedSequence, Group, PageCache

PAGE = 4


def cache_of(num_pages: int, *windows: int, **options: Any) -> PageCache:
    return PageCache([Group(num_pages, w) for w in windows or (0,)], PAGE, **options)


def computed(cache: PageCache, ids: list[int], **options: Any) -> CachedSequence:
    """A sequence that found what it could and computed the rest."""
    seq = CachedSequence(0, list(ids), **options)
    cache.match(seq)
    assert cache.allocate(seq, len(ids))
    seq.num_computed = len(ids)
    cache.publish(seq)
    cache.take_copies()
    return seq


def found(cache: PageCache, ids: list[int], **options: Any) -> int:
    seq = CachedSequence(0, list(ids), **options)
    cache.match(seq)
    cache.free(seq)
    cache.check_integrity()
    return seq.num_computed


def test_a_prefix_is_found_in_whole_pages_and_one_token_is_left_to_compute() -> None:
    cache = cache_of(20)
    cache.free(computed(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert found(cache, [1, 2, 3, 4, 0, 6, 7, 8, 9]) == 4
    assert found(cache, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0


def test_the_same_page_behind_another_beginning_is_another_page() -> None:
    cache = cache_of(20)
    cache.free(computed(cache, [1] * 4 + [2] * 4))
    assert found(cache, [2] * 4 + [2] * 4 + [0]) == 0
    cache.free(computed(cache, [2] * 8))
    assert found(cache, [1] * 4 + [2] * 8) == 8


def test_tokens_of_equal_hash_are_told_apart() -> None:
    """hash(-1) == hash(-2) in CPython, so tuples of them collide as well."""
    cache = cache_of(20)
    assert hash((-1,) * 4) == hash((-2,) * 4)
    cache.free(computed(cache, [-1] * 5))
    assert found(cache, [-2] * 5) == 0
    assert found(cache, [-1] * 5) == 4


def test_salts_share_nothing() -> None:
    cache = cache_of(20)
    cache.free(computed(cache, [1] * 9, salt="a"))
    assert found(cache, [1] * 9, salt="b") == 0
    assert found(cache, [1] * 9) == 0
    assert found(cache, [1] * 9, salt="a") == 8


def test_a_sequence_may_refuse_or_limit_reuse() -> None:
    cache = cache_of(20)
    cache.free(computed(cache, [2] * 9, reuse=False))
    assert found(cache, [2] * 9) == 0, "what refuses reuse leaves nothing either"
    cache.free(computed(cache, [1] * 13))
    assert found(cache, [1] * 13, reuse=False) == 0
    assert found(cache, [1] * 13, max_reuse=11) == 8
    off = cache_of(20, prefix_reuse=False)
    off.free(computed(off, [1] * 9))
    assert found(off, [1] * 9) == 0 and off.pools[0].num_free == 19


def test_partial_pages_and_unknown_tokens_cannot_be_found() -> None:
    cache = cache_of(20)
    seq = CachedSequence(0, [1] * 7)
    cache.match(seq)
    assert cache.allocate(seq, 8)
    seq.num_computed = 8  # the last token is still on the device
    cache.publish(seq)
    assert found(cache, [1] * 9) == 4
    seq.token_ids.append(1)
    cache.publish(seq)
    assert found(cache, [1] * 9) == 8


def test_pages_are_evicted_least_recently_used_first_and_deepest_first() -> None:
    cache = cache_of(8)
    for token in (1, 2):
        cache.free(computed(cache, [token] * 12))
    assert found(cache, [1] * 13) == 12  # 1 was used last now
    taken = computed(cache, [3] * 12)  # one page was free: two go
    assert cache.num_evictions == 2
    assert (found(cache, [1] * 13), found(cache, [2] * 13)) == (12, 4)
    cache.free(taken)


def test_pages_in_use_are_never_evicted() -> None:
    cache = cache_of(8)
    first = computed(cache, [1] * 12)
    second = CachedSequence(1, [1] * 12 + [2])
    assert cache.match(second) == 12
    cache.free(first)
    third = CachedSequence(2, [3] * 20)
    cache.match(third)
    assert not cache.allocate(third, 20), "only four pages are left"
    assert not third.pages[0], "all or nothing"
    assert cache.allocate(third, 16)
    assert found(cache, [1] * 13) == 12
    cache.check_integrity()


def test_an_orphan_is_cleaned_up_and_comes_back_with_its_parent() -> None:
    """The second sequence owns the end of a chain whose beginning, a twin of its own page, was evicted."""
    cache = cache_of(6)
    first, second = CachedSequence(0, [1] * 4), CachedSequence(1, [1] * 9)
    for seq in (first, second):  # side by side, so both compute the first page
        cache.match(seq)
        cache.allocate(seq, len(seq.token_ids))
    for seq in (first, second):
        seq.num_computed = len(seq.token_ids)
        cache.publish(seq)
    cache.free(first)
    other = computed(cache, [2] * 8)  # takes the last free page and that of `first`
    assert cache.num_evictions == 1 and found(cache, [1] * 9) == 0
    cache.free(second)
    cache.free(other)
    cache.free(computed(cache, [1] * 4))
    assert found(cache, [1] * 9) == 8, "the orphan was kept and is right"
    cache.free(computed(cache, [3] * 20))
    assert found(cache, [1] * 9) == 0 and cache.num_evictions > 1
    assert len(cache._roots) == 1


def test_a_window_group_keeps_only_what_can_be_seen_and_hits_need_only_that() -> None:
    cache = cache_of(20, 0, 6)
    seq = computed(cache, [1] * 22)
    cache.slide(seq)
    # the query at 22 sees keys 17 .. 22: pages 4 and 5
    assert [bool(page) for page in seq.pages[1]] == [False] * 4 + [True] * 2
    assert all(seq.pages[0])
    cache.free(seq)
    cache.check_integrity()
    again = CachedSequence(1, [1] * 22)
    assert cache.match(again) == 20
    # at 20 keys 15 .. 19 are seen besides its own
    assert [bool(page) for page in again.pages[1]] == [False] * 3 + [True] * 2
    cache.free(again)


def test_a_hit_is_cut_where_a_window_group_lost_its_pages() -> None:
    cache = PageCache([Group(40), Group(7, 5)], PAGE)
    cache.free(computed(cache, [1] * 24))
    seq = CachedSequence(1, [2] * 4)
    cache.match(seq)
    assert cache.allocate(seq, 4)  # evicts one page of the window group: the deepest
    assert found(cache, [1] * 25) == 20
    cache.free(seq)


def test_forks_share_pages_and_copy_the_last_one_before_they_write() -> None:
    cache = cache_of(20, 0, 6)
    parent = computed(cache, [1] * 10)
    child = CachedSequence(1, [1] * 10 + [2], num_computed=10)
    cache.fork(parent, child)
    assert child.pages == parent.pages
    used = cache.pools[0].num_used
    shared = [table[2] for table in parent.pages]
    assert cache.allocate(child, 11) and cache.allocate(parent, 11)
    copies = cache.take_copies()
    assert [(c.group, c.source) for c in copies] == [(0, shared[0]), (1, shared[1])], "one of the two keeps the page"
    assert [table[2] for table in parent.pages] == shared
    assert [table[2] for table in child.pages] == [c.target for c in copies]
    assert cache.pools[0].num_used == used + 1
    cache.check_integrity()
    cache.free(parent)
    cache.free(child)
    cache.free(child)
    cache.check_integrity()
    assert cache.pools[0].num_used == 0


def test_a_page_that_can_be_found_is_copied_though_nobody_else_holds_it() -> None:
    cache = cache_of(20)
    parent = computed(cache, [1] * 8)
    child = CachedSequence(1, [1] * 7 + [2], num_computed=7)
    cache.fork(parent, child)
    cache.free(parent)
    assert cache.allocate(child, 8) and len(cache.take_copies()) == 1
    child.num_computed = 8
    cache.publish(child)
    assert found(cache, [1] * 9) == found(cache, [1] * 7 + [2, 2]) == 8
    cache.free(child)


def test_the_source_of_a_copy_is_not_handed_out_before_the_copy_is_taken() -> None:
    cache = cache_of(4)
    parent = computed(cache, [1] * 3)
    child = CachedSequence(1, [1] * 3 + [2], num_computed=3)
    cache.fork(parent, child)
    assert cache.allocate(child, 4)
    cache.free(parent)
    third = CachedSequence(2, [3] * 8)
    cache.match(third)
    assert not cache.allocate(third, 8)
    assert len(cache.take_copies()) == 1
    assert cache.allocate(third, 8)
    cache.check_integrity()


def test_after_a_reset_nothing_old_is_found_and_running_sequences_leave_nothing() -> None:
    cache = cache_of(20)
    cache.free(computed(cache, [1] * 9))
    old = computed(cache, [2] * 5)
    cache.reset_prefixes()
    assert found(cache, [1] * 9) == 0
    assert cache.allocate(old, 12)
    old.token_ids += [2] * 7
    old.num_computed = 12
    cache.publish(old)
    assert found(cache, [2] * 12) == 0
    cache.free(old)
    assert cache.pools[0].num_free == 19 and not cache._roots
    cache.free(computed(cache, [2] * 5))
    assert found(cache, [2] * 5) == 4


def test_fits_counts_all_pages_of_full_groups_and_the_visible_ones_of_windows() -> None:
    assert cache_of(6).fits(20) and not cache_of(6).fits(21)
    windowed = PageCache([Group(4, 6)], PAGE)
    assert windowed.fits(1000), "6 keys touch at most 3 pages"
    assert not PageCache([Group(3, 6)], PAGE).fits(1000) and PageCache([Group(3, 6)], PAGE).fits(8)


@pytest.mark.parametrize("groups", [[], [Group(1)], [Group(9, -1)]])
def test_a_cache_that_holds_nothing_is_refused(groups: list[Group]) -> None:
    with pytest.raises(ValueError, match="hold nothing"):
        PageCache(groups, PAGE)


class Pages(RuleBasedStateMachine):
    """Sequences come, grow, fork and go; a memory stands beside that says what each slot holds."""

    @initialize(num_pages=st.integers(4, 24), windows=st.sampled_from([[0], [0, 5], [0, 2, 9], [7], [1, 0]]))
    def start(self, num_pages: int, windows: list[int]) -> None:
        self.cache = PageCache([Group(num_pages + 3 * i, w) for i, w in enumerate(windows)], PAGE)
        self.memory: dict[tuple[int, int, int], object] = {}
        self.sequences: list[CachedSequence] = []
        self.num_begun = 0

    def pick(self, data: st.DataObject) -> CachedSequence | None:
        return data.draw(st.sampled_from(self.sequences)) if self.sequences else None

    @rule(
        ids=st.lists(st.integers(1, 2), min_size=1, max_size=3).flatmap(
            lambda pattern: st.integers(1, 10).map(lambda n: [x for x in pattern for _ in range(PAGE)] * n)
        ),
        tail=st.lists(st.integers(1, 2), max_size=5),
        salt=st.sampled_from([None, "a"]),
        reuse=st.sampled_from([True, True, False]),
    )
    def begin(self, ids: list[int], tail: list[int], salt: str | None, reuse: bool) -> None:
        seq = CachedSequence(self.num_begun, (ids + tail)[:40], salt=salt, reuse=reuse)
        self.num_begun += 1
        hit = self.cache.match(seq)
        assert hit % PAGE == 0 and hit < len(seq.token_ids) and hit == seq.num_computed
        self.sequences.append(seq)

    @rule(data=st.data(), count=st.integers(1, 12), num_rejected=st.integers(0, 6), publishes=st.booleans())
    def grow(self, data: st.DataObject, count: int, num_rejected: int, publishes: bool) -> None:
        """One pass: `count` tokens, and drafts behind them that are rejected."""
        if not (seq := self.pick(data)):
            return
        room = self.cache.room(seq)
        if not self.cache.allocate(seq, seq.num_computed + count + num_rejected):
            assert room < seq.num_computed + count + num_rejected
            return
        assert room >= seq.num_computed + count + num_rejected
        for group, source, target in self.cache.take_copies():
            for offset in range(PAGE):
                self.memory[group, target, offset] = self.memory.get((group, source, offset))
        end = seq.num_computed + count
        seq.token_ids += [1 + len(seq.token_ids) // PAGE % 2] * (end - len(seq.token_ids))
        for position in range(seq.num_computed, end + num_rejected):
            for group, table in enumerate(seq.pages):
                self.memory[group, table[position // PAGE], position % PAGE] = self.key(seq, position)
        seq.num_computed = end
        if publishes:
            self.cache.publish(seq)

    def key(self, seq: CachedSequence, position: int) -> object:
        known = position < len(seq.token_ids)
        return (seq.salt, *seq.token_ids[: position + 1]) if known else "rejected"

    @rule(data=st.data(), back=st.integers(0, 5), token=st.integers(1, 2))
    def fork(self, data: st.DataObject, back: int, token: int) -> None:
        if (parent := self.pick(data)) and parent.num_computed > back:
            shared = parent.num_computed - back
            if all(  # the keys that a query at `shared` sees are still there
                all(table[pool.first_visible(shared, PAGE) :])
                for pool, table in zip(self.cache.pools, parent.pages, strict=True)
            ):
                ids = [*parent.token_ids[:shared], token]
                child = CachedSequence(self.num_begun, ids, salt=parent.salt, num_computed=shared)
                self.num_begun += 1
                self.cache.fork(parent, child)
                self.sequences.append(child)

    @rule(data=st.data(), twice=st.booleans())
    def free(self, data: st.DataObject, twice: bool) -> None:
        if seq := self.pick(data):
            self.sequences.remove(seq)
            for _ in range(1 + twice):
                self.cache.free(seq)

    @rule(data=st.data())
    def slide(self, data: st.DataObject) -> None:
        if seq := self.pick(data):
            self.cache.slide(seq)

    @rule()
    def reset(self) -> None:
        self.cache.reset_prefixes()

    @invariant()
    def everybody_sees_their_own_text(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for seq in self.sequences:
            for group, pool in enumerate(self.cache.pools):
                first = max(0, seq.num_computed - pool.window + 1) if pool.window else 0
                for position in range(first, seq.num_computed):
                    page = seq.pages[group][position // PAGE]
                    assert self.memory[group, page, position % PAGE] == self.key(seq, position)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for seq in self.sequences:
                self.cache.free(seq)
            self.cache.check_integrity()
            assert all(pool.num_used == 0 and pool.usage == 0 for pool in self.cache.pools), "pages leak"
            self.cache.reset_prefixes()
            assert all(pool.num_free == pool.num_pages - 1 for pool in self.cache.pools), "pages are lost"
            assert not self.cache._roots, "the trie leaks"


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40)
