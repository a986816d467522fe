"""A loaded model -> an engine: how much memory its pages may take is measured, then everything is put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmasos.devices import free_memory
from llmasos.errors import InsufficientMemoryError, InvalidInputError
from llmasos.inference.cache import Group, PageCache
from llmasos.inference.constrain import GrammarCompiler
from llmasos.inference.engine import Engine
from llmasos.inference.pages import Pages, page_groups
from llmasos.inference.runner import Runner, Step, table_columns
from llmasos.inference.sampler import SamplingBatch, SamplingRow, make_batch
from llmasos.inference.request import SamplingParams
from llmasos.inference.scheduler import Scheduler
from llmasos.inference.speculate import DraftModel, NGramProposer, Speculator

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.models.config import ModelConfig
    from llmasos.models.load import LoadedModel

_log = logging.getLogger("llmasos")
INVARIANT_PAGES = 8
"""Pages of a prompt that are computed together in the batch-invariant mode."""


@dataclass(frozen=True)
class Plan:
    """An EngineConfig with every None resolved for one model on one device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    windows: tuple[int, ...]
    """One per page group; 0: full attention."""
    bytes_per_page: tuple[int, ...]


def resolve(model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Plan:
    """Raises InvalidInputError where the config contradicts the model."""
    cuda = device.type == "cuda"
    limit = config.max_model_len or model.context_length
    if limit > model.context_length:
        raise InvalidInputError(
            f"max_model_len={limit} is more than the model's context of {model.context_length}.", param="max_model_len"
        )
    page_size = config.page_size or (64 if cuda else 16)
    windows = page_groups(model)[0]
    sizes = (Pages.bytes_per_page(model, g, page_size, config.kv_cache_dtype, dtype) for g in range(len(windows)))
    return Plan(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or (8192 if cuda else 1024),
        max_model_len=limit,
        page_size=page_size,
        windows=windows,
        bytes_per_page=tuple(sizes),
    )


def divide(plan: Plan, num_bytes: int) -> list[int]:
    """Pages per group that `num_bytes` buy. A window group needs no more than every sequence's window; the rest is for
    full attention. Raises InsufficientMemoryError for less than one whole context."""
    whole = -(-plan.max_model_len // plan.page_size) + 1
    most = whole * plan.max_num_seqs + 1
    span = [-(-(w + plan.max_num_batched_tokens) // plan.page_size) + 2 if w else whole for w in plan.windows]
    caps = [min(most, min(s, whole) * plan.max_num_seqs + 1) for s in span]
    total = sum(c * b for c, b in zip(caps, plan.bytes_per_page, strict=True))
    pages = caps
    if total > num_bytes:
        share = num_bytes / total
        pages = [int(c * share) for c in caps]
    if any(p < min(s, whole) + 1 for p, s in zip(pages, span, strict=True)):
        per_token = sum(plan.bytes_per_page) / plan.page_size
        raise InsufficientMemoryError(
            f"One context of {plan.max_model_len} tokens needs {whole * sum(plan.bytes_per_page) / 1e9:.2f} GB of keys "
            f"and values ({per_token / 1e3:.0f} kB per token); {max(0, num_bytes) / 1e9:.2f} GB are left for them.",
            hint="Lower max_model_len, use kv_cache_dtype='int8', or free memory.",
        )
    return pages


def _left_for_pages(plan: Plan, config: EngineConfig, make: Callable[[list[int]], Runner], device: torch.device) -> int:
    """Bytes that pages may take, after what a full pass and the graphs were seen to need."""
    if device.type != "cuda":
        return free_memory(device) // 2
    from llmasos.inference.kernels.compile import compiling

    num_tokens = plan.max_num_batched_tokens
    num_pages = -(-num_tokens // plan.page_size) + plan.max_num_seqs + 1
    runner = make([num_pages] * len(plan.windows))
    rows = [SamplingRow(SamplingParams(top_p=0.9, repetition_penalty=1.1, seed=0), (1,))] * plan.max_num_seqs
    batch = make_batch(rows, [0] * plan.max_num_seqs)
    with compiling() as can:
        if can:
            _try_shapes(runner, plan, batch)
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.forward(_full_pass(plan))
    runner.sample(batch, np.arange(plan.max_num_seqs)).wait()
    activations = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    runner.capture()
    graphs = max(0, torch.cuda.memory_reserved(device) - before)
    del runner
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - total * (1 - config.gpu_memory_utilization) - activations - graphs)


def _try_shapes(runner: Runner, plan: Plan, batch: SamplingBatch) -> None:
    """Launch the passes whose kernels differ: a prompt, and decodes of every power of two."""
    runner.forward(_full_pass(plan))
    runner.sample(batch, np.arange(plan.max_num_seqs))
    size = 1
    while size <= plan.max_num_seqs:
        runner.forward(_decodes(plan, size))
        rows = [SamplingRow(SamplingParams(temperature=float(size > 1)), ())] * size
        runner.sample(make_batch(rows, [0] * size), np.arange(size))
        size *= 2


def _decodes(plan: Plan, size: int) -> Step:
    every = np.arange(size, dtype=np.int32)
    columns = table_columns(1, plan.page_size, plan.max_model_len)
    return Step(
        tokens=np.zeros(size, np.int64),
        positions=np.zeros(size, np.int64),
        sequences=every,
        query_start=np.arange(size + 1, dtype=np.int32),
        seq_lens=np.ones(size, np.int32),
        tables=[np.ones((size, columns), np.int32)] * len(plan.windows),
        max_query=1,
        max_seq_len=min(columns * plan.page_size, plan.max_model_len),
        rows=every,
    )


def _full_pass(plan: Plan) -> Step:
    """As many tokens as a pass may have, and as many logits as it may want."""
    longest = min(plan.max_model_len, plan.max_num_batched_tokens)
    lengths = [longest] * (plan.max_num_batched_tokens // longest)
    columns = -(-longest // plan.page_size)
    every = np.arange(1, 1 + columns * len(lengths), dtype=np.int32).reshape(len(lengths), columns)
    num_tokens = sum(lengths)
    return Step(
        tokens=np.zeros(num_tokens, np.int64),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        sequences=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        query_start=np.array([0, *np.cumsum(lengths)], np.int32),
        seq_lens=np.array(lengths, np.int32),
        tables=[every] * len(plan.windows),
        max_query=longest,
        max_seq_len=longest,
        rows=np.arange(plan.max_num_seqs, dtype=np.int64) % num_tokens,
    )


def build_engine(model: LoadedModel, config: EngineConfig) -> Engine:
    """The engine of a decoder. Raises InsufficientMemoryError with the counts, InvalidInputError for a config that does
    not fit the model."""
    module = model.module
    plan = resolve(model.config, config, module.device, module.dtype)
    graphs = not (config.enforce_eager or config.batch_invariant)

    def make(num_pages: list[int]) -> Runner:
        options = {"kv_dtype": config.kv_cache_dtype, "batch_invariant": config.batch_invariant}
        pages = Pages(model.config, num_pages, plan.page_size, device=module.device, dtype=module.dtype, **options)
        sizes = {"max_num_seqs": plan.max_num_seqs, "max_model_len": plan.max_model_len}
        return Runner(module, pages, **sizes, graphs=graphs, batch_invariant=config.batch_invariant)

    num_pages = divide(plan, config.kv_cache_memory or _left_for_pages(plan, config, make, module.device))
    runner = make(num_pages)
    runner.capture()
    _log.info("%s pages of %d tokens", num_pages, plan.page_size)
    groups = [Group(n, w) for n, w in zip(num_pages, plan.windows, strict=True)]
    scheduler = Scheduler(
        PageCache(groups, plan.page_size, prefix_reuse=config.enable_prefix_caching),
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        aligned_chunks=plan.page_size * INVARIANT_PAGES if config.batch_invariant else 0,
    )
    tokenizer = model.tokenizer
    return Engine(
        runner,
        scheduler,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer else frozenset(),
        grammars=GrammarCompiler(tokenizer, model.config.vocab_size) if tokenizer and tokenizer.eos_token_ids else None,
        speculator=_speculator(model, config, plan),
    )


def _speculator(model: LoadedModel, config: EngineConfig, plan: Plan) -> Speculator | None:
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
        num_rows=plan.max_num_seqs,
    )
    return Speculator(draft, wanted.num_speculative_tokens)
