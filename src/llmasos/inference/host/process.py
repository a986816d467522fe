"""A model in a process of its own: started, watched, stopped. The parent loads no torch.

    parent                                   child (host.child)
    ModelProcess  --- Setup on stdin --->    loads the model
    Link          --- orders (ZeroMQ) --->   runs the engine
                  <-- news ------------      one message per step
    stderr reader <-- stderr ----------      native libraries, tracebacks

Whatever ends the child is noticed at once by a thread that waits for it, and every request on its way fails with
ModelCrashedError. One that gives no sign of life is ended. The child in turn ends with its parent. All this holds on
Linux, macOS and Windows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llmasos.errors import InsufficientMemoryError, LLMasOSError, ModelCrashedError, NotFoundError, ServerError
from llmasos.formats.checkpoint import gguf_in
from llmasos.inference.config import EngineConfig
from llmasos.inference.host import messages as wire
from llmasos.inference.host import spare
from llmasos.inference.host.hosted import Description, HostedLLM
from llmasos.inference.host.link import Link
from llmasos.store.transfer import Progress
from llmasos.text import Tokenizer, load_tokenizer

_log = logging.getLogger("llmasos")
LOOK_S = 0.25
"""Seconds between two looks at the child's memory."""
TERM_S = 5.0
"""How long a child may take to end after it was asked to, and again after SIGTERM."""
ORPHANS_S = 3.0
"""How long the child's own children may take to end after it."""
LAST_LINES = 20
SILENT_S = 120.0
"""A child that has said nothing for so long hangs, and is ended. It says every second that it lives, from a thread that
nothing but the interpreter can hold up: torch on a slow disk does, for as long as one library takes to be read."""
LONG_STEP_S = 60.0
"""After so long a step of the engine is worth a line of the log, and again after twice that time."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is to be served. `engine`: fields of EngineConfig. `adapters`: names and folders."""

    name: str
    reference: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    load_format: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `rss_bytes` are those of the process and its children in main memory, mapped files included."""

    rss_bytes: int = 0
    peak_rss_bytes: int = 0
    device_bytes: int = 0
    peak_device_bytes: int = 0


class ModelProcess:
    """Made by `start`. `memory_limit`: bytes of main memory that the process may take beyond mapped files; with more it
    is ended."""

    llm: HostedLLM
    load_seconds: float
    device: str
    dtype: str

    def __init__(
        self, spec: ModelSpec, *, on_progress: Callable[[Progress], None] | None, memory_limit: int | None
    ) -> None:
        self.spec, self.memory_limit = spec, memory_limit
        self._config = EngineConfig.of(**spec.engine)
        self._has_children = self._config.tensor_parallel_size > 1
        self._on_progress = on_progress
        self.memory = MemoryUse()
        self.pid = 0
        self._loaded: Future[None] = Future()
        self._ended: Future[int] = Future()
        self._tokenizer: Future[Tokenizer | None] = Future()
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reason: LLMasOSError | None = None
        """Why the process ends, where it is known better than by its exit code."""
        self._how = "it runs"
        self.most_silence = SILENT_S
        self.step_seconds = 0.0
        """For how long the engine's current step has been running, as of the last sign of life."""
        self._heard, self._silent, self._next_warning = 0, 0.0, LONG_STEP_S
        self._stopping = False
        self._begin = time.monotonic()
        self.link = Link(self._hear, self._break)
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._live, name=f"llmasos-{spec.name}", daemon=True).start()

    @classmethod
    async def start(
        cls,
        spec: ModelSpec,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        memory_limit: int | None = None,
    ) -> ModelProcess:
        """Load a model. `on_progress` is called in the running event loop. Raises what the load raised, or
        ModelCrashedError with the process's last words. A start that is cancelled leaves no process."""
        loop = asyncio.get_running_loop()
        report = None
        if on_progress is not None:
            heard = on_progress

            def report(progress: Progress) -> None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(heard, progress)

        process = cls(spec, on_progress=report, memory_limit=memory_limit)
        try:
            await asyncio.wrap_future(process._loaded)
        except BaseException:
            process.kill()
            with suppress(asyncio.CancelledError):
                await asyncio.shield(process.wait())
            raise
        return process

    def __repr__(self) -> str:
        return f"ModelProcess({self.spec.name!r}, pid={self.pid})"

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """The exit code when the process ends, however; negative for a signal."""
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    async def stop(self, grace: float) -> None:
        """Let what is on its way come to its end for up to `grace` seconds, then end the process, by force if need be,
        and all that it has started. Requests that are still on their way fail."""
        self._stopping = True
        if self.running:
            await asyncio.to_thread(self._wind_down, grace)
        await self.wait()

    def kill(self) -> None:
        """End the process now."""
        self._stopping = True
        self._signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)

    # the end

    def _wind_down(self, grace: float) -> None:
        end = time.monotonic() + grace
        while self.running and not self.link.wait_idle(0.05) and time.monotonic() < end:
            pass
        self.link.tell(wire.Stop())
        if self._ends_within(TERM_S):
            return
        self._signal(signal.SIGTERM)
        if not self._ends_within(TERM_S):
            self.kill()

    def _ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.02)
        return not self.running

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    # the thread that starts the child and waits for it: Linux kills a child when the thread that made it ends

    def _live(self) -> None:
        try:
            process = self._spawn()
        except Exception as error:  # whatever it is, somebody waits to hear of it
            what = f"No process for {self.spec.name} could be started: {error}"
            self._reason = error if isinstance(error, LLMasOSError) else ServerError(what)
            self._report_end(1)
            self._ended.set_result(1)
            return
        reader = threading.Thread(target=self._read_stderr, args=(process,), name="llmasos-stderr", daemon=True)
        reader.start()
        if self._stopping:  # before there was a process to stop
            process.kill()
        with _waiting(process) as ended:
            while not ended(LOOK_S):
                self._look(process)
                self._listen(process)
        reader.join(0.2)  # its last words; its own children may hold the pipe longer
        self._report_end(_exit_code(process))
        self._ended.set_result(self._reap(process))

    def _spawn(self) -> subprocess.Popen[bytes]:
        spec = self.spec
        engine = dict(spec.engine)
        if self._config.speculative is not None:
            engine["speculative"] = asdict(self._config.speculative)
        orders, news = self.link.addresses
        setup = wire.Setup(
            spec.name,
            spec.reference,
            spec.device,
            spec.dtype,
            spec.quantization,
            spec.load_format,
            engine,
            dict(spec.adapters),
            os.getpid(),
            orders,
            news,
            self.link.server_key,
        )
        warm = spare.take() if spec.device == "cpu" else None
        if warm is not None:
            self._begin = warm.began
        process = warm.process if warm is not None else spare.start(spec.name)
        self._process, self.pid = process, process.pid
        assert process.stdout is not None
        process.stdout.close()
        spare.tell(process, setup)
        return process

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        use = memory_of(process.pid, with_children=self._has_children)
        if use is None:
            return
        rss, kept = use
        known = self.memory
        self.memory = MemoryUse(rss, max(known.peak_rss_bytes, rss), known.device_bytes, known.peak_device_bytes)
        if self.memory_limit is not None and kept > self.memory_limit and self._reason is None:
            self._reason = InsufficientMemoryError(
                f"{self.spec.name} took {kept / 1e6:,.0f} MB of main memory; its limit is "
                f"{self.memory_limit / 1e6:,.0f} MB.",
                hint="Raise the limit, lower kv_cache_memory or max_num_seqs, or choose a smaller quantisation.",
            )
            process.kill()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Silence is counted in looks, not by a clock: when this process was stopped itself, no child is dead."""
        heard, self._heard = self._heard, self.link.num_heard
        self._silent = self._silent + LOOK_S if heard == self._heard else 0.0
        if self._silent > self.most_silence and self._reason is None:
            self._reason = ServerError(
                f"It gave no sign of life for {self._silent:.0f} s and was ended.", hint="Send the request again."
            )
            process.kill()

    def _read_stderr(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._last_lines.append(text)
            _log.warning("%s: %s", self.spec.name, text)
        process.stderr.close()

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code, when all that the child has started has ended too."""
        if os.name == "posix":
            end = time.monotonic() + ORPHANS_S
            while self._has_children and _group_lives(process.pid) and time.monotonic() < end:
                time.sleep(0.05)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        return code

    def _report_end(self, code: int) -> None:
        self._how = _how(code)
        self.link.end(self._crash)
        self.link.close()
        with suppress(InvalidStateError):  # loaded long ago, or nobody waits any more
            self._loaded.set_exception(self._reason if self._reason is not None else self._crash())
        if not self._stopping:
            _log.error("%s", self._crash().message)

    @property
    def why(self) -> str:
        """Why it has ended, in a line."""
        if self._reason is not None:
            return self._reason.message
        return f"{self._how}." + (f" Its last line: {self._last_lines[-1]}" if self._last_lines else "")

    def _crash(self) -> LLMasOSError:
        name = self.spec.name
        if self._stopping:
            return ModelCrashedError(f"{name} was unloaded.", hint="Send the request again.")
        if self._reason is not None:
            reason = self._reason
            return ModelCrashedError(f"The process of {name} has ended: {reason.message}", hint=reason.hint)
        said = "\n".join(self._last_lines)
        return ModelCrashedError(
            f"The process of {name} (pid {self.pid}) has ended: {self._how}."
            + (f" Its last words:\n{said}\n" if said else ""),
            hint="Send the request again.",
        )

    # the link's thread

    def _hear(self, news: wire.News) -> None:
        if isinstance(news, wire.Status):
            self.memory = MemoryUse(
                self.memory.rss_bytes, self.memory.peak_rss_bytes, news.device_bytes, news.peak_device_bytes
            )
        elif isinstance(news, wire.Beat):
            self._beat(news.step_seconds)
        elif isinstance(news, wire.Log):
            _log.log(news.level, "%s: %s", self.spec.name, news.message)
        elif isinstance(news, wire.Working):
            if self._on_progress is not None:
                self._on_progress(news.progress)
        elif isinstance(news, wire.Located):
            threading.Thread(target=self._read_tokenizer, args=(news.path,), daemon=True).start()
        elif isinstance(news, wire.Loaded):
            self._tokenizer.add_done_callback(lambda read: self._ready(news, read))
        elif isinstance(news, wire.Failed):
            self._reason = wire.error_of(news.problem)

    def _beat(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        if step_seconds < LONG_STEP_S:
            self._next_warning = LONG_STEP_S
        elif step_seconds >= self._next_warning:
            self._next_warning *= 2
            _log.warning("%s: a step of its engine has been running for %.0f s.", self.spec.name, step_seconds)

    def _break(self, error: wire.MalformedError) -> None:
        self._reason = error
        self._signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)

    def _read_tokenizer(self, path: str) -> None:
        """While the child loads torch and the weights."""
        try:
            self._tokenizer.set_result(tokenizer_of(Path(path), needed=self.spec.load_format != "dummy"))
        except Exception as error:
            self._tokenizer.set_exception(error)

    def _ready(self, news: wire.Loaded, tokenizer: Future[Tokenizer | None]) -> None:
        if self._loaded.done():
            return
        try:
            model = Description(news.config, tokenizer.result(), news.generation, news.pooling)
            self.llm = HostedLLM(self.spec.name, model, self._config, self.link)
        except Exception as error:
            with suppress(InvalidStateError):
                self._loaded.set_exception(error)
            return
        self.device, self.dtype = news.device, news.dtype
        if self._process is not None:
            self._look(self._process)  # the last look may be of before the weights were there
        self.load_seconds = time.monotonic() - self._begin
        with suppress(InvalidStateError):  # the start was cancelled meanwhile
            self._loaded.set_result(None)


def tokenizer_of(path: Path, *, needed: bool) -> Tokenizer | None:
    """The tokenizer of a model's files, without loading torch. Raises what `load_tokenizer` raises if it is needed."""
    try:
        return load_tokenizer(gguf_in(path))
    except NotFoundError:
        if needed:
            raise
        return None


def memory_of(pid: int, *, with_children: bool) -> tuple[int, int] | None:
    """Bytes of main memory that a process holds, and its children: all, and those that could not be read from a file
    again. None if it has ended. Pages that several of them share count once for each."""
    try:
        process = psutil.Process(pid)
        family = [process, *(process.children(recursive=True) if with_children else ())]
    except (psutil.Error, OSError):  # the latter: no file descriptor is left; another look may succeed
        return None
    rss = kept = 0
    for one in family:
        with suppress(psutil.Error, OSError):
            memory = one.memory_info()
            rss += memory.rss
            kept += memory.rss - _mapped(one.pid)
    return rss, kept


def _mapped(pid: int) -> int:
    """Bytes of files that lie in the process's memory, where the system tells (Linux)."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssFile:"):
                return 1024 * int(line.split()[1])
    return 0


@contextmanager
def _waiting(process: subprocess.Popen[bytes]) -> Iterator[Callable[[float], bool]]:
    """A function that waits for up to so many seconds and says whether the child has ended. Where the system can, it is
    not reaped: the number of its group stays its own."""
    try:
        fd = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
    except OSError:  # an old kernel
        fd = None
    if fd is None:
        yield lambda seconds: _reaped(process, seconds)
        return
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        yield lambda seconds: bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _reaped(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Of a child that has ended; negative for a signal."""
    if process.returncode is None and hasattr(os, "waitid"):
        with suppress(ChildProcessError):  # a signal to it found it ended, and took its code
            result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert result is not None
            return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
    return process.wait()


def _group_lives(leader: int) -> bool:
    """Whether a process of the group, the leader aside, has not ended."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            own = process.pid != leader and os.getpgid(process.pid) == leader
            if own and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"signal {name}" + (" (was memory short?)" if name == "SIGKILL" else "")
