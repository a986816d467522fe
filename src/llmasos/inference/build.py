"""A loaded model -> an engine: pages are counted, then everything is put together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llmasos.inference.cache import Group, PageCache
from llmasos.inference.constrain import GrammarCompiler
from llmasos.inference.engine import Engine
from llmasos.inference.rank import Rank, divide
from llmasos.inference.scheduler import Scheduler
from llmasos.inference.speculate import DraftModel, NGramProposer, Speculator

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.parallel import ParallelRanks
    from llmasos.models.load import LoadedModel

_log = logging.getLogger("llmasos")


def build_engine(model: LoadedModel, config: EngineConfig, ranks: ParallelRanks | None = None) -> Engine:
    """The engine of a decoder; `ranks` where it is tensor-parallel. Raises InsufficientMemoryError with the counts,
    InvalidInputError for a config that does not fit the model."""
    rank = ranks or Rank(model, config)
    sizes = rank.sizes
    speculator = _speculator(model, config, sizes.max_num_seqs)  # its memory is not there for pages
    num_pages = divide(sizes, rank.room())
    rank.start(num_pages)
    _log.info("%s pages of %d tokens", num_pages, sizes.page_size)
    scheduler = Scheduler(
        PageCache(
            [Group(n, w) for n, w in zip(num_pages, sizes.windows, strict=True)],
            sizes.page_size,
            prefix_reuse=config.enable_prefix_caching,
        ),
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
    )
    tokenizer = model.tokenizer
    return Engine(
        rank.runner,
        scheduler,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer else frozenset(),
        grammars=GrammarCompiler(tokenizer, model.config.vocab_size) if tokenizer and tokenizer.eos_token_ids else None,
        speculator=speculator,
        rank=rank,
    )


def _speculator(model: LoadedModel, config: EngineConfig, num_rows: int) -> Speculator | None:
    wanted = config.speculative
    if wanted is None:
        return None
    if wanted.method == "ngram":
        ngrams = NGramProposer(wanted.prompt_lookup_max, wanted.prompt_lookup_min)
        return Speculator(ngrams, wanted.num_speculative_tokens)
    from llmasos.models.load import load_model
    from llmasos.store import ensure

    assert wanted.model is not None
    draft = DraftModel(
        load_model(ensure(wanted.model), device=model.module.device),
        model.tokenizer,
        name=wanted.model,
        target_name=model.path.name,
        vocab_size=model.config.vocab_size,
        num_rows=num_rows,
    )
    return Speculator(draft, wanted.num_speculative_tokens)
