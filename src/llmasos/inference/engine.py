"""The engine: many requests, one model. `Engine.step` is schedule, launch, take.

It speaks token ids and knows no text. One thread steps it; `llmasos.inference.loop` is that thread, and the door for
all others.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmasos.errors import BusyError, InsufficientMemoryError, InvalidInputError, LLMasOSError, ServerError
from llmasos.inference.beam import BeamSearch
from llmasos.inference.constrain import num_words
from llmasos.inference.packing import Ints, Packed, Packer
from llmasos.inference.request import FinishReason, SamplingParams
from llmasos.inference.sampler import SamplingBatch, SamplingRow, make_batch
from llmasos.inference.scheduler import Item, Plan, Scheduler, Sequence
from llmasos.inference.speculate import verify
from llmasos.inference.state import CompletionState, EngineStats, Output, RawLogprob, Request, RequestState
from llmasos.models.layers import LENGTH_DEPENDENT, stretched_from

if TYPE_CHECKING:
    from torch import Tensor

    from llmasos.inference.adapters import Adapters
    from llmasos.inference.constrain import Fill, GrammarCompiler, Matcher
    from llmasos.inference.parallel import ParallelRanks, ParallelRunner
    from llmasos.inference.rank import Rank
    from llmasos.inference.runner import Landing, Runner, ScoredLogprobs
    from llmasos.inference.speculate import Speculator

_log = logging.getLogger("llmasos")
SMALLEST_CHUNK = 64
"""Tokens of a pass below which it is not made smaller for want of memory."""


@dataclass(slots=True)
class _Flight:
    """A pass that was launched and not yet taken in."""

    plan: Plan
    packed: Packed
    landing: Landing | None
    scored: list[ScoredLogprobs]
    beams: dict[Item, tuple[Tensor, Tensor]]


class Engine:
    """Runs requests to their end, many at once. Not thread-safe."""

    def __init__(
        self,
        runner: Runner | ParallelRunner,
        scheduler: Scheduler,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        grammars: GrammarCompiler | None = None,
        speculator: Speculator | None = None,
        adapters: Adapters | None = None,
        rank: Rank | ParallelRanks | None = None,
    ) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.eos, self.grammars = eos_token_ids, grammars
        self.speculator, self.adapters = speculator, adapters
        self.packer = Packer(len(runner.pages.groups), runner.pages.page_size)
        self.stats = EngineStats()
        self.is_sleeping = False
        self._rank = rank
        # on a CPU there is nothing to compute while the CPU computes; drafts follow known tokens, and a step's time is
        # that of its own pass
        self.overlap = runner.device.type != "cpu" and speculator is None
        config = runner.decoder.config
        scaling = config.rope_scaling
        self.lengths = scaling is not None and scaling.kind in LENGTH_DEPENDENT
        """Rotary frequencies depend on how long a sequence is: its keys fit no other sequence."""
        # longrope: keys cached before this length were turned by other frequencies (as Hugging Face's Phi-3 does)
        self.frequencies_change_at = stretched_from(config) if scaling and scaling.kind == "longrope" else None
        self._ids = itertools.count()
        self._states: dict[Request, RequestState] = {}
        self._for_adapters: deque[tuple[RequestState, Matcher | None]] = deque()
        """Wait for room among the adapters in memory."""
        self._flight: _Flight | None = None
        self._suspects: deque[Sequence] = deque()
        self._held: dict[Sequence, bool] = {}
        """Whether each sequence was paused before the suspects were set apart."""
        self._outputs: list[Output] = []
        self._stalled = False
        """Nothing can be planned until a request comes or goes or goes on."""

    # requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidInputError or InsufficientMemoryError for one that could never run here."""
        self.wake_up()
        params = request.params
        self._check_fits(len(request.prompt) + request.max_tokens, params.num_beams)
        state = RequestState(request, num_left=1 if params.num_beams > 1 else params.n)
        matcher = self._matcher(params)
        if request.max_tokens == 0 and request.score_from is None:
            self._nothing_to_do(state)
            return
        if request.adapter is None or (self._adapters().available(request.adapter) and not self._for_adapters):
            self._begin(state, matcher)
        else:
            self._for_adapters.append((state, matcher))

    def _begin(self, state: RequestState, matcher: Matcher | None) -> None:
        request, params = state.request, state.request.params
        if request.adapter is not None:
            state.adapter_key = self._adapters().acquire(request.adapter)
        self._states[request], self._stalled = state, False
        if params.num_beams > 1:
            state.beams = BeamSearch(request.prompt, params, request.max_tokens, self._ends(params))
        for index in range(state.num_left):
            self._start(state, index, matcher.copy() if matcher is not None and index else matcher)
        # the completions of one prompt come after the first, which computes it for all
        self.scheduler.add(state.completions[0].seq)

    def _check_fits(self, num_tokens: int, num_beams: int) -> None:
        if not self.scheduler.cache.fits(num_tokens):
            pages = self.scheduler.cache.pools[0]
            raise InsufficientMemoryError(
                f"The request may need keys and values of {num_tokens} tokens; this engine's pages hold "
                f"{(pages.num_pages - 1) * self.scheduler.cache.page_size}.",
                hint="Ask for fewer tokens, or give more memory: kv_cache_memory=..., kv_cache_dtype='int8'.",
            )
        if num_beams > self.scheduler.max_num_seqs:
            raise InvalidInputError(
                f"num_beams={num_beams} is more than the {self.scheduler.max_num_seqs} sequences that run at once.",
                hint="Raise max_num_seqs.",
                param="num_beams",
            )

    def _nothing_to_do(self, state: RequestState) -> None:
        last = state.request.params.n - 1
        self._outputs += [Output(state, i, finish_reason="length", last=i == last) for i in range(last + 1)]

    def use_adapters(self, adapters: Adapters) -> None:
        """Requests may name these from now on."""
        self.adapters, self.runner.lora = adapters, adapters.state

    def _fill_adapters(self) -> None:
        """An adapter may have become idle: those that wait for room begin, in their order."""
        while self._for_adapters:
            state, matcher = self._for_adapters[0]
            assert state.request.adapter is not None
            try:
                if not self._adapters().available(state.request.adapter):
                    return
                self._begin(state, matcher)
            except LLMasOSError as e:  # it was unloaded, or its files have changed
                self._outputs.append(Output(state, 0, last=True, error=e))
                self.stats.num_failed += 1
            self._for_adapters.popleft()

    def _adapters(self) -> Adapters:
        if self.adapters is None:
            raise InvalidInputError("No adapter is loaded.", hint="Load one with load_adapter.", param="adapter")
        return self.adapters

    def _start(self, state: RequestState, index: int, matcher: Matcher | None) -> CompletionState:
        request, params = state.request, state.request.params
        seq = Sequence(
            id=next(self._ids),
            token_ids=list(request.prompt),
            num_prompt=len(request.prompt),
            max_tokens=request.max_tokens,
            priority=request.priority,
            arrival=request.arrival,
            salt=(state.adapter_key, request.cache_salt),
            reuse=not self.lengths,
        )
        completion = CompletionState(state, index, seq, SamplingRow(params, request.prompt, index), self._ends(params))
        completion.matcher = matcher
        completion.stretched = len(request.prompt) > (self.frequencies_change_at or len(request.prompt))
        if index == 0 and request.score_from is not None:
            completion.score_from = max(1, request.score_from)
            completion.num_top = params.prompt_logprobs or 0
            seq.max_reuse = completion.score_from - 1
        seq.owner = completion
        state.completions.append(completion)
        return completion

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.structured is None:
            return None
        if self.grammars is None:
            raise InvalidInputError("Structured output needs a model with a tokenizer.", param="structured")
        return self.grammars.matcher(params.structured)

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        eos = frozenset() if params.ignore_eos else self.eos
        return eos | frozenset(params.stop_token_ids)

    def abort(self, request: Request, index: int | None = None) -> bool:
        """End a request, or one of its completions, now. Its pages are free at once; nothing more is heard of it.
        Returns whether the request is over."""
        state, self._stalled = self._states.get(request), False
        for completion in list(state.completions) if state is not None else []:
            if index is None or completion.index == index:
                self._finish(completion)
        if state is None and request.adapter is not None:
            self._for_adapters = deque(waiting for waiting in self._for_adapters if waiting[0].request is not request)
            self._fill_adapters()
        return request not in self._states

    def pause(self, request: Request, paused: bool) -> None:
        """Make no more tokens for a request until it goes on; it keeps its pages while nobody needs them more."""
        state = self._states.get(request)
        for completion in state.completions if state is not None else []:
            self._pause(completion.seq, paused)
        self._stalled = False

    def _pause(self, seq: Sequence, paused: bool) -> None:
        if self._suspects:  # holds once everybody goes on
            self._held[seq] = paused
        else:
            seq.paused = paused

    def sleep(self) -> int:
        """Give back the memory of weights and pages, a draft model's too; the weights stay on the CPU. Returns the
        bytes. Raises BusyError while requests run or wait."""
        if self._states:
            raise BusyError(
                f"{len(self._states)} requests are on their way.", hint="Sleep when they are done, or cancel them."
            )
        assert self._rank is not None
        self._land()
        self.scheduler.cache.reset_prefixes()
        self.is_sleeping = True
        drafts = self.speculator.proposer.sleep() if self.speculator is not None else 0
        return drafts + self._rank.sleep()

    def wake_up(self) -> None:
        """Bring the weights back. Nothing to do for an engine that is awake."""
        if self.is_sleeping:
            assert self._rank is not None
            self._rank.wake()
            if self.speculator is not None:
                self.speculator.proposer.wake()
            self.is_sleeping = False

    @property
    def has_work(self) -> bool:
        """There is something to do for `step`: not while all that is left waits for slow readers."""
        return bool(self._flight or self._outputs or (self.scheduler.has_work and not self._stalled))

    # a step

    def step(self) -> list[Output]:
        """Schedule and launch the next pass, then take in what the pass before it has made."""
        started = time.perf_counter()
        self._prepare()
        plan = self.scheduler.schedule()
        before, self._flight, error = self._flight, None, None
        if plan.items:
            try:
                self._flight = self._launch(plan)
            except Exception as e:
                error = e
        if before is not None:
            self._take(before)
        if error is not None:
            self._recover(plan, error)
        elif not self.overlap or self._suspects:
            self._land()
            self._acquit(plan)
        seconds = time.perf_counter() - started
        if self.speculator is not None and error is None:
            self.speculator.learn_step(plan.items, seconds)
        self._count(plan, seconds)
        outputs, self._outputs = self._outputs, []
        self._stalled = not (plan.items or plan.preempted or outputs or before or self._suspects)
        return outputs

    def _prepare(self) -> None:
        """What must be known before the next pass is planned."""
        if self._flight is not None and self._must_wait(self._flight):
            self._land()
        if self.frequencies_change_at is not None:
            self._restart_those_that_stretch(self.frequencies_change_at)
        if self.speculator is not None:
            self.speculator.draft(self.scheduler.running)
            if self.frequencies_change_at is not None:
                for seq in self.scheduler.running:
                    if not seq.owner.stretched:
                        del seq.drafts[max(0, self.frequencies_change_at - len(seq.token_ids)) :]

    def _restart_those_that_stretch(self, length: int) -> None:
        for seq in self.scheduler.running:
            completion: CompletionState = seq.owner
            if len(seq.token_ids) > length and not completion.stretched:
                completion.stretched = True
                self.scheduler.preempt(seq)

    def _must_wait(self, flight: _Flight) -> bool:
        if self.speculator is not None or self.frequencies_change_at is not None:
            return True
        return any(item.seq.owner.needs_tokens and not item.seq.owner.finished for item, _, _ in flight.packed.sampled)

    def _land(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            self._take(flight)

    def _launch(self, plan: Plan) -> _Flight:
        now = time.perf_counter()
        score = False
        for item in plan.items:
            completion = item.seq.owner
            score |= completion.score_from is not None and item.start < item.seq.num_prompt - 1
            if not completion.state.first_scheduled:
                completion.state.first_scheduled, completion.state.num_cached = now, item.seq.num_cached
                self.stats.num_cached_tokens += item.seq.num_cached
                self.stats.num_asked_tokens += item.seq.num_prompt
        packed = self.packer.pack(plan, score=score, lengths=self._lengths if self.lengths else None)
        if self.adapters is not None:
            names = [item.seq.owner.state.request.adapter for item in plan.items]
            packed.step.adapters = self.adapters.token_slots(names, [item.num_new for item in plan.items])
        scored = self.runner.forward(packed.step)
        landing, beams = None, {}
        if packed.sampled:
            beams = self._beam_candidates(packed)
            landing = self.runner.sample(self._sampling(packed), packed.pool_rows)
        return _Flight(plan, packed, landing, scored, beams)

    def _lengths(self, item: Item) -> Ints:
        """[num_new]: tokens that the sequence had when each token of the item was new, as without preemption or drafts;
        longrope, which begins anew when the frequencies change, counts all that are known."""
        seq = item.seq
        known = seq.num_prompt if self.frequencies_change_at is None else len(seq.token_ids)
        return np.maximum(np.arange(item.start, item.end) + 1, known)

    def _sampling(self, packed: Packed) -> SamplingBatch:
        """How each row chooses. Grammar masks are computed here, while the device computes the logits."""
        rows: list[SamplingRow] = []
        indices: list[int] = []
        drafts: list[list[int]] = []
        fills: list[Fill] = []
        pending: list[int] = []
        for item, first, count in packed.sampled:
            seq, completion = item.seq, item.seq.owner
            known = item.end - count + 1
            rows += [completion.row] * count
            indices += range(known - seq.num_prompt, known - seq.num_prompt + count)
            drafts += [list(item.drafts[:j]) for j in range(count)]
            pending += [seq.slot if known > len(seq.token_ids) else -1] * count
            if completion.matcher is not None:
                fills.append((completion.matcher, first, item.drafts))
        masks = None
        if fills:
            assert self.grammars is not None
            masks = np.full((len(rows), num_words(self.runner.vocab_size)), -1, np.int32)
            self.grammars.fill_masks(fills, masks)
        batch = make_batch(rows, indices, masks, drafts if any(drafts) else None)
        if "penalised" in batch.arrays:
            batch.pending_rows = np.array(pending, np.int64)
        return batch

    def _beam_candidates(self, packed: Packed) -> dict[Item, tuple[Tensor, Tensor]]:
        own = [(item, row) for item, row, _ in packed.sampled if item.seq.owner.state.beams is not None]
        if not own:
            return {}
        searches = [(item.seq.owner.state.beams, item.seq.owner.beam) for item, _ in own]
        found = self.runner.beam_candidates([row for _, row in own], searches)
        return {item: pair for (item, _), pair in zip(own, found, strict=True)}

    # what a pass has made

    def _take(self, flight: _Flight) -> None:
        tokens = flight.landing.wait() if flight.landing is not None else []
        now = time.perf_counter()
        self._take_scores(flight)
        logprobs = _logprobs(flight.landing)
        errors = flight.landing.result.errors if flight.landing is not None else {}
        for item, first, count in flight.packed.sampled:
            completion = item.seq.owner
            if item in flight.beams:
                self._take_beam(item, flight.beams[item])
                continue
            chosen = verify(tokens[first : first + count], item.drafts) if count > 1 else [tokens[first]]
            if not self.scheduler.commit(item, chosen):
                continue
            if count > 1:
                self._learn(item, len(chosen) - 1)
            if errors and (failed := [errors[r] for r in range(first, first + len(chosen)) if r in errors]):
                completion.error = InvalidInputError(
                    f"A logits processor failed: {type(failed[0]).__name__}: {failed[0]}", param="logits_processors"
                )
            raw = logprobs(completion.row.params.logprobs, first, chosen) if logprobs else []
            self._advance(completion, chosen, raw, now)
        for item in flight.plan.items:
            if not item.seq.max_tokens and item.end == item.seq.num_prompt and not item.seq.owner.finished:
                self._emit(item.seq.owner, [], [], "length", None)  # only the prompt was to be scored

    def _learn(self, item: Item, num_accepted: int) -> None:
        self.stats.num_draft_tokens += len(item.drafts)
        self.stats.num_accepted_tokens += num_accepted
        if self.speculator is not None:
            self.speculator.learn(item.seq, len(item.drafts), num_accepted)

    def _take_scores(self, flight: _Flight) -> None:
        parts = zip(flight.packed.scored, flight.packed.step.scored, flight.scored, strict=True)
        for item, wanted, result in parts:
            found = item.seq.owner.state.prompt_logprobs
            tops = _tops(result.top_ids, result.top_logprobs) or [()] * len(wanted.targets)
            values = zip(wanted.targets, result.logprobs.tolist(), result.best.tolist(), tops, strict=True)
            for position, (target, logprob, best, top) in enumerate(values, wanted.position):
                found.setdefault(position, (RawLogprob(target, logprob, top), best == target))

    def _advance(self, completion: CompletionState, tokens: list[int], logprobs: list[RawLogprob], now: float) -> None:
        """The tokens are part of the completion; end it where one of them does."""
        state, seq = completion.state, completion.seq
        if not state.first_token:
            state.first_token = now
            self._start_others(state)
        state.last_token = now
        reason: FinishReason | None = None
        stop: int | None = None
        count = len(seq.token_ids) - seq.num_prompt - len(tokens)
        for n, token in enumerate(tokens, 1):
            completion.row.add(token)
            if token in completion.ends:
                reason = "stop"
                stop = token if token in completion.row.params.stop_token_ids else None
            elif completion.matcher is not None and not self._follow(completion, token):
                reason = "stop"
            elif count + n >= seq.max_tokens:
                reason = "length"
            if reason is not None:
                tokens, logprobs = tokens[:n], logprobs[:n]
                break
        if reason is None and completion.matcher is not None and completion.row.params.logprobs is None:
            tokens = tokens + self._jump(completion, completion.matcher)
        self._emit(completion, tokens, logprobs, reason, stop)

    def _follow(self, completion: CompletionState, token: int) -> bool:
        """The grammar goes on by a token. False: nothing can follow it."""
        assert completion.matcher is not None
        completion.matcher.accept(token)
        completion.error = completion.error or completion.matcher.error
        return not completion.matcher.is_finished

    def _jump(self, completion: CompletionState, matcher: Matcher) -> list[int]:
        """Tokens that the grammar forces are appended without being sampled; the next pass computes them all."""
        forced = matcher.forced_tokens()
        seq = completion.seq
        # one is left to be sampled: what ends the text is always chosen
        if over := max(0, len(seq.token_ids) - seq.num_prompt + len(forced) - seq.max_tokens + 1):
            matcher.rollback(over)
            forced = forced[: len(forced) - over]
        seq.token_ids += forced
        for token in forced:
            completion.row.add(token)
        return forced

    def _start_others(self, state: RequestState) -> None:
        """The prompt is computed: the other completions find its pages."""
        if state.beams is None:
            for completion in state.completions[1:]:
                if not completion.finished:
                    self.scheduler.add(completion.seq)

    def _take_beam(self, item: Item, found: tuple[Tensor, Tensor]) -> None:
        """One hypothesis has its continuations; when all have, choose, and let the sequences follow."""
        completion, seq = item.seq.owner, item.seq
        state = completion.state
        if completion.finished or seq.num_preemptions != item.run:
            return
        search = state.beams
        assert search is not None
        seq.num_pending = 0
        self._pause(seq, True)
        state.beam_rows[completion] = found
        state.first_token = state.first_token or time.perf_counter()
        if len(state.beam_rows) < len(search.running):
            return
        parents = list(state.completions)
        sources = search.advance([state.beam_rows[c] for c in parents])
        state.beam_rows.clear()
        if not sources:
            self._finish_beams(state)
            return
        state.completions = self._branch(state, parents, sources)
        for completion, beam in zip(state.completions, search.running, strict=True):
            completion.beam = beam
            completion.seq.token_ids.append(beam.ids[-1])
            self._pause(completion.seq, False)

    def _branch(self, state: RequestState, parents: list[CompletionState], sources: list[int]) -> list[CompletionState]:
        """The sequences of the new hypotheses: a parent goes on as its first child, the others share its pages."""
        taken: set[int] = set()
        children = []
        for source in sources:
            parent = parents[source]
            if source in taken:
                child = self._start(state, parent.index, None)
                child.seq.token_ids = list(parent.seq.token_ids)
                child.stretched = parent.stretched
                self.scheduler.fork(parent.seq, child.seq)
                child.seq.paused = True
                parent = child
            taken.add(source)
            children.append(parent)
        for source, parent in enumerate(parents):
            if source not in taken:
                parent.finished = True
                self.scheduler.finish(parent.seq)
        return children

    def _finish_beams(self, state: RequestState) -> None:
        assert state.beams is not None
        results = state.beams.results()
        state.last_token = time.perf_counter()
        state.num_tokens = sum(len(beam.ids) for beam in results[: state.request.params.n])
        for completion in state.completions:
            completion.finished = True
            self.scheduler.finish(completion.seq)
        self.stats.num_generated_tokens += state.num_tokens
        self._close(state)
        self._outputs.append(Output(state, 0, last=True, beams=results))

    def _emit(
        self,
        completion: CompletionState,
        tokens: list[int],
        logprobs: list[RawLogprob],
        reason: FinishReason | None,
        stop: int | None,
    ) -> None:
        state = completion.state
        state.num_tokens += len(tokens)
        self.stats.num_generated_tokens += len(tokens)
        if completion.error is not None:
            self._fail(state, completion.error)
            return
        if reason is not None:
            self._finish(completion)
        end_token = reason == "stop" and tokens[-1] in completion.ends
        self._outputs.append(
            Output(state, completion.index, tokens, logprobs, reason, stop, end_token, last=not state.num_left)
        )

    def _finish(self, completion: CompletionState) -> None:
        if completion.finished:
            return
        completion.finished = True
        state = completion.state
        self.scheduler.finish(completion.seq)
        state.num_left -= 1
        if state.completions[0] is completion and not state.first_token:
            self._start_others(state)  # they must compute the prompt themselves
        if not state.num_left or state.beams is not None:
            self._close(state)

    def _close(self, state: RequestState) -> None:
        """The request is over."""
        if self._states.pop(state.request, None) is None:
            return
        self.stats.num_finished += 1
        if state.request.adapter is not None and self.adapters is not None:
            self.adapters.release(state.request.adapter)
            self._fill_adapters()

    def _fail(self, state: RequestState, error: LLMasOSError) -> None:
        self.abort(state.request)
        self._outputs.append(Output(state, 0, last=True, error=error))
        self.stats.num_failed += 1

    # when a pass fails

    def _recover(self, plan: Plan, error: Exception) -> None:
        """The sequences of a pass that failed are computed again, each alone, so that the one at fault fails alone. One
        that is alone already gets smaller passes if memory was short, else it fails."""
        if self.runner.check is not None:
            self.runner.check()  # another process is gone: nothing can be computed any more
        _log.warning("A pass of %d sequences, %d tokens failed: %s", len(plan.items), plan.num_tokens, error)
        self.scheduler.restart()  # what the pass should have written can be found, and shared, already
        live = [item.seq for item in plan.items if not item.seq.owner.finished]
        if isinstance(error, torch.OutOfMemoryError) and self._shrink(plan):
            return
        if len(live) == 1:
            self._fail(live[0].owner.state, _as_error(error, plan))
        self._set_apart(live)

    def _shrink(self, plan: Plan) -> bool:
        """Make passes half as large as one that did not fit into memory. False: they are as small as can be."""
        torch.cuda.empty_cache()
        scheduler = self.scheduler
        size = max(plan.num_tokens // 2, scheduler.max_num_seqs - 1 + SMALLEST_CHUNK)
        if size >= plan.num_tokens:
            return False
        scheduler.max_num_batched_tokens, scheduler.chunk = size, min(size, scheduler.chunk)
        return True

    def _set_apart(self, suspects: list[Sequence]) -> None:
        """Everybody waits while each suspect runs one pass alone."""
        for seq in (*self.scheduler.running, *self.scheduler.waiting):
            self._held.setdefault(seq, seq.paused)
            seq.paused = True
        self._suspects += [seq for seq in suspects if seq not in self._suspects]
        self._next_suspect()

    def _acquit(self, plan: Plan) -> None:
        """A suspect has come alone to where it was, and nothing happened."""
        if self._suspects and any(item.seq is self._suspects[0] and _caught_up(item) for item in plan.items):
            self._suspects.popleft().paused = True
            self._next_suspect()

    def _next_suspect(self) -> None:
        """The suspect before has passed; let the next one run, or everybody."""
        while self._suspects:
            if not self._suspects[0].owner.finished:
                self._suspects[0].paused = False
                return
            self._suspects.popleft()
        for seq, paused in self._held.items():
            seq.paused = paused
        self._held.clear()

    def _count(self, plan: Plan, seconds: float) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.num_steps += 1
        stats.num_prompt_tokens += plan.num_tokens - plan.num_decodes
        stats.last_step_tokens, stats.last_step_seconds = plan.num_tokens, seconds
        stats.num_preemptions = scheduler.num_preemptions

    def snapshot(self) -> EngineStats:
        """The counters, and the state now. From any thread."""
        scheduler = self.scheduler
        return replace(
            self.stats,
            num_evictions=scheduler.cache.num_evictions,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._for_adapters),
            kv_cache_usage=scheduler.cache.pools[0].usage,
        )


def failed_output(request: Request, cause: Exception) -> Output:
    """What a request hears when the engine itself broke."""
    return Output(RequestState(request), 0, last=True, error=_as_error(cause, None))


def _as_error(error: Exception, plan: Plan | None) -> LLMasOSError:
    if isinstance(error, LLMasOSError):
        return error
    if isinstance(error, torch.OutOfMemoryError) and plan is not None:
        return InsufficientMemoryError(
            f"A pass of {plan.num_tokens} tokens does not fit into the device's memory.",
            hint="Lower gpu_memory_utilization or max_num_batched_tokens.",
        )
    return ServerError(f"The model failed: {type(error).__name__}: {error}", hint="Try again.")


def _tops(ids: Tensor | None, logprobs: Tensor | None) -> list[tuple[tuple[int, float], ...]]:
    if ids is None or logprobs is None:
        return []
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [tuple(zip(row_ids, row, strict=True)) for row_ids, row in pairs]


def _logprobs(landing: Landing | None) -> Callable[[int | None, int, list[int]], list[RawLogprob]] | None:
    """Reads log-probabilities of rows: (how many alternatives, first row, tokens chosen there) -> one per token."""
    if landing is None or landing.result.logprobs is None:
        return None
    values = landing.result.logprobs.tolist()
    tops = _tops(landing.result.top_ids, landing.result.top_logprobs)

    def read(num_top: int | None, first: int, chosen: list[int]) -> list[RawLogprob]:
        if num_top is None:
            return []
        rows = range(first, first + len(chosen))
        return [RawLogprob(t, values[r], tops[r][:num_top] if tops else ()) for t, r in zip(chosen, rows, strict=True)]

    return read


def _caught_up(item: Item) -> bool:
    return item.samples or item.end == item.seq.num_prompt + item.seq.max_tokens
