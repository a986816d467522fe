"""The launcher: a small program between the server and a command in the sandbox. It takes the order as a line of JSON
from a socket, gives rights up, starts the command, tells how it ends, and ends all that is left then, or as soon as the
other side of the socket is closed.

    keeper, outside ──fork──> first process of the namespace ──fork──> command       where namespaces may be made
    keeper, which inherits orphans ──fork──> command                                 elsewhere

It imports nothing but the standard library and its siblings, and has one thread. POSIX only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from llmasos.apps.sandbox import landlock, linux, namespaces, seccomp
from llmasos.apps.sandbox.limits import set_rlimits

LOOK_S = 0.05
_ON_LINUX = sys.platform == "linux"
_PROC_FILES = tuple(
    Path("/proc", name) for name in ("self", "cpuinfo", "meminfo", "stat", "loadavg", "sys/vm/overcommit_memory")
)
"""What the command may read where /proc shows the processes of all; `self` is then its own only."""
_MESSAGE = 1 << 20


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    try:
        with control.makefile("rb") as lines:
            order = json.loads(lines.readline())
        _keep(order, control)
    except BaseException as error:
        _tell(control, {"error": f"{type(error).__name__}: {error}"})


def _tell(to: socket.socket, message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        to.sendall(json.dumps(message).encode() + b"\n")


def _keep(order: dict[str, Any], control: socket.socket) -> None:
    null = os.open(os.devnull, os.O_RDWR)  # now: the root of both keepers will change
    means: dict[str, Any] = {"why": {}}
    if _ON_LINUX and "namespaces" not in order["without"]:
        try:
            means["users"] = namespaces.enter()
            means["pids"] = True
            if order["net"] in ("none", "loopback") and (order["sockets"] or order["net"] == "loopback"):
                namespaces.enter_network()
                means["net"] = True
        except OSError as error:
            means["why"]["namespaces"] = error.strerror or str(error)
    if order["net"] == "loopback" and not means.get("net"):
        order["net"] = "none"
    if not means.get("pids"):
        if _ON_LINUX:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            means["subreaper"] = True
        child = _start(order, control, means, null)
        _hold_tree(control, child)
        return
    first = os.fork()
    if first == 0:
        _as_first(order, control, means, null)
    _silence(null)
    while os.waitpid(first, os.WNOHANG) == (0, 0):
        with suppress(ProcessLookupError):
            if _let_go(control):
                os.kill(first, signal.SIGKILL)
                os.waitpid(first, 0)  # when all in the namespace have ended
                return


def _as_first(order: dict[str, Any], control: socket.socket, means: dict[str, Any], null: int) -> NoReturn:
    """The first process of the namespace: when it ends, the kernel ends all others there."""
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a first process does not get from its own
        _make_root(order, means)
        child = _start(order, control, means, null)
        while (ended := os.wait())[0] != child:
            pass
        _tell(control, {"exit": os.waitstatus_to_exitcode(ended[1])})
    except BaseException as error:
        _tell(control, {"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)


def _make_root(order: dict[str, Any], means: dict[str, Any]) -> None:
    try:
        namespaces.begin_root()
    except OSError as error:
        means["why"]["namespaces"] = error.strerror or str(error)
        return
    read, write, devices = (_paths(order[kind]) for kind in ("read", "write", "devices"))
    means["proc"] = namespaces.finish_root([*read, *_paths(order["sockets"])], write, devices)
    means["root"] = True


def _paths(names: Iterable[str]) -> list[Path]:
    return [Path(name) for name in names]


def _silence(null: int) -> None:
    """Let the command's input and output go: they end with it."""
    for fd in (0, 1, 2):
        os.dup2(null, fd)


# the command


def _start(order: dict[str, Any], control: socket.socket, means: dict[str, Any], null: int) -> int:
    """Its process id, when it runs; tells the server that it does. Raises if it does not."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        _become(order, theirs, means)
    theirs.close()
    _silence(null)
    said, listeners, _, _ = socket.recv_fds(ours, _MESSAGE, 1)
    for listener in listeners:
        seccomp.let_one_exec(listener)
    while more := ours.recv(_MESSAGE):
        said += more
    *_, last = map(json.loads, said.splitlines() or [b'{"error": "The launcher ended before the command began."}'])
    if "error" in last:
        os.waitpid(child, 0)
        raise OSError(last["error"])
    _tell(control, {"means": last["means"]})
    return child


def _become(order: dict[str, Any], keeper: socket.socket, means: dict[str, Any]) -> NoReturn:
    try:
        os.setsid()
        os.chdir(order["cwd"])
        own_count = bool(means.get("users")) and os.getuid() != 0  # the kernel counts for nobody's root
        means["rlimits"] = set_rlimits(order["limits"], own_count=own_count)
        listeners = _give_up(order, means) if _ON_LINUX else []
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # as Python has changed them
            signal.signal(number, signal.SIG_DFL)
        socket.send_fds(keeper, [json.dumps({"means": means}).encode() + b"\n"], listeners)
        os.execve(order["program"], order["command"], order["env"])
    except BaseException as error:
        _tell(keeper, {"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(127)


def _give_up(order: dict[str, Any], means: dict[str, Any]) -> list[int]:
    """All rights but the granted ones; the listener for the one exec, if there is to be one."""
    without, why = order["without"], means["why"]
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.drop_rights()
    version = 0 if "landlock" in without else landlock.abi()
    means["landlock"] = version
    if version:
        _restrict(order, version, bool(means.get("proc")))
    else:
        why["landlock"] = "this kernel has it not, or it was left out"
    if "seccomp" in without or not seccomp.available():
        why["seccomp"] = f"not known for {linux.MACHINE}, or left out"
        return []
    reachable = bool(order["sockets"]) or (bool(means.get("root")) and version >= 6)
    families = [socket.AF_UNIX] * reachable
    if order["net"] != "none":
        families += [socket.AF_INET, socket.AF_INET6]
    try:
        rules = seccomp.rules_for(families, only_tcp=isinstance(order["net"], list))
        seccomp.install(rules + seccomp.CORES_KEPT * ("cores" in means["rlimits"]))
        means["seccomp"] = True
        if not order["exec"]:
            listener = seccomp.listen_for_exec()
            means["one_exec"] = True
            return [listener]
    except OSError as error:  # a kernel without it, or an old one
        why["one_exec" if means.get("seccomp") else "seccomp"] = error.strerror or str(error)
    return []


def _restrict(order: dict[str, Any], version: int, own_proc: bool) -> None:
    ports = (
        {"none": [], "loopback": None, "all": None}.get(order["net"]) if isinstance(order["net"], str) else order["net"]
    )
    landlock.restrict(
        version,
        read=[*_paths(order["read"]), *([Path("/proc")] if own_proc else _PROC_FILES)],
        write=_paths(order["write"]),
        devices=_paths(order["devices"]),
        ports=ports,
    )


# without a namespace: its whole tree


def _hold_tree(control: socket.socket, child: int) -> None:
    code = None
    while code is None and not _let_go(control):
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
    if code is not None:
        _tell(control, {"exit": code})
    _end_tree(child)


def _let_go(control: socket.socket) -> bool:
    """Whether the server has closed its side; waits a moment for it."""
    return bool(select.select([control], [], [], LOOK_S)[0])


def _end_tree(child: int) -> None:
    """All of its group, and on Linux all that descend from it, whatever group they are in: orphans became our own."""
    while True:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        for pid in _descendants(os.getpid()) if _ON_LINUX else ():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(LOOK_S / 10)
        except ChildProcessError:
            return


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


if __name__ == "__main__":
    main()
