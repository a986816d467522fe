"""What a step of training holds in memory, found without a byte of it: the real model, loss and optimizer run on
tensors that have shapes and no content, while the birth and death of every tensor is counted.

T = packed tokens, N = trained ones, V = vocabulary. What a step holds grows in a straight line with layers, so two
small depths tell of any.

GPUs differ from that in three places, which have stand-ins here: attention and the loss are kernels of their own, and a
compiled block keeps what the compiler's partitioner chooses (see `compiled`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmasos.models.attention import Attend, AttentionSpec, Varlen, layer_specs
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.layers import LENGTH_DEPENDENT, Rope
from llmasos.models.load import LoadedModel, made_anew
from llmasos.train.attention import packed_attention
from llmasos.train.compiled import Kept, StandIn, flash, kept
from llmasos.train.divergence import Divergence, Scores, linear_divergence
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.losses import COLUMNS, PIECE, linear_cross_entropy
from llmasos.train.lowbit import FrozenLinear, Kind
from llmasos.train.model import Trainee
from llmasos.train.optim import OptimizerOptions, Optimizers
from llmasos.train.resident import forget_most, most_resident, resident

LARGE = 2**25
"""Bytes from which on glibc gives a tensor memory of its own, and back to the system when it is freed."""
HEAP = {(2, False): 1.35, (2, True): 1.35, (4, False): 1.5, (4, True): 4.0}
"""Memory that a heap takes for activations, by bytes of a value and whether blocks are computed again: those come and
go once more between what they keep, and in bfloat16 lengths differ less (see `losses.ROWS`). Measured on SmolLM2-135M
(bench/plan_check.py); a model of six wide layers (hidden size 1,024) takes up to 9 % less than planned."""
KERNEL = 2**19
"""That oneDNN compiles for a shape of a product in bfloat16, and keeps."""
NUM_LENGTHS = 3
"""Of micro-batches, of which none is quite full, in whole rows (see `losses.ROWS`)."""
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


@dataclass(frozen=True)
class Taught:
    """By a teacher of this shape, from which the student's distance is the loss."""

    teacher: ModelConfig
    how: Divergence

    def scores(self, num: int, vocab_size: int, dtype: torch.dtype) -> Scores:
        """The teacher's, of `num` rows over some of its words; numbers that nobody set."""
        width = self.teacher.embedding_size or self.teacher.hidden_size
        hidden, weight = (torch.empty(rows, width, dtype=dtype) for rows in (num, vocab_size))
        return Scores(hidden, weight, None, self.teacher.logit_scale, self.teacher.final_softcap)


@dataclass(frozen=True)
class Setup:
    """What of a run its memory depends on, beside the model and the batch. dtype: of the computation and of frozen
    weights. lora: None trains all weights. quantization: of the blocks' frozen weights. accumulates: a step has more
    than one micro-batch. on_gpu, compiled: see the module."""

    dtype: torch.dtype
    optimizer: OptimizerOptions
    lora: LoraOptions | None = None
    quantization: Kind | None = None
    recompute: bool = False
    accumulates: bool = False
    on_gpu: bool = False
    compiled: bool = False
    taught: Taught | None = None


@dataclass(frozen=True)
class Load:
    """A micro-batch: the lengths of its sequences, and how many of their tokens are trained."""

    lengths: tuple[int, ...]
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Footprint:
    """Bytes. forward, loss, backward and step are peaks of their phases, with everything that is held then."""

    weights: int = 0
    """Trained ones in float32, frozen ones as they are stored, tables of positions."""
    casts: int = 0
    """The trained weights once more in the dtype of the computation, during a pass."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Held from the forward pass for the backward pass, casts not counted."""
    forward: int = 0
    loss: int = 0
    backward: int = 0
    step: int = 0
    small: int = 0
    """The most that tensors below LARGE had, weights and states of the optimizer not counted; `large`: the others."""
    large: int = 0
    scattered: int = 0
    """Of `small`, what comes and goes in the order of layers, and not as casts and gradients do all at once; `again`:
    when blocks are computed again."""
    again: int = 0
    kernels: int = 0
    """Of the products' shapes, where each has a kernel compiled for it."""

    @property
    def peak(self) -> int:
        return max(self.forward, self.loss, self.backward, self.step)

    def resident(self, setup: Setup) -> int:
        """What a CPU's process grows by: its heap keeps what it once took, in pieces that do not all fit what comes
        next."""
        lost = round(
            (HEAP[setup.dtype.itemsize, setup.recompute] - 1) * min(self.small, max(self.scattered, self.again))
        )
        return self.weights + self.optimizer + self.small + self.large + lost + self.kernels

    def at(self, layers: int, other: Footprint, others: int, wanted: int) -> Footprint:
        """On the straight line through this one, of `layers`, and another one of `others` layers."""
        values = {}
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = round(here + (there - here) * (wanted - layers) / (others - layers))
        return Footprint(**values)


@lru_cache(maxsize=64)
def footprint(shape: ModelConfig, setup: Setup, load: Load) -> Footprint:
    """What a step takes. Raises UnsupportedError and InvalidInputError for adapters that the model can't have."""
    each = period(shape)
    # blocks that are computed again take more than they leave: a line through one or two of them would be another's
    less = 3 * each if setup.recompute else each
    if shape.num_layers <= less + each:
        return _run(shape, setup, load)
    first, second = (_run(of_depth(shape, depth), setup, load) for depth in (less, less + each))
    return first.at(less, second, less + each, shape.num_layers)


def period(shape: ModelConfig) -> int:
    """Layers after which their kinds repeat."""
    kinds = [(shape.is_sliding(i), i in shape.nope_layers) for i in range(shape.num_layers)]
    for each in range(1, shape.num_layers):
        if all(kinds[i] == kinds[i % each] for i in range(shape.num_layers)):
            return each
    return shape.num_layers


def of_depth(shape: ModelConfig, depth: int) -> ModelConfig:
    nope = tuple(i for i in shape.nope_layers if i < depth)
    return replace(shape, num_layers=depth, layer_types=shape.layer_types[:depth], nope_layers=nope)


def of_layer(shape: ModelConfig, layer: int) -> ModelConfig:
    """A model of this layer alone."""
    nope = (0,) if layer in shape.nope_layers else ()
    return replace(shape, num_layers=1, layer_types=shape.layer_types[layer : layer + 1], nope_layers=nope)


@lru_cache(maxsize=64)
def _kept(shape: ModelConfig, setup: Setup, load: Load) -> Kept:
    """What the block of a model of one layer keeps, compiled."""
    with FakeTensorMode():
        module = build(shape, setup).module
        _without_values(module)
        rope = module.ropes[shape.is_sliding(0)] if shape.position == "rope" else None
        attend = _attention(layer_specs(shape), setup, load)
        return kept(module.layers[0], setup.dtype, load.num_tokens, rope, attend)


class Count(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on, and the most there were at once; the small ones, which a C
    library keeps in its heap, also apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self.small = self.most_small = 0
        self.most_large = 0
        self.products: set[tuple[tuple[int, ...], ...]] = set()
        """Shapes of what was multiplied in bfloat16."""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS and out.dtype == torch.bfloat16:
            self.products.add(tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
        for found in tree_iter(out):
            if isinstance(found, Tensor):
                self.see(found)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor from now on; each memory counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        small = size if size < LARGE else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size
            self.small -= small

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.small += small
        self.most = max(self.most, self.live)
        self.most_small = max(self.most_small, self.small)
        self.most_large = max(self.most_large, self.live - self.small)

    @contextmanager
    def phase(self, into: dict[str, int], name: str) -> Iterator[None]:
        self.most = self.live
        yield
        into[name] = max(into.get(name, 0), self.most)


def _run(shape: ModelConfig, setup: Setup, load: Load) -> Footprint:
    found: dict[str, int] = {}
    layers = range(shape.num_layers) if setup.compiled else ()
    found_kept = [_kept(of_layer(shape, layer), setup, load) for layer in layers]
    with FakeTensorMode(), Count() as count:
        model = build(shape, setup)
        _without_values(model.module)
        trainee = Trainee(model.module, dtype=setup.dtype, recompute=setup.recompute and not setup.compiled)
        for block, own in zip(model.module.layers, found_kept, strict=False):
            block.forward = StandIn(block, own, setup.recompute)
        found["weights"] = count.live
        optimizers = Optimizers(model.module, setup.optimizer)
        for parameter in optimizers.parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizers.step(1.0)  # states are made by the first step
        found["optimizer"] = count.live - found["weights"]
        found["gradients"] = sum(p.nbytes for p in optimizers.parameters)
        taught = None if setup.on_gpu else setup.taught  # there both models' logits have the room of one's
        theirs = None if taught is None else taught.scores(load.num_trained, taught.teacher.vocab_size, setup.dtype)
        held, held_small = count.live, count.small
        count.most_small, count.most_large = held_small, held - held_small
        count.products.clear()
        for _ in range(2 if setup.accumulates else 1):
            _pass(trainee, setup, load, count, found, theirs)
        found["kernels"] = 0 if setup.on_gpu else KERNEL * NUM_LENGTHS * len(count.products)
        with count.phase(found, "step"):
            optimizers.step(1.0)
    found["small"] = count.most_small - held_small
    found["large"] = count.most_large - (held - held_small)
    return Footprint(**found)


def build(shape: ModelConfig, setup: Setup) -> LoadedModel:
    """The model that such a run trains, with weights that nobody set."""
    module = Decoder(shape).requires_grad_(setup.lora is None).train()
    model = LoadedModel(module, shape, None, Path())
    if setup.lora is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(setup.dtype)
        if setup.quantization is not None:
            made_anew(module, partial(FrozenLinear, kind=setup.quantization))
        add_lora(model, setup.lora)
    return model


def _pass(
    trainee: Trainee, setup: Setup, load: Load, count: Count, found: dict[str, int], theirs: Scores | None
) -> None:
    """A micro-batch, both ways."""
    before, small = count.live, count.small
    most_small, count.most_small = count.most_small, small
    with count.phase(found, "forward"):
        tokens, positions = (torch.zeros(load.num_tokens, dtype=torch.int64) for _ in range(2))
        rows = torch.zeros(load.num_trained, dtype=torch.int64)
        casts = trainee.casts()
        found["casts"] = sum(t.nbytes for t in casts.values())
        hidden = trainee.forward(tokens, positions, _attention(trainee.specs, setup, load), casts)
    found["activations"] = count.live - before - found["casts"]
    small_casts = sum(t.nbytes for t in casts.values() if t.nbytes < LARGE)
    found["scattered"] = max(0, count.most_small - small - small_casts)
    with count.phase(found, "loss"):
        labels = torch.zeros_like(rows)
        if setup.taught is None or theirs is None:
            way = _loss if setup.on_gpu else linear_cross_entropy
            loss = way(*trainee.scored(hidden[rows], casts), labels=labels, **trainee.head(casts))
        else:
            loss = distance(trainee, hidden[rows], casts, theirs, labels, setup.taught.how)
        del casts, hidden
    with count.phase(found, "backward"):
        loss.backward()
    if setup.recompute:
        small_gradients = sum(p.nbytes for p in trainee.decoder.parameters() if p.requires_grad and p.nbytes < LARGE)
        found["again"] = max(0, count.most_small - small - small_casts - small_gradients)
    count.most_small = max(count.most_small, most_small)


def distance(
    trainee: Trainee, hidden: Tensor, casts: Mapping[str, Tensor], theirs: Scores, labels: Tensor, how: Divergence
) -> Tensor:
    """A student's loss, from the hidden states [N, D] of trained rows."""
    ours = Scores(*trainee.scored(hidden, casts), **trainee.head(casts))
    return linear_divergence(ours, theirs, labels, how).loss


def _without_values(module: Decoder) -> None:
    module.ropes = {sliding: _Rope(rope) for sliding, rope in module.ropes.items()}


class _Rope(Rope):
    """Tables of any positions, whose values nobody looks at."""

    def __init__(self, rope: Rope) -> None:
        self.__dict__.update(rope.__dict__)

    def prepare(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        if self._kind not in LENGTH_DEPENDENT:
            self._tables[device, dtype] = self._empty(length, dtype)

    def tables(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._empty(len(positions), dtype)

    def _partners(self, device: torch.device) -> Tensor:
        # a tensor of one trace means nothing to the next: not kept
        return torch.arange(self.dim, device=device) ^ 1

    def _empty(self, num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.empty(num, 1, self.dim, dtype=dtype), torch.empty(num, 1, self.dim, dtype=dtype)


# --- stand-ins for what runs on GPUs


def _attention(specs: Sequence[AttentionSpec], setup: Setup, load: Load) -> Attend:
    has_kernel = setup.dtype in (torch.bfloat16, torch.float16) and all(spec.plain for spec in specs)
    if setup.on_gpu:
        return flash if has_kernel else Varlen(specs, load.lengths)
    return packed_attention(specs, load.lengths, torch.device("cpu"), setup.dtype)


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **bent: float) -> Tensor:
    out: Tensor = _Loss.apply(hidden, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Loss(torch.autograd.Function):
    """`losses.linear_cross_entropy` with the kernel that needs no room beside the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad
        filled = -len(weight) % COLUMNS
        head = F.pad(weight, (0, 0, 0, filled)) if filled else weight
        grads = (
            torch.empty_like(hidden) if of_hidden else None,
            torch.zeros_like(head) if of_weight else None,
            torch.zeros_like(bias) if of_bias and bias is not None else None,
        )
        _logits = torch.empty(min(len(hidden), max(1, PIECE // len(head))), len(head), dtype=hidden.dtype)
        of_head = grads[1]
        ctx.gradients = grads[0], None if of_head is None else of_head[: len(weight)], grads[2]
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


# --- what was really held


def forget_peak(device: torch.device) -> None:
    """What `Peak` measures begins anew: with what the process has now, and without what an earlier run left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_most()


class Peak:
    """The most memory that this process took on `device` since the object was made: on a CPU all that is resident, on a
    GPU what its tensors had. `before`: what it had when the object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        forget_peak(device)
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()

    @property
    def num_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else most_resident()
