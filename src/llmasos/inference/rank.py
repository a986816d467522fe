"""One process's share of an engine: the model, the memory for its pages as measured, the runner."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from llmasos.devices import free_memory
from llmasos.errors import InsufficientMemoryError, InvalidInputError, UnsupportedError
from llmasos.inference.batch import SharedPrefix
from llmasos.inference.pages import Pages, page_groups
from llmasos.inference.request import SamplingParams
from llmasos.inference.runner import Runner, Step, table_columns
from llmasos.inference.sampler import SamplingBatch, SamplingRow, make_batch
from llmasos.models.weights import sleep, wake

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.runner import Ints, Landing, ScoredLogprobs
    from llmasos.models.config import ModelConfig
    from llmasos.models.load import LoadedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """An EngineConfig with every None resolved for one rank's share of a model on its device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    windows: tuple[int, ...]
    """One per page group; 0: full attention."""
    bytes_per_page: tuple[int, ...]


def tokens_per_pass(config: EngineConfig, device: torch.device) -> int:
    return config.max_num_batched_tokens or max(8192 if device.type == "cuda" else 1024, 2 * config.max_num_seqs)


def resolve(model: ModelConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Sizes:
    """Raises InvalidInputError where the config contradicts the model."""
    cuda = device.type == "cuda"
    limit = config.max_model_len or model.context_length
    if limit > model.context_length:
        raise InvalidInputError(
            f"max_model_len={limit} is more than the model's context of {model.context_length}.",
            hint=f"Give at most {model.context_length}, or leave it out.",
            param="max_model_len",
        )
    page_size = config.page_size or (64 if cuda else 16)
    windows = tuple(page_groups(model)[0])
    per_page = (Pages.bytes_per_page(model, g, page_size, config.kv_cache_dtype, dtype) for g in range(len(windows)))
    most = tokens_per_pass(config, device)
    if most < config.max_num_seqs:
        raise InvalidInputError(
            f"max_num_batched_tokens={most} leaves no room for prompts beside {config.max_num_seqs} sequences.",
            hint=f"Use at least {config.max_num_seqs}, or a lower max_num_seqs.",
            param="max_num_batched_tokens",
        )
    return Sizes(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=most,
        max_model_len=limit,
        page_size=page_size,
        windows=windows,
        bytes_per_page=tuple(per_page),
    )


def page_needs(sizes: Sizes) -> tuple[list[int], int, int]:
    """Pages per group for one whole context (of a window group: what its window keeps of it), the bytes that an engine
    needs at least to run one, and the bytes that each further context takes."""
    whole = -(-sizes.max_model_len // sizes.page_size) + 1
    kept = [-(-(w + sizes.max_num_batched_tokens) // sizes.page_size) + 2 if w else whole for w in sizes.windows]
    one = [min(k, whole) for k in kept]
    further = sum(n * b for n, b in zip(one, sizes.bytes_per_page, strict=True))
    return one, further + sum(sizes.bytes_per_page), further  # page 0 is nobody's


def divide(sizes: Sizes, num_bytes: int) -> list[int]:
    """Pages per group that `num_bytes` buy: one whole context, and of the rest equal shares of what max_num_seqs of
    them need. Raises InsufficientMemoryError for less."""
    one, needed, rest = page_needs(sizes)
    if num_bytes < needed:
        per_token = sum(sizes.bytes_per_page) / sizes.page_size
        raise InsufficientMemoryError(
            f"One context of {sizes.max_model_len} tokens needs {needed / 1e6:.1f} MB of keys and values "
            f"({per_token / 1e3:.1f} kB per token); {max(0, num_bytes) / 1e6:.1f} MB are left.",
            hint="Lower max_model_len, use kv_cache_dtype='int8', raise kv_cache_memory if set, or free memory.",
        )
    rest *= sizes.max_num_seqs - 1
    share = min(num_bytes - needed, rest)
    return [n + 1 + n * (sizes.max_num_seqs - 1) * share // max(1, rest) for n in one]


class Rank:
    """Measure with `room`, `start` with a number of pages, then run passes."""

    runner: Runner

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model, self.config = model, config
        module = model.module
        self.sizes = resolve(module.config, config, module.device, module.dtype)
        if config.batch_invariant:
            _make_invariant(model)

    def room(self) -> int:
        """Bytes that pages may take: what is asked for, or what a full pass and the graphs were seen to leave."""
        self.__dict__.pop("runner", None)  # of an engine that broke
        if self.config.kv_cache_memory is not None:
            return self.config.kv_cache_memory
        device = self.model.module.device
        if device.type != "cuda":
            return free_memory(device) // (2 * self.config.tensor_parallel_size)
        return self._measure(device)

    def _measure(self, device: torch.device) -> int:
        from llmasos.inference.kernels.compile import compiling

        sizes = self.sizes
        num_pages = -(-sizes.max_num_batched_tokens // sizes.page_size) + sizes.max_num_seqs + 1
        runner = self._runner([num_pages] * len(sizes.windows))
        rows = [SamplingRow(SamplingParams(top_p=0.9, repetition_penalty=1.1, seed=0), (1,))] * sizes.max_num_seqs
        batch = make_batch(rows, [0] * sizes.max_num_seqs)
        with compiling() as can, runner.one_layer_of_each_kind():
            if can:
                _try_shapes(runner, sizes, batch)
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        runner.forward(_full_pass(sizes))
        runner.sample(batch, np.arange(sizes.max_num_seqs)).wait()
        activations = torch.cuda.max_memory_allocated(device) - held
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        runner.capture(sizes.max_num_seqs)
        graphs = max(0, torch.cuda.memory_reserved(device) - before) + runner.num_bytes_of_smaller_graphs
        del runner
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1 - self.config.gpu_memory_utilization) - activations - graphs)

    def _runner(self, num_pages: list[int]) -> Runner:
        module, config = self.model.module, self.config
        pages = Pages(
            module.config,
            num_pages,
            self.sizes.page_size,
            device=module.device,
            dtype=module.dtype,
            kv_dtype=config.kv_cache_dtype,
            batch_invariant=config.batch_invariant,
        )
        return Runner(
            module,
            pages,
            max_num_seqs=self.sizes.max_num_seqs,
            max_model_len=self.sizes.max_model_len,
            graphs=not (config.enforce_eager or config.batch_invariant),
            batch_invariant=config.batch_invariant,
        )

    def start(self, num_pages: list[int]) -> None:
        """Take the memory of the pages; capture the graph of a single request."""
        self.runner = self._runner(num_pages)
        self.runner.capture(1)

    def forward(self, step: Step) -> list[ScoredLogprobs]:
        return self.runner.forward(step)

    def sample(self, batch: SamplingBatch, pool_rows: Ints) -> Landing:
        return self.runner.sample(batch, pool_rows)

    def apply(self, work: Callable[[LoadedModel], T]) -> T:
        """A pass of another kind."""
        return work(self.model)

    def close(self) -> None:
        """Let go of pages and graphs: a group can't be left while a graph holds its sums."""
        if hasattr(self, "runner"):
            self.runner.release_pages()
            gc.collect()

    def sleep(self) -> int:
        """Give back the memory of weights, pages and graphs; the weights stay on the CPU. Returns the bytes."""
        freed = self.runner.release_pages()
        freed += sleep(self.model.module)
        if self.model.module.device.type == "cuda":
            torch.cuda.empty_cache()
        return freed

    def wake(self) -> None:
        """Bring the weights back; the pages begin empty."""
        wake(self.model.module)
        self.runner.renew_pages()
        self.runner.capture(1)


def _make_invariant(model: LoadedModel) -> None:
    if model.module.device.type == "cpu":
        from llmasos.inference.invariant import make_invariant

        make_invariant(model.module)
        return
    from llmasos.inference.fused import FusedDecoder

    if not FusedDecoder.supports(model.module.config):
        raise UnsupportedError(
            f"batch_invariant needs kernels that {model.config.architecture} has none of on a GPU.",
            hint='Use device="cpu", or leave it out.',
            param="batch_invariant",
        )


def _try_shapes(runner: Runner, sizes: Sizes, batch: SamplingBatch) -> None:
    """Launch the passes whose kernels differ: prompts, decodes of few sequences and of many, with a shared prefix."""
    runner.eager(_full_pass(sizes))
    runner.sample(batch, np.arange(sizes.max_num_seqs))
    for num_tokens in (16, 128):
        runner.eager(_prompts([num_tokens], sizes))
    for size in sorted({min(n, sizes.max_num_seqs) for n in (1, 2, 16, sizes.max_num_seqs)}):
        runner.eager(_decodes(sizes, size))
        rows = [SamplingRow(SamplingParams(temperature=float(size > 1)), ())] * size
        runner.sample(make_batch(rows, [0] * size), np.arange(size))
    step = _decodes(sizes, sizes.max_num_seqs)
    step.prefixes = [SharedPrefix(0, sizes.max_num_seqs, 0)]
    runner.eager(step)


def _decodes(sizes: Sizes, size: int) -> Step:
    every = np.arange(size, dtype=np.int32)
    columns = table_columns(1, sizes.page_size, sizes.max_model_len)
    return Step(
        tokens=np.zeros(size, np.int64),
        positions=np.zeros(size, np.int64),
        sequences=every,
        query_start=np.arange(size + 1, dtype=np.int32),
        seq_lens=np.ones(size, np.int32),
        tables=[np.ones((size, columns), np.int32)] * len(sizes.windows),
        max_query=1,
        max_seq_len=min(columns * sizes.page_size, sizes.max_model_len),
        rows=every,
    )


def _full_pass(sizes: Sizes) -> Step:
    """As many tokens as a pass may have, and as many logits as it may want."""
    longest = min(sizes.max_model_len, sizes.max_num_batched_tokens)
    step = _prompts([longest] * (sizes.max_num_batched_tokens // longest), sizes)
    step.rows = np.arange(sizes.max_num_seqs, dtype=np.int64) % len(step.tokens)
    return step


def _prompts(lengths: list[int], sizes: Sizes) -> Step:
    longest, num_tokens = max(lengths), sum(lengths)
    columns = -(-longest // sizes.page_size)
    every = np.arange(1, 1 + columns * len(lengths), dtype=np.int32).reshape(len(lengths), columns)
    ends = np.cumsum(lengths)
    return Step(
        tokens=np.zeros(num_tokens, np.int64),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        sequences=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        query_start=np.array([0, *ends], np.int32),
        seq_lens=np.array(lengths, np.int32),
        tables=[every] * len(sizes.windows),
        max_query=longest,
        max_seq_len=longest,
        rows=ends - 1,
    )
