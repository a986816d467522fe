"""A command in the sandbox: started, watched, ended with all that it has started.

`start` and `wait` are plain functions, since a program is run from threads (a task) as well as from an event loop (the
server); `ended` is the same for the latter. A thread per process watches.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from llmasos.apps.sandbox.policy import SYSTEM_PATHS, Policy
from llmasos.apps.sandbox.watch import Use, disk_of, tree, use_of
from llmasos.errors import InvalidInputError, NotFoundError, ServerError

LOOK_S = 0.05
"""Seconds between two looks at what a sandbox takes."""
DISK_LOOK_S = 0.25
"""The same for its disk, and at least SLOWNESS times what the look itself took."""
SLOWNESS = 10
START_S = 30.0
END_S = 10.0
"""How long the launcher may take to end everything before it is ended itself."""
_DEVICES = ("null", "zero", "full", "random", "urandom")
_GPU_DEVICES = ("nvidia*", "dri", "kfd")
_ALWAYS_PASSED = ("LANG", "LC_ALL", "TZ", "SYSTEMROOT", "PATHEXT", "COMSPEC")
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_PACKAGE_ROOT = str(Path(__file__).parents[3])
_LAUNCH = "import sys; sys.path.insert(0, sys.argv.pop(2)); from llmasos.apps.sandbox.launch import main; main()"

Reason = Literal["exited", "signal", "killed", "memory", "cpu", "processes", "disk", "file_size", "wall"]
Means = Mapping[str, Any]


@dataclass(frozen=True)
class Exit:
    """`code`: of the command; negative: a signal; None: all were killed before it ended. `reason`: which limit ended
    it, `killed` if its owner did, `signal` or `exited` if it ended by itself."""

    code: int | None
    reason: Reason


def start(
    command: Sequence[str],
    policy: Policy,
    *,
    cwd: Path | None = None,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    env: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> SandboxedProcess:
    """Returns when the command runs. `env`: variables on top of those that the policy passes. `without`: "namespaces",
    "landlock", "seccomp" not used even if they are there, so that what is left can be tested.

    Raises NotFoundError for a command that is not there and ServerError if the sandbox could not be made."""
    if not command:
        raise InvalidInputError("The command is empty.", hint="Give a program.", param="command")
    folder = cwd or (policy.write[0] if policy.write else Path(os.sep))
    variables = _variables(policy, env or {})
    program = shutil.which(command[0], path=variables["PATH"])
    if program is None:
        raise NotFoundError(f"There is no program {command[0]!r}.", hint=f"Looked for in {variables['PATH']}.")
    if os.name != "posix":
        arguments = [program, *command[1:]]
        process = subprocess.Popen(arguments, cwd=folder, env=variables, stdin=stdin, stdout=stdout, stderr=stderr)
        return SandboxedProcess(process, policy, {}, None)
    order = {
        "program": os.path.abspath(program),
        "command": list(command),
        "env": variables,
        "cwd": str(folder),
        "read": [str(path) for path in (*SYSTEM_PATHS, *policy.read)],
        "write": [str(path) for path in policy.write],
        "devices": [str(path) for path in _devices(policy)],
        "net": policy.net,
        "sockets": [str(path) for path in policy.sockets],
        "exec": policy.exec,
        "limits": asdict(policy.limits),
        "without": list(without),
    }
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(theirs.fileno()), _PACKAGE_ROOT],
                env=variables,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        except OSError as e:
            ours.close()
            raise ServerError(f"{command[0]} could not be started in the sandbox: {e}.") from e
    try:
        return SandboxedProcess(process, policy, _begin(ours, order), ours)
    except BaseException:
        _close(ours)  # which ends the launcher
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        raise


def _variables(policy: Policy, more: Mapping[str, str]) -> dict[str, str]:
    """The one place outside `settings` that reads the environment: to pass on what is named."""
    variables = {name: os.environ[name] for name in (*_ALWAYS_PASSED, *policy.env) if name in os.environ}
    variables.setdefault("PATH", _PATH if os.name == "posix" else os.environ.get("PATH", os.defpath))
    if policy.write:
        home = str(policy.write[0])
        variables |= {"HOME": home, "TMPDIR": home} | ({} if os.name == "posix" else {"TEMP": home, "TMP": home})
    if not policy.gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables | dict(more)


def _devices(policy: Policy) -> list[Path]:
    devices = [Path("/dev", name) for name in _DEVICES]
    if policy.gpu:
        devices += [path for pattern in _GPU_DEVICES for path in sorted(Path("/dev").glob(pattern))]
    return devices


def _begin(control: socket.socket, order: Mapping[str, Any]) -> Means:
    """Send the order; by which means the command is held, when it runs."""
    control.settimeout(START_S)
    try:
        control.sendall(json.dumps(order).encode() + b"\n")
        answer = _read_line(control)
    except OSError as error:
        answer = {"error": str(error)}
    if "means" not in answer:
        said = answer.get("error", "its launcher ended")
        raise ServerError(f"{order['command'][0]} could not be started in the sandbox: {said}.")
    return answer["means"]


def _read_line(control: socket.socket) -> dict[str, Any]:
    """The next message; empty if there is none any more."""
    line = b""
    while not line.endswith(b"\n"):
        byte = control.recv(1)
        if not byte:
            return {}
        line += byte
    return json.loads(line)


def _close(control: socket.socket) -> None:
    """Seen by the other side even if a copy of the socket has got into another process."""
    with suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()


class SandboxedProcess:
    """Made by `start`. `means`: what holds it, as the launcher found it; `report.enforcements` says it in rows.
    `stdin`, `stdout`, `stderr`: as of subprocess.Popen."""

    def __init__(
        self, process: subprocess.Popen[bytes], policy: Policy, means: Means, control: socket.socket | None
    ) -> None:
        self.policy, self.means = policy, means
        self.pid = process.pid
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr
        self._process, self._control = process, control
        self._num_keepers = 0 if control is None else 2 if means.get("pids") else 1
        self._reason: Reason | None = None
        self._ended: Future[Exit] = Future()
        self._seen: dict[int, psutil.Process] = {}
        threading.Thread(target=self._watch, name=f"llmasos-sandbox-{self.pid}", daemon=True).start()

    def __repr__(self) -> str:
        return f"SandboxedProcess(pid={self.pid})"

    @property
    def running(self) -> bool:
        return not self._ended.done()

    def wait(self, timeout: float | None = None) -> Exit:
        """When it and all that it has started have ended. Raises TimeoutError."""
        return self._ended.result(timeout)

    async def ended(self) -> Exit:
        """`wait` for an event loop."""
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    def terminate(self) -> None:
        """Ask the command itself to end (SIGTERM); it may take its time, or not do it."""
        generations = tree(self.pid)
        for pid in generations[self._num_keepers] if len(generations) > self._num_keepers else ():
            with suppress(psutil.Error):
                psutil.Process(pid).terminate()

    def use(self) -> Use:
        """What it takes now, with all that it has started."""
        return use_of(tree(self.pid), self._num_keepers)

    def kill(self) -> None:
        """End it now, and all that it has started. `wait` says when that is done."""
        self._end("killed")

    def _end(self, reason: Reason) -> None:
        if self._reason is None and self.running:
            self._reason = reason

    # the thread

    def _watch(self) -> None:
        try:
            end = self._watch_limits()
        except Exception as error:  # whatever it is: nothing runs unwatched, and somebody waits to hear of it
            self._end_all()
            self._ended.set_exception(error)
        else:
            self._ended.set_result(end)

    def _watch_limits(self) -> Exit:
        limits, folders = self.policy.limits, self.policy.write
        begun, next_disk, code = time.monotonic(), 0.0, None
        while self._reason is None and (code := self._ended_within(LOOK_S)) is None:
            generations = tree(self.pid)
            use = use_of(generations, self._num_keepers)
            self._remember(generations)
            now = time.monotonic()
            if limits.memory is not None and use.memory > limits.memory:
                self._reason = "memory"
            elif limits.cpu_seconds is not None and use.cpu_seconds > limits.cpu_seconds + 1:
                self._reason = "cpu"
            elif limits.processes is not None and use.processes > limits.processes:
                self._reason = "processes"
            elif limits.wall_seconds is not None and now - begun > limits.wall_seconds:
                self._reason = "wall"
            elif limits.disk is not None and now >= next_disk:
                if disk_of(folders, [pid for pids in generations for pid in pids]) > limits.disk:
                    self._reason = "disk"
                after = time.monotonic()
                next_disk = after + max(DISK_LOOK_S, SLOWNESS * (after - now))
        self._end_all()
        if self._reason is None and limits.disk is not None and disk_of(folders, ()) > limits.disk:
            self._reason = "disk"
        return Exit(code, self._reason or _reason_of(code))

    def _ended_within(self, seconds: float) -> int | None:
        """The command's exit code, if it ends meanwhile."""
        if self._control is None:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(seconds)
            return None
        self._control.settimeout(seconds)
        try:
            answer = _read_line(self._control)
        except TimeoutError:
            return None
        except OSError:
            answer = {}
        if "exit" in answer:
            return int(answer["exit"])
        self._reason = self._reason or "killed"  # its launcher was ended by somebody
        return None

    def _remember(self, generations: list[list[int]]) -> None:
        """Where no namespace ends with all that is in it, the watchdog ends what it saw."""
        if not self.means.get("pids"):
            for pid in (pid for pids in generations for pid in pids if pid not in self._seen):
                with suppress(psutil.Error):
                    self._seen[pid] = psutil.Process(pid)

    def _end_all(self) -> None:
        if self._control is not None:
            _close(self._control)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        else:
            self._remember(tree(self.pid))
            self._process.kill()
        for process in self._seen.values():
            with suppress(psutil.Error):
                process.kill()  # psutil looks whether the number is still that process's
        self._process.wait()
        psutil.wait_procs(self._seen.values(), timeout=END_S)


def _reason_of(code: int | None) -> Reason:
    if code is None or code >= 0 or os.name != "posix":
        return "exited"
    known: dict[int, Reason] = {signal.SIGXCPU: "cpu", signal.SIGXFSZ: "file_size"}
    return known.get(-code, "signal")
