"""The processes of a run, each with a GPU of its own (or the CPU, for tests), and what they agree on.

Ranks are laid out as [replicas, shards, tensor]: `tensor` ranks beside each other hold parts of the same layers and
read the same batches; the others read batches of their own ("data ranks").

Counts and decisions go over gloo, on the CPU: nothing waits for a GPU, and a process that ended is noticed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.train.config import how_to_resume

Kind = Literal["ddp", "fsdp", "hsdp"]

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one that does something alone, as exporting a checkpoint."""
COLLECTIVE = timedelta(minutes=5)
"""How long a collective of the GPUs may take before the run is given up."""


class LostRankError(LLMasOSError):
    """Another process of the run ended, or does not answer."""


@dataclass
class Ranks:
    """A single process is `Ranks()`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    kind: Kind = "ddp"
    tensor: int = 1
    """Processes that hold parts of the same layers."""
    mesh: DeviceMesh | None = None
    """Of dimensions replica, shard, tensor."""
    control: Any = None
    saving: Any = None
    """Groups over gloo: of the thread that trains, and of the one that writes checkpoints."""

    @classmethod
    def of_group(cls, kind: str, tensor: int, device: str, *, local_rank: int, local_size: int) -> Ranks:
        """Of the default process group. Raises InvalidInputError for numbers that do not go together."""
        world = dist.get_world_size()
        if world % tensor:
            raise InvalidInputError(
                f"{world} processes cannot be split into groups of {tensor}.",
                hint="Make gpus a multiple of tensor_parallel_size.",
                param="tensor_parallel_size",
            )
        data = world // tensor
        own: Kind = "ddp" if kind == "auto" else kind  # type: ignore[assignment]
        shards = {"ddp": 1, "fsdp": data, "hsdp": max(1, local_size // tensor)}[own]
        if data % shards:
            raise InvalidInputError(
                f"hsdp shards over the {shards} GPUs of a host, and {data} are no multiple.", param="parallel"
            )
        mesh = init_device_mesh(device, (data // shards, shards, tensor), mesh_dim_names=("replica", "shard", "tensor"))
        groups = [dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2)]
        return cls(dist.get_rank(), world, local_rank, own, tensor, mesh, *groups)

    # --- who reads what

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def group(self, name: str) -> Any:
        """The processes beside this one in one dimension of the mesh."""
        assert self.mesh is not None
        return self.mesh.get_group(name)

    def size(self, name: str) -> int:
        return 1 if self.mesh is None else self.mesh[name].size()

    # --- agreement

    def total(self, values: Tensor) -> Tensor:
        """Added up over the data ranks; on the CPU, float64."""
        values = values.detach().cpu().double()
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
            values /= self.tensor
        return values

    def sums(self, *values: int) -> list[int]:
        """Added up over the data ranks."""
        return [round(v) for v in self.total(torch.tensor(values, dtype=torch.float64)).tolist()]

    def most(self, *values: float) -> list[float]:
        """The largest of all ranks."""
        if self.world_size == 1:
            return list(values)
        sent = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sent, dist.ReduceOp.MAX, group=self.control)
        found: list[float] = sent.tolist()
        return found

    def told(self, value: Any) -> Any:
        """What the first rank says."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, group=self.control)
            [value] = box
        return value

    def check(self, problem: Exception | None) -> None:
        """Raise on all ranks what one of them has found; `is_shared` tells that the first has it, too."""
        if self.world_size > 1:
            found: list[Any] = [None] * self.world_size
            dist.all_gather_object(found, problem, group=self.control)
            problem = next((p for p in found if p is not None), None)
        if problem is not None:
            problem.is_shared = True  # type: ignore[attr-defined]  # errors of any kind, told apart in `worker`
            raise problem

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first rank does it before the others."""
        if not self.is_first:
            self.most(0)
        yield
        if self.is_first:
            self.most(0)

    # --- numbers

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Of the whole gradient, wherever its parts are; a scalar on the device."""
        squares = {cut: torch.zeros((), device=_place(parameters)) for cut in (False, True)}
        for parameter in parameters:
            if parameter.grad is not None:
                part = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32).square()
                squares[is_cut(parameter)] += part
        both = torch.stack([squares[False], squares[True]])
        if self.size("shard") > 1:
            dist.all_reduce(both, group=self.group("shard"))
        if self.tensor > 1:
            own = both[1].clone()
            dist.all_reduce(own, group=self.group("tensor"))
            both[1] = own
        return both.sum().sqrt()


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def is_cut(parameter: Tensor) -> bool:
    """Whether ranks of the tensor dimension hold different parts of it."""
    return getattr(parameter, "cut", None) is not None


def _place(parameters: Sequence[Tensor]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")


@contextmanager
def explained(ranks: Ranks) -> Iterator[None]:
    """What collectives say when a process is gone, in words."""
    try:
        yield
    except (RuntimeError, dist.DistError) as e:
        words = str(e).lower()
        lost = isinstance(e, dist.DistError) or any(w in words for w in ("gloo", "connection", "nccl", "timed out"))
        if ranks.world_size == 1 or not lost:
            raise
        raise LostRankError(
            f"Process {ranks.rank} of {ranks.world_size} lost another one of the run: {_reason(e)}.",
            hint=f"What that one said is above it. {how_to_resume(None)}",
        ) from e


def _reason(e: BaseException) -> str:
    """The first sentence, without the place in torch's source."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(e)).splitlines()[0].split(". ")[0].removesuffix(".")
