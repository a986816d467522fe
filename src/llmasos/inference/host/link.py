"""The parent's end of the line to a model's process: requests go out, what each step made comes back.

One thread reads. What it reads for a reader in an event loop is handled in that loop, all of a step at once, so a
token costs no switch of threads; readers without a loop are served by the reading thread itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zmq

from llmasos.errors import LLMasOSError
from llmasos.inference.answer import Home, Listener
from llmasos.inference.host import messages as wire
from llmasos.inference.state import AdapterInfo, EngineStats, Output, Request, RequestState

LAST_MS = 50
"""What a process said before it ended may still be in ZeroMQ's hands for so long."""


FOLDERS = "llmasos-link-"
"""What the folders of sockets are called in the system's for temporary ones."""
SURE_S = 60.0
"""An older folder without a lock is nobody's: its owner has not just made it."""


def own(folder: Path) -> int:
    """Lock a folder as long as this process lives, however it ends. Returns the lock's file descriptor."""
    import fcntl  # not on Windows, which has no such folders

    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


@cache
def sweep() -> None:
    """Once: delete what dead processes of this user have left. A lock tells who is dead, whatever has become of their
    process numbers, also where containers share the folder."""
    if os.name != "posix":
        return
    import fcntl

    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*"):
        with suppress(OSError):  # somebody else's, in use, or gone
            stat = folder.lstat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < SURE_S:
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@dataclass(slots=True, eq=False)
class _Entry:
    """A request on its way."""

    id: int
    state: RequestState
    listener: Listener
    home: Home
    left: set[int]
    """Completions that have neither ended nor met a stop string."""


class Link:
    """Any thread may call. In the reading thread `on_news` hears what belongs to no request, and `on_broken` of bytes
    that are no message, after which nothing more is read."""

    delivers_home = True

    def __init__(self, on_news: Callable[[wire.News], None], on_broken: Callable[[wire.MalformedError], None]) -> None:
        self._on_news, self._on_broken = on_news, on_broken
        self.stats = EngineStats()
        self.adapters: list[AdapterInfo] = []
        self.num_heard = 0
        """Messages so far."""
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._by_request: dict[Request, _Entry] = {}
        self._homes: Counter[Home] = Counter()
        self._calls: dict[int, Future[Any]] = {}
        self._end: Callable[[], LLMasOSError] | None = None
        self._idle = threading.Event()
        self._idle.set()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._orders, self._news = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._folder: Path | None = None
        self._owned: int | None = None
        self.server_key = ""
        self.addresses = self._bind()
        self._bell, self._ringer = socket.socketpair()
        self._thread = threading.Thread(target=self._read, name="llmasos-link", daemon=True)
        self._thread.start()

    def _bind(self) -> tuple[str, str]:
        """Addresses of orders and news that nobody else of this machine can use."""
        sockets = (self._orders, self._news)
        for one in sockets:
            one.setsockopt(zmq.LINGER, 0)
            one.setsockopt(zmq.SNDHWM, 0)
            one.setsockopt(zmq.RCVHWM, 0)
        if zmq.has("ipc") and os.name == "posix":
            self._folder = Path(tempfile.mkdtemp(prefix=FOLDERS))  # readable by this user alone
            self._owned = own(self._folder)
            addresses = f"ipc://{self._folder}/orders", f"ipc://{self._folder}/news"
            for one, address in zip(sockets, addresses, strict=True):
                one.bind(address)
            return addresses
        public, secret = zmq.curve_keypair()
        self.server_key = public.decode()
        for one in sockets:
            one.curve_secretkey, one.curve_publickey, one.curve_server = secret, public, True
        orders, news = (one.bind_to_random_port("tcp://127.0.0.1") for one in sockets)
        return f"tcp://127.0.0.1:{orders}", f"tcp://127.0.0.1:{news}"

    # requests: what an Answer needs

    def submit(self, request: Request, listener: Listener, home: Home = None) -> Future[None]:
        """Queue a request. What is wrong with it comes as its last output. Raises what `end` was given."""
        entry = _Entry(next(self._ids), RequestState(request), listener, home, set(range(request.params.n)))
        order = wire.encode(wire.submit_of(entry.id, request))
        with self._lock:
            self._check()
            self._entries[entry.id] = self._by_request[request] = entry
            self._homes[home] += 1
            self._idle.clear()
            self._send(order)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def abort(self, request: Request) -> None:
        """End a request soon; nothing to do if it is over, or everything is."""
        with self._lock:
            entry = self._by_request.get(request)
            if entry is not None:
                self._forget(entry)
                self._send(wire.encode(wire.Abort(entry.id)))

    def pause(self, request: Request, paused: bool) -> None:
        with self._lock:
            if (entry := self._by_request.get(request)) is not None:
                self._send(wire.encode(wire.Pause(entry.id, paused)))

    def finish(self, request: Request, index: int) -> None:
        """End one completion of a request: what was made of it in the meantime is not delivered."""
        with self._lock:
            if (entry := self._by_request.get(request)) is None:
                return
            entry.left.discard(index)
            if entry.left:
                self._send(wire.encode(wire.Finish(entry.id, index)))
            else:
                self._forget(entry)
                self._send(wire.encode(wire.Abort(entry.id)))

    def call(self, make: Callable[[int], wire.Call]) -> Future[Any]:
        """Ask for one Result."""
        id, future = next(self._ids), Future[Any]()
        order = wire.encode(make(id))
        with self._lock:
            self._check()
            self._calls[id] = future
            self._idle.clear()
            self._send(order)
        return future

    def tell(self, order: wire.Order) -> None:
        with self._lock:
            self._send(wire.encode(order))

    @property
    def num_busy(self) -> int:
        """Requests and calls on their way."""
        return len(self._entries) + len(self._calls)

    def wait_idle(self, seconds: float) -> bool:
        """Whether nothing was on its way any more before so many seconds were over."""
        return self._idle.wait(seconds)

    def end(self, error: Callable[[], LLMasOSError]) -> None:
        """The process is gone: what has come from it is still delivered, everything else fails with `error()`."""
        with self._lock:
            self._end = self._end or error
        self._ringer.send(b"x")

    def close(self) -> None:
        """After `end`: let the sockets go."""
        self._thread.join()

    # under the lock

    def _check(self) -> None:
        if self._end is not None:
            raise self._end()

    def _send(self, order: bytes) -> None:
        with suppress(zmq.ZMQError):  # nobody is there to read: `end` is on its way
            self._orders.send(order, zmq.NOBLOCK)

    def _forget(self, entry: _Entry) -> bool:
        if self._entries.pop(entry.id, None) is None:
            return False
        del self._by_request[entry.state.request]
        self._homes[entry.home] -= 1
        if not self._homes[entry.home]:
            del self._homes[entry.home]
        self._rest()
        return True

    def _rest(self) -> None:
        if not self._entries and not self._calls:
            self._idle.set()

    # the reading thread

    def _read(self) -> None:
        sweep()
        poller = zmq.Poller()
        poller.register(self._news, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        over = broken = False
        while not over:
            poller.poll()
            if self._end is not None:
                over = True
                poller.unregister(self._bell)
                poller.poll(LAST_MS)
            while not broken and (frame := self._next()) is not None:
                self.num_heard += 1
                try:
                    self._take(wire.decode_news(frame))
                except wire.MalformedError as error:
                    broken = True
                    poller.unregister(self._news)
                    self._on_broken(error)
        self._fail_all()
        with self._lock:
            self._orders.close()
        self._news.close()
        self._bell.close()
        self._ringer.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._owned is not None:
            os.close(self._owned)

    def _next(self) -> bytes | None:
        try:
            return self._news.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _take(self, news: wire.News) -> None:
        if isinstance(news, wire.Step):
            self.stats = news.stats
            for home in tuple(self._homes):
                self._at(home, self._deliver, home, news)
        elif isinstance(news, wire.Result):
            with self._lock:
                future = self._calls.pop(news.id, None)
                self._rest()
            if future is not None and future.set_running_or_notify_cancel():
                if news.problem is not None:
                    future.set_exception(wire.error_of(news.problem))
                else:
                    future.set_result(news.value)
        else:
            if isinstance(news, wire.Status):
                self.stats, self.adapters = news.stats, news.adapters
            elif isinstance(news, wire.Loaded):
                self.adapters = news.adapters
            self._on_news(news)

    def _at(self, home: Home, work: Callable[..., None], *args: Any) -> None:
        if home is None:
            work(*args)
            return
        try:
            home.call_soon_threadsafe(work, *args)
        except RuntimeError:  # that event loop is closed: its readers are gone
            for entry in tuple(self._entries.values()):
                if entry.home is home:
                    self.abort(entry.state.request)

    # a reader's thread

    def _deliver(self, home: Home, step: wire.Step) -> None:
        """The part of a step that readers of one event loop wait for."""
        now = time.perf_counter()
        entries = self._entries
        for id, token in zip(step.ids, step.tokens, strict=True):
            entry = entries.get(id)
            if entry is not None and entry.home is home and 0 in entry.left:
                state = entry.state
                state.last_token = now
                state.num_tokens += 1
                entry.listener.take_token(token)
        for part in step.parts:
            entry = entries.get(part.id)
            if entry is not None and entry.home is home:
                self._deliver_part(entry, part, now)

    def _deliver_part(self, entry: _Entry, part: wire.Part, now: float) -> None:
        state = entry.state
        if part.queue_seconds is not None:
            state.first_scheduled = state.request.arrival + part.queue_seconds
            state.num_cached = part.num_cached
            for position, sent, best in part.prompt_logprobs:
                state.prompt_logprobs[position] = (wire.logprob_of(sent), best)
        if part.token_ids and part.index in entry.left:
            state.first_token, state.last_token = state.first_token or now, now
            state.num_tokens += len(part.token_ids)
        beams = None
        if part.beams is not None:
            beams = wire.beams_of(part.beams)
            state.last_token = now
            state.num_tokens = sum(len(beam.ids) for beam in beams[: state.request.params.n])
        if part.last:
            with self._lock:
                self._forget(entry)
        elif part.index not in entry.left:
            return
        if part.finish_reason is not None:
            entry.left.discard(part.index)
        output = Output(
            state,
            part.index,
            part.token_ids,
            [wire.logprob_of(sent) for sent in part.logprobs],
            part.finish_reason,
            part.stop_reason,
            part.end_token,
            part.last,
            None if part.problem is None else wire.error_of(part.problem),
            beams,
        )
        entry.listener.take(output)

    def _fail_all(self) -> None:
        with self._lock:
            homes, calls = tuple(self._homes), list(self._calls.values())
            self._calls.clear()
            self._rest()
        for home in homes:  # after what they have still to take
            self._at(home, self._fail, home)
        assert self._end is not None
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._end())

    def _fail(self, home: Home) -> None:
        assert self._end is not None
        for entry in tuple(self._entries.values()):
            if entry.home is home:
                with self._lock:
                    self._forget(entry)
                entry.listener.take(Output(entry.state, 0, last=True, error=self._end()))
