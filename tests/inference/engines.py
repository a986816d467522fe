"""Engines on tiny random models, stepped by hand: what tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmasos.errors import LLMasOSError
from llmasos.inference.build import build_engine
from llmasos.inference.config import EngineConfig
from llmasos.inference.engine import Engine
from llmasos.inference.pages import Pages, page_groups
from llmasos.inference.request import FinishReason, SamplingParams
from llmasos.inference.speculate import Wanted
from llmasos.inference.state import Output, Request
from llmasos.models.config import ModelConfig
from llmasos.models.load import LoadedModel
from paged_world import decoder_of


def model_of(config: ModelConfig) -> LoadedModel:
    """Random weights, no tokenizer."""
    return LoadedModel(decoder_of(config).eval(), config, None, Path())


def engine_of(model: LoadedModel, *, overlap: bool = False, num_pages: int | None = None, **options: Any) -> Engine:
    """`num_pages`: of every group, one of them reserved."""
    if num_pages is not None:
        groups = range(len(page_groups(model.config)[0]))
        kv = options.get("kv_cache_dtype", "auto")
        sizes = [Pages.bytes_per_page(model.config, g, 16, kv, model.module.dtype) for g in groups]
        options["kv_cache_memory"] = num_pages * sum(sizes)
    engine = build_engine(model, EngineConfig.of(**{"max_num_seqs": 8} | options))
    engine.overlap = overlap
    return engine


def request_of(prompt: Sequence[int], params: SamplingParams, **options: Any) -> Request:
    assert params.max_tokens is not None
    return Request(tuple(prompt), params, params.max_tokens, **options)


class Results:
    """What came of each request: tokens of each completion, its reason, its log-probabilities, an error."""

    def __init__(self) -> None:
        self.tokens: dict[Request, list[list[int]]] = {}
        self.reasons: dict[Request, dict[int, FinishReason]] = {}
        self.logprobs: dict[Request, list[list[float]]] = {}
        self.errors: dict[Request, LLMasOSError] = {}
        self.ended: list[Request] = []
        self.states: dict[Request, Any] = {}

    def take(self, output: Output) -> None:
        request, n = output.request, output.request.params.n
        assert request not in self.ended, "an output after the last"
        self.states[request] = output.state
        tokens = self.tokens.setdefault(request, [[] for _ in range(n)])
        if output.beams is not None:
            tokens[:] = [list(beam.ids) for beam in output.beams[:n]]
        else:
            assert output.index not in self.reasons.get(request, {}), "an output of a completion that ended"
            tokens[output.index] += output.token_ids
        found = self.logprobs.setdefault(request, [[] for _ in range(n)])
        found[output.index] += [raw.logprob for raw in output.logprobs]
        if output.finish_reason is not None:
            self.reasons.setdefault(request, {})[output.index] = output.finish_reason
        if output.error is not None:
            self.errors[request] = output.error
        if output.last:
            self.ended.append(request)


def finish(engine: Engine, results: Results, each: Callable[[int], object] = lambda step: None) -> None:
    """Step to the end; `each` is called before every step."""
    step = 0
    while engine.has_work:
        each(step)
        for output in engine.step():
            results.take(output)
        step += 1
        assert step < 20_000, "the engine does not come to an end"


def run(engine: Engine, requests: Sequence[Request], each: Callable[[int], object] = lambda step: None) -> Results:
    """All at once, to the end; then the books must be clean."""
    results = Results()
    for request in requests:
        engine.add(request)
    finish(engine, results, each)
    assert sorted(map(id, results.ended)) == sorted(map(id, requests))
    check_idle(engine)
    return results


def check_idle(engine: Engine) -> None:
    """Nothing runs or waits, no page is used, and the books are in order."""
    scheduler = engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not engine._states
    assert all(pool.num_used == 0 for pool in scheduler.cache.pools), "pages leak"
    scheduler.check_integrity()


class Oracle:
    """Proposes what a text will be, with a wrong token here and there."""

    def __init__(self, texts: Sequence[Sequence[int]], every: int = 5) -> None:
        self.texts, self.every = [list(t) for t in texts], every

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._draft(list(w.token_ids), w.k) for w in wanted]

    def _draft(self, known: list[int], k: int) -> list[int]:
        for text in self.texts:
            if text[: len(known)] == known:
                right = text[len(known) : len(known) + k]
                return [t if (len(known) + i) % self.every else (t + 1) % 7 for i, t in enumerate(right)]
        return []

    def forget(self, id: int) -> None:
        pass
