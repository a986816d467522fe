"""The one loop: it knows batches, a loss, a step and a place to go on from, and no method by name.

for each step: micro-batches -> loss of each / trained tokens of the step -> gradients -> clip, step, schedule
               -> tell listeners -> save every so often, at the end, and when the run is told to stop

On several ranks all take each step together: trained tokens, the gradient's norm, and whether to stop are those of all.
The first rank alone writes the log and tells listeners.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from llmasos.data import Batch, Batches
from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.models.load import write_atomically
from llmasos.train.checkpoint import Checkpoints
from llmasos.train.events import Evaluation, Listener, StepReport
from llmasos.train.marks import written
from llmasos.train.model import Placed
from llmasos.train.optim import OptimizerOptions, Optimizers
from llmasos.train.parallel.gradients import Reducer
from llmasos.train.parallel.ranks import Ranks, explained
from llmasos.train.parallel.shard import at_rest
from llmasos.train.resident import give_back
from llmasos.train.schedule import Schedule
from llmasos.train.spikes import Spikes


class DivergedError(LLMasOSError):
    """The loss or the gradient is no number, or far above what it was, more often than may be."""


class Learner(Protocol):
    """A method: what is trained, and its loss."""

    step: int
    """Done, when a step begins."""

    @property
    def module(self) -> nn.Module: ...
    def loss(self, batch: Placed) -> Tensor:
        """Summed over the trained tokens, float32."""

    def parts(self) -> dict[str, Tensor]:
        """What the losses since the last call consist of, by name, summed over trained tokens; empty for most. The
        same names in the same order on all ranks."""


@dataclass(frozen=True)
class LoopOptions:
    """steps: of the run. accumulation: micro-batches of a step. save_every: steps between checkpoints, 0: at the end
    only. evaluate_every: steps between evaluations, 0: at the end only. max_bad: steps in a row that are left out (see
    `spikes`) before the run is given up. max_seconds: of this process's part of the run, 0: no limit; a run that
    reaches it saves and ends."""

    steps: int
    accumulation: int = 1
    save_every: int = 0
    evaluate_every: int = 0
    max_bad: int = 5
    max_seconds: float = 0.0


@dataclass
class Loop:
    learner: Learner
    batches: Batches
    optimizer: OptimizerOptions
    schedule: Schedule
    options: LoopOptions
    run: Path
    """Folder of the run: checkpoints and log.jsonl."""
    device: torch.device
    listeners: Sequence[Listener] = ()
    evaluate: Callable[[int], Evaluation] | None = None
    """Gets the number of steps done."""
    ranks: Ranks = field(default_factory=Ranks)
    """`learner` is spread over them already, and `batches` are this one's."""
    keep: int = 2
    """Checkpoints."""

    def __post_init__(self) -> None:
        self.optimizers = Optimizers(self.learner.module, self.optimizer, self.ranks)
        self.checkpoints = Checkpoints(self.run / "checkpoints", self.keep, ranks=self.ranks)
        whole = self.ranks.data_size > 1 and self.ranks.kind == "ddp"
        self._reducer = Reducer(self.optimizers.parameters, self.ranks.group("replica")) if whole else None
        # FSDP takes the mean over ranks, and the loss is a sum
        self._share = self.ranks.data_size if self.ranks.kind != "ddp" else 1
        self.step = 0
        self._evaluated = -1
        self._bad = 0
        self._spikes = Spikes()
        self._stop = threading.Event()
        self._failed: Exception | None = None

    def resume(self) -> bool:
        """Go on from the latest checkpoint, if there is one. Raises InvalidInputError where a step would read another
        number of tokens than it did."""
        latest = self.checkpoints.latest()
        if latest is None:
            self._forget_after(0)
            return False
        state = self.checkpoints.load(latest, self.learner.module, self.optimizers)
        self._check_step(state.get("step_tokens", self._step_tokens))
        self.step, self._bad, self._evaluated = state["step"], state["bad"], state["evaluated"]
        self._spikes.load_state_dict(state.get("spikes", ()))
        self.batches.load_state_dict(state["batches"])
        self._forget_after(self.step)
        return True

    @property
    def _step_tokens(self) -> int:
        """That a step reads at most, on all ranks."""
        return self.options.accumulation * self.batches.batch_tokens * self.ranks.data_size

    def _check_step(self, before: int) -> None:
        """More processes than a step has micro-batches would make it longer: another run than was begun."""
        if abs(self._step_tokens - before) <= 0.25 * before:
            return
        number, each = round(before / self.batches.batch_tokens), self.ranks.tensor
        fitting = ", ".join(str(n * each) for n in range(1, number + 1) if number % n == 0)
        raise InvalidInputError(
            f"A step of this run reads {before:,} tokens, in micro-batches of {self.batches.batch_tokens:,}; with "
            f"{self.ranks.world_size} processes it would read {self._step_tokens:,}.",
            hint=f"Go on with a number of processes that divides it: {fitting}.",
            param="gpus",
        )

    def _forget_after(self, step: int) -> None:
        """Steps that were run and lost are run again: the log has each once."""
        log = self.run / "log.jsonl"
        if self.ranks.is_first and log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            write_atomically(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def stop(self) -> None:
        """End after the step that runs, with a checkpoint. From any thread."""
        self._stop.set()

    def train(self) -> str:
        """To the last step. Returns why it ended: "finished", "stopped" (`stop`, SIGTERM, SIGINT), "data" (its epochs
        are over before), "time" (max_seconds).

        Raises DivergedError, DiskFullError, and what the data raise; what a listener raises, after a checkpoint."""
        self.learner.module.train()
        self._each(lambda listener: listener.began(self.step, self.options.steps))
        self._check_listeners()
        try:
            with self._signals(), explained(self.ranks), self.checkpoints:
                reason = self._steps()
        except BaseException as e:
            self._end(": ".join(filter(None, (type(e).__name__, str(e)))))
            if self._failed is not None:
                e.add_note(f"And a listener failed: {self._failed!r}")
            raise
        self._end(reason)
        self._check_listeners()
        return reason

    def _end(self, reason: str) -> None:
        self.learner.module.eval()
        self._each(lambda listener: listener.ended(self.step, reason))

    def _steps(self) -> str:
        saved = self.step
        started = time.monotonic()
        reason = "finished"
        if not self.step:
            self._evaluate()  # what there was to begin with
            self._check_listeners()
        if self.device.type == "cpu":
            give_back()  # what loading and the first evaluation took for a while
        given = iter(self.batches)
        while self.step < self.options.steps:
            micro = list(islice(given, self.options.accumulation))
            if not micro:
                reason = "data"
                break
            self._tell(self._train_step(micro))
            if _is_time(self.step, self.options.evaluate_every):
                self._evaluate()
            if _is_time(self.step, self.options.save_every):
                self.save(wait=False)
                saved = self.step
            is_late = 0 < self.options.max_seconds <= time.monotonic() - started
            stopped, late, writing, failed = self.ranks.most(
                self._stop.is_set(), is_late, self.checkpoints.is_writing, self._failed is not None
            )
            if not writing:
                self._saved()
            if failed:
                reason = "failed"
                break
            if stopped:
                reason = "stopped"
                break
            if late:
                reason = "time"
                break
        try:
            if saved != self.step:
                self.save()
            self._saved()
        except LLMasOSError:  # on all ranks together
            self._check_listeners()  # why it is saved comes first
            raise
        if self._evaluated != self.step and reason not in ("stopped", "failed"):
            self._evaluate()  # also by a run that was killed between its last checkpoint and this
        self._check_listeners()
        return reason

    def _evaluate(self) -> None:
        if self.evaluate is not None:
            found = self.evaluate(self.step)
            at_rest(self.learner.module)
            self._evaluated = self.step
            self._each(lambda listener: listener.evaluated(found))

    def _each(self, tell: Callable[[Listener], None]) -> None:
        """All of them, whatever one raises: `_check_listeners` says that, when nothing is lost by it."""
        for listener in self.listeners if self.ranks.is_first else ():
            with self._later():
                tell(listener)

    @contextmanager
    def _later(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            self._failed = self._failed or e

    def _check_listeners(self) -> None:
        """Raises what a listener has raised; on the other ranks, an error that the first one says."""
        if not self.ranks.most(self._failed is not None)[0]:
            return
        failed, self._failed = self._failed, None
        words = self.ranks.told(": ".join(filter(None, (type(failed).__name__, str(failed)))))
        if failed is None:
            failed = LLMasOSError(f"The run ended by an error of its first process: {words}")
            failed.is_shared = True  # type: ignore[attr-defined]  # of this run only: see Ranks.check
        raise failed

    def save(self, *, wait: bool = True) -> Path:
        """Weights are copied now and written while the run goes on, unless it should wait for that."""
        self._saved()
        state = {"batches": self.batches.state_dict(), "bad": self._bad, "spikes": self._spikes.state_dict()}
        state |= {"evaluated": self._evaluated, "step_tokens": self._step_tokens}
        path = self.checkpoints.begin(self.step, self.learner.module, self.optimizers, state)
        if wait:
            self._saved()
        return path

    def _saved(self) -> None:
        """What is being written is done now, and told."""
        if done := self.checkpoints.finish():
            self._each(lambda listener: listener.saved(*done))

    def _train_step(self, micro: list[Batch]) -> StepReport:
        started = time.perf_counter()
        num_trained, num_tokens = self.ranks.sums(
            sum(batch.num_trained for batch in micro), sum(len(batch.tokens) for batch in micro)
        )
        total = torch.zeros((), device=self.device)
        self.learner.step = self.step
        for i, batch in enumerate(micro):
            if self._reducer and i == len(micro) - 1:
                self._reducer.last()
            loss = self.learner.loss(Placed.of(batch, self.device)) / max(1, num_trained)
            (loss * self._share if self._share > 1 else loss).backward()
            total += loss.detach()
        if self._reducer:
            self._reducer.finish()
        self._add_partial()
        factor = self.schedule.factor(self.step, self.options.steps)
        norm = self._norm()
        summed = self.learner.parts()
        # the one time that a step waits for the device: the update then runs while the next batch is made
        read = torch.stack([norm, total, *(torch.as_tensor(p).to(total) for p in summed.values())]).cpu()
        mean, *sums = self.ranks.total(read[1:])
        skipped = self._update(factor, norm, self._spikes.why(float(mean), float(read[0])))
        self.step += 1
        parts = {name: float(part) / max(1, num_trained) for name, part in zip(summed, sums, strict=True)}
        return StepReport(
            step=self.step,
            loss=float(mean),
            gradient_norm=float(read[0]),
            rate=self.optimizer.lr * factor,
            num_tokens=num_tokens,
            num_trained=num_trained,
            seconds=time.perf_counter() - started,
            skipped=skipped,
            parts=parts or None,
            memory=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
        )

    def _norm(self) -> Tensor:
        """Of the whole gradient, a float32 scalar on the device."""
        if self.ranks.tensor > 1 or self.ranks.kind != "ddp":  # no rank has it
            return self.ranks.norm(self.optimizers.parameters)
        gradients = [p.grad for p in self.optimizers.parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients) or [torch.zeros((), device=self.device)]
        return torch.linalg.vector_norm(torch.stack(list(norms)))

    def _update(self, factor: float, norm: Tensor, why: str) -> str:
        """A step, unless it is bad; a few of those are left out, then the run is. Returns why it was left out."""
        if why:
            self.optimizers.zero()
            self._bad += 1
            if self._bad > self.options.max_bad:
                raise DivergedError(
                    f"{self._bad} steps in a row were left out, the last (step {self.step + 1}) because {why}.",
                    hint="Lower lr, lengthen the warm-up, or look at the data of these steps; `resume` goes on from "
                    "the last checkpoint.",
                )
            return why
        self._bad = 0
        self.optimizers.step(factor, norm)
        return ""

    def _add_partial(self) -> None:
        """Small weights that all ranks of the tensor dimension have, each using them for its own part."""
        if self.ranks.tensor > 1:
            for parameter in self.optimizers.parameters:
                if getattr(parameter, "partial", False) and parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad, group=self.ranks.group("tensor"))

    def _tell(self, report: StepReport) -> None:
        if not self.ranks.is_first:
            return
        with self._later(), written(self.run / "log.jsonl"):
            self.run.mkdir(parents=True, exist_ok=True)
            with (self.run / "log.jsonl").open("a") as file:
                file.write(json.dumps(vars(report)) + "\n")
        self._each(lambda listener: listener.stepped(report))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after a step, with a checkpoint. A second SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop()

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
