"""Steps that would do harm: a loss or gradient that is no number, or far above those of the steps before.

The rule of OLMo-core's SkipStepOptimizer (AllenAI): six standard deviations above the mean of the last 128
steps. Steps that were left out count among them: a level that stays is soon the usual one, and of many spikes only the
largest are left out. Here a spike is also at least `LEAST_NATS` of loss, or `LEAST_TIMES` the mean norm: where values
hardly vary, six deviations are next to nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 128
FIRST = 20
"""Steps before nothing is called a spike."""
SIGMAS = 6.0
LEAST_NATS = 0.5
"""Gradients are clipped, and data has harder batches: a spike of the loss is more than one of those."""
LEAST_TIMES = 10.0


class Spikes:
    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def why(self, loss: float, norm: float) -> str:
        """Why a step of this loss (nats a token) and norm of the gradient should be left out; "" for most. Each step
        is told once."""
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        losses, norms = zip(*self._seen, strict=True) if self._seen else ((), ())
        self._seen.append((loss, norm))
        if len(losses) < FIRST:
            return ""
        return _above("loss", loss, losses, LEAST_NATS) or _above(
            "gradient's norm", norm, norms, (LEAST_TIMES - 1) * statistics.fmean(norms)
        )

    def state_dict(self) -> list[tuple[float, float]]:
        return list(self._seen)

    def load_state_dict(self, state: Sequence[tuple[float, float]]) -> None:
        self._seen.clear()
        self._seen.extend(state)


def _above(name: str, value: float, before: Sequence[float], least: float) -> str:
    mean = statistics.fmean(before)
    if value - mean <= max(SIGMAS * statistics.pstdev(before, mean), least):
        return ""
    return f"the {name} {value:.3g} is far above the {mean:.3g} of the last {len(before)} steps"
