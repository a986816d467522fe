"""`llmasos agent`: ask a model that may call tools, and read what agents have done."""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, table
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.apps.agent import AgentEvent, AgentRun
    from llmasos.apps.agent.agent import Agent
    from llmasos.apps.memory import Memory

Action = Literal["run", "continue", "ls", "show", "replay", "rm", "tools"]
_OF_RUN = {
    *("model", "tool", "mcp_config", "system", "steps", "tokens", "seconds", "output", "context", "conversation"),
    *("require_tool", "single_calls", "yes", "max_tokens"),
}
_TAKES = {
    "run": _OF_RUN,
    "continue": {"model", "tool", "mcp_config", "output", "yes", "deny"},
    "ls": set[str](),
    "show": {"whole"},
    "replay": set[str](),
    "rm": set[str](),
    "tools": {"mcp_config"},
}
"""The options of each action, beside --json."""
_SHOWN = 160


def agent(
    action: Action = "ls",
    /,
    *words: str,
    model: str | None = None,
    tool: tuple[str, ...] = (),
    mcp_config: str | None = None,
    system: str | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    max_tokens: int | None = None,
    output: str | None = None,
    context: Literal["drop", "summarise", "stop"] | None = None,
    conversation: str | None = None,
    require_tool: bool = False,
    single_calls: bool = False,
    yes: bool = False,
    deny: bool = False,
    whole: bool = False,
    json: bool = False,
) -> int | None:
    """`llmasos agent ACTION ...`."""
    given = {name: value for name, value in locals().items() if name not in ("action", "words", "json")}
    options = {name: value for name, value in given.items() if value is not None and value is not False and value != ()}
    _check(action, words, options)
    if action in ("run", "continue"):
        return _ask(action, words, options, json)
    if action == "ls":
        _ls(json)
    elif action == "tools":
        _tools(options.get("mcp_config"), json)
    elif action == "rm":
        _rm(words[0])
    elif action == "replay":
        return _replay(words[0], json)
    else:
        _show(words[0], whole, json)
    return None


def _check(action: Action, words: tuple[str, ...], options: dict[str, Any]) -> None:
    """What is missing, and what would have no effect, is refused."""
    command = f"llmasos agent {action}"
    help = t("usage.see_help", command="llmasos agent")
    if stray := [name for name in options if name not in _TAKES[action]]:
        option = f"--{stray[0].replace('_', '-')}"
        raise InvalidInputError(t("key.stray", option=option, command=command), hint=help)
    if action == "run":
        if not words:
            raise InvalidInputError(t("agent.no_question"), hint='llmasos agent run "…" --tool python', param="words")
        return
    most = 0 if action in ("ls", "tools") else 1
    if len(words) > most:
        raise InvalidInputError(t("usage.extra", value=words[most]), hint=help)
    if len(words) < most:
        raise InvalidInputError(t("agent.no_id", command=command), hint="llmasos agent ls", param="id")
    if action == "continue" and ("yes" in options) == ("deny" in options):
        raise InvalidInputError(t("agent.yes_or_deny"), hint=f"{command} {words[0]} --yes", param="yes")


# asking


def _ask(action: Action, words: tuple[str, ...], options: dict[str, Any], as_json: bool) -> int:
    from llmasos.apps.agent import open_traces
    from llmasos.apps.agent.agent import DEFAULT_MODEL
    from llmasos.apps.memory import Memory
    from llmasos.cli.fetch import load

    run: AgentRun | None = None
    if action == "continue":
        with open_traces() as traces:
            run = traces.get(words[0])
        if run.state != "requires_action":
            raise InvalidInputError(t("agent.not_waiting", id=run.id, state=run.state), hint="llmasos agent ls")
    model = options.get("model") or (run.model if run is not None else DEFAULT_MODEL)
    needs_memory = "conversation" in options or (run is not None and run.conversation is not None)
    with load(model) as llm:
        memory = Memory.open() if needs_memory else None
        try:
            made = _agent(llm, options, memory, run)
            if run is not None:
                return _told(made.stream_resume(run, "yes" in options), as_json)
            question = " ".join(words)
            id = _conversation(memory, options.get("conversation"), question)
            return _told(made.stream(question, conversation=id), as_json)
        finally:
            if memory is not None:
                memory.close()


def _conversation(memory: Memory | None, wanted: str | None, question: str) -> str | None:
    """`new` makes one, and says its id."""
    if memory is None or wanted != "new":
        return wanted
    id = memory.create(title=" ".join(question.split())[:80])
    say(t("agent.conversation", id=id))
    return id


def _agent(llm: Any, options: dict[str, Any], memory: Memory | None, run: AgentRun | None) -> Agent:
    from llmasos.apps.agent import AgentLimits
    from llmasos.apps.agent.agent import Agent

    names = {"steps": "steps", "tokens": "tokens", "seconds": "seconds", "max_tokens": "answer_tokens"}
    limits = {wire: options[name] for name, wire in names.items() if name in options}
    if wrong := [name for name in names if name in options and options[name] <= 0]:
        option = f"--{wrong[0].replace('_', '-')}"
        raise InvalidInputError(
            t("usage.bad_value", option=option, value=options[wrong[0]], kind=t("agent.positive")), param=wrong[0]
        )
    return Agent(
        llm,
        tools=_toolbox(_words(options, run), options.get("mcp_config"), llm),
        system=options.get("system"),
        limits=run.limits if run is not None else AgentLimits(**limits),
        approve=_approval(options),
        output=_form(options.get("output")),
        context=options.get("context", "drop" if run is None else run.context),
        tool_choice="required" if "require_tool" in options else "auto",
        parallel_calls="single_calls" not in options if run is None else run.parallel_calls,
        memory=memory,
    )


def _words(options: dict[str, Any], run: AgentRun | None) -> list[str]:
    """A run that goes on has the tools that it had, unless others are named."""
    if run is None or "tool" in options:
        return list(options.get("tool", ()))
    return list(dict.fromkeys(one.source for one in run.tools if one.source))


def _toolbox(words: list[str], config: str | None, llm: Any) -> list[Any]:
    from llmasos.apps.agent.mcp_tools import mcp_config
    from llmasos.apps.agent.tools import named_tools
    from llmasos.errors import NotFoundError

    found: list[Any] = []
    for word in words:
        kind, _, name = word.partition(":")
        if kind == "mcp" and name:
            servers = mcp_config(config)
            if name not in servers:
                known = ", ".join(servers) or t("agent.none")
                raise NotFoundError(t("agent.no_server", name=name), hint=t("agent.servers", names=known))
            found.append(servers[name])
        else:
            found += named_tools(word, model=llm)
    return found


def _form(path: str | None) -> Any:
    if path is None:
        return None
    try:
        found = jsons.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
    except (OSError, ValueError) as e:
        raise InvalidInputError(t("agent.bad_schema", path=path), param="output") from e
    return found


def _approval(options: dict[str, Any]) -> Callable[..., Any] | None:
    """Without a terminal, and without --yes, the run pauses."""
    if "yes" in options:
        return lambda call, tool: True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(call: Any, tool: Any) -> Any:
        say(t("agent.approve", name=_plain(call.name), source=f" ({tool.source})" if tool.source else ""))
        say(f"  {_plain(call.arguments)}")
        print(t("agent.approve_keys"), end=" ", file=sys.stderr, flush=True)
        said = sys.stdin.readline().strip()
        lower = said.lower()
        if lower in ("y", "yes", "是"):
            return True
        if lower in ("a", "always", "总是"):
            return "always"
        return False if lower in ("", "n", "no", "否") else said

    return ask


def _told(events: Generator[AgentEvent, None, None], as_json: bool) -> int:
    """The answer on standard output as it comes, calls and notices on standard error."""
    run: AgentRun | None = None
    has_text = False
    with closing(events):
        for event in events:
            run = event.run or run
            if as_json:
                continue
            if event.type == "answer.delta":
                print(event.text, end="", flush=True)
                has_text = True
            elif event.type == "answer.done" and has_text:
                print()
                has_text = False
            elif event.type == "call.done" and event.call is not None:
                _say_call(event.call)
            elif event.type == "notice":
                say(_plain(event.text or ""))
    assert run is not None
    if as_json:
        emit(run.model_dump(mode="json", exclude_none=True))
    else:
        _say_end(run)
    return 0 if run.state == "done" else 1


def _say_call(call: Any) -> None:
    result = " ".join((call.result or "").split())
    short = result if len(result) <= _SHOWN else f"{result[:_SHOWN]}…"
    say(_plain(f"{'✗' if call.is_error else '→'} {call.name} {call.arguments}"))
    say(_plain(f"    {short}"))


def _say_end(run: AgentRun) -> None:
    if run.stop is not None:
        say(run.stop.message)
    if run.state == "requires_action":
        for call in run.waiting():
            say(_plain(t("agent.waits", name=call.name, arguments=call.arguments)))
        say(t("agent.go_on", command=f"llmasos agent continue {run.id} --yes"))
    elif run.state != "done" or run.steps[-1].number > 1:
        say(t("agent.trace", command=f"llmasos agent show {run.id}"))


def _plain(text: str) -> str:
    """What tools and models write may hold commands for the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# reading


def _ls(as_json: bool) -> None:
    from llmasos.apps.agent import open_traces

    with open_traces() as traces:
        found = traces.list()
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
    elif not found:
        say(t("agent.no_runs"))
    else:
        heads = [t(f"head.{head}") for head in ("id", "state", "created", "model", "question")]
        rows = [(o.id, o.state, f"{o.created:%Y-%m-%d %H:%M}", o.model, _plain(o.input)[:60]) for o in found]
        print(table(heads, rows))


def _get(id: str) -> AgentRun:
    from llmasos.apps.agent import open_traces

    with open_traces() as traces:
        return traces.get(id)


def _show(id: str, whole: bool, as_json: bool) -> None:
    from llmasos.apps.agent import tree

    run = _get(id)
    if as_json:
        emit(run.model_dump(mode="json", exclude_none=True))
    else:
        print(tree(run, whole=whole))


def _rm(id: str) -> None:
    from llmasos.apps.agent import open_traces

    with open_traces() as traces:
        traces.remove(id)
    say(t("agent.removed", id=id))


def _replay(id: str, as_json: bool) -> int:
    from llmasos.apps.agent import replay

    found = replay(_get(id))
    if as_json:
        emit({"id": id, "differences": list(found.differences)})
    elif found.differences:
        for line in found.differences:
            print(_plain(line))
    else:
        say(t("agent.replayed", steps=found.run.num_answers))
    return 1 if found.differences else 0


def _tools(config: str | None, as_json: bool) -> None:
    from llmasos.apps.agent.mcp_tools import mcp_config
    from llmasos.apps.knowledge import names
    from llmasos.tasks import TASKS

    found = [("python", t("agent.tool.python"))]
    found += [(f"knowledge:{name}", t("agent.tool.knowledge")) for name in names()]
    found += [(f"task:{one.name}", one.summary) for one in TASKS.values()]
    for name, server in mcp_config(config).items():
        found.append((f"mcp:{name}", server.url or " ".join(server.command)))
    if as_json:
        emit([{"tool": name, "about": about} for name, about in found])
    else:
        print(table([t("head.tool"), t("head.about")], found))
