"""Logits -> tokens: penalties, truncation, the draw. One row at a time, the plain path that batched ones must equal.

V = vocabulary. Order, as in Hugging Face's `generate`: bias and penalties on the raw logits, then temperature, top-k,
top-p, min-p, typical. Every function takes and returns float32 logits [V]; a removed token has the logit -inf.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmasos.inference.request import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from llmasos.text import Tokenizer

REMOVED = float("-inf")


def penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Bias and penalties. `prompt` and `output` are the tokens seen so far. Ids of the bias are in the vocabulary."""
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(0, ids, bias)
    if params.repetition_penalty != 1.0 and (prompt or output):
        ids = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        seen = logits[ids]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    if (params.presence_penalty or params.frequency_penalty) and output:
        ids, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        cost = params.presence_penalty + params.frequency_penalty * counts
        logits = logits.index_add(0, ids, -cost.to(logits.dtype))
    return logits


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then the four ways to drop unlikely tokens; at least one token stays."""
    if params.temperature != 1.0:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        logits = top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = top_p(logits, params.top_p)
    if params.min_p > 0.0:
        logits = min_p(logits, params.min_p)
    if params.typical_p < 1.0:
        logits = typical_p(logits, params.typical_p)
    return logits


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest; ties with the k-th stay."""
    return logits.masked_fill(logits < logits.topk(k).values[-1], REMOVED)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (nucleus, arXiv:1904.09751)."""
    ordered, order = logits.sort(descending=False)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - p
    removed[-1] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), REMOVED)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens less likely than p times the most likely one (arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    removed = probabilities < p * probabilities.max()
    removed[probabilities.argmax()] = False
    return logits.masked_fill(removed, REMOVED)


def typical_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy until their mass reaches p (arXiv:2202.00666)."""
    normal = logits.log_softmax(-1)
    entropy = -(normal * normal.exp()).nansum(-1)
    _, order = (-normal - entropy).abs().sort()
    mass = logits[order].softmax(-1).cumsum(-1)
    last = int((mass < p).sum().clamp(max=logits.shape[-1] - 1))
    removed = torch.ones_like(logits, dtype=torch.bool)
    removed[order[: last + 1]] = False
    return logits.masked_fill(removed, REMOVED)


class Sampler:
    """The choices of one completion: its own random stream, so its text does not depend on what runs beside it."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params, self.prompt = params, prompt
        self.generator = torch.Generator()
        seed = secrets.randbits(62) if params.seed is None else params.seed
        # spread, so that completion 1 of seed 7 is not completion 0 of seed 8
        self.generator.manual_seed((seed * 1_000_003 + index) % 2**63)

    def choose(self, logits: Tensor, output: Sequence[int]) -> int:
        """The next token for logits [V], after the tokens in `output`."""
        logits = penalise(logits, self.params, self.prompt, output)
        if self.params.greedy:
            return int(logits.argmax())
        probabilities = truncate(logits, self.params).softmax(-1)
        # drawn on the CPU: one stream of random numbers for every device
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self.generator))

    @property
    def trivial(self) -> bool:
        """The choice is the argmax of the raw logits."""
        p = self.params
        touched = p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        return p.greedy and not touched


def token_names(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """How log-probabilities name a token: the text that it adds, half characters as U+FFFD; empty for one of the rows
    that pad a model's vocabulary."""
    if tokenizer is None:
        return str
    known = tokenizer.backend.id_to_token

    def text(token: int) -> str:
        return "" if known(token) is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

    return text


def token_logprob(logits: Tensor, token: int, num_top: int, name: Callable[[int], str]) -> TokenLogprob:
    """Log-probabilities of one position from its raw logits [V]; `name` gives a token's text."""
    logprobs = logits.log_softmax(-1)
    top: tuple[tuple[int, str, float], ...] = ()
    if num_top:
        best = logprobs.topk(min(num_top, logprobs.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple((i, name(i), value) for i, value in pairs)
    return TokenLogprob(token, name(token), float(logprobs[token]), top)
