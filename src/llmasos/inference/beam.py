"""Beam search over one prompt, with the candidates, scores and stopping rule of Hugging Face's `generate(num_beams=…)`,
so that texts agree token for token. B = beams, V = vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmasos.inference.generate import Job, frequencies_change_at, prefill_piece
from llmasos.inference.sampler import penalise
from llmasos.models.attention import ContiguousCache

if TYPE_CHECKING:
    from llmasos.models.load import LoadedModel


@dataclass(frozen=True)
class Beam:
    """A hypothesis: its new tokens, the sum of their log-probabilities, and whether an end token closed it."""

    ids: tuple[int, ...]
    total: float
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.total / len(self.ids) ** length_penalty


def beam_search(
    model: LoadedModel, job: Job, *, lock: threading.Lock, cancelled: Callable[[], bool] = lambda: False
) -> list[Beam]:
    """The `num_beams` best hypotheses, best first; fewer if cancelled early. `max_tokens` must be at least 1."""
    return _Search(model, job, lock, cancelled).run()


class _Search:
    def __init__(self, model: LoadedModel, job: Job, lock: threading.Lock, cancelled: Callable[[], bool]) -> None:
        self.module, self.config = model.module, model.config
        self.job, self.lock, self.cancelled = job, lock, cancelled
        params = job.params
        self.width, self.penalty = params.num_beams, params.length_penalty
        eos = model.tokenizer.eos_token_ids if model.tokenizer and not params.ignore_eos else frozenset()
        self.ends = frozenset(eos) | frozenset(params.stop_token_ids)
        self.num_candidates = max(2, 1 + len(self.ends)) * self.width
        self.cache = ContiguousCache(
            model.config,
            self.width,
            device=self.module.device,
            dtype=self.module.dtype,
            capacity=len(job.prompt) + job.max_tokens,
        )
        self.finished: list[Beam] = []

    def run(self) -> list[Beam]:
        running = [Beam((), 0.0)]
        with torch.inference_mode():
            logits = self._prefill()
            while not self.cancelled():
                candidates = self._candidates(logits, running)
                closed = [self._closes(beam) for _, beam in candidates]
                top = list(zip(candidates, closed, strict=True))[: self.width]
                self._finish([beam for (_, beam), closes in top if closes])
                pairs = zip(candidates, closed, strict=True)
                alive = [candidate for candidate, closes in pairs if not closes][: self.width]
                if not alive or self._settled(alive[0][1]):
                    break
                sources, running = [source for source, _ in alive], [beam for _, beam in alive]
                with self.lock:
                    logits = self._step(sources, running)
        rest = [] if self.finished else running
        return sorted(self.finished or rest, key=lambda b: -b.score(self.penalty) if b.ids else 0.0)

    def _prefill(self) -> Tensor:
        prompt = list(self.job.prompt)
        piece = prefill_piece(len(prompt), self.config)
        hidden = torch.empty(0)
        for at in range(0, len(prompt), piece):
            if at and self.cancelled():
                break
            with self.lock:
                hidden = self._forward([0], [prompt[at : at + piece]])
        with self.lock:
            logits: Tensor = self.module.logits(hidden[-1:])
        return logits

    def _step(self, sources: list[int], running: list[Beam]) -> Tensor:
        rows = list(range(len(running)))
        self.cache.reorder(rows, sources)
        tokens = [list(beam.ids[-1:]) for beam in running]
        if self.cache.lengths[0] == frequencies_change_at(self.config):
            for row in rows:
                self.cache.lengths[row] = 0
            tokens = [[*self.job.prompt, *beam.ids] for beam in running]
        hidden = self._forward(rows, tokens)
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0) - 1
        logits: Tensor = self.module.logits(hidden[ends.to(hidden.device)])
        return logits

    def _forward(self, rows: list[int], tokens: list[list[int]]) -> Tensor:
        positions = self.cache.plan(rows, [len(t) for t in tokens])
        packed = torch.tensor([i for t in tokens for i in t], device=self.module.device)
        hidden: Tensor = self.module(packed, positions, self.cache)
        self.cache.advance()
        return hidden

    def _candidates(self, logits: Tensor, running: list[Beam]) -> list[tuple[int, Beam]]:
        """The best continuations over all beams as (beam they continue, hypothesis), best first."""
        logprobs = logits.log_softmax(-1)
        rows = [
            penalise(row, self.job.params, self.job.prompt, beam.ids) + beam.total
            for row, beam in zip(logprobs, running, strict=True)
        ]
        totals = torch.stack(rows)
        best = totals.flatten().topk(min(self.num_candidates, totals.numel()))
        out = []
        for total, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            source, token = divmod(flat, totals.shape[1])
            out.append((source, Beam((*running[source].ids, token), total, token in self.ends)))
        return out

    def _closes(self, beam: Beam) -> bool:
        return beam.ended or len(beam.ids) >= self.job.max_tokens

    def _finish(self, beams: list[Beam]) -> None:
        """Keep the best `width` of what has ended so far."""
        self.finished = sorted([*self.finished, *beams], key=lambda b: -b.score(self.penalty))[: self.width]

    def _settled(self, best: Beam) -> bool:
        """No running hypothesis can better the finished ones, by Hugging Face's heuristic of the current length."""
        if len(self.finished) < self.width:
            return False
        worst = self.finished[-1].score(self.penalty)
        return self.job.params.early_stopping or best.score(self.penalty) <= worst
