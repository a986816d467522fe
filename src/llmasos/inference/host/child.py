"""A model's process: `python -m llmasos.inference.host.child NAME`, started by `process.ModelProcess`.

Loads the model, runs its engine, and does what comes over the socket. It knows token ids only. It ends when it is told
to, when its parent ends, and when the model can't be used any more (a CUDA error that stays, a dead rank).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from llmasos.errors import LLMasOSError, ServerError, error_facts
from llmasos.inference.host import messages as wire
from llmasos.store.transfer import Progress

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.inference.state import EngineStats, Output, Request

STATUS_S = 1.0
"""Seconds between two looks at memory and at other ranks."""
BEAT_S = 1.0
"""Seconds between two signs of life."""
LINGER_MS = 1000
_PR_SET_PDEATHSIG = 1


class Line:
    """The child's end of the sockets. Any thread may `send`; one receives."""

    def __init__(self, setup: wire.Setup) -> None:
        # two contexts: what is to be said can be seen off while a thread waits for orders
        self._contexts: list[zmq.Context[zmq.Socket[bytes]]] = [zmq.Context(), zmq.Context()]
        self.orders, self._news = self._contexts[0].socket(zmq.PULL), self._contexts[1].socket(zmq.PUSH)
        self._lock = threading.Lock()
        for one, address in ((self.orders, setup.orders), (self._news, setup.news)):
            one.setsockopt(zmq.SNDHWM, 0)
            one.setsockopt(zmq.RCVHWM, 0)
            one.setsockopt(zmq.LINGER, LINGER_MS)
            if setup.server_key:
                public, secret = zmq.curve_keypair()
                one.curve_secretkey, one.curve_publickey = secret, public
                one.curve_serverkey = setup.server_key.encode()
            one.connect(address)

    def send(self, news: wire.News) -> None:
        frame = wire.encode(news)
        with self._lock:
            self._news.send(frame)

    def see_off(self) -> None:
        """Send no more, and wait until the parent has what was sent."""
        with self._lock:
            self._news.close()
            self._contexts[1].term()


class Pulse(threading.Thread):
    """Signs of life from the process's first moments to its last, whatever its other threads do."""

    def __init__(self, line: Line) -> None:
        super().__init__(name="llmasos-pulse", daemon=True)
        self._line = line
        self.step_seconds: Callable[[], float] = lambda: 0.0

    def run(self) -> None:
        with suppress(zmq.ZMQError):  # the line is closed
            while True:
                self._line.send(wire.Beat(self.step_seconds()))
                time.sleep(BEAT_S)


class _Asked:
    """A request on its way."""

    __slots__ = ("id", "request", "told")

    def __init__(self, id: int, request: Request) -> None:
        self.id, self.request = id, request
        self.told = False
        """Its first output has been sent."""


class Child:
    def __init__(self, llm: LLM, line: Line) -> None:
        self.llm, self.line = llm, line
        self._asked: dict[int, _Asked] = {}
        self._by_request: dict[Request, _Asked] = {}
        self._ids: list[int] = []
        self._tokens: list[int] = []
        self._parts: list[wire.Part] = []
        self._ending = threading.Event()
        llm._loop.after_step = self._flush

    def run(self) -> None:
        """Do what comes until `Stop`."""
        threading.Thread(target=self._watch, name="llmasos-status", daemon=True).start()
        while not isinstance(order := wire.decode_order(self.line.orders.recv()), wire.Stop):
            self._do(order)
        self._ending.set()
        self._by_request.clear()  # whoever still waits hears of the process's end
        self.llm.close()

    def _do(self, order: wire.Order) -> None:
        loop = self.llm._loop
        if isinstance(order, wire.Submit):
            self._submit(order)
        elif isinstance(order, wire.Abort | wire.Finish | wire.Pause):
            loop.run(lambda: self._change(order))
        else:
            assert not isinstance(order, wire.Stop)
            threading.Thread(target=self._call, args=(order,), name="llmasos-call", daemon=True).start()

    def step_seconds(self) -> float:
        began = self.llm._loop.turn_began
        return 0.0 if began is None else time.monotonic() - began

    # requests

    def _submit(self, order: wire.Submit) -> None:
        try:
            request = wire.request_of(order)
        except Exception as error:  # one request's fault is not the model's
            self._refuse(order.id, error)
            return
        asked = _Asked(order.id, request)
        self._asked[order.id] = self._by_request[request] = asked
        future = self.llm._loop.submit(request, self)
        future.add_done_callback(lambda done: self._submitted(asked, done))

    def _submitted(self, asked: _Asked, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            self._forget(asked)
            self._refuse(asked.id, error)

    def _refuse(self, id: int, error: BaseException) -> None:
        part = wire.Part(id, 0, [], last=True, problem=wire.problem_of(error))
        self.line.send(wire.Step([], [], [part], self.llm.stats))

    def _change(self, order: wire.Abort | wire.Finish | wire.Pause) -> None:
        """In the engine's thread."""
        asked = self._asked.get(order.id)
        if asked is None:
            return
        loop = self.llm._loop
        if isinstance(order, wire.Pause):
            loop.pause(asked.request, order.paused)
            return
        if isinstance(order, wire.Finish):
            loop.finish(asked.request, order.index)
        else:
            self._forget(asked)
            loop.abort(asked.request)
        loop.run(self._tell)  # after what `abort` has asked for

    def _forget(self, asked: _Asked) -> None:
        if self._asked.pop(asked.id, None) is not None:
            del self._by_request[asked.request]

    def take(self, output: Output) -> None:
        """In the engine's thread."""
        asked = self._by_request.get(output.request)
        if asked is None:
            return
        plain = asked.told and len(output.token_ids) == 1 and not output.index and not output.logprobs
        if plain and output.finish_reason is None and not output.last:
            self._ids.append(asked.id)
            self._tokens.append(output.token_ids[0])
            return
        if output.error is not None and (cause := self._lasting()) is not None:
            die(self.line, cause)
        self._parts.append(wire.part_of(asked.id, output, first=not asked.told))
        asked.told = True
        if output.last:
            self._forget(asked)

    def _flush(self) -> None:
        """In the engine's thread: one message for a step."""
        if self._ids or self._parts:
            self.line.send(wire.Step(self._ids, self._tokens, self._parts, self.llm.stats))
            self._ids, self._tokens, self._parts = [], [], []

    def _lasting(self) -> LLMasOSError | None:
        """What makes this process useless, if anything does: asked when a request has failed."""
        try:
            self.llm.check()
        except LLMasOSError as dead:
            return dead
        if self.llm.model.module.device.type != "cuda":
            return None
        import torch

        try:
            torch.cuda.synchronize(self.llm.model.module.device)
        except RuntimeError as sticky:  # CUDA refuses everything after an illegal access
            return ServerError(f"The GPU gave up: {sticky}", hint="Try again: the model is loaded afresh.")
        return None

    # other work

    def _call(self, order: wire.Call) -> None:
        try:
            result = wire.Result(order.id, self._answer(order))
        except Exception as error:
            result = wire.Result(order.id, problem=wire.problem_of(error))
        self.line.send(result)

    def _answer(self, order: wire.Call) -> Any:
        llm = self.llm
        if isinstance(order, wire.Embed):
            return llm._embed(order.texts, order.pooling, order.normalize)
        if isinstance(order, wire.FillMask):
            return llm._fill_mask(order.text, order.top_k)
        if isinstance(order, wire.Classify):
            return llm._classify(order.texts, order.types)
        if isinstance(order, wire.Sleep):
            return llm.sleep()
        if isinstance(order, wire.WakeUp):
            return llm.wake_up()
        if isinstance(order, wire.LoadAdapter):
            llm.load_adapter(order.name, order.path)
        else:
            llm.unload_adapter(order.name)
        self._tell()  # before the result: who has it sees the new list
        return None

    # status

    def _tell(self) -> None:
        self.line.send(self._status(self.llm.stats))

    def _status(self, stats: EngineStats) -> wire.Status:
        held, peak = device_memory(self.llm)
        return wire.Status(stats, self.llm.adapters, held, peak)

    def _watch(self) -> None:
        before: wire.Status | None = None
        while not self._ending.wait(STATUS_S):
            try:
                self.llm.check()
            except LLMasOSError as error:
                die(self.line, error)
            status = self._status(self.llm.stats)
            if status != before:
                self.line.send(status)
            before = status


def device_memory(llm: LLM) -> tuple[int, int]:
    """Bytes that torch holds of the model's device now, and the most that it has held."""
    device = llm.model.module.device
    if device.type != "cuda":
        return 0, 0
    import torch

    return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)


def die(line: Line, error: BaseException) -> None:
    """End now: the parent fails what is on its way and knows why."""
    with suppress(Exception):
        line.send(wire.Failed(wire.problem_of(error)))
        line.see_off()
    os._exit(1)


# beginning


class _Logs(logging.Handler):
    """Our log records go to the parent, which has the log."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):
            self._line.send(wire.Log(record.levelno, self.format(record)))


def read_setup(answers: int) -> wire.Setup:
    """From standard input. Before, the parent may ask what a model takes; that is written to `answers`."""
    first = _read_message()
    if isinstance(first, wire.Setup):
        return first
    foretell(first.options, answers)
    return read_setup(answers)


def _read_message() -> wire.Setup | wire.Foretell:
    """Four bytes of length, most significant first, and the message."""
    stdin = sys.stdin.buffer
    if not (head := stdin.read(4)):
        os._exit(1)  # the parent is gone
    return wire.decode_setup(stdin.read(int.from_bytes(head, "big")))


def foretell(options: dict[str, Any], answers: int) -> None:
    """See `wire.Foretell`."""
    from llmasos.inference.host.forecast import forecast

    try:
        told = forecast(**options)
        answer = {"ok": asdict(told)}
    except LLMasOSError as e:
        answer = {"error": error_facts(e)}
    os.write(answers, json.dumps(answer).encode() + b"\n")
    if "error" in answer or told.device != "cpu":
        os._exit(0)


def end_with_parent(parent: int) -> None:
    """Linux kills this process when the thread that started it ends; elsewhere the end of standard input says so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before that was set
            os._exit(1)

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, name="llmasos-parent", daemon=True).start()


def load(setup: wire.Setup, report: Callable[[wire.News], None]) -> LLM:
    """Raises what `LLM.from_pretrained` raises."""
    from llmasos.inference.config import EngineConfig
    from llmasos.store import ensure

    config = EngineConfig.of(**setup.engine)
    path = ensure(setup.reference, on_progress=lambda progress: report(wire.Working(progress)))
    report(wire.Located(str(path)))
    total = weight_bytes(path)
    report(wire.Working(Progress("load", total=total)))
    from llmasos.inference.llm import LLM

    llm = LLM.load(
        path,
        name=setup.name,
        config=config,
        device=setup.device,
        dtype=setup.dtype,
        quantization=setup.quantization,
        load_format=setup.load_format,
    )
    llm.start()
    for name, folder in setup.adapters.items():
        llm.load_adapter(name, Path(folder))
    report(wire.Working(Progress("load", done=total, total=total)))
    return llm


def weight_bytes(path: Path) -> int:
    """Of a model's files with weights."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    faulthandler.enable(all_threads=False)
    setup = read_setup(answers)
    os.close(answers)
    end_with_parent(setup.parent)
    with suppress(OSError):  # if memory runs out, this process goes before its parent (Linux)
        Path("/proc/self/oom_score_adj").write_text("500")
    line = Line(setup)
    pulse = Pulse(line)
    pulse.start()
    log = logging.getLogger("llmasos")
    log.addHandler(_Logs(line))
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        llm = load(setup, line.send)
    except Exception as error:
        if not isinstance(error, LLMasOSError):
            traceback.print_exc()
        die(line, error)
    module = llm.model.module
    line.send(
        wire.Loaded(
            replace(llm.model.config, extra={}),
            llm.model.generation,
            llm.model.pooling,
            str(module.device),
            str(module.dtype).removeprefix("torch."),
            llm.adapters,
        )
    )
    child = Child(llm, line)
    pulse.step_seconds = child.step_seconds
    child._tell()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        child.run()
    except Exception as error:
        traceback.print_exc()
        die(line, error)
    line.see_off()
    sys.stderr.flush()
    os._exit(0)  # to take an interpreter with torch in it apart took 3 s on a busy machine, and whoever stops waits


if __name__ == "__main__":
    main()
