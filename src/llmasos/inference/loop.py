"""The thread that steps an engine, and the door through which all other threads reach it.

Everything that touches the model runs in this one thread: steps, and between two steps at most one pass of another kind
(embeddings, classification). So nothing is locked, and CPU kernels keep one pool of threads.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from llmasos.errors import ServerError

if TYPE_CHECKING:
    from llmasos.inference.answer import Taker
    from llmasos.inference.engine import Engine
    from llmasos.inference.state import Request

T = TypeVar("T")
_running: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Python ends in order while a step runs: torch aborts where its threads are taken away from it."""
    for one in list(_running):
        one.close()


class EngineLoop:
    """Starts its thread with the first work and builds the engine with the first request. Ends with `close`."""

    delivers_home = False

    def __init__(self, build: Callable[[], Engine], *, name: str) -> None:
        self._build, self._name = build, name
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._passes: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._listeners: dict[Request, Taker] = {}
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False
        self.after_step: Callable[[], None] = lambda: None
        """Is called in the engine's thread when all outputs of a step have been given to their listeners."""
        self.turn_began: float | None = None
        """When the step that runs now began (`time.monotonic`)."""

    def submit(self, request: Request, listener: Taker, home: object = None) -> Future[None]:
        """Queue a request; its outputs go to `listener`, in the engine's thread. The future fails for a request that
        can't run here."""
        return self.run(lambda: self._add(request, listener))

    def abort(self, request: Request) -> None:
        """End a request soon; nothing to do if it is over, or everything is."""
        with suppress(ServerError):  # closed
            self.run(lambda: self._drop(request))

    def pause(self, request: Request, paused: bool) -> None:
        """Stop or go on making tokens for a request whose reader is slow; nothing to do if everything is over."""
        with suppress(ServerError):  # closed
            self.run(lambda: self._engine.pause(request, paused) if self._engine is not None else None)

    def finish(self, request: Request, index: int) -> None:
        """End one completion of a request. Only in the engine's thread."""
        if self._engine is not None and self._engine.abort(request, index):
            self._listeners.pop(request, None)

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run short `work` in the engine's thread before its next step."""
        future: Future[T] = Future()
        self._put(lambda: _settle(future, work))
        return future

    def run_pass(self, work: Callable[[], T]) -> T:
        """Run one forward pass of another kind between two steps, and wait for it."""
        if threading.current_thread() is self._thread:
            return work()
        future: Future[T] = Future()
        self._put(lambda: self._passes.append((future, work)))
        return future.result()

    def engine(self) -> Engine:
        """The engine, built if need be. Only in the engine's thread."""
        if self._engine is None:
            self._engine = self._build()
        return self._engine

    @property
    def current_engine(self) -> Engine | None:
        """The engine if it was built: for reading its statistics."""
        return self._engine

    def close(self) -> None:
        """End the thread after its current step. Requests on their way fail with ServerError."""
        with self._starting:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _put(self, command: Callable[[], None]) -> None:
        with self._starting:
            if self._closed:
                raise ServerError(f"{self._name} is closed.", hint="Load the model again.")
            if self._thread is None:
                me = weakref.ref(self)
                self._thread = threading.Thread(target=_serve, args=(me, self._inbox), name=self._name, daemon=True)
                self._thread.start()
                _running.add(self)
            self._inbox.put(command)

    def _add(self, request: Request, listener: Taker) -> None:
        self.engine().add(request)
        self._listeners[request] = listener

    def _drop(self, request: Request) -> None:
        if self._listeners.pop(request, None) is not None and self._engine is not None:
            self._engine.abort(request)

    @property
    def _busy(self) -> bool:
        return bool(self._passes) or (self._engine is not None and self._engine.has_work)

    def _turn(self) -> None:
        """One pass of another kind, one step."""
        if self._passes:
            _settle(*self._passes.popleft())
        engine = self._engine
        if engine is None or not engine.has_work:
            return
        try:
            outputs = engine.step()
        except Exception as e:
            self._fail(e)
            return
        for output in outputs:
            listener = self._listeners.get(output.request)
            if output.last:
                self._listeners.pop(output.request, None)
            if listener is not None:
                listener.take(output)
        self.after_step()

    def _fail(self, cause: Exception) -> None:
        """The engine broke: every request on its way fails, the next one gets a new engine."""
        from llmasos.inference.engine import failed_output

        self._engine = None
        listeners, self._listeners = self._listeners, {}
        for request, listener in listeners.items():
            listener.take(failed_output(request, cause))
        self.after_step()

    def _end(self) -> None:
        closed = ServerError(f"{self._name} was closed.", hint="Load the model again.")
        self._fail(closed)
        for future, _ in self._passes:
            future.set_exception(closed)


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():  # a task that waited for it was cancelled
        return
    try:
        future.set_result(work())
    except BaseException as e:
        future.set_exception(e)


def _serve(loop: weakref.ref[EngineLoop], inbox: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """The thread. It holds no reference to the loop while it waits, so that a model nobody holds is freed."""
    while True:
        me = loop()
        if me is None:
            return
        busy = me._busy
        if not busy:
            del me
        try:
            command = inbox.get(block=not busy, timeout=None if busy else 1.0)
        except queue.Empty:
            if busy:
                me = loop()
                if me is not None:
                    me.turn_began = time.monotonic()
                    me._turn()
                    me.turn_began = None
            continue
        me = loop()
        if command is None or me is None:
            if me is not None:
                me._end()
            return
        command()
        del command
