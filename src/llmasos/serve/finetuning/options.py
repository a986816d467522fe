"""What a request for fine-tuning asks, as options of a run."""

from __future__ import annotations

import os
import re
from typing import Any

from llmasos.client.types.finetuning import FineTuningRequest, Hyperparameters, HyperparametersRequest
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.store.card import tidy_name
from llmasos.train.config import TrainConfig

OURS = {
    "model": "The field 'model' names it.",
    "data": "The field 'training_file' names it.",
    "validation_data": "The field 'validation_file' names it.",
    "name": "The job names it; 'suffix' is a part of that.",
    "output": "It is the server's choice.",
    "resume": "POST /v1/fine_tuning/jobs/{id}/resume goes on with a job.",
    "install": "What a job makes is served.",
    "seed": "The field 'seed' has it.",
    "trackers": "The server reports to no service in a client's name.",
}
"""Options of a run that a request can't give, and where what they are for is said."""
_SUFFIX = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_LONGEST_BASE = 48
"""Of a base's name in that of its child: folders have 128 characters."""


def hyperparameters_of(body: FineTuningRequest) -> Hyperparameters:
    """As they were asked for. Raises UnsupportedError for another method, InvalidInputError."""
    method = body.method
    if method is not None and method.type != "supervised":
        raise UnsupportedError(
            f"The method {method.type!r} is not supported yet.",
            hint="Use supervised: it learns from conversations or pairs of prompt and completion.",
            param="method.type",
        )
    for other in ("dpo", "reinforcement"):
        if method is not None and getattr(method, other) is not None:
            raise InvalidInputError(f"method.{other} is of another method.", param=f"method.{other}")
    inside = method.supervised.hyperparameters if method is not None and method.supervised is not None else None
    if inside is not None and body.hyperparameters is not None:
        raise InvalidInputError(
            "Hyperparameters are given twice.",
            hint="Give method.supervised.hyperparameters, and leave the older field out.",
            param="hyperparameters",
        )
    asked = inside or body.hyperparameters or HyperparametersRequest()
    where = "hyperparameters" if inside is None else "method.supervised.hyperparameters"
    for name, most in (("n_epochs", 1000), ("batch_size", 65_536), ("learning_rate_multiplier", 10_000)):
        value = getattr(asked, name)
        if value != "auto" and not 0 < value <= most:
            raise InvalidInputError(
                f"{name}={value!r} is not above 0 and at most {most:,}.", hint="Or use auto.", param=f"{where}.{name}"
            )
    return Hyperparameters(**asked.model_dump())


def options_of(body: FineTuningRequest, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Options of the run that the request sets. Raises InvalidInputError that names the option."""
    asked = dict(body.llmasos or {})
    for name in asked:
        if reason := OURS.get(name.split(".")[0]):
            raise InvalidInputError(f"llmasos.{name} can't be given.", hint=reason, param=f"llmasos.{name}")
    _check_paths(asked)
    _check_gpus(asked)
    options: dict[str, Any] = {"validation": 0.0, **asked, "seed": body.seed or 0}
    if hyperparameters.n_epochs != "auto":
        if {"epochs", "steps"} & asked.keys():
            raise InvalidInputError(
                "n_epochs is given, and llmasos.epochs or llmasos.steps as well.", hint="Give one.", param="llmasos"
            )
        options["epochs"] = float(hyperparameters.n_epochs)
    for ours, theirs in (("batch_tokens", "batch_size"), ("lr", "learning_rate_multiplier")):
        if ours in asked and getattr(hyperparameters, theirs) != "auto":
            raise InvalidInputError(f"{theirs} and llmasos.{ours} are both given.", hint="Give one.", param="llmasos")
    try:
        TrainConfig.of(**options, model=body.model)
    except InvalidInputError as e:
        param = f"llmasos.{e.param}" if e.param else "llmasos"
        raise InvalidInputError(f"llmasos: {e.message}", hint=e.hint, param=param) from e
    return options


def job_options(hyperparameters: Hyperparameters, serves_as: str) -> dict[str, Any]:
    """The section `job` of the process's file."""
    known = hyperparameters.model_dump(include={"batch_size", "learning_rate_multiplier"})
    return {"serves_as": serves_as} | {name: value for name, value in known.items() if value != "auto"}


def check_suffix(suffix: str | None) -> str | None:
    if suffix is not None and not _SUFFIX.fullmatch(suffix):
        raise InvalidInputError(
            f"suffix={suffix!r} can't be a part of a name.",
            hint="Use letters, digits and . _ - between letters or digits.",
            param="suffix",
        )
    return suffix


def names_of(base: str, suffix: str | None, id: str) -> tuple[str, str]:
    """How a job's model is served, `ft:BASE:SUFFIX:ID`, and the name of its run and folder."""
    short = tidy_name(base)[:_LONGEST_BASE].rstrip("._-+@")
    served = f"ft:{short}:{suffix or ''}:{id}"
    return served, tidy_name(served)


def _check_paths(asked: dict[str, Any]) -> None:
    """Clients name no files of the server."""
    template = asked.get("template")
    if isinstance(template, str) and "{{" not in template and "{%" not in template:
        raise InvalidInputError(
            "llmasos.template is no Jinja template.",
            hint="Send the template's text; a path would be one of the server's.",
            param="llmasos.template",
        )
    for name, value in other_models(asked).items():
        if isinstance(value, str) and ("/" in value or "\\" in value or value.startswith((".", "~", "file:"))):
            raise InvalidInputError(
                f"llmasos.{name}={value!r} is a path.", hint="Name an installed model.", param=f"llmasos.{name}"
            )


def other_models(asked: dict[str, Any]) -> dict[str, Any]:
    """Options that name a model beside the one that is trained, with what was given."""
    distillation = asked.get("distillation")
    teacher = asked.get("distillation.teacher", distillation.get("teacher") if isinstance(distillation, dict) else None)
    found = {"tokenizer": asked.get("tokenizer"), "distillation.teacher": teacher}
    return {name: value for name, value in found.items() if value is not None}


def _check_gpus(asked: dict[str, Any]) -> None:
    """Without GPUs the run's processes share the CPU, and nothing else bounds how many a client may begin."""
    number, most = asked.get("gpus"), os.cpu_count() or 1
    if isinstance(number, int) and number > most:
        raise InvalidInputError(
            f"llmasos.gpus={number}, and the server has {most} CPU cores for its processes.",
            hint="Leave it out, or give the number of the server's GPUs.",
            param="llmasos.gpus",
        )
