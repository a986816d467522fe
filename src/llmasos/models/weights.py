"""Weights on their device: brought there, made up, put to sleep and woken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from llmasos.devices import Placement
from llmasos.models.config import ModelConfig
from llmasos.models.layers import Norm
from llmasos.models.parallel import Shard

PIECE = 16 << 20
"""Bytes that a thread stages at a time on their way to a GPU."""


def fill_with_noise(
    config: ModelConfig,
    whole: nn.Module,
    module: nn.Module,
    shard: Shard | None,
    placement: Placement,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Fill `module`, or a share of `whole`, as before training, on the device itself: matrices and biases are drawn,
    norms multiply by one. A share is cut out of the whole weight, so that any number of processes is one model. `check`
    is called before every weight, and may raise."""
    generator = torch.Generator(placement.device).manual_seed(0)
    std = float(config.extra.get("initializer_range") or 0.02)
    owners = dict(module.named_modules())
    for name, child in list(whole.named_modules()):
        for leaf, parameter in child._parameters.items():
            if parameter is None or is_tied(config, f"{name}.{leaf}"):
                continue
            check()
            tensor = torch.empty(parameter.shape, device=placement.device, dtype=placement.dtype)
            if isinstance(child, Norm):
                tensor.fill_(float(leaf == "weight" and not child.unit_offset))
            else:
                tensor.normal_(0.0, std, generator=generator)
            part = own_part(f"{name}.{leaf}", tensor, shard)
            owners[name]._parameters[leaf] = None if part is None else nn.Parameter(part, requires_grad=False)
    tie(config, module, shard)


def own_part(parameter: str, whole: Tensor, shard: Shard | None) -> Tensor | None:
    """What this process keeps of a whole weight, in memory of its own; None: nothing. Without a shard the whole itself,
    a view of a mapped file where it is one."""
    part = whole if shard is None else shard.take(parameter, whole)
    if part is None or part is whole:
        return part
    return part.clone(memory_format=torch.contiguous_format)


def is_tied(config: ModelConfig, parameter: str) -> bool:
    """The parameter has no weights of its own."""
    return parameter == "head.weight" and config.tie_embeddings


def tie(config: ModelConfig, module: nn.Module, shard: Shard | None) -> None:
    """Let the head read the embeddings, or this process's rows of them."""
    if not config.tie_embeddings or config.is_encoder or not isinstance(module.head, nn.Linear):
        return
    assert isinstance(module.embed, nn.Embedding)
    weight = module.embed.weight
    own = weight if shard is None else shard.take("head.weight", weight)
    assert own is not None
    module.head.weight = weight if own is weight else nn.Parameter(own, requires_grad=False)


class Upload:
    """Tensors of a mapped file to a GPU. Each thread copies through two pinned buffers of its own, so that the file is
    read while the piece before is on its way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.local()

    def begin(self) -> None:
        """What every thread does first."""
        torch.cuda.set_device(self.device)
        pair = [(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        self._own.buffers = cycle(pair)

    def __call__(self, tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source, flat = (t.view(-1).view(torch.uint8) for t in (tensor.contiguous(), target))
        for piece, goal in zip(source.split(PIECE), flat.split(PIECE), strict=True):
            buffer, free = next(self._own.buffers)
            free.synchronize()
            buffer[: len(piece)].copy_(piece)
            goal.copy_(buffer[: len(piece)], non_blocking=True)
            free.record()
        return target


@dataclass
class _Asleep:
    kept: dict[int, Tensor]
    """Memory of the weights by the address that it had, on the CPU."""
    layouts: dict[str, tuple[int, torch.Size, tuple[int, ...], int]]
    """Of each weight: address of its memory, shape, strides, offset."""


def sleep(module: nn.Module) -> int:
    """Free the device memory of a model that is not needed for a while, keeping the weights in the CPU's; returns the
    bytes that it took. Parameters stay the same objects, empty; CUDA graphs captured with them must be dropped. A
    module that sleeps already is left alone."""
    if is_asleep(module):
        return 0
    memory: dict[int, Tensor] = {}
    layouts = {}
    for name, tensor in _weights(module):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        layouts[name] = storage.data_ptr(), tensor.shape, tensor.stride(), int(tensor.storage_offset())
    num_bytes = sum(part.nbytes for part in memory.values())
    kept = {address: _to_cpu(part) for address, part in memory.items()}
    memory.clear()
    for _, tensor in _weights(module):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    module.__dict__["_asleep"] = _Asleep(kept, layouts)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return num_bytes


def wake(module: nn.Module) -> None:
    """Give a sleeping module its weights back. A module that is awake is left alone."""
    if not is_asleep(module):
        return
    asleep: _Asleep = module.__dict__["_asleep"]
    device = next(tensor.device for _, tensor in _weights(module))
    memory = {at: part.to(device, non_blocking=True).untyped_storage() for at, part in asleep.kept.items()}
    for name, tensor in _weights(module):
        address, shape, stride, offset = asleep.layouts[name]
        empty = torch.empty(0, dtype=tensor.dtype, device=device)
        tensor.data = empty.set_(memory[address], offset, shape, stride)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the pinned copies are given back
    del module.__dict__["_asleep"]


def is_asleep(module: nn.Module) -> bool:
    return "_asleep" in module.__dict__


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _to_cpu(part: Tensor) -> Tensor:
    if part.device.type != "cuda":
        return part.cpu()
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
