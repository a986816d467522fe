"""What tests of inference share."""

import time
from typing import Any

import pytest

from llmasos.inference.runner import Runner


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each forward pass of any engine; each takes at least 2 ms."""
    counted: list[int] = []
    forward = Runner.forward

    def watched(self: Runner, step: Any) -> Any:
        time.sleep(0.002)
        counted.append(len(step.seq_lens))
        return forward(self, step)

    monkeypatch.setattr(Runner, "forward", watched)
    return counted
