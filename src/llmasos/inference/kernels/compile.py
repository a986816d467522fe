"""Compiling kernels before they are needed, many at once. A Triton that can't compiles each at first use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_one = threading.Lock()
"""Triton's launcher is exchanged by one at a time, so that each gives back what it found."""


class _Compilers(ThreadPoolExecutor):
    """Threads that also build the C code which launches a kernel, a third of a second each: Triton would, one after the
    other, at first launch. It finds them in its cache then."""

    def submit(self, compile_kernel: Any, /, *args: Any, **options: Any) -> Future[Any]:
        return super().submit(_with_launcher, compile_kernel, *args, **options)


def _with_launcher(compile_kernel: Any, *args: Any, **options: Any) -> Any:
    from triton.runtime.driver import driver

    kernel = compile_kernel(*args, **options)
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


@contextmanager
def compiling() -> Iterator[bool]:
    """Inside, kernels that this thread launches are compiled in threads and not run: their outputs hold anything.
    Behind it all of them are ready. Another model's thread goes on as ever. Yields whether this Triton can."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield False
        return
    me = threading.get_ident()
    with _one, _Compilers(min(16, os.cpu_count() or 1)) as pool, AsyncCompileMode(pool):
        run = JITFunction.run

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == me, **options)

        JITFunction.run = compile_only
        try:
            yield True
        finally:
            JITFunction.run = run
