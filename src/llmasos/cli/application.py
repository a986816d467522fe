"""`llmasos app`: call a route of an application without a server, look at it, offer its tools to other programs.

Its packages are handled in package.py.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import llmasos
from llmasos.cli.app_config import config
from llmasos.cli.messages import t
from llmasos.cli.package import Options, check_flags, package
from llmasos.cli.render import cell_width, emit, say, size, table, working
from llmasos.cli.running import ACTIONS, Where, run_action
from llmasos.errors import InvalidInputError, LLMasOSError, ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmasos.apps import Application, Route

Action = Literal[
    "run",
    "show",
    "mcp",
    "client",
    "new",
    "pack",
    "sign",
    "verify",
    "publish",
    "yank",
    "search",
    "install",
    "update",
    "rollback",
    "uninstall",
    "ls",
    "config",
    "dev",
    "test",
    "logs",
    "start",
    "stop",
    "restart",
    "ps",
]
Language = Literal["python", "javascript"]


def app(
    action: Action,
    file: str | None = None,
    route: str | None = None,
    /,
    *inputs: str,
    language: Language = "python",
    session: str | None = None,
    index: tuple[str, ...] = (),
    out: str | None = None,
    yes: bool = False,
    trust: str | None = None,
    reason: str | None = None,
    data: bool = False,
    owner: str | None = None,
    port: int | None = None,
    follow: bool = False,
    limit: int | None = None,
    url: str | None = None,
    api_key: str | None = None,
    json: bool = False,
) -> int | None:
    """`llmasos app ACTION [FILE] [ROUTE] [INPUT...]`."""
    options = Options(index, out, yes, trust, reason, data, owner)
    where = Where(port, follow, limit, url, api_key)
    if action == "config":
        typed = {name for one in (options, where) for name, value in vars(one).items() if value}
        check_flags(action, typed, ("url", "api_key"))
        config([word for word in (file, route, *inputs) if word is not None], where, json)
        return None
    if action in ACTIONS:
        check_flags(action, {name for name, value in vars(options).items() if value}, ())
        return run_action(action, [word for word in (file, route, *inputs) if word is not None], where, json)
    check_flags(action, {name for name, value in vars(where).items() if value}, ())
    if action not in ("run", "show", "mcp", "client"):
        words = [word for word in (file, route, *inputs) if word is not None]
        return package(action, words, options, json)
    check_flags(action, {name for name, value in vars(options).items() if value}, ())
    if file is None:
        raise InvalidInputError(
            t("usage.missing", option="FILE"), hint=t("usage.see_help", command="llmasos app"), param="file"
        )
    if session is not None and action != "run":
        raise InvalidInputError(
            t("usage.unknown_option", option="--session"),
            hint=t("usage.see_help", command="llmasos app"),
            param="session",
        )
    _use(action, file, route, inputs, language, session, json)
    return None


def _use(
    action: str,
    file: str,
    route: str | None,
    inputs: tuple[str, ...],
    language: Language,
    session: str | None,
    json: bool,
) -> None:
    from llmasos.apps.loading import load_application

    stray = route if action in ("mcp", "client") else inputs[0] if action == "show" and inputs else None
    if stray is not None:
        raise InvalidInputError(t("usage.extra", value=stray), hint=t("usage.see_help", command="llmasos app"))
    if action == "run" and route is None:
        raise InvalidInputError(t("app.route"), hint=f"llmasos app show {file}", param="route")
    try:
        application = load_application(file)
    except LLMasOSError:
        raise
    except Exception as e:  # its author's, who wants to know where it is
        raise ServerError(t("app.not_loaded", file=file, where=_place_of(e)), hint=t("app.traceback")) from e
    if action == "mcp":
        from llmasos.apps.mcp import serve_stdio

        serve_stdio(application)
    elif action == "client":
        from llmasos.apps.codegen import javascript_client, python_client

        write = python_client if language == "python" else javascript_client
        print(write(application.document()), end="")
    elif action == "show":
        _show(application, file, route, json)
    else:
        _run(application, file, application.find(route or ""), inputs, session, json)


def _place_of(error: Exception) -> str:
    """An error and the last line of its author's that it came through."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    ours = Path(llmasos.__file__).parent, Path(traceback.__file__).parent
    own = [one for one in frames if not any(Path(one.filename).is_relative_to(place) for place in ours)]
    own = [one for one in own if "site-packages" not in Path(one.filename).parts] or frames
    return f"{own[-1].filename}:{own[-1].lineno}: {kind}: {error}"


def _run(
    application: Application, file: str, route: Route, words: tuple[str, ...], session: str | None, as_json: bool
) -> None:
    import anyio
    from pydantic import ValidationError

    from llmasos.apps import problems
    from llmasos.apps.document import describe_route
    from llmasos.apps.jobs import reporting_to
    from llmasos.cli.inputs import parse

    values = parse(describe_route(route)["input"], words)
    shows_pieces = route.joins and not as_json

    async def tell(piece: Any) -> None:
        if shows_pieces:
            print(piece, end="", flush=True)

    async def call() -> bytes:
        async with application.hooks():
            result = await application.call(route, values, on_item=tell, session=session)
            await application.settle()  # what it does in the background ends with this process
            return result

    def report(done: float | None, message: str) -> None:
        share = "" if done is None else f"{done:.0%} "
        if show is not None:
            show(f"{share}{message}")
        elif not shows_pieces:
            say(f"{route.name}: {share}{message}")

    try:
        with working(route.name) if not route.streams else nullcontext() as show, reporting_to(report):
            result = anyio.run(call)
    except ValidationError as e:
        problem = problems.wrong_input(problems.located(e, "body", ()), [i.name for i in route.inputs])
        raise InvalidInputError(problem["message"], hint=f"llmasos app show {file} {route.name}") from e
    except LLMasOSError:
        raise
    except Exception as e:
        raise ServerError(
            t("app.failed", route=route.name, kind=type(e).__name__, text=str(e) or "-"), hint=t("app.traceback")
        ) from e
    if route.returns_files and not as_json and not route.streams:
        _print_files(result)
    else:
        _print(result, as_json, shows_pieces, route.hints.output)


def _print(result: bytes, as_json: bool, is_shown: bool, output: str | None) -> None:
    import json

    if as_json:
        print(result.decode())
    elif is_shown:
        print()
    else:
        value = json.loads(result)
        print(value) if isinstance(value, str) else print(_rows(value)) if output == "table" else emit(value)


def _rows(value: Any) -> str:
    """A list of objects as a table; anything else as JSON."""
    import json

    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value) or not value:
        return json.dumps(value, ensure_ascii=False, indent=2)
    heads = list(dict.fromkeys(name for row in value for name in row))
    words = [
        [
            one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            for one in (row.get(h, "") for h in heads)
        ]
        for row in value
    ]
    return table(heads, words)


def _print_files(result: bytes) -> None:
    """A single file goes to a pipe as it is; on a terminal all are saved in the working folder."""
    import json

    from llmasos.apps.files import File

    value = json.loads(result)
    found = [File.from_text(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
    if len(found) == 1 and not sys.stdout.isatty():
        sys.stdout.buffer.write(found[0].data)
        sys.stdout.buffer.flush()
        return
    for file in found:
        print(f"{file.save('.')}  {file.media_type}  {size(file.size)}")


def _show(application: Application, file: str, route: str | None, as_json: bool) -> None:
    from llmasos.apps.document import describe_route

    if as_json:
        emit(application.document() if route is None else describe_route(application.find(route)))
        return
    if route is not None:
        print(_about(file, application.find(route)))
        return
    print(f"{application.title} {application.asgi.version}")
    width = max((cell_width(one.name) for one in application.routes), default=0)
    for one in application.routes:
        print(f"  {one.name:<{width}}  {one.summary}")
    document = application.document()
    if document["chat"] is not None:
        print(f"\n{document['chat']['model']}  {document['chat']['summary']}")
    for one in document["schedules"]:
        when = one["cron"] or t("app.every", seconds=f"{one['every']:g}")
        print(f"\n{one['name']}  [{when}]  {one['summary']}")


def _about(file: str, route: Route) -> str:
    lines = [f"{route.name}  {', '.join(route.methods)} {route.path}", "", route.summary]
    lines += ["", route.description] if route.description else []
    for entry in route.inputs:
        kind: Any = entry.schema.get("enum") or entry.schema.get("type") or "JSON"
        kind = "|".join(map(str, kind)) if isinstance(kind, list) else kind
        kind = {"one": "@FILE", "many": "@FILE..."}.get(entry.files or "", kind)
        default = "" if entry.required else f" [{entry.default}]"
        lines.append(f"  --{entry.name.replace('_', '-')} {kind}{default}  {entry.description}".rstrip())
    hints = [name for name in ("tool", "read_only", "destructive") if getattr(route.hints, name)]
    hints += ["session"] if route.node.uses("session") else []
    lines += ["", t("app.hints", hints=", ".join(hints))] if hints else []
    lines += ["", *(f"llmasos app run {file} {route.name} {_words(example)}" for example in route.examples)]
    return "\n".join(lines).rstrip()


def _words(inputs: Mapping[str, Any]) -> str:
    """Inputs as a command line's words."""
    import json
    import shlex

    words = []
    for name, value in inputs.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        for one in value if isinstance(value, list) and value else [value]:
            text = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            words += [f"--{flag}", shlex.quote(f"@{text}" if text.startswith("@") else text)]
    return " ".join(words)
