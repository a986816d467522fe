"""The processes of a tensor-parallel model, one per device. The caller's is rank 0 and tells the others what to do.

Every process makes the same object (a runner) from one picklable factory and then calls the same methods of it in the
same order; what they compute together goes through the `Group`. Orders travel through shared memory that all workers
read; pipes carry answers back, orders that are too long, and what wakes a sleeper. No process waits for a dead one: a
worker's end is noticed by a thread of rank 0, and workers end with rank 0.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Literal

import torch

from llmasos.errors import DeviceError, LLMasOSError
from llmasos.models.parallel import Group

SLOTS, SLOT_BYTES = 8, 1 << 20
SPIN_S = 0.005
"""A worker looks for its next order this long before it sleeps: longer than a decode step takes."""
GRACE_S = 5.0
"""How long processes that should end, or the cause of an error elsewhere, are waited for."""
_LINE = 8
"""Words of a cache line; counters that different processes write lie on different ones."""
Factory = Callable[[Group], Any]
_Answer = Literal["result", "error", "last words"]


class _Ring:
    """A queue from one writer to several readers, each of which sees every message. `word[0]` counts what was written,
    each reader's line what it has read and whether it sleeps; a slot is its length, -1 for "in the pipe", and bytes."""

    def __init__(self, num_readers: int, name: str | None = None) -> None:
        head = 8 * _LINE * (1 + num_readers)
        self.memory = SharedMemory(name, create=name is None, size=head + SLOTS * (8 + SLOT_BYTES))
        view = self.memory.buf
        assert view is not None, "fresh memory is open"
        self.words, self.slots = view[:head].cast("q"), view[head:]
        self.num_readers = num_readers
        self._order = threading.Lock()

    def _slot(self, count: int) -> tuple[memoryview, memoryview]:
        start = count % SLOTS * (8 + SLOT_BYTES)
        return self.slots[start : start + 8].cast("q"), self.slots[start + 8 : start + 8 + SLOT_BYTES]

    def _fence(self) -> None:
        """Locks are barriers: what was written before is seen before what is written after, on any processor."""
        with self._order:
            pass

    def full(self) -> bool:
        reads = [self.words[_LINE * (1 + r)] for r in range(self.num_readers)]
        return self.words[0] - min(reads) >= SLOTS

    def write(self, payload: bytes) -> bool:
        """False: too long; the readers have been told to look into their pipes."""
        length, place = self._slot(self.words[0])
        fits = len(payload) <= SLOT_BYTES
        length[0] = len(payload) if fits else -1
        if fits:
            place[: len(payload)] = payload
        self._fence()
        self.words[0] += 1
        self._fence()
        return fits

    def sleepers(self) -> list[int]:
        return [r for r in range(self.num_readers) if self.words[_LINE * (1 + r) + 1]]

    # reader's side

    def waiting(self, reader: int) -> bool:
        return self.words[0] > self.words[_LINE * (1 + reader)]

    def sleeps(self, reader: int, asleep: bool) -> None:
        self.words[_LINE * (1 + reader) + 1] = asleep
        self._fence()

    def read(self, reader: int, long: Callable[[], bytes]) -> Any:
        self._fence()
        length, place = self._slot(self.words[_LINE * (1 + reader)])
        try:
            return pickle.loads(long() if length[0] < 0 else place[: length[0]])
        finally:
            self.words[_LINE * (1 + reader)] += 1

    def close(self, *, unlink: bool) -> None:
        with suppress(BufferError):  # the frames of an error may still look at a slot
            self.words.release()
            self.slots.release()
            self.memory.close()
        if unlink:
            self.memory.unlink()


class Workers:
    """Starts `world_size` - 1 processes and makes `factory(group)` in each and here (`local`).

    `device` is a kind, "cuda" or "cpu": rank r computes on cuda:r. The factory and what it makes may not wait for other
    ranks before all are made. Raises DeviceError where there are fewer GPUs or a process ends, and what a factory
    raises. One thread at a time may use it; scripts start it under `if __name__ == "__main__":`.
    """

    local: Any

    def __init__(self, world_size: int, factory: Factory, device: str = "cuda") -> None:
        if device == "cuda" and torch.cuda.device_count() < world_size:
            raise DeviceError(
                f"tensor_parallel_size={world_size} needs that many GPUs; this machine has "
                f"{torch.cuda.device_count()}.",
                hint="Use fewer, or one.",
            )
        assert world_size > 1, "one process needs no others"
        self.world_size = world_size
        self._dead: int | None = None
        self._reason: Exception | None = None
        self._up = self._closed = False
        self._group: Group | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="llmasos-"))
        self._ring = _Ring(world_size - 1)
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        atexit.register(self.close)
        try:
            self._start(factory, device)
        except BaseException:
            self.close()
            raise

    def _start(self, factory: Factory, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = self._folder / "rendezvous"
        for rank in range(1, self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, device, meeting, self._ring.memory.name, theirs, factory)
            process = context.Process(target=_worker, args=args, name=f"llmasos-rank-{rank}", daemon=True)
            process.start()
            theirs.close()  # so that the pipe breaks when the worker ends
            self._pipes.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, name="llmasos-workers", daemon=True).start()
        self._answers()  # all have come up, so none waits in vain at the meeting
        self._group = Group(0, self.world_size, _device(device, 0), meeting)
        self.local = factory(self._group)
        self._answers()
        self._up = True

    # orders

    def broadcast(self, method: str, *args: Any) -> None:
        """Every other rank calls `method(*args)` of its object as soon as it can; the caller does so itself, with
        `local`. What goes wrong elsewhere is raised by a later call. Raises DeviceError if a worker has ended."""
        self._send(False, method, args)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Every rank calls the method, this one too; returns the results by rank. An error of this rank's is raised
        first, else the lowest rank's, its rank named."""
        self._send(True, method, args)
        try:
            mine = getattr(self.local, method)(*args)
        except Exception as error:
            self._collect_after(error)
            raise
        return [mine, *self._answers()]

    def check(self) -> None:
        """Raise DeviceError if a worker has ended. Cheap: call it while you wait for a device, whose kernels may wait
        for a peer that is gone."""
        if self._dead is not None:
            raise self._death(self._dead)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what this rank does itself after a `broadcast`. An error means that the ranks are no longer in one
        state, and that others may wait for this one: all end. Raises DeviceError, with the end of another rank where
        that is what is behind it (a broken connection)."""
        try:
            yield
        except Exception as error:
            self._await_death()
            if self._dead is None:
                self._dead, self._reason = 0, _of_rank(0, _portable(error))
            self.close()
            raise self._death(self._dead) from error

    def _await_death(self) -> None:
        """A connection breaks sooner than its cause is known."""
        deadline = time.monotonic() + 1.0
        while self._dead is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """End the workers, by force where they don't listen; again: nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        orderly = self._up and self._dead is None
        if orderly:
            with suppress(LLMasOSError, OSError):
                self._send(False, "", ())
        if self._group is not None:
            _close(getattr(self, "local", None))
            self._group.close()
        deadline = time.monotonic() + (GRACE_S if orderly else 0.0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._ring.close(unlink=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # inside

    def _send(self, answer: bool, method: str, args: tuple[Any, ...]) -> None:
        self.check()
        payload = pickle.dumps((answer, method, args), pickle.HIGHEST_PROTOCOL)
        while self._ring.full():
            self.check()
            time.sleep(1e-4)
        try:
            if not self._ring.write(payload):
                for pipe in self._pipes:
                    pipe.send_bytes(payload)
            else:
                for reader in self._ring.sleepers():
                    self._pipes[reader].send_bytes(b"")
        except (BrokenPipeError, ConnectionResetError):
            self._await_death()
            self.check()
            raise

    def _answers(self) -> list[Any]:
        """One answer of each worker; the lowest rank's error is raised once all have answered."""
        answers = [self._answer(rank, pipe) for rank, pipe in enumerate(self._pipes, 1)]
        for rank, (kind, value) in enumerate(answers, 1):
            if kind == "error":
                raise _of_rank(rank, value)
        return [value for _, value in answers]

    def _answer(self, rank: int, pipe: Connection) -> tuple[_Answer, Any]:
        while not pipe.poll(0.1):
            self.check()
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            self._dead = self._dead or rank
            raise self._death(rank) from None
        if kind == "last words":
            self._dead, self._reason = rank, _of_rank(rank, value)
            raise self._death(rank)
        return kind, value

    def _collect_after(self, error: Exception) -> None:
        """This rank failed: keep the answers in step, and say so if it failed because a worker ended."""
        try:
            self._answers()
        except Exception:
            if self._dead is not None:
                raise self._death(self._dead) from error

    def _watch(self) -> None:
        ranks = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        ended = wait(list(ranks))
        if not self._closed:
            self._dead = ranks[ended[0]]  # type: ignore[index]  # sentinels are what was waited for
            if self._group is not None:
                self._group.abort()

    def _death(self, rank: int) -> Exception:
        """What the worker said last, or how it ended; once all worked, that there is no going on."""
        if self._reason is None:
            self._reason = self._last_words(rank)
        if not self._up:
            return self._reason
        error = DeviceError(
            self._reason.message if isinstance(self._reason, LLMasOSError) else str(self._reason),
            hint="A process of this tensor-parallel model is gone: load the model again.",
        )
        error.__cause__ = self._reason
        return error

    def _last_words(self, rank: int) -> Exception:
        pipe, process = self._pipes[rank - 1], self._processes[rank - 1]
        process.join(GRACE_S)
        with suppress(OSError, EOFError):
            while pipe.poll(0):
                kind, value = pipe.recv()
                if kind == "last words":
                    return _of_rank(rank, value)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return DeviceError(
            f"The worker of rank {rank} (process {process.pid}) ended: {how}.",
            hint='Its own message, if any, is above. Was memory short? Scripts need `if __name__ == "__main__":`.',
        )


def _of_rank(rank: int, error: Exception) -> Exception:
    text = error.message if isinstance(error, LLMasOSError) else str(error)
    error.args = (f"Rank {rank}: {text}",)
    if isinstance(error, LLMasOSError):
        error.message = error.args[0]
    return error


def _device(kind: str, rank: int) -> torch.device:
    return torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)


# a worker's side


def _close(target: Any) -> None:
    """Let an object go of what holds the group (CUDA graphs with sums in them), where it has something to close."""
    if hasattr(target, "close"):
        target.close()


def _worker(rank: int, size: int, device: str, meeting: Path, memory: str, pipe: Connection, factory: Factory) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches rank 0, which ends its workers
    threading.Thread(target=_end_with_parent, name="llmasos-parent", daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    ring = _Ring(size - 1, memory)
    try:
        pipe.send(("result", None))
        group = Group(rank, size, _device(device, rank), meeting)
        target = factory(group)
        pipe.send(("result", None))
        _serve(target, ring, rank - 1, pipe)
        _close(target)
        group.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # rank 0 is gone
    except Exception as error:
        pipe.send(("last words", _portable(error)))
    finally:
        ring.close(unlink=False)


def _serve(target: Any, ring: _Ring, reader: int, pipe: Connection) -> None:
    while True:
        _await_order(ring, reader, pipe)
        answer, method, args = ring.read(reader, lambda: _long_order(pipe))
        if not method:
            return
        try:
            result = getattr(target, method)(*args)
        except Exception as error:
            if not answer:  # the ranks are no longer in the same state; the device may wait for them
                pipe.send(("last words", _portable(error)))
                os._exit(1)
            pipe.send(("error", _portable(error)))
            continue
        if answer:
            pipe.send(("result", result))


def _await_order(ring: _Ring, reader: int, pipe: Connection) -> None:
    end = time.perf_counter() + SPIN_S
    while not ring.waiting(reader):
        if time.perf_counter() < end:
            os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)
            continue
        ring.sleeps(reader, True)
        # a wake-up that was lost, which some processors allow, costs a twentieth of a second
        if not ring.waiting(reader) and pipe.poll(0.05) and not ring.waiting(reader):
            pipe.recv_bytes()  # a wake-up that came too late; one in time stays there, before a long order perhaps
        ring.sleeps(reader, False)


def _long_order(pipe: Connection) -> bytes:
    while not (payload := pipe.recv_bytes()):  # wake-ups
        pass
    return payload


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it can't travel; where it happened is its note."""
    try:
        same = pickle.loads(pickle.dumps(error))
        error = same if type(same) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(traceback.format_exc())
    return error


def _end_with_parent() -> None:
    """Also where this process hangs in a device that waits for rank 0."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
