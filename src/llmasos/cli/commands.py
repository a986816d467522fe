"""The table of commands, and the help of the whole. Light: loads neither a parser nor any command's module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmasos.cli.messages import t
from llmasos.errors import InvalidInputError


@dataclass(frozen=True)
class Command:
    """One command. `is_bare`: it does something sensible without arguments and takes --json."""

    name: str
    module: str
    attribute: str
    group: str
    is_bare: bool = False

    def function(self) -> Callable[..., int | None]:
        found: Any = getattr(importlib.import_module(f"llmasos.cli.{self.module}"), self.attribute)
        return found


_TABLE = (
    Command("run", "run", "run", "use"),
    Command("chat", "chat", "chat", "use"),
    Command("task", "task", "task", "use"),
    Command("kb", "kb", "kb", "use", is_bare=True),
    Command("agent", "agent", "agent", "use", is_bare=True),
    Command("memory", "memory", "memory", "use", is_bare=True),
    Command("data", "data", "data", "use"),
    Command("train", "train", "train", "use"),
    Command("runs", "runs", "runs", "use", is_bare=True),
    Command("serve", "serve", "serve", "use"),
    Command("app", "application", "app", "use"),
    Command("ps", "ps", "ps", "server", is_bare=True),
    Command("load", "ps", "load", "server"),
    Command("unload", "ps", "unload", "server"),
    Command("stop", "ps", "unload", "server"),
    Command("console", "console", "console", "server"),
    Command("top", "top", "top", "server"),
    Command("log", "log", "log", "server", is_bare=True),
    Command("jobs", "jobs", "jobs", "server", is_bare=True),
    Command("search", "models", "search", "models", is_bare=True),
    Command("plan", "fetch", "plan", "models"),
    Command("pull", "fetch", "pull", "models"),
    Command("import", "models", "import_model", "models"),
    Command("ls", "models", "ls", "models", is_bare=True),
    Command("show", "models", "show", "models"),
    Command("verify", "models", "verify", "models", is_bare=True),
    Command("rm", "models", "rm", "models"),
    Command("key", "key", "key", "machine", is_bare=True),
    Command("doctor", "system", "doctor", "machine", is_bare=True),
    Command("completion", "system", "completion", "machine"),
    Command("version", "system", "version", "machine", is_bare=True),
)
COMMANDS = {command.name: command for command in _TABLE}


def root_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [t("help.about"), "", t("help.usage", usage="llmasos COMMAND [...]"), ""]
    for group in dict.fromkeys(command.group for command in _TABLE):
        lines.append(t(f"group.{group}"))
        lines += [f"  {c.name:<{width}}  {t(f'command.{c.name}')}" for c in _TABLE if c.group == group]
        lines.append("")
    return "\n".join([*lines, t("help.more")])


def unknown_command(name: str) -> InvalidInputError:
    """The error for a first word that is no command, with the nearest ones."""
    import difflib

    known = COMMANDS
    if name.startswith("-"):
        return InvalidInputError(t("usage.unknown_option", option=name), hint=t("usage.see_help", command="llmasos"))
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = t("usage.did_you_mean", words=t("or").join(f"llmasos {n}" for n in near)) if near else ""
    return InvalidInputError(
        t("usage.unknown_command", command=name), hint=hint or t("usage.see_help", command="llmasos"), param="command"
    )
