"""Beam search, with the candidates, scores and stopping rule of Hugging Face's `generate(num_beams=…)`, so that texts
agree token for token. The engine runs the beams as sequences that share their pages; this is the choice between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import penalise
from llmasos.inference.state import Beam


@dataclass(slots=True)
class BeamSearch:
    """The search of one request. `running` are the hypotheses whose next tokens are being computed."""

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    ends: frozenset[int]
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[Beam] = field(default_factory=list)

    @property
    def num_candidates(self) -> int:
        return max(2, 1 + len(self.ends)) * self.params.num_beams

    def candidates(self, logits: Tensor, beam: Beam) -> tuple[Tensor, Tensor]:
        """The best continuations of one hypothesis from its logits [V]: totals and tokens, best first, at most
        num_candidates each: more can't be among the best of all."""
        logprobs = penalise(logits.float().log_softmax(-1), self.params, self.prompt, beam.ids) + beam.total
        best = logprobs.topk(min(self.num_candidates, logprobs.shape[0]))
        return best.values, best.indices

    def advance(self, rows: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
        """Take the continuations of every running hypothesis, in their order. Returns which of them each new running
        hypothesis continues; empty when the search is over."""
        totals, tokens = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
        sources = torch.arange(len(rows), device=totals.device).repeat_interleave(
            torch.tensor([len(r[0]) for r in rows], device=totals.device)
        )
        best = totals.topk(min(self.num_candidates, len(totals)))
        chosen = zip(best.values.tolist(), sources[best.indices].tolist(), tokens[best.indices].tolist(), strict=True)
        candidates = [
            (source, Beam((*self.running[source].ids, token), total, token in self.ends))
            for total, source, token in chosen
        ]
        width = self.params.num_beams
        self._keep([beam for _, beam in candidates[:width] if self._closes(beam)])
        alive = [(source, beam) for source, beam in candidates if not self._closes(beam)][:width]
        if not alive or self._settled(alive[0][1]):
            return []
        self.running = [beam for _, beam in alive]
        return [source for source, _ in alive]

    def results(self) -> list[Beam]:
        """The best hypotheses, best first; those still running if none has finished."""
        return sorted(self.finished or self.running, key=lambda b: -b.score(self.params.length_penalty))

    def _closes(self, beam: Beam) -> bool:
        return beam.ended or len(beam.ids) >= self.max_tokens

    def _keep(self, beams: list[Beam]) -> None:
        """Of what has ended so far the best `num_beams`."""
        best = sorted([*self.finished, *beams], key=lambda b: -b.score(self.params.length_penalty))
        self.finished = best[: self.params.num_beams]

    def _settled(self, best: Beam) -> bool:
        """No running hypothesis can better the finished ones, by Hugging Face's heuristic of the current length."""
        if len(self.finished) < self.params.num_beams:
            return False
        worst = self.finished[-1].score(self.params.length_penalty)
        return self.params.early_stopping or best.score(self.params.length_penalty) <= worst
