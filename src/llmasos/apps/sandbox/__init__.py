"""A room for programs that are not trusted: a command runs with what its policy grants and under its limits, and what
this system cannot hold it to is said.

    server                              launcher (launch.py)                the command
    start() ── policy as JSON ───────>  keeper: new root, new process ids
    watchdog: memory, cpu, disk, ...      └─ fork: limits, no rights,
              end of the leash: kill all      Landlock, seccomp ── exec ──> runs, like all that it starts

Names load on first use: the launcher needs none but its own, and begins sooner.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.apps.sandbox.policy import Limits as Limits
    from llmasos.apps.sandbox.policy import Policy as Policy
    from llmasos.apps.sandbox.python import Result as Result
    from llmasos.apps.sandbox.python import run_python as run_python
    from llmasos.apps.sandbox.report import Enforcement as Enforcement
    from llmasos.apps.sandbox.report import enforced as enforced
    from llmasos.apps.sandbox.run import Exit as Exit
    from llmasos.apps.sandbox.run import SandboxedProcess as SandboxedProcess
    from llmasos.apps.sandbox.run import start as start

__all__ = ["Enforcement", "Exit", "Limits", "Policy", "Result", "SandboxedProcess", "enforced", "run_python", "start"]

_HOMES = {
    "Policy": "policy",
    "Limits": "policy",
    "Result": "python",
    "run_python": "python",
    "Enforcement": "report",
    "enforced": "report",
    "Exit": "run",
    "SandboxedProcess": "run",
    "start": "run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
