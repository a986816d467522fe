"""`llmasos memory`: the conversations that are kept: listed, searched, read, exported, deleted."""

from __future__ import annotations

import json as jsons
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, table
from llmasos.errors import InvalidInputError, StoreError

if TYPE_CHECKING:
    from llmasos.apps.memory import Memory

Action = Literal["ls", "search", "show", "export", "rename", "rm"]


def memory(
    action: Action = "ls",
    /,
    *words: str,
    to: str | None = None,
    yes: bool = False,
    json: bool = False,
) -> int | None:
    """`llmasos memory ACTION ...`."""
    from llmasos.apps.memory import Memory

    _check(action, words, to, yes)
    with Memory.open() as found:
        if action in ("ls", "search"):
            _list(found, " ".join(words), json)
        elif action == "show":
            _show(found, words[0], json)
        elif action == "export":
            _export(found, words[0] if words else None, to)
        elif action == "rename":
            found.rename(words[0], " ".join(words[1:]))
        else:
            return _rm(found, words[0], yes)
    return None


def _check(action: Action, words: tuple[str, ...], to: str | None, yes: bool) -> None:
    command, help = f"llmasos memory {action}", t("usage.see_help", command="llmasos memory")
    for option, is_given, takes in (("--to", to is not None, "export"), ("--yes", yes, "rm")):
        if is_given and action != takes:
            raise InvalidInputError(t("key.stray", option=option, command=command), hint=help)
    least, most = {"ls": (0, 0), "search": (1, 99), "export": (0, 1), "rename": (2, 99)}.get(action, (1, 1))
    if len(words) > most:
        raise InvalidInputError(t("usage.extra", value=words[most]), hint=help)
    if len(words) < least:
        key = "kb.no_words.search" if action == "search" else "agent.no_id"
        raise InvalidInputError(t(key, command=command), hint="llmasos memory ls", param="words")


def _list(memory: Memory, query: str, as_json: bool) -> None:
    found = memory.search(query) if query else memory.list()
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
    elif not found:
        say(t("kb.nothing") if query else t("memory.none"))
    else:
        heads = [t(f"head.{head}") for head in ("id", "changed", "messages", "title")]
        rows = [(o.id, f"{o.updated:%Y-%m-%d %H:%M}", str(o.num_messages), _plain(o.title)) for o in found]
        print(table(heads, rows))
        for one in found if query else ():
            say(f"{one.id}  {_plain(one.snippet)}")


def _show(memory: Memory, id: str, as_json: bool) -> None:
    whole = next(memory.export(id))
    if as_json:
        emit(whole)
        return
    for message in whole["messages"]:
        print(f"{message['role']}: {_plain(message.get('content') or '', keep=True)}")
        for call in message.get("tool_calls", ()):
            print(f"  → {_plain(call['function']['name'])} {_plain(call['function']['arguments'])}")


def _export(memory: Memory, id: str | None, to: str | None) -> None:
    """JSON lines, one conversation each."""
    count = 0
    lines = (jsons.dumps(one, ensure_ascii=False) for one in memory.export(id))
    if to is None:
        for line in lines:
            print(line)
        return
    try:
        with Path(to).expanduser().open("x", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
                count += 1
    except OSError as e:
        raise StoreError(t("memory.not_written", path=to, why=e.strerror or str(e))) from e
    say(t("memory.exported", count=count, path=to))


def _rm(memory: Memory, id: str, yes: bool) -> int | None:
    info = memory.get(id)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError(t("rm.no_terminal", name=id), hint=f"llmasos memory rm {id} --yes")
        print(t("memory.ask", title=_plain(info.title), num=info.num_messages), end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes", "是"):
            say(t("rm.kept", name=id))
            return 1
    memory.delete(id)
    say(t("agent.removed", id=id))
    return None


def _plain(text: Any, *, keep: bool = False) -> str:
    """What was written may hold commands for the terminal."""
    return "".join(c if c.isprintable() or (keep and c in "\n\t") else " " for c in str(text))
