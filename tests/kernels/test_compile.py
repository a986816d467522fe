"""Kernels are compiled ahead of their use without a launch, and without a word to other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import triton.runtime.jit

from llmasos.inference.kernels.compile import compiling

pytest.importorskip("triton.runtime._async_compile")


def test_only_the_thread_that_compiles_leaves_its_kernels_unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, bool]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((threading.current_thread().name, warmup))

    kernel_type = triton.runtime.jit.JITFunction
    monkeypatch.setattr(kernel_type, "run", run)

    def launch() -> None:
        kernel_type.run(None, grid=(1,), warmup=False)

    with compiling() as can:
        assert can
        launch()
        other = threading.Thread(target=launch, name="another model")
        other.start()
        other.join()
    launch()
    mine = threading.current_thread().name
    assert launches == [(mine, True), ("another model", False), (mine, False)]
    assert kernel_type.run is run
