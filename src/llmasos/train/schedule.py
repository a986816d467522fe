"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmasos.errors import InvalidInputError

Kind = Literal["wsd", "cosine", "linear", "constant"]
KINDS = ("wsd", "cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """wsd: warm up, stay, cool down in a straight line (arXiv:2404.06395). cosine, linear: down from the end of the
    warm-up to the end of the run. warmup, cooldown: shares of the steps. floor: the share of the rate at the end."""

    kind: Kind = "wsd"
    warmup: float = 0.03
    cooldown: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInputError(
                f"There is no schedule {self.kind!r}.", hint=f"Use {', '.join(KINDS)}.", param="schedule"
            )
        cooldown = self.cooldown if self.kind == "wsd" else 0.0
        if self.warmup < 0 or cooldown < 0 or self.warmup + cooldown > 1:
            raise InvalidInputError(
                f"warmup={self.warmup} and cooldown={cooldown} are no shares of one run.",
                hint="Use shares from 0 to 1 whose sum is at most 1.",
                param="warmup",
            )

    def factor(self, step: int, num_steps: int) -> float:
        """What the rate of step 0 .. num_steps - 1 is multiplied with."""
        warm = round(self.warmup * num_steps)
        if step < warm:
            return (step + 1) / warm
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            cold = round(self.cooldown * num_steps)
            left = (num_steps - step) / cold if cold else 1.0
            return self.floor + (1 - self.floor) * min(1.0, left)
        done = (step - warm) / max(1, num_steps - warm)
        falling = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * falling
