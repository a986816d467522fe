"""What the engine knows of each request: what was asked, how far it is, what a step made of it: values, no torch."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmasos.errors import LLMasOSError
from llmasos.inference.request import FinishReason, RequestMetrics, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from llmasos.inference.beam import BeamSearch
    from llmasos.inference.constrain import Matcher
    from llmasos.inference.sampler import SamplingRow
    from llmasos.inference.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class RawLogprob:
    """Log-probability of a token and the most likely alternatives, by id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Beam:
    """A hypothesis: its new tokens, the sum of their log-probabilities, and whether an end token closed it."""

    ids: tuple[int, ...] = ()
    total: float = 0.0
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.total / len(self.ids) ** length_penalty if self.ids else 0.0


@dataclass(eq=False, slots=True)
class Request:
    """What is asked of the engine. `max_tokens` is resolved against the context."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    priority: int = 0
    """Smaller is sooner."""
    adapter: str | None = None
    cache_salt: Hashable = None
    """Requests with different salts share no cached prefixes."""
    score_from: int | None = None
    """Return the log-probabilities of the prompt's tokens from this position (at least 1) on."""
    arrival: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class Output:
    """What one step made of one completion."""

    state: RequestState
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[RawLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    end_token: bool = False
    """The last token is an end token: it adds no text."""
    last: bool = False
    """The request's last output."""
    error: LLMasOSError | None = None
    beams: list[Beam] | None = None
    """The hypotheses of a beam search, best first; with its last output."""

    @property
    def request(self) -> Request:
        return self.state.request


@dataclass(eq=False, slots=True)
class RequestState:
    """A request on its way. Times are seconds of `time.perf_counter`, 0 for what has not happened."""

    request: Request
    completions: list[CompletionState] = field(default_factory=list)
    num_left: int = 1
    """Completions that are not finished."""
    adapter_key: int | None = None
    """What no other adapter's content has had."""
    beams: BeamSearch | None = None
    beam_rows: dict[CompletionState, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Continuations of those hypotheses that have theirs; the others are still being computed."""
    prompt_logprobs: dict[int, tuple[RawLogprob, bool]] = field(default_factory=dict)
    """By position: the prompt token's log-probability, and whether it was the first choice."""
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0

    def metrics(self) -> RequestMetrics:
        start = self.request.arrival
        first = self.first_token or self.last_token or time.perf_counter()
        return RequestMetrics(
            time_to_first_token=first - start,
            decode_seconds=max(0.0, self.last_token - first),
            num_output_tokens=self.num_tokens,
            queue_seconds=max(0.0, self.first_scheduled - start),
            num_cached_tokens=self.num_cached,
        )


@dataclass(eq=False, slots=True)
class CompletionState:
    """One completion; the `owner` of its sequence."""

    state: RequestState
    index: int
    seq: Sequence
    row: SamplingRow
    ends: frozenset[int]
    matcher: Matcher | None = None
    score_from: int | None = None
    num_top: int = 0
    beam: Beam = field(default_factory=Beam)
    """The hypothesis that it computes, in a beam search."""
    stretched: bool = False
    """Its keys are those of a sequence that is longer than `Engine.frequencies_change_at`."""
    finished: bool = False
    error: LLMasOSError | None = None

    @property
    def needs_tokens(self) -> bool:
        """Its next step can't be prepared before its last token is known."""
        return self.matcher is not None or self.row.needs_tokens or self.state.beams is not None


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and the state now."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Computed; those found in the cache are in num_cached_tokens."""
    num_cached_tokens: int = 0
    num_asked_tokens: int = 0
    """Of the prompts that began, computed or cached."""
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0
    """Cached pages that gave way to new ones."""
    num_finished: int = 0
    num_failed: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    last_step_tokens: int = 0
    last_step_seconds: float = 0.0


@dataclass(frozen=True)
class AdapterInfo:
    """A LoRA adapter of a model that is being served."""

    name: str
    path: Path
    slot: int | None
    """None: on disk only."""
    rank: int
    num_requests: int
    """That use it now."""
