"""The model's side of a step: packed arrays in, sampled tokens out. The only room that knows CUDA graphs.

T = packed tokens, B = sequences, R = rows whose logits are wanted, P = columns of a page table, V = vocabulary.
A step comes in two calls, so that the CPU can prepare the choice (grammar masks) while the device computes: `forward`
launches the pass, `sample` chooses. Neither waits for the device: `Sampled.wait` does. Tokens that the next pass needs
stay in a pool on the device, one row per running sequence, so that it can be launched before they are known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmasos.inference.batch import Batch, SharedPrefix
from llmasos.inference.pages import Pages
from llmasos.inference.sampler import Sampled, Sampler, SamplingBatch

if TYPE_CHECKING:
    from llmasos.inference.beam import BeamSearch
    from llmasos.inference.cache import Copy
    from llmasos.inference.fused import FusedDecoder
    from llmasos.inference.state import Beam
    from llmasos.models.decoder import Decoder

LADDER = (1, 2, 4, 8, *range(16, 129, 8), *range(144, 257, 16), *range(288, 513, 32))
"""Batch sizes that have a CUDA graph; a batch of decodes runs in the next larger one."""
LOGIT_ROWS = 256
"""Prompt positions whose logits exist at once: 256 × 150k × 4 bytes = 150 MB."""
Ints = NDArray[Any]


@dataclass(slots=True)
class Step:
    """One pass, as plain arrays: it also travels to the other processes of a tensor-parallel model."""

    tokens: Ints
    """[T]; -1 - row where the token is what the pool holds in that row."""
    positions: Ints
    sequences: Ints
    query_start: Ints
    seq_lens: Ints
    tables: list[Ints]
    """One [B, P] per page group."""
    max_query: int
    max_seq_len: int
    rows: Ints
    """[R]: the packed tokens whose logits are wanted."""
    prefixes: list[SharedPrefix] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    lengths: Ints | None = None
    """[T]: tokens that each token's sequence has, for rotary frequencies that depend on it."""
    adapters: Ints | None = None
    """[T]: LoRA slot of each token, -1 for none."""
    scored: list[Scored] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.max_query == 1


@dataclass(slots=True)
class Scored:
    """Prompt tokens whose log-probabilities are wanted: packed rows start .. predict `targets`, which begin at
    `position` of their sequence."""

    start: int
    position: int
    targets: list[int]
    num_top: int


@dataclass(slots=True)
class ScoredLogprobs:
    """[n] each: log-probability of the target, the first choice; [n, num_top] alternatives."""

    logprobs: Tensor
    best: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None


class Runner:
    """One model (or one rank's share of it) with its pages, graphs and token pool."""

    def __init__(
        self,
        decoder: Decoder,
        pages: Pages,
        *,
        max_num_seqs: int,
        max_model_len: int,
        graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.decoder, self.pages = decoder, pages
        self.device = decoder.device
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.sampler = Sampler(self.device)
        self.pool = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self.lora: Any = None
        self.check: Callable[[], None] | None = None
        """Is asked while the device is waited for: raises when another process that it may wait for is gone."""
        self._prepare_rope()
        self._fused = _fused(decoder, pages, batch_invariant)
        self._uploads = _Uploads(self.device)
        self._graphs = _Graphs(self) if graphs and pages.graphable else None
        self._logits: Tensor | None = None
        self._pool_rows: tuple[Ints, Tensor] | None = None

    def _prepare_rope(self) -> None:
        if self.decoder.config.position == "rope":
            dtype = torch.float32 if self.decoder.config.rope_float32 else self.decoder.dtype
            for rope in {id(r): r for r in self.decoder.ropes.values()}.values():
                rope.prepare(self.max_model_len, self.device, dtype)

    @property
    def vocab_size(self) -> int:
        return self.decoder.config.vocab_size

    # a step

    @torch.inference_mode()
    def forward(self, step: Step) -> list[ScoredLogprobs]:
        """Launch the pass; its logits wait for `sample`. Returns the log-probabilities of prompt tokens asked for."""
        if step.copies:
            self.pages.copy(step.copies)
        if self._graphs is not None and (graph := self._graphs.find(step)) is not None:
            self._logits = graph.replay(step)
            return []
        if step.adapters is None:
            return self.eager(step)
        self.lora.plan(step.adapters)
        try:
            return self.eager(step)
        finally:
            self.lora.plan(None)  # embeddings run the same layers between two steps

    @torch.inference_mode()
    def eager(self, step: Step) -> list[ScoredLogprobs]:
        """The pass without a graph and without adapters."""
        hidden = self.hidden(self._batch(step), self._lengths(step))
        scored = [self._score(hidden, s) for s in step.scored]
        if len(step.rows):
            rows = self._uploads.tensor(step.rows)
            wanted = hidden if len(step.rows) == hidden.shape[0] else hidden.index_select(0, rows)
            self._logits = self.logits(wanted)
        return scored

    @torch.inference_mode()
    def sample(self, batch: SamplingBatch, pool_rows: Ints) -> Landing:
        """Choose a token for each wanted row; row r's token goes to the pool's row pool_rows[r] (-1: nowhere)."""
        assert self._logits is not None
        # let go, so that the next pass finds their memory free
        logits, self._logits = self._logits[: len(pool_rows)], None
        result = self.sampler.sample(logits, batch, self._pending(batch))
        kept = np.flatnonzero(pool_rows >= 0)
        if len(kept) == len(pool_rows):
            self.pool.index_copy_(0, self._pool_index(pool_rows), result.tokens)
        elif len(kept):
            rows, targets = self._uploads.many([kept, pool_rows[kept]])
            self.pool.index_copy_(0, targets.long(), result.tokens[rows])
        return Landing(result, self.device, self.check)

    def _pool_index(self, pool_rows: Ints) -> Tensor:
        """The same decodes write to the same rows step after step."""
        if self._pool_rows is None or not np.array_equal(self._pool_rows[0], pool_rows):
            self._pool_rows = (pool_rows.copy(), self._uploads.tensor(pool_rows).long())
        return self._pool_rows[1]

    def _pending(self, batch: SamplingBatch) -> Tensor | None:
        if batch.pending_rows is None:
            return None
        rows = self._uploads.tensor(batch.pending_rows)
        return torch.where(rows >= 0, self.pool[rows.clamp_min(0)], -1)

    @torch.inference_mode()
    def beam_candidates(self, rows: list[int], searches: list[tuple[BeamSearch, Beam]]) -> list[tuple[Tensor, Tensor]]:
        """The best continuations of each hypothesis, from the logits of the last pass."""
        assert self._logits is not None
        return [search.candidates(self._logits[row], beam) for row, (search, beam) in zip(rows, searches, strict=True)]

    def hidden(self, batch: Batch, lengths: Tensor | None = None) -> Tensor:
        """Final hidden states of the packed tokens, [T, D]."""
        self.pages.plan(batch)
        if self._fused is not None:
            return self._fused.forward(batch)
        out: Tensor = self.decoder(batch.tokens, batch.positions, self.pages, lengths)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V]; in the model's dtype where the fused step runs, else float32."""
        if self._fused is not None:
            return self._fused.logits(hidden)
        out: Tensor = self.decoder.logits(hidden)
        return out

    def _lengths(self, step: Step) -> Tensor | None:
        return None if step.lengths is None else self._uploads.tensor(step.lengths)

    def _batch(self, step: Step) -> Batch:
        up = self._uploads.many(
            [step.tokens, step.positions, step.sequences, step.query_start, step.seq_lens, *step.tables]
        )
        tokens, positions, sequences, query_start, seq_lens = up[:5]
        if (step.tokens < 0).any():
            tokens = resolve(tokens, self.pool)
        return Batch(
            tokens=tokens,
            positions=positions,
            sequences=sequences,
            query_start=query_start,
            seq_lens=seq_lens,
            tables=up[5:],
            page_size=self.pages.page_size,
            max_query=step.max_query,
            max_seq_len=step.max_seq_len,
            prefixes=step.prefixes,
        )

    def _score(self, hidden: Tensor, wanted: Scored) -> ScoredLogprobs:
        """LOGIT_ROWS positions at a time: the logits of a long prompt never exist together."""
        parts: list[list[Tensor]] = [[], [], [], []]
        targets = torch.tensor(wanted.targets, device=hidden.device)
        for at in range(0, len(wanted.targets), LOGIT_ROWS):
            goal = targets[at : at + LOGIT_ROWS]
            start = wanted.start + at
            logprobs = self.decoder.logits(hidden[start : start + len(goal)]).log_softmax(-1)
            parts[0].append(logprobs.gather(1, goal[:, None])[:, 0])
            parts[1].append(logprobs.argmax(-1))
            if wanted.num_top:
                values, ids = logprobs.topk(min(wanted.num_top, logprobs.shape[1]))
                parts[2].append(ids)
                parts[3].append(values)
        chosen, best = torch.cat(parts[0]), torch.cat(parts[1])
        if not wanted.num_top:
            return ScoredLogprobs(chosen, best, None, None)
        return ScoredLogprobs(chosen, best, torch.cat(parts[2]), torch.cat(parts[3]))

    # graphs

    def capture(self, size: int) -> None:
        """Capture the graph of `size` decodes now; others are captured when they first run."""
        if self._graphs is not None:
            self._graphs.capture(size)

    @property
    def num_bytes_of_smaller_graphs(self) -> int:
        """What the graphs of other sizes than the largest, which is captured, will keep: each its logits."""
        return self._graphs.num_bytes_of_smaller if self._graphs is not None else 0

    @contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """Passes inside run one layer of each page group: all kernels, in a fraction of the time."""
        layers = self.decoder.layers
        if self._fused is not None:
            firsts = [self.pages.layer_group.index(group) for group in range(len(self.pages.groups))]
            self.decoder.layers = nn.ModuleList(layers[i] for i in sorted(firsts))
        try:
            yield
        finally:
            self.decoder.layers = layers

    def release_pages(self) -> int:
        """Give back the memory of pages and graphs; returns the pages' bytes."""
        if self._graphs is not None:
            self._graphs = _Graphs(self)
        return self.pages.release()

    def renew_pages(self) -> None:
        """Take the memory of the pages again; nothing of what they held is left."""
        self.pages.renew()


class Landing:
    """Tokens, and their log-probabilities, on their way from the device: `result` is here once `wait` has returned."""

    def __init__(self, result: Sampled, device: torch.device, check: Callable[[], None] | None) -> None:
        self.result, self._check = result, check
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            there = {f.name: getattr(result, f.name) for f in fields(result)}
            here: dict[str, Any] = {name: _fetch(t) for name, t in there.items() if isinstance(t, Tensor)}
            self.result = replace(result, **here)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        """The tokens, one per wanted row; blocks until the device has made them."""
        if self._event is not None and self._check is not None:
            while not self._event.query():
                self._check()
        elif self._event is not None:
            self._event.synchronize()
        return self.result.tokens.tolist()


def _fetch(there: Tensor) -> Tensor:
    """A tensor of the device in pinned memory, soon: reading it there would wait for the passes launched since."""
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    return here.copy_(there, non_blocking=True)


def resolve(tokens: Tensor, pool: Tensor) -> Tensor:
    """Tokens [T] with each -1 - row replaced by what the pool holds in that row."""
    if tokens.device.type == "cuda":
        from llmasos.inference.kernels.tokens import resolve_tokens

        out = torch.empty_like(tokens)
        resolve_tokens(tokens, pool, out)
        return out
    return torch.where(tokens < 0, pool[(-1 - tokens).clamp_min(0)].to(tokens.dtype), tokens)


def _fused(decoder: Decoder, pages: Pages, invariant: bool) -> FusedDecoder | None:
    if decoder.device.type != "cuda":
        return None
    from llmasos.inference.fused import FusedDecoder

    return FusedDecoder(decoder, pages, invariant=invariant) if FusedDecoder.supports(decoder.config) else None


class _Uploads:
    """Small integer arrays to the device, through pinned memory that is not written again while a copy may read it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tensor(self, array: Ints) -> Tensor:
        return self.many([array])[0]

    def many(self, arrays: list[Ints]) -> list[Tensor]:
        """One copy for all of them. On a CPU the arrays themselves."""
        if self.device.type != "cuda":
            return [torch.from_numpy(np.ascontiguousarray(a)).long() for a in arrays]
        sizes = [a.size for a in arrays]
        # pinned blocks come from torch's caching host allocator, which waits for the copies that read them
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        flat, at = host.numpy(), 0
        for a in arrays:
            flat[at : at + a.size] = a.reshape(-1)
            at += a.size
        device = host.to(self.device, non_blocking=True)
        return [part.view(a.shape) for part, a in zip(device.split(sizes), arrays, strict=True)]


def table_columns(needed: int, page_size: int, max_model_len: int) -> int:
    """Columns of the page tables of a captured pass: few widths, so that there are few graphs."""
    columns = max(1, 8192 // page_size)
    while columns < needed:
        columns *= 4
    return min(columns, -(-max_model_len // page_size))


def fill_input(flat: Ints, step: Step, size: int, columns: int) -> None:
    """Write a step of decodes to the zeroed input [size · (3 + G · columns)] of a graph: tokens, positions, seq_lens,
    and the tables of the G page groups."""
    num = len(step.seq_lens)
    flat[:num] = step.tokens
    flat[size : size + num] = step.positions
    flat[2 * size : 2 * size + num] = step.seq_lens
    for g, table in enumerate(step.tables):
        at = size * (3 + g * columns)
        known = table[:, :columns]  # tables grow in steps, past the longest sequence too
        flat[at : at + size * columns].reshape(size, columns)[:num, : known.shape[1]] = known


class _Graphs:
    """CUDA graphs of decode passes by (batch size, columns of the page tables, with shared prefixes, with adapters)."""

    def __init__(self, runner: Runner) -> None:
        # no cycle: a runner that is dropped gives its memory back at once, not when garbage is collected
        self.runner: Runner = weakref.proxy(runner)
        self.memory = torch.cuda.graph_pool_handle()
        # one for all: libraries keep a workspace for every stream
        self.stream = torch.cuda.Stream()
        self.graphs: dict[tuple[int, int, bool, bool], _Graph] = {}
        self.lora_version = 0
        limit = runner.max_num_seqs
        self.sizes = [n for n in LADDER if n < limit] + [min(limit, LADDER[-1])]

    def find(self, step: Step) -> _Graph | None:
        """The graph that this step fits; captured now if it is the first of its kind."""
        num = len(step.seq_lens)
        if not step.decodes or step.lengths is not None or step.scored:
            return None
        if num > self.sizes[-1] or len(step.rows) != num:
            return None
        size = next(n for n in self.sizes if n >= num)
        adapted = step.adapters is not None
        if adapted and self.runner.lora.version != self.lora_version:
            self.graphs = {key: graph for key, graph in self.graphs.items() if graph.routes is None}
            self.lora_version = self.runner.lora.version
        return self._graph(size, self._columns(step.tables[0].shape[1]), bool(step.prefixes), adapted)

    def _columns(self, needed: int) -> int:
        return table_columns(needed, self.runner.pages.page_size, self.runner.max_model_len)

    def _graph(self, size: int, columns: int, shared: bool, adapted: bool) -> _Graph:
        key = (size, columns, shared, adapted)
        if key not in self.graphs:
            self.graphs[key] = _Graph(self, *key)
        return self.graphs[key]

    def capture(self, size: int) -> None:
        self._graph(next((n for n in self.sizes if n >= size), self.sizes[-1]), self._columns(1), False, False)

    @property
    def num_bytes_of_smaller(self) -> int:
        largest = next(graph for graph in self.graphs.values() if graph.size == self.sizes[-1])
        return sum(self.sizes[:-1]) * largest.logits[0].nbytes


class _Graph:
    """One captured decode pass: input buffers, logits."""

    def __init__(self, graphs: _Graphs, size: int, columns: int, shared: bool, adapted: bool) -> None:
        runner = graphs.runner
        self.runner, self.size, self.columns = runner, size, columns
        groups = len(runner.pages.groups)
        # tokens, positions, seq_lens, tables; what never changes is not uploaded
        self.input = torch.zeros(size * (3 + groups * columns), dtype=torch.int32, device=runner.device)
        parts = self.input.split([size, size, size, *[size * columns] * groups])
        self.batch = Batch(
            tokens=parts[0],
            positions=parts[1],
            sequences=torch.arange(size, dtype=torch.int32, device=runner.device),
            query_start=torch.arange(size + 1, dtype=torch.int32, device=runner.device),
            seq_lens=parts[2],
            tables=[part.view(size, columns) for part in parts[3:]],
            page_size=runner.pages.page_size,
            max_query=1,
            max_seq_len=min(columns * runner.pages.page_size, runner.max_model_len),
        )
        self.prefix = runner.pages.prefix_buffers(size) if shared else None
        self.routes = runner.lora.buffers(size) if adapted else None
        self.graph = torch.cuda.CUDAGraph()
        self.logits = self._capture(graphs.memory, graphs.stream)

    def _capture(self, memory: Any, stream: torch.cuda.Stream) -> Tensor:
        # torch.cuda.graph() would collect garbage and give memory back first: half a second for each graph
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            self._pass()  # kernels compile and libraries take their workspaces outside of the capture
            self.graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                logits = self._pass()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return logits

    def _pass(self) -> Tensor:
        runner = self.runner
        batch = Batch(**{**vars(self.batch), "tokens": resolve(self.batch.tokens, runner.pool)})
        runner.pages.capturing(self.prefix)
        if self.routes is None:
            return runner.logits(runner.hidden(batch))
        runner.lora.capturing(self.routes)
        try:
            return runner.logits(runner.hidden(batch))
        finally:
            runner.lora.capturing(None)

    def replay(self, step: Step) -> Tensor:
        host = torch.zeros(self.input.shape, dtype=torch.int32, pin_memory=True)
        fill_input(host.numpy(), step, self.size, self.columns)
        self.input.copy_(host, non_blocking=True)
        if self.prefix is not None:
            self.prefix.fill(step.prefixes)
        if self.routes is not None:
            self.runner.lora.fill(self.routes, step.adapters)
        self.graph.replay()
        return self.logits
