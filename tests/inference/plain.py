"""The slow path that every faster one must equal: one sequence in one row of a contiguous cache, a pass per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llmasos.inference.constrain import GrammarCompiler, num_words
from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import Sampler, SamplingRow, make_batch
from llmasos.models.attention import ContiguousCache
from llmasos.models.layers import stretched_from
from llmasos.models.load import LoadedModel


def next_logits(model: LoadedModel, tokens: list[int]) -> Iterator[Tensor]:
    """[V] after `tokens`, which the caller lets grow by one between two questions. Where longrope's frequencies change,
    all tokens are computed again, as Hugging Face's Phi-3 does."""
    module, scaling = model.module, model.config.rope_scaling
    changes_at = stretched_from(model.config) if scaling is not None and scaling.kind == "longrope" else -1
    cache = ContiguousCache(model.config, 1, device=module.device, dtype=module.dtype, capacity=64)
    while True:
        if cache.lengths[0] == changes_at:
            cache.lengths[0] = 0
        new = tokens[cache.lengths[0] :]
        with torch.inference_mode():
            hidden = module(torch.tensor(new), cache.plan([0], [len(new)]), cache)
            cache.advance()
            logits = module.logits(hidden[-1:])[0]
        yield logits


def plain(model: LoadedModel, prompt: Sequence[int], params: SamplingParams, index: int = 0) -> list[int]:
    """The tokens of completion `index`, the end token included. `params.max_tokens` must be given."""
    return [token for token, _ in plain_scored(model, prompt, params, index)]


def plain_scored(
    model: LoadedModel, prompt: Sequence[int], params: SamplingParams, index: int = 0
) -> Iterator[tuple[int, float]]:
    """Each token with its log-probability."""
    row, tokens = SamplingRow(params, tuple(prompt), index), list(prompt)
    eos = model.tokenizer.eos_token_ids if model.tokenizer and not params.ignore_eos else frozenset()
    ends, matcher = eos | set(params.stop_token_ids), None
    if params.structured is not None:
        assert model.tokenizer is not None
        matcher = GrammarCompiler(model.tokenizer, model.config.vocab_size).matcher(params.structured)
    assert params.max_tokens is not None
    steps = zip(range(params.max_tokens), next_logits(model, tokens), strict=False)
    for number, logits in steps:
        mask = None
        if matcher is not None:
            mask = np.full((1, num_words(model.config.vocab_size)), -1, np.int32)
            matcher.fill_masks(mask)
        token = int(Sampler(logits.device).sample(logits[None], make_batch([row], [number], mask)).tokens)
        tokens.append(token)
        row.add(token)
        yield token, float(logits.log_softmax(-1)[token])
        if token in ends or (matcher is not None and matcher.accept(token)):
            break
