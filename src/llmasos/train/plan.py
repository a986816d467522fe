"""A run's memory and time before its weights are loaded: what a step takes, the largest micro-batch that fits, whether
blocks must be computed again for the backward pass, and, where nothing fits, which change would.

T = packed tokens of a micro-batch. Memory comes from `memory.footprint`. GPUs that share the weights (FSDP) divide what
is kept of them, and hold two blocks whole while they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmasos.data import Stats
from llmasos.devices import free_memory
from llmasos.errors import InsufficientMemoryError
from llmasos.models.config import ModelConfig
from llmasos.train.answers import shadow_bytes
from llmasos.train.config import TrainConfig
from llmasos.train.divergence import Divergence
from llmasos.train.flops import num_weights
from llmasos.train.lora import LoraOptions
from llmasos.train.losses import PIECE, missing_rows
from llmasos.train.memory import Footprint, Load, Setup, Taught, footprint
from llmasos.train.optim import OptimizerOptions
from llmasos.train.pace import Pace, few_blocks, measured
from llmasos.train.parallel.shard import KEPT
from llmasos.train.resident import resident

USABLE = 0.95
"""Of the memory that is free: an allocator has holes."""
WORKSPACE = 64 * 2**20
"""Of a GPU's matrix kernels."""
MOST_SEQUENCES = 4
"""Sequences of a batch that is planned with: many short ones take what a few longer ones do."""
MOST_ON_CPU = 2048
"""Tokens of a micro-batch on a CPU, which more do not make faster."""
LEAST_LENGTH = 128
"""Tokens below which no shorter samples are proposed."""
PROBE_TOKENS = 512
"""Of a micro-batch that is timed on a CPU, or those of a usual sequence."""
AGAIN = 4 / 3
"""Time of a step whose blocks are computed again: one forward pass more, of three."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, of one device."""

    config: TrainConfig
    """With micro_batch_tokens, batch_tokens and recompute settled."""
    shape: ModelConfig
    device: torch.device
    dtype: torch.dtype
    world_size: int
    sharded: bool
    """Weights, gradients and states of the optimizer are divided over the devices."""
    accumulation: int
    """Micro-batches of a step, on each device."""
    parts: dict[str, int]
    """weights, gradients, optimizer, activations, loss, workspace: what there is at the peak. In distillation teacher,
    and writer: the student's copy that writes answers, with keys and values. On a CPU process: what this process had
    before, its code above all."""
    memory: int
    """The most there is at once, as `Peak` measures it: on a GPU what tensors take and the kernels' workspace, on a CPU
    the resident memory of the whole process."""
    available: int
    """What is free; on a CPU with what this process has already."""
    num_tokens: int
    """Of the run."""
    seconds: float | None
    """Of the run's steps, without evaluations; None where nobody could know."""
    basis: str
    """Of `seconds`."""

    @property
    def fits(self) -> bool:
        return self.memory <= self.available * USABLE

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None or not self.num_tokens else self.num_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "world_size": self.world_size,
            "sharded": self.sharded,
            "max_length": self.config.max_length,
            "micro_batch_tokens": self.config.micro_batch_tokens,
            "accumulation": self.accumulation,
            "recompute": self.config.recompute,
            "memory": self.memory,
            "available": self.available,
            "fits": self.fits,
            "parts": dict(self.parts),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "basis": self.basis,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Names (for messages `train.plan.NAME`) and values in words, for a table."""
        sizes = [(name, _size(value)) for name, value in self.parts.items() if value]
        rate, batch = self.tokens_per_second, self.config.micro_batch_tokens
        each = f"{batch:,} x {self.accumulation}" + (f" x {self.world_size}" if self.world_size > 1 else "")
        shown = [*sizes, ("memory", f"{_size(self.memory)} / {_size(self.available)}"), ("micro_batch", each)]
        shown.append(("recompute", "yes" if self.config.recompute else "no"))
        if self.seconds is not None and rate is not None:
            shown += [("time", _duration(self.seconds)), ("rate", f"{rate:,.0f} tok/s"), ("basis", self.basis)]
        return shown


def plan(
    config: TrainConfig,
    shape: ModelConfig,
    stats: Stats,
    *,
    device: torch.device,
    dtype: torch.dtype,
    world_size: int = 1,
    teacher: ModelConfig | None = None,
    available: int | None = None,
    timed: bool = True,
) -> Plan:
    """The plan of a settled `config` (tuning, optimizer, max_length and batch_tokens are said), on each of `world_size`
    devices. stats: of the data. teacher: a second model, that is only read. available: bytes of one device, default:
    what is free there (on a CPU with what this process has), or the config's max_memory. timed: measure the time, too.

    Raises InsufficientMemoryError, whose hint names every change that would fit."""
    case = _Case(config, shape, stats, _Machine(device, dtype, world_size, 0, 0, teacher))
    own, pace = 0, None
    if teacher is not None and config.distillation.on_policy:
        timed = False  # how long a student's own answers are, nobody knows
    if device.type == "cpu":
        if timed:
            pace = _pace_on_cpu(case, available)
        case.plan(case.micro_batches()[0])  # what the process has before the run is with the code that planning loads
        own = resident()
    if available is None:
        available = free_memory(device) + own
        if config.max_memory is not None:
            available = min(available, round(config.max_memory * GIB / USABLE))
    machine = replace(case.machine, available=available, own=own)
    found = _search(replace(case, machine=machine))
    if not found.fits:
        raise _too_little(found, config, stats, machine)
    if timed and device.type != "cpu":
        case = replace(case, config=found.config)
        assert found.config.micro_batch_tokens is not None
        with suppress(torch.OutOfMemoryError):  # somebody else took it meanwhile: the run may find it free again
            pace = _pace(case, found.config.micro_batch_tokens)
    return found if pace is None else _timed(found, pace, computed_again=bool(case.config.recompute))


@dataclass(frozen=True)
class _Machine:
    device: torch.device
    dtype: torch.dtype
    world_size: int
    available: int
    own: int
    """Bytes that the process has before the run."""
    teacher: ModelConfig | None

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"


@dataclass(frozen=True)
class _Case:
    """Options, and what they take."""

    config: TrainConfig
    shape: ModelConfig
    stats: Stats
    machine: _Machine

    @property
    def length(self) -> int:
        """Tokens of a usual sequence."""
        longest = self.config.max_length or self.shape.context_length
        mean = self.stats.num_tokens / max(1, self.stats.num_samples)
        return max(1, min(longest, math.ceil(mean)))

    def micro_batches(self) -> list[int]:
        """Sizes that divide a step's tokens, the largest first."""
        config = self.config
        if config.micro_batch_tokens is not None:
            return [config.micro_batch_tokens]
        assert config.max_length is not None and config.batch_tokens is not None
        own = math.ceil(config.batch_tokens / self.machine.world_size)
        most = own if self.machine.on_gpu else min(own, MOST_ON_CPU)
        sizes = {math.ceil(own / number) for number in range(1, own // config.max_length + 1)}
        return sorted({max(config.max_length, min(size, most)) for size in (sizes or {own})}, reverse=True)

    def accumulation(self, micro: int) -> int:
        assert self.config.batch_tokens is not None
        return max(1, round(self.config.batch_tokens / (micro * self.machine.world_size)))

    def load(self, micro: int) -> Load:
        micro += missing_rows(micro, self.machine.device, self.machine.dtype)
        tokens = max(2, min(micro, self.stats.num_tokens)) if self.stats.num_tokens else micro
        number = min(MOST_SEQUENCES, max(1, tokens // self.length))
        lengths = [tokens // number + (i < tokens % number) for i in range(number)]
        share = self.stats.num_trained / self.stats.num_tokens if self.stats.num_tokens else 1.0
        return Load(tuple(lengths), min(tokens, max(1, math.ceil(share * tokens))))

    def usual(self, micro: int) -> Load:
        """A micro-batch as it comes, for its time: sequences of all lengths around the mean, unless all have one, and
        none longer than the run's longest."""
        load = self.load(micro)
        most = max(self.length, min(self.config.max_length or self.shape.context_length, self.stats.longest))
        number = math.ceil(load.num_tokens / self.length)
        each, rest = divmod(load.num_tokens, number)
        lengths = [each + (i < rest) for i in range(number)]
        for i in range(number // 2):  # a pair keeps its sum
            less = min(round(each / 2 * (1 - 2 * i / number)), most - lengths[-1 - i])
            lengths[i], lengths[-1 - i] = lengths[i] - less, lengths[-1 - i] + less
        return Load(tuple(lengths), load.num_trained)

    def setup(self, micro: int) -> Setup:
        config, machine = self.config, self.machine
        is_full = config.tuning == "full"
        compiled = machine.device.type == "cuda" if config.compile is None else config.compile
        return Setup(
            dtype=machine.dtype,
            optimizer=OptimizerOptions(name=config.optimizer or "adamw"),
            lora=None if is_full else LoraOptions(**dict(config.lora)),
            quantization=config.quantization if config.tuning == "qlora" else None,
            recompute=bool(config.recompute),
            accumulates=self.accumulation(micro) > 1,
            on_gpu=machine.on_gpu,
            compiled=compiled,
            taught=self._taught(),
        )

    def _taught(self) -> Taught | None:
        teacher, options = self.machine.teacher, self.config.distillation
        if teacher is None:
            return None
        return Taught(teacher, Divergence(options.divergence, options.beta, options.temperature, options.weight))

    def plan(self, micro: int) -> Plan:
        machine = self.machine
        held = footprint(self.shape, self.setup(micro), self.load(micro))
        sharded = self.is_sharded
        parts = _parts(held, self, micro, sharded)
        config = self.config.model_copy(update={"micro_batch_tokens": micro, "recompute": bool(self.config.recompute)})
        if machine.world_size > 1 and config.parallel == "auto":
            config = config.model_copy(update={"parallel": "fsdp" if sharded else "ddp"})
        return Plan(
            config=config,
            shape=self.shape,
            device=machine.device,
            dtype=machine.dtype,
            world_size=machine.world_size,
            sharded=sharded,
            accumulation=self.accumulation(micro),
            parts=parts,
            memory=max(sum(parts.values()), _loading(held, parts, self)),
            available=machine.available,
            num_tokens=_num_tokens(self.config, self.stats),
            seconds=None,
            basis="",
        )

    @property
    def is_sharded(self) -> bool:
        return self.machine.world_size > 1 and self.config.parallel in ("fsdp", "hsdp")

    def changed(self, **updates: Any) -> _Case:
        return replace(self, config=self.config.model_copy(update=updates))


def _search(case: _Case) -> Plan:
    """The best plan that fits: the largest micro-batch without computing anything again, else with; on several GPUs
    weights are divided only where they must. If none fits, the one that takes least."""
    cases = [case]
    if case.config.recompute is None:
        cases = [case.changed(recompute=False), case.changed(recompute=True)]
    if case.machine.world_size > 1 and case.config.parallel == "auto":
        cases = [each.changed(parallel=how) for how in ("ddp", "fsdp") for each in cases]
    smallest: list[Plan] = []
    for each in cases:
        found = _largest(each)
        if found.fits:
            return found
        smallest.append(found)
    return min(smallest, key=lambda found: found.memory)


def _largest(case: _Case) -> Plan:
    """The largest micro-batch that fits, else the smallest there is. Memory is nearly a straight line of its tokens."""
    sizes = case.micro_batches()
    most = case.plan(sizes[0])
    if most.fits or len(sizes) == 1:
        return most
    least = case.plan(sizes[-1])
    if not least.fits:
        return least
    slope = (most.memory - least.memory) / (sizes[0] - sizes[-1])
    for size in sizes[1:-1]:
        if least.memory + slope * (size - sizes[-1]) <= case.machine.available * USABLE:
            found = case.plan(size)
            if found.fits:
                return found
    return least


def _parts(held: Footprint, case: _Case, micro: int, sharded: bool) -> dict[str, int]:
    """Bytes of one device at the peak."""
    machine = case.machine
    accumulates = case.accumulation(micro) > 1
    early = held.peak in (held.forward, held.loss) and not accumulates
    gradients = 0 if early else held.gradients
    if machine.on_gpu:
        total, workspace = held.peak, WORKSPACE
    else:
        total, workspace = held.resident(case.setup(micro)) - held.kernels, held.kernels
    rest = max(0, total - held.weights - held.optimizer - gradients)
    kept = held.weights + held.optimizer + held.casts + held.activations + (gradients if accumulates else 0)
    loss = min(rest, max(0, held.loss - kept)) if held.peak == held.loss else 0
    parts = {
        "weights": held.weights,
        "gradients": gradients,
        "optimizer": held.optimizer,
        "activations": rest - loss,
        "loss": loss,
        "workspace": workspace,
    }
    if machine.world_size > 1:
        parts = _shared(parts, held, case, sharded)
    if case.config.tensor_parallel_size > 1:
        parts = _cut(parts, case)
    if machine.teacher is not None:
        parts["teacher"] = _of_teacher(machine.teacher, case.load(micro), case)
        if case.config.distillation.on_policy:
            room = micro + case.config.distillation.max_new_tokens  # as the distiller's
            parts["writer"] = shadow_bytes(case.shape, machine.device, machine.dtype, room)
    if machine.own:
        parts["process"] = machine.own
    return parts


def _shared(parts: dict[str, int], held: Footprint, case: _Case, sharded: bool) -> dict[str, int]:
    """DDP sends gradients in buckets, a copy of them. FSDP divides what is kept, and gathers it to compute."""
    if not sharded:
        return {**parts, "gradients": parts["gradients"] + held.gradients}
    number = case.machine.world_size
    divided = parts | {name: math.ceil(parts[name] / number) for name in ("weights", "gradients", "optimizer")}
    divided["activations"] = max(0, parts["activations"] - held.casts)
    size = case.machine.dtype.itemsize
    whole = held.weights if case.config.tuning == "qlora" else size * num_weights(case.shape)
    divided["workspace"] += _gathered(whole, size * _num_ends(case.shape), case.shape.num_layers, case.machine)
    return divided


def _gathered(whole: int, ends: int, num_layers: int, machine: _Machine) -> int:
    """What FSDP has of `whole` bytes while it computes: `ends`, which are around the blocks, and two blocks; all of it
    where that is little."""
    if machine.on_gpu:
        is_there = machine.device.type == "cuda" and torch.cuda.is_available()
        total = torch.cuda.get_device_properties(machine.device).total_memory if is_there else machine.available
        if whole <= KEPT * total:
            return whole
    return min(whole, ends + 2 * max(0, whole - ends) // num_layers)


def _loading(held: Footprint, parts: dict[str, int], case: _Case) -> int:
    """The most of weights that a device has before the first step: its own part, and the block that is being divided or
    what is around the blocks."""
    config, machine = case.config, case.machine
    if not case.is_sharded and config.tensor_parallel_size == 1:
        return held.weights
    ends = (4 if config.tuning == "full" else machine.dtype.itemsize) * _num_ends(case.shape)
    return parts["weights"] + max(ends, (held.weights - ends) // case.shape.num_layers)


def _cut(parts: dict[str, int], case: _Case) -> dict[str, int]:
    """Tensor parallelism divides what is inside of blocks; activations are counted as if it did not."""
    inside = 1 - _num_ends(case.shape) / num_weights(case.shape)
    kept = 1 - inside + inside / case.config.tensor_parallel_size
    return {**parts, **{name: math.ceil(kept * parts[name]) for name in ("weights", "gradients", "optimizer")}}


def _num_ends(shape: ModelConfig) -> int:
    """Weights of embeddings and head."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)


def _of_teacher(teacher: ModelConfig, load: Load, case: _Case) -> int:
    """Its weights, hidden states and, where the loss is a kernel, one piece of its scores."""
    size = case.machine.dtype.itemsize
    scores = min(PIECE, load.num_trained * teacher.vocab_size) if case.machine.on_gpu else 0
    passing = size * (load.num_tokens * teacher.hidden_size + scores)
    whole, ends = size * num_weights(teacher), size * _num_ends(teacher)
    if case.is_sharded:
        gathered = _gathered(whole, ends, teacher.num_layers, case.machine)
        return passing + whole // case.machine.world_size + gathered
    return passing + ends + (whole - ends) // case.config.tensor_parallel_size


# --- time


def _num_tokens(config: TrainConfig, stats: Stats) -> int:
    if config.steps is not None and config.batch_tokens is not None:
        return config.steps * config.batch_tokens
    return round(stats.num_tokens * (config.epochs or 1))


def _pace_on_cpu(case: _Case, available: int | None) -> Pace | None:
    """None where even a few blocks have no room: the run is refused then, or was before it is timed."""
    micro, machine = min(case.micro_batches()[0], max(PROBE_TOKENS, case.length)), case.machine
    room = free_memory(machine.device) if available is None else available
    if case.config.max_memory is not None:
        room = min(room, round(case.config.max_memory * GIB))
    setup = case.setup(micro)
    needed = footprint(few_blocks(case.shape, machine.device), setup, case.usual(micro)).resident(setup)
    if machine.teacher is not None:
        needed += machine.dtype.itemsize * num_weights(few_blocks(machine.teacher, machine.device))
    return _pace(case, micro) if needed < USABLE * room else None


def _pace(case: _Case, micro: int) -> Pace:
    parts = case.config.tensor_parallel_size
    return measured(case.shape, case.setup(micro), case.usual(micro), case.machine.device, parts=parts)


def _timed(found: Plan, pace: Pace, *, computed_again: bool) -> Plan:
    """computed_again: blocks were when the pace was measured."""
    assert found.config.batch_tokens is not None
    again = AGAIN if found.config.recompute and not computed_again else 1.0
    steps = math.ceil(found.num_tokens / found.config.batch_tokens)
    seconds = again * pace.token * found.num_tokens / found.world_size + pace.step * steps
    return replace(found, seconds=seconds, basis=pace.basis)


# --- what would fit


def _too_little(found: Plan, asked: TrainConfig, stats: Stats, machine: _Machine) -> InsufficientMemoryError:
    config = found.config.model_copy(update={"micro_batch_tokens": asked.micro_batch_tokens})
    ways = [f"{how} ({_size(what.memory)})" for how, what in _ways(_Case(config, found.shape, stats, machine))]
    hint = "These would fit: " + "; ".join(ways) + "." if ways else "No single change would do: take a smaller model."
    batch = found.config.micro_batch_tokens or 0
    return InsufficientMemoryError(
        f"A step of {batch:,} tokens needs {_size(found.memory)} on {found.device}, and {_size(found.available)} are "
        f"free, of which {USABLE:.0%} can be used.",
        hint=hint,
    )


def _ways(case: _Case) -> Iterator[tuple[str, Plan]]:
    """Changes that would fit, each alone, beside everything else that was asked for; then a few together."""
    found = False
    for updates in _changes(case):
        plan = _smallest(case.changed(**updates))
        if plan.fits:
            found = True
            yield _words(updates), plan
    if case.machine.on_gpu and (more := _more_gpus(case)):
        found = True
        yield more
    if not found and case.config.max_length:
        together: dict[str, Any] = _tuned(case, "qlora") if case.config.model else {"optimizer": "adamw8bit"}
        shorter = _shorter(case.changed(recompute=True, micro_batch_tokens=None, **together))
        if shorter is not None:
            together |= {"recompute": True, "max_length": shorter.config.max_length}
            if case.config.micro_batch_tokens:
                together["micro_batch_tokens"] = shorter.config.max_length
            yield _words(together), shorter


def _changes(case: _Case) -> Iterator[dict[str, Any]]:
    config = case.config
    if config.micro_batch_tokens:  # asked for
        smaller = _largest(case.changed(micro_batch_tokens=None)).config.micro_batch_tokens
        yield {"micro_batch_tokens": smaller}
    if not config.recompute:
        yield {"recompute": True}
    if shorter := _shorter(case):
        yield {"max_length": shorter.config.max_length}
    if config.tuning == "full":
        if config.optimizer == "adamw":
            yield {"optimizer": "adamw8bit"}
        if config.model:
            yield _tuned(case, "lora")
    if config.tuning != "qlora" and config.model:
        yield _tuned(case, "qlora")


def _tuned(case: _Case, tuning: str) -> dict[str, Any]:
    """Adapters, with their usual optimizer where another one was taken for all weights."""
    is_usual = case.config.optimizer == "adamw"
    return {"tuning": tuning} if is_usual else {"tuning": tuning, "optimizer": "adamw"}


def _words(updates: dict[str, Any]) -> str:
    return " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in updates.items())


def _smallest(case: _Case) -> Plan:
    return case.plan(case.micro_batches()[-1])


def _shorter(case: _Case) -> Plan | None:
    """The longest samples, halved and halved again, that fit."""
    length = (case.config.max_length or 0) // 2
    while length >= LEAST_LENGTH:
        found = _smallest(case.changed(max_length=length, batch_tokens=max(length, case.config.batch_tokens or 0)))
        if found.fits:
            return found
        length //= 2
    return None


def _more_gpus(case: _Case) -> tuple[str, Plan] | None:
    number = 2 * case.machine.world_size
    while number <= 64:
        machine = replace(case.machine, world_size=number)
        found = _smallest(replace(case.changed(parallel="fsdp"), machine=machine))
        if found.fits:
            return f"--gpus {number} --parallel fsdp", found
        number *= 2
    return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
