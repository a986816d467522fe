"""Weights spread over ranks, from outside of the model's definition: FSDP2, HSDP, and tensor parallelism.

A `Spreader` gets a decoder's parts while it is loaded or made; optimizers come after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmasos.errors import InvalidInputError
from llmasos.models.decoder import Decoder
from llmasos.train.lora import TrainedLora
from llmasos.train.lowbit import FrozenLinear
from llmasos.train.parallel.ranks import Ranks
from llmasos.train.parallel.tensor import check_heads, cut_block, cut_of, uncut

if TYPE_CHECKING:
    from llmasos.train.model import Trainee

KEPT = 0.2
"""Of a GPU's memory: weights that take less stay whole between forward and backward pass, which saves sending them
once more."""


class Spreader:
    """Leaves of each part of a decoder what is this rank's, as soon as the part is there (`part`): so a process has in
    memory what is its own, and one block. dtype: of the computation.

    Raises InvalidInputError for ways to spread that do not go together."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype, optimizer: str = "adamw") -> None:
        self.ranks, self.dtype = ranks, dtype
        self.is_sharded = ranks.world_size > 1 and ranks.kind != "ddp"
        if ranks.tensor == 1:
            return
        if optimizer == "adamw8bit":
            raise InvalidInputError(
                f"adamw8bit keeps its states in blocks, and tensor_parallel_size={ranks.tensor} cuts through them.",
                hint='Use optimizer="adamw", or parallel="fsdp" without tensor_parallel_size.',
                param="optimizer",
            )
        if self.is_sharded:
            raise InvalidInputError(
                f"tensor_parallel_size={ranks.tensor} with parallel={ranks.kind}: the two are not used together.",
                hint='Use parallel="ddp" beside it, or parallel="fsdp" alone.',
                param="parallel",
            )

    def part(self, decoder: Decoder, name: str) -> None:
        """Of the block of this name; of all that is outside of blocks, if it is empty, when all blocks are done.

        Raises InvalidInputError, UnsupportedError for what cannot be cut."""
        module = decoder.get_submodule(name)
        if self.ranks.tensor > 1 and name:
            check_heads(decoder.config, self.ranks.tensor)
            cut_block(module, decoder.config, self.ranks)
        if self.is_sharded:
            self._shard(module, decoder)

    def whole(self, decoder: Decoder) -> None:
        """Of one that is there already."""
        for number in range(len(decoder.layers)):
            self.part(decoder, f"layers.{number}")
        self.part(decoder, "")

    def _shard(self, module: nn.Module, decoder: Decoder) -> None:
        """A block is gathered when it is needed, the next one while it computes; masters stay float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        ranks = self.ranks
        assert ranks.mesh is not None
        shards = ranks.size("shard")
        for layer in module.modules() if module is not decoder else ():
            if isinstance(layer, FrozenLinear):
                layer.as_parameters()
        fully_shard(
            module,
            mesh=ranks.mesh["replica", "shard"] if ranks.kind == "hsdp" else ranks.mesh["shard"],
            # beside adapters weights are in the dtype of the computation, and adapters are cast where they are used
            mp_policy=MixedPrecisionPolicy(
                param_dtype=None if _has_adapters(module) else self.dtype, reduce_dtype=torch.float32
            ),
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, shards)),
        )

    def prepare(self, trainee: Trainee) -> None:
        """For passes through what was spread."""
        if not self.is_sharded:
            return
        layers: Any = trainee.decoder.layers
        again = _must_reshard(trainee)
        for block in layers:
            if block._compiled_call_impl is not None:  # what gathers weights stays outside of the compiled part
                block._compiled_call_impl = None
                block.forward = torch.compile(block.forward)
            block.set_reshard_after_forward(again)
        whole: Any = trainee.decoder
        whole.set_reshard_after_forward(False, recurse=False)  # the head is used after the forward pass
        for before, after in itertools.pairwise(layers):
            before.set_modules_to_forward_prefetch([after])
        trainee.casts_itself = False


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(layer, TrainedLora) for layer in module.modules())


def shard_dim(shape: Sequence[int], shards: int) -> int:
    """Along which FSDP divides a parameter. Adapters' A is [parts, rank, inputs]: of few parts."""
    return 1 if len(shape) == 3 and shape[1] % shards == 0 else 0


def _must_reshard(trainee: Trainee) -> bool:
    device = trainee.decoder.device
    if device.type != "cuda":
        return True
    is_cast = not _has_adapters(trainee.decoder)
    size = sum(p.numel() * (trainee.dtype if is_cast else p.dtype).itemsize for p in trainee.decoder.parameters())
    return size > KEPT * torch.cuda.get_device_properties(device).total_memory


def at_rest(module: nn.Module) -> None:
    """No weight is gathered: after passes without a backward one."""
    from torch.distributed.fsdp import FSDPModule

    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def whole_tensor(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """Of a parameter, or of something of its shape (`like` is the parameter). All ranks call it."""
    found = _gathered(tensor, ranks) if hasattr(tensor, "to_local") else tensor
    return uncut(found, like, ranks) if ranks.tensor > 1 else found


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """What it has in one process."""
    shape, cut = list(parameter.shape), getattr(parameter, "cut", None)
    if cut is not None:
        shape[cut.dim] *= len(cut.of)
    return tuple(shape)


def joined_on_device(part: Tensor, like: Any, ranks: Ranks) -> Tensor:
    """The whole of which this rank has `part`, spread as the parameter `like` is, by way of the GPUs. All ranks call
    it."""
    if hasattr(like, "to_local"):
        from torch.distributed.tensor import DTensor

        spread_as = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        found: Tensor = DTensor.from_local(part, like.device_mesh, like.placements, **spread_as).full_tensor()
        return found
    return uncut(part, like, ranks) if ranks.tensor > 1 else part


def own_part(full: Tensor, like: Any, ranks: Ranks) -> Tensor:
    """What this rank has of it, spread as the parameter `like` is."""
    if hasattr(like, "to_local"):
        dim, (shards, own) = like.placements[-1].dim, shards_of(like)
        return full.narrow(dim, *shard_of(full.shape[dim], own, shards))
    cut = getattr(like, "cut", None)
    return full if cut is None else cut_of(full, cut, ranks)


def shards_of(parameter: Any) -> tuple[int, int]:
    """Into how many FSDP divides it, and which of them this rank has."""
    if not hasattr(parameter, "to_local"):
        return 1, 0
    mesh = parameter.device_mesh
    return mesh["shard"].size(), mesh.get_local_rank("shard")


def shard_of(length: int, number: int, shards: int) -> tuple[int, int]:
    """Where it begins and how long it is; the last shards have less, or nothing."""
    each = -(-length // shards)
    begin = min(number * each, length)
    return begin, min(each, length - begin)


def _gathered(tensor: Any, ranks: Ranks) -> Tensor:
    """Plain, blocking collectives on the CPU: weights need not fit twice into a GPU."""
    found: Tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    dim = tensor.placements[-1].dim
    part, size = tensor.to_local().detach().cpu(), ranks.size("shard")
    if ranks.data_rank < size:
        found.narrow(dim, *shard_of(tensor.shape[dim], ranks.data_rank, size)).copy_(part)
    dist.all_reduce(found, group=ranks.control)
    return found


def whole(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """All weights as one process has them, on the CPU of the first rank; empty elsewhere. All ranks call it."""
    at_rest(module)
    found = {}
    for name, parameter in module.named_parameters():
        full = whole_tensor(parameter.detach(), parameter, ranks)
        if ranks.is_first:
            found[name] = full.cpu()
    return found
