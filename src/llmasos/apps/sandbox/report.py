"""What the sandbox holds programs to on this system, by which means, and what it cannot: from what a launcher really
did, not from what a system should have."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmasos.apps.sandbox.policy import Limits, Policy, python_paths
from llmasos.apps.sandbox.run import Means, start

MEANS = ("namespaces", "landlock", "seccomp", "rights", "rlimits", "watchdog", "launcher")


@dataclass(frozen=True)
class Enforcement:
    """`what`: a name such as `files_write`. `by`: of MEANS, all that hold it, each enough alone; none: it is not
    enforced here, and `why` names what is needed for it."""

    what: str
    by: tuple[str, ...] = ()
    why: str = ""


def enforced(policy: Policy | None = None, *, without: Collection[str] = ()) -> list[Enforcement]:
    """A row for everything that a policy forbids or limits; without one, for a policy that grants nothing. A program
    that does nothing is started for it, once per kind of policy. `without`: as of `start`."""
    policy = policy or Policy()
    own_network = policy.net == "loopback" or (policy.net == "none" and bool(policy.sockets))
    return enforcements(_probe(frozenset(without), policy.exec, own_network), policy)


def missing(rows: Iterable[Enforcement]) -> list[Enforcement]:
    return [row for row in rows if not row.by]


@functools.cache
def _probe(without: frozenset[str], may_exec: bool, own_network: bool) -> Means:
    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        policy = Policy(
            read=python_paths(),
            write=(Path(name).resolve(),),
            net="loopback" if own_network else "none",
            exec=may_exec,
            limits=Limits(cores=1),
        )
        process = start([sys.executable, "-I", "-S", "-c", ""], policy, without=without)
        process.wait()
        return process.means


def enforcements(means: Means, policy: Policy) -> list[Enforcement]:
    """Rows from the means that hold a process."""
    landlock = int(means.get("landlock", 0))
    root, pids, net, seccomp = (bool(means.get(name)) for name in ("root", "pids", "net", "seccomp"))
    on_linux = "landlock" in means
    rlimits = means.get("rlimits", ())

    def row(what: str, why: str, **by: bool) -> Enforcement:
        held = tuple(name for name in MEANS if by.get(name))
        return Enforcement(what, held, "" if held else why if on_linux or why == "hosts" else "needs_linux")

    no_unix = seccomp and not policy.sockets and not (root and landlock >= 6)
    rows = [
        row("files_read", "needs_landlock", namespaces=root, landlock=landlock >= 1),
        row("files_write", "needs_landlock_3", namespaces=root, landlock=landlock >= 3),
        row("file_attributes", "needs_namespaces", namespaces=root),
    ]
    if policy.net in ("none", "loopback"):
        rows.append(
            row("network", "needs_seccomp", namespaces=net, seccomp=seccomp and not (policy.net != "none" and net))
        )
    elif policy.net != "all":
        rows.append(row("network", "needs_both", landlock=seccomp and landlock >= 4))
        rows.append(row("network_hosts", "hosts"))
    rows += [
        row("unix_sockets", "needs_namespaces", namespaces=root, seccomp=no_unix),
        row("abstract_sockets", "needs_landlock_6", namespaces=net, landlock=landlock >= 6, seccomp=no_unix),
        row("signals", "needs_namespaces", namespaces=pids, landlock=landlock >= 6),
        row("process_memory", "needs_landlock", namespaces=root, landlock=landlock >= 1),
        row("kernel_calls", "needs_seccomp", seccomp=seccomp),
        row("rights", "needs_linux", rights=on_linux),
        row("setuid_files", "needs_seccomp", seccomp=seccomp),
    ]
    if not policy.exec:
        rows.append(row("programs", "needs_seccomp", seccomp=bool(means.get("one_exec"))))
    if not policy.gpu:
        rows.append(row("gpu", "needs_landlock", namespaces=root, landlock=landlock >= 1))
    rows += [Enforcement("environment", ("launcher",)), Enforcement("descriptors", ("launcher",))]
    own = {"memory": True, "cpu_seconds": True, "processes": True, "disk": True, "wall_seconds": True}
    for name in vars(policy.limits):
        if getattr(policy.limits, name) is not None:
            rows.append(row(name, "needs_rlimits", rlimits=name in rlimits, watchdog=own.get(name, False)))
    safe_launcher = bool(means.get("subreaper")) and landlock >= 6  # else it could be killed from within
    rows.append(row("survivors", "needs_namespaces", namespaces=pids, launcher=safe_launcher))
    return rows
