"""`llmasos train`: a corpus or chats in, a better model out; plan, go on, look, merge, export, check."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, table, working
from llmasos.errors import FormatError, InvalidInputError

if TYPE_CHECKING:
    from llmasos.data import Totals
    from llmasos.train.config import TrainConfig
    from llmasos.train.run import OnProgress, Result

Action = Literal["sft", "pretrain", "distill", "resume", "plan", "inspect", "merge", "export", "verify"]
_METHODS = ("sft", "pretrain", "distill")
_NOT_FLAGS = ("method", "resume")
_LISTS = ("lora.targets", "trackers", "distillation.keep_layers")
"""Several words in one value, divided by commas."""
NESTED = "__"
"""Stands for the dot of a nested option in a Python name."""
ACTIONS: tuple[str, ...] = typing.get_args(Action)
_OWN_FLAGS = {
    "merge": {"name", "output", "dtype", "method", "weights", "base", "density", "json"},
    "export": {"name", "output", "dtype", "merge", "install", "checkpoint", "json"},
    "verify": {"device", "checkpoint", "json"},
}
"""What these use; all other actions use options of a run."""


def train_types() -> dict[str, Any]:
    """The flags of a run's options and the types of their values; nested ones as `lora__r`, typed `--lora.r`."""
    from pydantic import BaseModel

    from llmasos.train.config import TrainConfig

    found: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{name}{NESTED}{inner}": _plain(f.annotation) for inner, f in kind.model_fields.items()}
        elif name not in _NOT_FLAGS:
            found[field.alias or name] = _plain(kind)
    for name in _LISTS:
        found[name.replace(".", NESTED)] = str
    return found | {"columns": str}


def uses(action: str) -> set[str]:
    """The flags that an action uses, by their Python names; it refuses the others."""
    from llmasos.train.config import MAY_CHANGE

    match action:
        case "merge" | "export" | "verify":
            return _OWN_FLAGS[action]
        case "resume":
            return (set(train_types()) & MAY_CHANGE) - {"name", "output"} | {"json"}
    return set(train_types()) | {"json"}


def flag(name: str) -> str:
    """As it is typed."""
    return "--" + name.replace(NESTED, ".").replace("_", "-")


def _check_uses(action: str, typed: Iterable[str]) -> None:
    """A flag that would do nothing is an error."""
    for name in typed:
        if name not in uses(action):
            users = ", ".join(each for each in ACTIONS if name in uses(each))
            raise InvalidInputError(
                t("train.no_use", option=flag(name), action=action),
                hint=t("train.used_by", actions=users),
                param=name.replace(NESTED, "."),
            )


def _plain(kind: Any) -> Any:
    """Without None: nothing typed is None."""
    kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    is_union = type(None) in typing.get_args(kind)
    return kinds[0] if is_union and len(kinds) == 1 else kind


def train(
    action: Action,
    /,
    *words: str,
    json: bool = False,
    method: Literal["linear", "slerp", "task_arithmetic", "ties"] | None = None,
    weights: str | None = None,
    base: str | None = None,
    density: float | None = None,
    checkpoint: int | None = None,
    **train: Any,
) -> int | None:
    """`llmasos train ACTION`. A run's words are a YAML file of options, or none."""
    own = {"method": method, "weights": weights, "base": base, "density": density, "checkpoint": checkpoint}
    _check_uses(action, [*train, *(name for name, value in own.items() if value is not None), *["json"] * json])
    if action in _METHODS:
        return _run(_config(action, words, train), as_json=json)
    match action:
        case "resume":
            return _resume(words, train, as_json=json)
        case "plan":
            _plan(words, train, as_json=json)
        case "inspect":
            _inspect(words, train, as_json=json)
        case "merge":
            _merge(words, {name: value for name, value in own.items() if value is not None}, train, as_json=json)
        case "export":
            _export(words, train, checkpoint, as_json=json)
        case "verify":
            return _verify(words, train, checkpoint, as_json=json)
    return None


def _config(method: str | None, words: tuple[str, ...], typed: dict[str, Any]) -> TrainConfig:
    from llmasos.data import parse_columns
    from llmasos.train.config import TrainConfig

    if others := [word for word in words if not _is_options(word)] or words[1:]:
        raise InvalidInputError(t("train.words", words=" ".join(others)), hint=t("train.words.hint"))
    values = _dotted(typed)
    if "distillation.keep_layers" in values and len(values["distillation.keep_layers"]) == 1:
        [values["distillation.keep_layers"]] = values["distillation.keep_layers"]
    if "columns" in values:
        values["columns"] = parse_columns(values["columns"])
    if method is not None:
        values["method"] = method
    return TrainConfig.of(words[0] if words else None, **values)


def _is_options(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml")


def _number(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


def _run(config: TrainConfig, *, as_json: bool) -> int:
    from llmasos.train.parallel import begins
    from llmasos.train.run import train

    with working(t("train.preparing")) if begins() else nullcontext() as tell:
        result = train(config, on_progress=_telling(tell), progress=not as_json)
    return _ended(result, as_json=as_json)


def _telling(tell: Callable[[str], None] | None) -> OnProgress:
    from llmasos.train.answers import Answered

    def told(name: str, totals: Totals) -> None:
        if tell is not None:
            what = "train.answering" if isinstance(totals, Answered) else "train.tokenising"
            tell(t(what, file=name, rows=f"{totals.num_rows:,}"))

    return told


def _resume(words: tuple[str, ...], typed: dict[str, Any], *, as_json: bool) -> int:
    from llmasos.train.parallel import begins
    from llmasos.train.run import resume

    with working(t("train.preparing")) if begins() else nullcontext() as tell:
        result = resume(_the_run(words), on_progress=_telling(tell), progress=not as_json, **_dotted(typed))
    return _ended(result, as_json=as_json)


def _the_run(words: tuple[str, ...]) -> str:
    if len(words) != 1:
        raise InvalidInputError(t("train.which_run"), hint="llmasos runs", param="run")
    return words[0]


def _dotted(typed: dict[str, Any]) -> dict[str, Any]:
    values = {name.replace(NESTED, "."): value for name, value in typed.items()}
    for name in _LISTS:
        if name in values:
            values[name] = [_number(part) for part in str(values[name]).split(",") if part]
    return values


def _ended(result: Result, *, as_json: bool) -> int:
    from llmasos.train.parallel import begins
    from llmasos.train.run import reference

    if not begins():  # torchrun began several, and one of them tells
        return 0
    facts = {
        "name": result.name,
        "folder": str(result.folder),
        "reason": result.reason,
        "step": result.step,
        "loss": result.evaluation.loss if result.evaluation and math.isfinite(result.evaluation.loss) else None,
        "installed": result.installed,
    }
    if as_json:
        emit(facts)
    else:
        heads = {
            "name": t("train.name"),
            "folder": t("train.folder"),
            "reason": t("train.reason"),
            "step": t("train.step"),
            "loss": t("train.loss"),
            "installed": t("train.installed"),
        }
        say(pairs([(heads[name], str(value)) for name, value in facts.items() if value is not None]))
        if result.installed:
            say(t("train.serves", name=result.installed))
        elif result.reason in ("stopped", "time"):
            say(t("train.go_on", name=reference(result.name, result.folder)))
    return 0


def _plan(words: tuple[str, ...], typed: dict[str, Any], *, as_json: bool) -> None:
    from llmasos.train.run import plan_run

    config = _config(*_method(words), typed)
    with working(t("train.preparing")) as tell:
        found = plan_run(config, on_progress=_telling(tell))
    if as_json:
        emit(found.as_dict())
    else:
        print(pairs([(t(f"train.plan.{name}"), value) for name, value in found.rows()]))


def _merge(words: tuple[str, ...], options: dict[str, Any], typed: dict[str, Any], *, as_json: bool) -> None:
    from llmasos.train.merge import merge

    if "weights" in options:
        try:
            options["weights"] = [float(part) for part in options["weights"].split(",")]
        except ValueError:
            raise InvalidInputError(
                t("train.bad_weights", value=options["weights"]), hint="--weights 0.7,0.3", param="weights"
            ) from None
    with working(t("train.merging")):
        made = merge(words, **options, **typed)
    if as_json:
        emit({"path": str(made.path), "installed": made.installed})
    else:
        say(t("train.made", path=made.path))
        if made.installed:
            say(t("train.serves", name=made.installed))


def _export(words: tuple[str, ...], typed: dict[str, Any], step: int | None, *, as_json: bool) -> None:
    from llmasos.train.export import export_run
    from llmasos.train.run import find_run

    folder = find_run(_the_run(words))
    with working(t("train.exporting")):
        made = export_run(folder, step=step, **typed)
    if as_json:
        emit({"step": made.step, "dtype": made.dtype, "path": str(made.folder), "installed": made.installed})
    else:
        say(t("train.made", path=made.folder))
        if made.installed:
            say(t("train.serves", name=made.installed))


def _verify(words: tuple[str, ...], typed: dict[str, Any], step: int | None, *, as_json: bool) -> int:
    """Exit code 4 if what was exported is not what was trained."""
    import dataclasses

    from llmasos.train.run import find_run
    from llmasos.train.verify import verify_run

    folder = find_run(_the_run(words))
    with working(t("train.verifying")):
        found = verify_run(folder, step=step, **typed)
    if as_json:
        emit({**dataclasses.asdict(found), "folder": str(found.folder), "ok": found.ok, "problems": found.problems})
    else:
        heads = (t("train.with"), "dtype", t("train.mean"), t("train.most"), t("train.top1"))
        rows = [
            (one.name, one.dtype, f"{one.mean_difference:.2e}", f"{one.max_difference:.2e}", f"{one.top1:.1%}")
            if not one.skipped
            else (one.name, one.skipped, "", "", "")
            for one in found.comparisons
        ]
        print(table(heads, rows))
        for problem in found.problems:
            say(problem)
        say(t("train.same") if found.ok else t("train.different"))
    return 0 if found.ok else FormatError.exit_code


def _inspect(words: tuple[str, ...], typed: dict[str, Any], *, as_json: bool) -> None:
    """The first batch that a run of these options would read. Words that are no file of options are data."""
    from llmasos.cli.data import print_batch
    from llmasos.train.run import first_batch

    method, rest = _method(words)
    if any(map(_is_options, rest)):
        config = _config(method, rest, typed)
    else:
        config = _config(method, (), {**typed, "data": (*rest, *typed.get("data", ()))})
    with working(t("train.preparing")):
        batch, tokenizer = first_batch(config)
    if as_json:
        emit({"tokens": batch.tokens.tolist(), "labels": batch.labels.tolist(), "lengths": batch.lengths})
    else:
        print_batch(batch, tokenizer)


def _method(words: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The method that the first word is, if it is one, and the others."""
    return (words[0], words[1:]) if words and words[0] in _METHODS else (None, words)
