"""What was freed goes back to the system."""

from __future__ import annotations

import platform

import pytest
import torch

from llmasos.train.resident import give_back, resident


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_rooms_between_what_is_used_go_back_to_the_system() -> None:
    kept, freed = [], []
    for _ in range(1000):  # too small to get memory of their own
        freed.append(torch.ones(100_000, dtype=torch.uint8))
        kept.append(torch.ones(20_000, dtype=torch.uint8))  # lies between them
    freed.clear()
    before = resident()
    give_back()
    assert before - resident() > 60e6 and len(kept) == 1000
