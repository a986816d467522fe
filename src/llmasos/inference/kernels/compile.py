"""Compiling kernels before they are needed, many at once. A Triton that can't compiles each at first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiling() -> Iterator[bool]:
    """Inside, kernels that are launched are compiled in threads and not run: their outputs hold anything. Behind it all
    of them are ready. Yields whether this Triton can."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield False
        return
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, AsyncCompileMode(pool):
        JITFunction.run = compile_only
        try:
            yield True
        finally:
            JITFunction.run = run
