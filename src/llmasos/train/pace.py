"""How fast a run would go: a few blocks and what is around them are trained for a moment, as the run would train them.

A pass through the blocks gives what a block takes; what is not inside of blocks is measured with them. GPUs take the
run's own micro-batch, compiled if the run is. CPUs, on which that could take a minute, take fewer tokens and, where
weights are large, fewer words, and the loss is scaled.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.train.memory import Load, Setup, build, distance, of_depth, period
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import Optimizers

DEPTH, MOST_KINDS = 2, 8
PASSES, ENOUGH = 3, 3.0
"""The fastest of so many passes counts; after so many seconds there is none more."""
LITTLE, LONG = 64, 20.0
"""Tokens of a first pass on a CPU. It is the only one where a whole one would take more seconds than these, as in
bfloat16 without units for it."""
BLOCKS = "layers."
"""Names in a decoder that are blocks'."""
WORDS, VALUES = 8192, 2**25
"""On a CPU the loss is over so many words at least, or as many as make a head of so many weights."""


@dataclass(frozen=True)
class Pace:
    token: float
    """Seconds that a token of a micro-batch takes, both ways."""
    step: float
    """Seconds of the optimizer, each step."""
    basis: str


def measured(
    shape: ModelConfig,
    setup: Setup,
    load: Load,
    device: torch.device,
    *,
    parts: int = 1,
) -> Pace:
    """Of a micro-batch of `load`. parts: tensor parallelism divides blocks into so many. What processes send each other
    is not in it, and not what a student writes itself."""
    on_gpu = device.type != "cpu"
    few = few_blocks(shape, device)
    with torch.random.fork_rng([device] if on_gpu else [], device_type=device.type if on_gpu else "cuda"):
        try:
            found, load = _timed(few, setup, load, device)
            gc.collect()  # what was compiled or computed again is in rings
            of_teacher = 0.0 if setup.taught is None else _asked(setup.taught.teacher, setup, load, device)
        finally:
            gc.collect()
            if on_gpu:
                torch.accelerator.empty_cache()
    words = shape.vocab_size / few.vocab_size
    block, rest = found.blocks / few.num_layers, max(0.0, found.whole - found.blocks)
    step, ends = found.inside / few.num_layers, max(0.0, found.step - found.inside)
    return Pace(
        (shape.num_layers * block / parts + words * rest) / load.num_tokens + of_teacher,
        shape.num_layers * step / parts + words * ends,
        "a few blocks, measured now",
    )


def few_blocks(shape: ModelConfig, device: torch.device) -> ModelConfig:
    """The model that is timed: DEPTH blocks, or as many as there are kinds of them."""
    kinds = period(shape)
    depth = min(kinds if DEPTH < kinds <= MOST_KINDS else DEPTH, shape.num_layers)
    return replace(of_depth(shape, depth), vocab_size=_words(shape, device))


def _timed(few: ModelConfig, setup: Setup, load: Load, device: torch.device) -> tuple[_Parts, Load]:
    """What a micro-batch takes, and how large it was."""
    probe = _Probe(few, setup, load, device)
    if device.type != "cpu" or setup.compiled:
        probe.passed(load)  # compiles
        return _least(probe, load), load
    little = _little(load)
    found = probe.passed(little)
    if (found.blocks + found.whole) * load.num_tokens / little.num_tokens > LONG:
        return found, little
    return _least(probe, load), load


def _least(probe: _Probe, load: Load) -> _Parts:
    begun = time.perf_counter()
    found = probe.passed(load)
    for _ in range(PASSES - 1):
        if time.perf_counter() - begun > ENOUGH:
            break
        found = found.least(probe.passed(load))
    return found


def _little(load: Load) -> Load:
    num = min(LITTLE, load.num_tokens)
    return Load((num,), max(1, round(num * load.num_trained / load.num_tokens)))


def _words(shape: ModelConfig, device: torch.device) -> int:
    return min(shape.vocab_size, max(WORDS, VALUES // shape.hidden_size)) if device.type == "cpu" else shape.vocab_size


@dataclass(frozen=True)
class _Parts:
    """Seconds: of blocks both ways, of a whole pass both ways, of the optimizer for blocks, and for all weights."""

    blocks: float
    whole: float
    inside: float
    step: float

    def least(self, other: _Parts) -> _Parts:
        return _Parts(
            min(self.blocks, other.blocks),
            min(self.whole, other.whole),
            min(self.inside, other.inside),
            min(self.step, other.step),
        )


class _Probe:
    def __init__(self, shape: ModelConfig, setup: Setup, load: Load, device: torch.device) -> None:
        with device:
            self.module = build(shape, setup).module
        _fill(self.module)
        self.trainee = Trainee(self.module, dtype=setup.dtype, recompute=setup.recompute, compiled=setup.compiled)
        self.optimizers = Optimizers(self.module, setup.optimizer)
        self.shape, self.device = shape, device
        self.taught, self.theirs = setup.taught, None
        if self.taught is not None:
            words = min(shape.vocab_size, self.taught.teacher.vocab_size)
            with device:
                self.theirs = self.taught.scores(load.num_trained, words, setup.dtype)
            self.theirs.hidden.normal_(), self.theirs.weight.normal_(0.0, 0.02)
        self.blocks = [p for p in self.module.layers.parameters() if p.requires_grad]

    def passed(self, load: Load) -> _Parts:
        batch, now = _batch(load, self.shape.vocab_size, self.device), _clock(self.device)
        around = {name: cast for name, cast in self.trainee.casts().items() if not name.startswith(BLOCKS)}
        times = [now()]
        hidden = self.trainee.hidden(batch, around | self.trainee.casts(BLOCKS))
        torch.autograd.backward(hidden, torch.ones_like(hidden), inputs=self.blocks)
        del hidden, around
        times.append(now())
        self.optimizers.step(1.0)
        times.append(now())
        (self._loss(batch) / len(batch)).backward()
        times.append(now())
        self.optimizers.step(1.0)
        times.append(now())
        blocks, inside, whole, step = (after - before for before, after in itertools.pairwise(times))
        return _Parts(blocks, whole, inside, step)

    def _loss(self, batch: Placed) -> Tensor:
        trainee = self.trainee
        if self.taught is None or self.theirs is None:
            return trainee.loss(batch)
        casts = trainee.casts()
        hidden = trainee.hidden(batch, casts)[batch.rows]
        theirs = replace(self.theirs, hidden=self.theirs.hidden[: len(batch)])
        return distance(trainee, hidden, casts, theirs, batch.labels, self.taught.how)


def _asked(teacher: ModelConfig, setup: Setup, load: Load, device: torch.device) -> float:
    """Seconds a token of the pass through a teacher's blocks, which are as they are stored; its scores are part of the
    loss."""
    few = few_blocks(teacher, device)
    with device:
        module = Decoder(few).to(setup.dtype).requires_grad_(requires_grad=False)
    _fill(module)
    trainee = Trainee(module, dtype=setup.dtype, compiled=setup.compiled)

    def passed(load: Load) -> float:
        """Seconds a token."""
        batch, now = _batch(load, few.vocab_size, device), _clock(device)
        started = now()
        trainee.hidden(batch)
        return teacher.num_layers * (now() - started) / few.num_layers / load.num_tokens

    with torch.no_grad():
        is_cautious = device.type == "cpu" and not setup.compiled
        found = passed(_little(load) if is_cautious else load)
        if is_cautious and found * load.num_tokens * few.num_layers / teacher.num_layers > LONG:
            return found
        found, begun = math.inf, time.perf_counter()
        for _ in range(PASSES):
            found = min(found, passed(load))
            if time.perf_counter() - begun > ENOUGH:
                break
    return found


def _fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(0.0, 0.02)


def _batch(load: Load, vocab_size: int, device: torch.device) -> Placed:
    positions = torch.cat([torch.arange(length, device=device) for length in load.lengths])
    tokens = torch.randint(vocab_size, (load.num_tokens,), device=device)
    rows = torch.arange(load.num_trained, device=device)
    return Placed(tokens, positions, rows, tokens[rows], list(load.lengths))


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type != "cpu":  # its kernels are only asked for
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now
