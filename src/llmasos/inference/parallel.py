"""A tensor-parallel engine: one `Rank` per process, all doing the same passes; rank 0 also schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmasos.inference.config import EngineConfig
from llmasos.inference.rank import Rank
from llmasos.inference.workers import Workers
from llmasos.models.load import LoadedModel, gguf_in, load_model, read_config
from llmasos.models.parallel import shard_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmasos.inference.beam import BeamSearch
    from llmasos.inference.runner import Ints, Landing, Runner, ScoredLogprobs, Step
    from llmasos.inference.sampler import SamplingBatch
    from llmasos.inference.state import Beam
    from llmasos.models.parallel import Group

T = TypeVar("T")


@dataclass(frozen=True)
class RankFactory:
    """Loads a rank's share of a model; travels to the processes."""

    path: Path
    config: EngineConfig
    dtype: str = "auto"
    quantization: str = "auto"
    load_format: str = "auto"

    def __call__(self, group: Group) -> Rank:
        model = load_model(
            self.path, dtype=self.dtype, quantization=self.quantization, load_format=self.load_format, group=group
        )
        return Rank(model, self.config)


def start_workers(factory: RankFactory, device: torch.device) -> tuple[Workers, LoadedModel]:
    """The processes, and rank 0's share of the model. Raises InvalidInputError or UnsupportedError, before a process is
    started, for a model that can't be shared out; and what Workers raises."""
    shard_config(read_config(gguf_in(factory.path)), factory.config.tensor_parallel_size)
    workers = Workers(factory.config.tensor_parallel_size, factory, device.type)
    return workers, workers.local.model


class ParallelRanks:
    """All ranks as if they were one `Rank`."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.local: Rank = workers.local
        self.sizes = self.local.sizes

    def room(self) -> int:
        """Bytes that the pages of every rank may take."""
        return min(self.workers.call("room"))

    def start(self, num_pages: list[int]) -> None:
        self.workers.call("start", num_pages)

    @property
    def runner(self) -> ParallelRunner:
        return ParallelRunner(self.workers, self.local.runner)

    def apply(self, work: Callable[[LoadedModel], T]) -> T:
        """A pass of another kind, in all processes."""
        self.workers.broadcast("apply", work)
        with self.workers.in_step():
            return self.local.apply(work)

    def sleep(self) -> int:
        return sum(self.workers.call("sleep"))

    def wake(self) -> None:
        self.workers.call("wake")


class ParallelRunner:
    """A runner whose passes run in all processes. Each chooses the same tokens from the same logits, so none has to be
    told what another chose."""

    def __init__(self, workers: Workers, local: Runner) -> None:
        self._workers, self._local = workers, local
        self.pages, self.decoder, self.device = local.pages, local.decoder, local.device
        self.vocab_size, self.lora = local.vocab_size, None
        self.check = local.check = workers.check

    def forward(self, step: Step) -> list[ScoredLogprobs]:
        self._workers.broadcast("forward", step)
        with self._workers.in_step():
            return self._local.forward(step)

    def sample(self, batch: SamplingBatch, pool_rows: Ints) -> Landing:
        self._workers.broadcast("sample", batch, pool_rows)
        with self._workers.in_step():
            return self._local.sample(batch, pool_rows)

    def beam_candidates(self, rows: list[int], searches: list[tuple[BeamSearch, Beam]]) -> list[tuple[Tensor, Tensor]]:
        return self._local.beam_candidates(rows, searches)
