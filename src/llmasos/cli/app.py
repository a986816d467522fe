"""From a command's typed Python function to flags, help and calls (by cyclopts).

A parameter's name and type make its flag; its text comes from the message table (`option.run.model`, else
`option.model`). `**engine` in a signature stands for the fields of EngineConfig, `**sampling` for those of both
EngineConfig and SamplingParams, so those flags are written in one place only. All are optional: what nobody typed is
left to the model. `**train` stands for the options of a training run, `**server` for those of the server, whose help
lies beside them, and the engine's.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import exceptions

from llmasos.cli import messages
from llmasos.cli.commands import COMMANDS, Command
from llmasos.cli.engine import engine_types
from llmasos.cli.messages import t
from llmasos.cli.render import cell_width
from llmasos.errors import InvalidInputError
from llmasos.inference.request import SamplingParams

NOT_FLAGS = frozenset(
    {"logit_bias", "logits_processors", "logprobs", "prompt_logprobs", "shown_token_ids", "structured"}
)
"""Fields of SamplingParams for programs only: a line of text has no room for what they take or give."""
STDIN = "\0-"
"""Stands for a lone `-` while the line is parsed: to the parser it would be an option without a name."""

REST = "inputs"
"""The parameter that takes all words as they are, unknown flags too."""

_SHORT = {"follow": "-f"}
_CAN_BE_OFF = ("compile", "recompute", "install")
"""Switches of a training run that are on, or decided for it, where nobody says otherwise."""
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def sampling_types() -> dict[str, Any]:
    """The sampling flags and the types of their values."""
    hints = typing.get_type_hints(SamplingParams)
    return {f.name: hints[f.name] for f in dataclasses.fields(SamplingParams) if f.name not in NOT_FLAGS}


def server_types() -> dict[str, Any]:
    """The server's flags and the types of their values."""
    from llmasos.serve.config import flags

    kinds: dict[str, Any] = {"number": int, "switch": bool}
    return {
        flag.name: tuple[str, ...]
        if flag.is_repeated
        else Literal[flag.choices]
        if flag.choices
        else kinds.get(flag.kind, str)
        for flag in flags()
    }


def _train_types() -> dict[str, Any]:
    from llmasos.cli.train import train_types

    return train_types()


_STANDS_FOR: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": engine_types,
    "server": lambda: server_types() | engine_types(),
    "sampling": lambda: sampling_types() | engine_types(),
    "train": _train_types,
}


def call(command: Command, args: list[str]) -> int:
    """Parse `args` and run the command. Raises InvalidInputError, among others, for a wrong line."""
    typed = args[: args.index("--")] if "--" in args else args
    if "--help" in typed or "-h" in typed:
        print(command_help(command, typed[0]))
        return 0
    app = build([command])
    words = _shielded(args) if command.name == "app" else args
    tokens = [command.name, *(STDIN if arg == "-" else arg for arg in words)]
    try:
        result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except exceptions.CycloptsError as e:
        raise _usage_error(e, command) from e
    return result or 0


def _shielded(args: list[str]) -> list[str]:
    """What follows `run FILE ROUTE` is the route's: an input may have the name of one of our flags, but for --json."""
    names = [i for i, arg in enumerate(args) if not arg.startswith("-")]
    if len(names) < 3 or args[names[0]] != "run":
        return args
    ours, theirs = args[: names[2] + 1], args[names[2] + 1 :]
    if "--" not in theirs:
        ours += ["--json"] * ("--json" in theirs)
        theirs = ["--", *(arg for arg in theirs if arg != "--json")]
    return ours + theirs


def build(commands: Iterable[Command]) -> cyclopts.App:
    """A parser for these commands. Each one's module is imported."""
    app = cyclopts.App(
        name="llmasos",
        help=t("help.about"),
        help_flags=(),
        version_flags=(),
        suppress_keyboard_interrupt=False,  # `main` knows what to do with it
    )
    for command in commands:
        app.command(_bindable(command), name=command.name, help=t(f"command.{command.name}"))
    return app


def _bindable(command: Command) -> Callable[..., int | None]:
    """The command's function with a signature that holds every flag and its help."""
    function = command.function()

    def bound(*args: Any, **options: Any) -> int | None:
        typed = {name: value for name, value in options.items() if name not in flags or value is not None}
        return function(*map(_stdin_back, args), **{name: _stdin_back(value) for name, value in typed.items()})

    parameters: list[inspect.Parameter] = []
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            about = _about(command, parameter.name, hints[parameter.name])
            parameters.append(parameter.replace(annotation=Annotated[hints[parameter.name], about]))
            continue
        flags = _STANDS_FOR[parameter.name]()
        for name, kind in flags.items():
            annotation = Annotated[kind | None, _about(command, name, kind)]  # type: ignore[valid-type]  # a type known at run time
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
    bound.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what cyclopts reads
    bound.__annotations__ = {p.name: p.annotation for p in parameters}
    return bound


def _stdin_back(value: Any) -> Any:
    return "-" if value == STDIN else value


def _about(command: Command, name: str, kind: Any) -> cyclopts.Parameter:
    nested = name.replace("__", ".")
    own = f"option.{command.name}.{nested}"
    text = _server_help(name) if command.name == "serve" else None
    text = text or t(own if messages.has(own) else f"option.{name}")
    return cyclopts.Parameter(
        help=text,
        name=f"--{nested.replace('_', '-')}" if nested != name else None,
        negative=f"--no-{name}" if command.name == "train" and name in _CAN_BE_OFF else (),
        alias=_SHORT.get(name),
        converter=_whole if _metavar(kind) == "N" else None,
        allow_leading_hyphen=name == REST,
    )


def _server_help(name: str) -> str | None:
    """The help of an option of the server stands beside the option, with its default."""
    from llmasos.serve.config import flags

    found = next((flag for flag in flags() if flag.name == name), None)
    if found is None:
        return None
    return found.help[messages.language()] + (f" [{found.default}]" if found.default else "")


def _whole(kind: Any, tokens: Sequence[Any]) -> Any:
    """Whole numbers only: the parser alone would round 1.5 to 2 and say nothing."""
    numbers = tuple(int(token.value) for token in tokens)
    return numbers if tuple in (typing.get_origin(k) for k in (kind, *typing.get_args(kind))) else numbers[0]


def _flags_of(command: Command, action: str) -> set[str] | None:
    """Those that an action of the command uses, where it refuses the others."""
    if command.name != "train":
        return None
    from llmasos.cli.train import ACTIONS, flag, uses

    return set(map(flag, uses(action))) if action in ACTIONS else None


def command_help(command: Command, action: str = "") -> str:
    """Usage, purpose, arguments and options of one command, or of one of its actions."""
    flags = _flags_of(command, action)
    arguments = _arguments(build([command]), command)
    usage, positional = [f"llmasos {command.name}"], []
    options: list[tuple[str, str]] = []
    engine: list[tuple[str, str]] = []
    engine_flags = {f"--{name.replace('_', '-')}" for name in engine_types()}
    for argument in arguments:
        info = argument.field_info
        text = argument.parameter.help or ""
        if info.is_positional:
            name = argument.names[0] + ("..." if info.kind is info.VAR_POSITIONAL else "")
            usage.append(name if argument.required else f"[{name}]")
            positional.append((name, text))
        elif flags is None or argument.names[0] in flags:
            if info.default not in (None, False, "auto", (), inspect.Parameter.empty):
                text += f" [{info.default}]"
            names = " ".join([", ".join(argument.names), _metavar(argument.hint)]).rstrip()
            (engine if argument.names[0] in engine_flags else options).append((names, text))
    if options:
        usage.append("[--...]")
    lines = [t("help.usage", usage=" ".join(usage)), "", t(f"command.{command.name}")]
    details = f"details.{command.name}"
    if messages.has(details):
        lines += ["", t(details)]
    for head, entries in (("help.arguments", positional), ("help.options", options), ("help.engine", engine)):
        if entries:
            width = max(cell_width(name) for name, _ in entries)
            lines += ["", t(head), *(f"  {name}{' ' * (width - cell_width(name))}  {text}" for name, text in entries)]
    return "\n".join(lines)


def _arguments(app: cyclopts.App, command: Command) -> Any:
    return app[command.name].assemble_argument_collection()


def _metavar(hint: Any) -> str:
    kinds = [kind for kind in typing.get_args(hint) if kind not in (type(None), Ellipsis)] or [hint]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, kinds))
    if kinds == [bool]:
        return ""
    if typing.get_args(kinds[0]):
        return _metavar(kinds[0])
    return _METAVARS.get(kinds[0], "TEXT")


def _usage_error(error: exceptions.CycloptsError, command: Command) -> InvalidInputError:
    """The parser's complaint in our words and the user's language."""
    hint = t("usage.see_help", command=f"llmasos {command.name}")
    match error:
        case exceptions.UnknownOptionError():
            option = (error.token.keyword or error.token.value).split("=", 1)[0]
            known = [name for argument in error.argument_collection for name in argument.names if name[0] == "-"]
            near = difflib.get_close_matches(option, known, n=2, cutoff=0.6)
            if near:
                hint = t("usage.did_you_mean", words=t("or").join(near))
            return InvalidInputError(t("usage.unknown_option", option=option), hint=hint, param=option)
        case exceptions.CoercionError(token=token) if token is not None:
            name = token.keyword or (error.argument.name if error.argument else "")
            kind = _metavar(error.target_type or (error.argument.hint if error.argument else str))
            words = {"N": t("usage.whole_number"), "X": t("usage.number")}.get(kind, kind.replace("|", ", "))
            return InvalidInputError(
                t("usage.bad_value", option=name, value=token.value, kind=words), hint=hint, param=name
            )
        case exceptions.RepeatArgumentError(token=token):
            return InvalidInputError(t("usage.repeated", option=token.keyword), hint=hint, param=token.keyword)
        case exceptions.MissingArgumentError(argument=argument) if argument is not None:
            name = getattr(error, "keyword", None) or argument.name  # not in cyclopts 4.0
            key = "usage.missing" if argument.field_info.is_positional else "usage.missing_value"
            return InvalidInputError(t(key, option=name), hint=hint, param=name)
        case exceptions.UnusedCliTokensError(unused_tokens=tokens) if tokens:
            return InvalidInputError(t("usage.extra", value=" ".join(map(_stdin_back, tokens))), hint=hint)
    return InvalidInputError(str(error), hint=hint)


def completion_script(shell: str) -> str:
    """A completion script of the whole command for bash, zsh or fish."""
    script: str = build(COMMANDS.values()).generate_completion(shell=shell)  # type: ignore[arg-type]  # a Literal there
    return script
