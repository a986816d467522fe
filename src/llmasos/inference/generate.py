"""The plain generation loop: packed prompts in, chunks out, over a contiguous cache.

A row of the cache is a slot: every completion takes one and gives it to the next prompt in line when it is done.
Correct before fast: whatever is made faster later must give this loop's tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmasos.errors import ContextOverflowError
from llmasos.inference.request import Chunk, FinishReason, SamplingParams, TokenLogprob
from llmasos.inference.sampler import Sampler, SamplingRow, make_batch, token_logprob, token_names
from llmasos.inference.stopping import StopStrings
from llmasos.models.attention import ContiguousCache
from llmasos.models.layers import stretched_from

if TYPE_CHECKING:
    from llmasos.models.config import ModelConfig
    from llmasos.models.load import LoadedModel
    from llmasos.text import StreamDecoder

DEFAULT_MAX_TOKENS = 256
MAX_ROWS = 32
PREFILL_TOKENS = 2048
"""Prompt tokens that one forward pass takes at most."""


def resolve_max_tokens(num_prompt: int, params: SamplingParams, context_length: int) -> int:
    """New tokens that a request may make. Raises ContextOverflowError with the counts; nothing is cut silently."""
    room = context_length - num_prompt
    wanted = params.max_tokens
    if wanted is None:
        wanted = max(1, min(DEFAULT_MAX_TOKENS, room))
    if wanted > room:
        raise ContextOverflowError(num_prompt, wanted, context_length)
    return wanted


def prefill_piece(num_prompt: int, config: ModelConfig) -> int:
    """Prompt tokens per forward pass. Rotary frequencies that depend on the length must see the whole prompt."""
    return num_prompt if 0 < stretched_from(config) < num_prompt else PREFILL_TOKENS


def frequencies_change_at(config: ModelConfig) -> int | None:
    """The length after which longrope turns by other frequencies, so that everything cached must be computed again
    (as Hugging Face's Phi-3 does); None for other models."""
    scaling = config.rope_scaling
    return stretched_from(config) if scaling is not None and scaling.kind == "longrope" else None


@dataclass(frozen=True)
class Job:
    """One prompt to complete. `max_tokens` is resolved against the context."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int


@dataclass(frozen=True)
class Event:
    """A chunk of job number `job`, and when it was made (seconds, monotonic)."""

    job: int
    chunk: Chunk
    time: float


@dataclass
class _Running:
    """One completion on its way, in one row of the cache."""

    job: int
    index: int
    row: int
    max_tokens: int
    sampling: SamplingRow
    decoder: StreamDecoder | None
    stops: StopStrings
    ids: list[int] = field(default_factory=list)


class Generation:
    """Iterate to run the jobs to their end. `lock` is held for one forward pass at a time, so that several generations
    on one model take turns; `cancelled` is asked before each pass."""

    def __init__(
        self,
        model: LoadedModel,
        jobs: Sequence[Job],
        *,
        lock: threading.Lock,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.jobs, self.lock, self.cancelled = model, list(jobs), lock, cancelled
        self.module, self.tokenizer = model.module, model.tokenizer
        self._changes_at = frequencies_change_at(model.config)
        self._name = token_names(self.tokenizer)
        self._eos = self.tokenizer.eos_token_ids if self.tokenizer else frozenset()
        active = [i for i, job in enumerate(self.jobs) if job.max_tokens > 0]
        self._waiting = deque(active)
        self._running: list[_Running] = []
        self._entering: list[list[_Running]] = []
        """Those of the running completions whose prompt is being computed, by prompt."""
        sizes = [self.jobs[i] for i in active]
        num_rows = min(sum(j.params.n for j in sizes), max([MAX_ROWS, *(j.params.n for j in sizes)]))
        self._free = list(range(num_rows))[::-1]
        if active:
            self._cache = ContiguousCache(
                model.config,
                num_rows,
                device=self.module.device,
                dtype=self.module.dtype,
                capacity=min(max(len(j.prompt) + j.max_tokens for j in sizes), 64 + max(len(j.prompt) for j in sizes)),
            )

    def __iter__(self) -> Iterator[Event]:
        for i, job in enumerate(self.jobs):
            if job.max_tokens == 0:
                for index in range(job.params.n):
                    yield self._event(i, Chunk(index, "", finish_reason="length"))
        while self._waiting or self._running:
            if self.cancelled():
                yield from self._abort()
                return
            with self.lock, torch.inference_mode():
                ready = self._prefill() if self._entering or self._admit() else self._decode()
                tokens = _choose(ready) if ready else []
                chunks = [self._advance(s, row, token) for (s, row), token in zip(ready, tokens, strict=True)]
            for (sequence, _), chunk in zip(ready, chunks, strict=True):
                yield self._event(sequence.job, chunk)

    def _event(self, job: int, chunk: Chunk) -> Event:
        return Event(job, chunk, time.perf_counter())

    def _abort(self) -> Iterator[Event]:
        for s in self._running:
            yield self._event(s.job, Chunk(s.index, self._rest(s), finish_reason="abort"))
        for job in self._waiting:
            for index in range(self.jobs[job].params.n):
                yield self._event(job, Chunk(index, "", finish_reason="abort"))

    def _admit(self) -> bool:
        """Let in the waiting jobs that find rows now; prompts of one pass stay within PREFILL_TOKENS."""
        tokens = 0
        while self._waiting:
            number = self._waiting[0]
            job = self.jobs[number]
            if job.params.n > len(self._free) or (self._entering and tokens + len(job.prompt) > PREFILL_TOKENS):
                break
            self._waiting.popleft()
            tokens += len(job.prompt)
            self._entering.append([self._start(number, index) for index in range(job.params.n)])
            self._running += self._entering[-1]
        self._running.sort(key=lambda s: s.row)  # rows in order need not be gathered when all of them decode
        return bool(self._entering)

    def _start(self, number: int, index: int) -> _Running:
        job, row = self.jobs[number], self._free.pop()
        self._cache.lengths[row] = 0
        return _Running(
            job=number,
            index=index,
            row=row,
            max_tokens=job.max_tokens,
            sampling=SamplingRow(job.params, job.prompt, index),
            decoder=self.tokenizer.stream() if self.tokenizer else None,
            stops=StopStrings(job.params.stop, include=job.params.include_stop),
        )

    def _prefill(self) -> list[tuple[_Running, Tensor]]:
        """One pass over the prompts that enter; none is ready while the only one is too long for one pass. The
        completions of one prompt share its pass and then copy its row."""
        prompts = [self.jobs[group[0].job].prompt for group in self._entering]
        rows = [group[0].row for group in self._entering]
        done, piece = self._cache.lengths[rows[0]], prefill_piece(len(prompts[0]), self.model.config)
        if len(prompts) == 1 and len(prompts[0]) - done > piece:
            self._forward(rows, [prompts[0][done : done + piece]])
            return []
        logits = self._last_logits(rows, [prompts[0][done:], *prompts[1:]])
        ready = []
        for group, row in zip(self._entering, logits, strict=True):
            copies = [s.row for s in group[1:]]
            self._cache.reorder(copies, [group[0].row] * len(copies))
            ready += [(s, row) for s in group]
        self._entering = []
        return ready

    def _decode(self) -> list[tuple[_Running, Tensor]]:
        tokens = [self._next_tokens(s) for s in self._running]
        logits = self._last_logits([s.row for s in self._running], tokens)
        return list(zip(self._running, logits, strict=True))

    def _next_tokens(self, s: _Running) -> list[int]:
        """The last token, or everything again where the cached keys no longer fit."""
        if self._changes_at != self._cache.lengths[s.row]:
            return s.ids[-1:]
        self._cache.lengths[s.row] = 0
        return [*self.jobs[s.job].prompt, *s.ids]

    def _last_logits(self, rows: list[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        hidden = self._forward(rows, tokens)
        if len(hidden) > len(rows):
            ends = torch.tensor([len(t) for t in tokens]).cumsum(0) - 1
            hidden = hidden[ends.to(hidden.device)]
        logits: Tensor = self.module.logits(hidden)
        return logits

    def _forward(self, rows: list[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        positions = self._cache.plan(rows, [len(t) for t in tokens])
        packed = torch.tensor([i for t in tokens for i in t], device=self.module.device)
        hidden: Tensor = self.module(packed, positions, self._cache)
        self._cache.advance()
        return hidden

    def _advance(self, s: _Running, logits: Tensor, token: int) -> Chunk:
        """Make `token` part of the completion; its last chunk frees the row."""
        params = s.sampling.params
        s.ids.append(token)
        s.sampling.add(token)
        reason: FinishReason | None
        stop_reason: str | int | None
        reason, stop_reason = self._ended_by(s, token)
        text = ""
        if s.decoder is not None and reason is None:
            text = s.stops.push(s.decoder.push(token))
            if s.stops.stopped is not None:
                reason, stop_reason = "stop", s.stops.stopped
        if reason is None and len(s.ids) >= s.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._rest(s)
            self._running.remove(s)
            self._free.append(s.row)
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = (token_logprob(logits, token, params.logprobs, self._name),)
        return Chunk(s.index, text, (token,), logprobs, reason, stop_reason)

    def _ended_by(self, s: _Running, token: int) -> tuple[FinishReason | None, int | None]:
        if token in s.sampling.params.stop_token_ids:
            return "stop", token
        if token in self._eos and not s.sampling.params.ignore_eos:
            return "stop", None
        return None, None

    def _rest(self, s: _Running) -> str:
        """Text that was held back: half a character, or what might have become a stop string."""
        if s.decoder is None or s.stops.stopped is not None:
            return ""
        return s.stops.push(s.decoder.flush()) + s.stops.flush()


def _choose(ready: list[tuple[_Running, Tensor]]) -> list[int]:
    """The next token of each."""
    batch = make_batch([s.sampling for s, _ in ready], [len(s.ids) for s, _ in ready])
    logits = torch.stack([row for _, row in ready])
    tokens: list[int] = Sampler(logits.device).sample(logits, batch).tokens.tolist()
    return tokens
