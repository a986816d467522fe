"""The book-keeping of paged keys and values: which sequence owns which page, which pages can be taken again by a
sequence that begins with the same tokens. Plain Python, no torch: the bytes themselves live in pages.py.

Pages come in groups (layers that keep the same tokens): a full-attention group keeps every page of a sequence, a
sliding-window group (window > 0) gives pages back once no later query can see them. A sequence has one table per
group; all its tables have the same length, entry p holds positions p * page_size .. (p + 1) * page_size - 1, and 0
stands for a page that slid away (page 0 itself is never handed out).

Reuse is exact. Full pages form a trie: a node is reached from its parent by the tuple of its page's tokens, from a root
that belongs to the sequence's salt. Nothing is looked up by a hash alone, so no collision can give wrong text. A node
holds one page per group (0: not kept) and lives while it has a page, a child, or a running sequence that stands on it.

A page is used (referenced by sequences), cached (by none, but in the trie: evicted oldest first, and of one sequence
deepest first) or free. All device work is ordered: a page may be given away while a pass that reads it is still in
flight, because the pass that writes it next comes later.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Group:
    """Layers that keep the same tokens. `num_pages` counts the reserved page 0."""

    num_pages: int
    window: int = 0
    """Keys a query sees, itself included; 0: all before it."""


class Copy(NamedTuple):
    """Page `target` of a group must hold what `source` holds before the next pass writes."""

    group: int
    source: int
    target: int


@dataclass(eq=False, slots=True)
class CachedSequence:
    """What the cache knows of a sequence. `pages`, `node`, `num_published` and `num_writable` are the cache's own."""

    id: int
    token_ids: list[int]
    _: KW_ONLY
    salt: Hashable = None
    """Sequences of different salt (tenants, adapters) share no pages."""
    reuse: bool = True
    """False: takes no cached pages and leaves none."""
    max_reuse: int | None = None
    """Never take more than this many cached tokens."""
    num_computed: int = 0
    """Keys written, or being written by a pass in flight."""
    pages: list[list[int]] = field(default_factory=list)
    """One table per group."""
    node: Node | None = None
    """Where in the trie its first `num_published` pages end; None: it publishes nothing."""
    num_published: int = 0
    num_writable: int = 0
    """Positions num_computed .. num_writable - 1 have pages that nobody else reads."""


class Node:
    """One full page of one exact prefix."""

    __slots__ = ("children", "num_users", "pages", "parent", "step")

    def __init__(self, parent: Node | None, step: Hashable, num_groups: int) -> None:
        self.parent = parent
        self.step = step  # the page's tokens; of a root: the salt
        self.pages = [0] * num_groups
        self.children: dict[Hashable, Node] = {}
        self.num_users = 0


class PagePool:
    """The pages of one group."""

    def __init__(self, group: Group) -> None:
        self.num_pages, self.window = group.num_pages, group.window
        self.references = [0] * group.num_pages
        self.nodes: list[Node | None] = [None] * group.num_pages
        self.free = list(range(group.num_pages - 1, 0, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now."""
        return len(self.free) + len(self.cached)

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_cached(self) -> int:
        return len(self.cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_available

    @property
    def usage(self) -> float:
        return self.num_used / max(1, self.num_pages - 1)

    def first_visible(self, position: int, page_size: int) -> int:
        """Index of the first page that a query at `position` or later can see."""
        return max(0, position - self.window + 1) // page_size if self.window else 0

    def share(self, page: int) -> None:
        if not self.references[page]:
            self.cached.pop(page, None)
        self.references[page] += 1


class PageCache:
    """Pages of all groups, and the trie of those that can be found again."""

    def __init__(self, groups: Sequence[Group], page_size: int, *, prefix_reuse: bool = True) -> None:
        if not groups or page_size < 1 or any(g.num_pages < 2 or g.window < 0 for g in groups):
            raise ValueError(f"groups {list(groups)} with pages of {page_size} tokens hold nothing")
        self.page_size = page_size
        self.prefix_reuse = prefix_reuse
        self.pools = [PagePool(group) for group in groups]
        self.num_evictions = 0
        self._roots: dict[Hashable, Node] = {}
        self._residents: dict[CachedSequence, None] = {}
        self._copies: list[Copy] = []
        self._sources: set[tuple[int, int]] = set()

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now, in the group that has fewest."""
        return min(pool.num_available for pool in self.pools)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence could ever hold `num_tokens` keys, alone."""
        for pool in self.pools:
            need = self.pages_for(num_tokens)
            if pool.window:  # a run of keys that may start and end inside a page
                need = min(need, (pool.window + self.page_size - 2) // self.page_size + 1)
            if need > pool.num_pages - 1:
                return False
        return True

    # a sequence comes and goes

    def match(self, seq: CachedSequence) -> int:
        """Begin a sequence: it takes the longest prefix that is cached, num_computed becomes its length in tokens:
        whole pages, and at least one token is left to compute."""
        seq.pages = [[] for _ in self.pools]
        seq.num_published = seq.num_computed = seq.num_writable = 0
        self._residents[seq] = None
        if not (self.prefix_reuse and seq.reuse):
            return 0
        node = self._roots.get(seq.salt)
        if node is None:
            node = self._roots[seq.salt] = Node(None, seq.salt, len(self.pools))
        path = self._longest(node, seq)
        for group, pool in enumerate(self.pools):
            first = pool.first_visible(len(path) * self.page_size, self.page_size)
            table = [0] * min(first, len(path)) + [step.pages[group] for step in path[first:]]
            for page in table[first:]:
                pool.share(page)
            seq.pages[group] = table
        seq.node = path[-1] if path else node
        seq.node.num_users += 1
        seq.num_published = len(path)
        seq.num_computed = seq.num_writable = len(path) * self.page_size
        return seq.num_computed

    def _longest(self, node: Node, seq: CachedSequence) -> list[Node]:
        """Nodes of the longest usable prefix: full groups have all pages, window groups those the next query sees."""
        size, ids = self.page_size, seq.token_ids
        limit = len(ids) - 1 if seq.max_reuse is None else min(len(ids) - 1, seq.max_reuse)
        path: list[Node] = []
        runs = [0] * len(self.pools)  # per group: first page of the unbroken run that ends here
        best = 0
        for end in range(size, limit + 1, size):
            child = node.children.get(tuple(ids[end - size : end]))
            if child is None:
                break
            path.append(child)
            node, usable = child, True
            for group, pool in enumerate(self.pools):
                if not child.pages[group]:
                    runs[group] = len(path)
                usable &= runs[group] <= pool.first_visible(end, size)
            if usable:
                best = len(path)
            elif any(run and not pool.window for run, pool in zip(runs, self.pools, strict=True)):
                break
        return path[:best]

    def fork(self, parent: CachedSequence, child: CachedSequence) -> None:
        """`child` shares the pages of its first child.num_computed tokens, which must be those of `parent` and lie no
        further back than parent's last pass began."""
        count = self.pages_for(child.num_computed)
        assert child.num_computed <= parent.num_computed and parent in self._residents
        child.pages = []
        for pool, table in zip(self.pools, parent.pages, strict=True):
            first = pool.first_visible(child.num_computed, self.page_size)
            assert all(table[first:count]), "a page that the child needs slid away"
            for page in table[:count]:
                if page:
                    pool.share(page)
            child.pages.append(table[:count])
        self._residents[child] = None
        child.num_published = min(parent.num_published, child.num_computed // self.page_size)
        child.node = parent.node
        for _ in range(parent.num_published - child.num_published):
            child.node = child.node.parent if child.node else None
        if child.node:
            child.node.num_users += 1
        parent.num_writable = child.num_writable = 0

    def free(self, seq: CachedSequence) -> None:
        """Give everything back; pages in the trie stay cached. A sequence that has nothing is left alone."""
        if seq not in self._residents:
            return
        del self._residents[seq]
        for group, table in enumerate(seq.pages):
            for page in reversed(table):  # the deepest page becomes the oldest, so it is evicted first
                if page:
                    self._release(group, page)
        self._leave(seq)
        seq.pages = []
        seq.num_published = seq.num_writable = 0

    # pages

    def room(self, seq: CachedSequence, spare: int = 0, claimed: int = 0) -> int:
        """How many tokens in all (from position 0) `seq` could hold in its next pass if `spare` pages of every group,
        and `claimed` more of full-attention groups, must stay available."""
        self.slide(seq)
        extra = min(
            pool.num_available - spare - (0 if pool.window else claimed) - self._must_copy(pool, table, seq)
            for pool, table in zip(self.pools, seq.pages, strict=True)
        )
        return (len(seq.pages[0]) + extra) * self.page_size if extra >= 0 else max(seq.num_computed, seq.num_writable)

    def _must_copy(self, pool: PagePool, table: list[int], seq: CachedSequence) -> bool:
        """The next key would be written into a page that somebody else reads or could find."""
        index = seq.num_computed // self.page_size
        if index >= len(table):
            return False
        page = table[index]
        return pool.references[page] > 1 or pool.nodes[page] is not None

    def allocate(self, seq: CachedSequence, num_tokens: int) -> bool:
        """Own pages for keys num_computed .. num_tokens - 1 in every group: all and True, or none and False."""
        if num_tokens <= seq.num_writable:
            return True
        self.slide(seq)
        new = max(0, self.pages_for(num_tokens) - len(seq.pages[0]))
        copies = [self._must_copy(pool, table, seq) for pool, table in zip(self.pools, seq.pages, strict=True)]
        if any(pool.num_available < new + copy for pool, copy in zip(self.pools, copies, strict=True)):
            return False
        for group, table in enumerate(seq.pages):
            if copies[group]:
                index = seq.num_computed // self.page_size
                source, table[index] = table[index], self._take(group)
                self._copies.append(Copy(group, source, table[index]))
                self._sources.add((group, source))
                self._release(group, source)
            table.extend([self._take(group) for _ in range(new)])
        seq.num_writable = len(seq.pages[0]) * self.page_size
        return True

    def slide(self, seq: CachedSequence) -> None:
        """Window groups give back the pages that no query at num_computed or later can see."""
        for group, pool in enumerate(self.pools):
            if pool.window:
                table = seq.pages[group]
                index = min(pool.first_visible(seq.num_computed, self.page_size), len(table)) - 1
                while index >= 0 and table[index]:
                    self._release(group, table[index])
                    table[index] = 0
                    index -= 1

    def take_copies(self) -> list[Copy]:
        """Copies to run, in any order, before the next pass writes. Until this call no source is handed out again."""
        copies, self._copies = self._copies, []
        sources, self._sources = self._sources, set()
        for group, page in sources:
            if not self.pools[group].references[page]:
                self._retire(group, page)
        return copies

    def _take(self, group: int) -> int:
        pool = self.pools[group]
        if pool.free:
            page = pool.free.pop()
        else:
            page, _ = pool.cached.popitem(last=False)
            self.num_evictions += 1
            node, pool.nodes[page] = pool.nodes[page], None
            assert node is not None
            node.pages[group] = 0
            self._prune(node)
        pool.references[page] = 1
        return page

    def _release(self, group: int, page: int) -> None:
        references = self.pools[group].references
        references[page] -= 1
        if not references[page] and (group, page) not in self._sources:
            self._retire(group, page)

    def _retire(self, group: int, page: int) -> None:
        pool = self.pools[group]
        if pool.nodes[page] is None:
            pool.free.append(page)
        else:
            pool.cached[page] = None

    # the trie

    def publish(self, seq: CachedSequence) -> None:
        """Full pages of known and computed tokens can be found from now on: also by a sequence of the pass that writes
        them, since a layer writes all its keys before any of its queries reads."""
        node = seq.node
        if node is None:
            return
        size, ids = self.page_size, seq.token_ids
        count = min(seq.num_computed, len(ids)) // size
        if count <= seq.num_published:
            return
        node.num_users -= 1
        for index in range(seq.num_published, count):
            step = tuple(ids[index * size : (index + 1) * size])
            child = node.children.get(step)
            if child is None:
                child = node.children[step] = Node(node, step, len(self.pools))
            node = child
            for group, table in enumerate(seq.pages):
                # the page of whoever came first stays
                if table[index] and not node.pages[group]:
                    node.pages[group] = table[index]
                    self.pools[group].nodes[table[index]] = node
        node.num_users += 1
        seq.node, seq.num_published = node, count

    def reset_prefixes(self) -> None:
        """Forget every prefix (the weights changed, or a pass failed). Sequences that run keep their pages and publish
        nothing more."""
        for pool in self.pools:
            pool.nodes = [None] * pool.num_pages
            pool.free.extend(pool.cached)
            pool.cached.clear()
        for seq in self._residents:
            seq.node = None
        self._roots.clear()

    def _leave(self, seq: CachedSequence) -> None:
        node, seq.node = seq.node, None
        if node is not None:
            node.num_users -= 1
            self._prune(node)

    def _prune(self, node: Node | None) -> None:
        while node is not None and not (node.children or node.num_users or any(node.pages)):
            siblings = node.parent.children if node.parent else self._roots
            del siblings[node.step]
            node = node.parent

    def check_integrity(self) -> None:
        """Raise AssertionError that says what is wrong. Costs a walk over everything: for tests, and when idle."""
        assert not self._copies and not self._sources, f"copies {self._copies} were never taken"
        length = {id(seq): len(seq.pages[0]) for seq in self._residents}
        for group, pool in enumerate(self.pools):
            counted: Counter[int] = Counter()
            for seq in self._residents:
                table = seq.pages[group]
                assert len(table) == length[id(seq)], f"tables of sequence {seq.id} differ in length"
                seen = pool.first_visible(seq.num_computed, self.page_size)
                assert all(table[seen:]), f"sequence {seq.id} lost a page of group {group} that it can see"
                counted.update(page for page in table if page)
            free, cached = set(pool.free), set(pool.cached)
            assert len(free) == len(pool.free), f"a page of group {group} is free twice"
            for page in range(1, pool.num_pages):
                assert pool.references[page] == counted[page], f"page {group}:{page} counts {pool.references[page]}"
                found, node = (page in free) + (page in cached) + (counted[page] > 0), pool.nodes[page]
                assert found == 1, f"page {group}:{page} is in {found} places"
                assert node is None or node.pages[group] == page, f"page {group}:{page} is not its node's"
                assert (page in cached) <= (node is not None) and not (page in free and node), f"page {group}:{page}"
            assert not counted[0] and not {0} & (free | cached) and not pool.references[0], "page 0 was handed out"
        self._check_writable()
        self._check_trie()

    def _check_writable(self) -> None:
        for group, pool in enumerate(self.pools):
            for seq in self._residents:
                if seq.num_writable > seq.num_computed:
                    for page in seq.pages[group][seq.num_computed // self.page_size :]:
                        assert pool.references[page] == 1, f"page {group}:{page} is written and shared"
                        assert pool.nodes[page] is None, f"page {group}:{page} is written and can be found"

    def _check_trie(self) -> None:
        users = Counter(seq.node for seq in self._residents if seq.node)
        held, stack = Counter[int](), list(self._roots.values())
        while stack:
            node = stack.pop()
            assert node.num_users == users.pop(node, 0), "a node's users are miscounted"
            assert node.children or node.num_users or any(node.pages), "a dead node was kept"
            for group, page in enumerate(node.pages):
                held[group] += page > 0
                assert not page or self.pools[group].nodes[page] is node, f"page {group}:{page} belongs to another node"
            stack.extend(node.children.values())
        assert not users, "a sequence stands on a node outside the trie"
        for group, pool in enumerate(self.pools):
            assert held[group] == sum(node is not None for node in pool.nodes), (
                f"group {group} has pages outside the trie"
            )
