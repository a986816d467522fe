"""Whether who asked for a call has left: for functions in threads, which nobody can interrupt.

Who runs a function makes a `Token` and calls the function inside `token.active()`; models' methods that wait look at
it, and so may the function itself (`is_cancelled`, `check_cancelled`). Where there is no token, nothing of this does
anything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from llmasos.errors import LLMasOSError

T = TypeVar("T")
_current: ContextVar[Token | None] = ContextVar("llmasos_leaving", default=None)


class CallCancelledError(LLMasOSError):
    """Nobody waits for this call any more. A function may let it pass: it ends the function."""

    http_status = 499

    def __init__(self) -> None:
        super().__init__("Nobody waits for this call any more.")


class Token:
    """One call. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[object, Callable[[], object]] = {}
        self.is_cancelled = False

    def cancel(self) -> None:
        with self._lock:
            self.is_cancelled = True
            calls = list(self._calls.values())
            self._calls.clear()
        for call in calls:
            call()

    @contextmanager
    def active(self) -> Iterator[None]:
        """What runs in the block, in this thread and in those it begins with its context, is this call's."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)

    @contextmanager
    def calling(self, call: Callable[[], object]) -> Iterator[None]:
        """`call` is called when the token is cancelled during the block, or at once if it is already. It may come from
        another thread."""
        name = object()
        with self._lock:
            if not (over := self.is_cancelled):
                self._calls[name] = call
        if over:
            call()
        try:
            yield
        finally:
            with self._lock:
                self._calls.pop(name, None)


def current() -> Token | None:
    return _current.get()


def is_cancelled() -> bool:
    """Whether nobody waits for what this function makes: its client has left, or its job was cancelled."""
    token = _current.get()
    return token is not None and token.is_cancelled


def check_cancelled() -> None:
    """Raises CallCancelledError where `is_cancelled`."""
    if is_cancelled():
        raise CallCancelledError


@contextmanager
def ending(call: Callable[[], object]) -> Iterator[None]:
    """`call` ends what the block waits for when nobody waits any more. Raises CallCancelledError then, after the
    block."""
    token = _current.get()
    if token is None:
        yield
        return
    with token.calling(call):
        yield
    check_cancelled()


def heeding(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items as long as somebody waits for them; then CallCancelledError, and `items` are closed."""
    return items if _current.get() is None else _heeding(items)


def _heeding(items: Generator[T, None, None]) -> Generator[T, None, None]:
    try:
        for item in items:
            check_cancelled()
            yield item
    finally:
        items.close()


def can_run() -> bool:
    """Whether `run` is of use here: there is a token, and this thread runs no event loop."""
    if _current.get() is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result, in this thread; cancelled when nobody waits any more (CallCancelledError)."""
    token = _current.get()
    assert token is not None

    async def work() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with token.calling(lambda: loop.call_soon_threadsafe(task.cancel)):
            return await make()

    try:
        return asyncio.run(work())
    except asyncio.CancelledError:
        raise CallCancelledError from None
