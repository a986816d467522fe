"""What a run tells while it goes on: steps, evaluations, checkpoints. Whoever shows or keeps them is a Listener."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepReport:
    step: int
    """From 1."""
    loss: float
    """Mean over the step's trained tokens, nats."""
    gradient_norm: float
    rate: float
    """Learning rate."""
    num_tokens: int
    """Of the step, all ranks and micro-batches."""
    num_trained: int
    seconds: float
    skipped: str = ""
    """Why the step was left out, if it was."""
    parts: dict[str, float] | None = None
    """What the loss consists of, by name, each a mean over trained tokens (distillation)."""
    memory: int = 0
    """The most bytes that tensors had on one device so far; 0 on a CPU."""


@dataclass(frozen=True)
class Generated:
    """What the model says to a prompt in the middle of a run."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    step: int
    loss: float
    """Mean over the trained tokens of the held-out part, nats."""
    bits_per_byte: float | None
    """Of the trained text in UTF-8; None where bytes are not known."""
    num_tokens: int
    """Trained tokens that were read."""
    seconds: float
    samples: tuple[Generated, ...] = ()


class Listener:
    """Does nothing at anything; subclasses say what they care for. Called on rank 0 only, between steps, in the thread
    that trains. What one raises ends the run, after a checkpoint; the others are told all the same."""

    def began(self, step: int, num_steps: int) -> None:
        """step: already done, by the run that is resumed."""

    def stepped(self, report: StepReport) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def saved(self, step: int, path: Path) -> None: ...

    def ended(self, step: int, reason: str) -> None:
        """reason: "finished", "stopped" (told to), "data" (no more of it), "time" (its limit), or what went wrong."""
