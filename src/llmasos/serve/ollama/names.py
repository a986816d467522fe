"""Ollama's names for models and its durations, in ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from llmasos.serve.caller import Caller
from llmasos.serve.models import ModelNotFoundError, Models

LATEST = ":latest"
_HUB = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/", re.IGNORECASE)
_DURATION = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+")
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def shown(name: str) -> str:
    """A model's name as Ollama's clients expect it: with a tag."""
    return name if ":" in name else name + LATEST


def spellings(name: str) -> Iterator[str]:
    """What a name may be here: as it is, without the tag that says nothing, with the tag as a part of the name."""
    yield name
    if name.endswith(LATEST):
        name = name.removesuffix(LATEST)
        yield name
    if _HUB.match(name):
        name = _HUB.sub("", name)
        yield f"hf:{name}"
    if ":" in name:
        yield name.replace(":", "-")


async def served_name(models: Models, name: str, caller: Caller, *, facts: bool = False) -> str:
    """The served model that a client means; `facts`: as in `Models.look`. Raises ModelNotFoundError, and ForbiddenError
    for an unknown name that the caller may not use."""
    for spelling in spellings(name):
        if models.is_app(spelling):
            return spelling
        await models.look(spelling, facts=facts)
        try:
            models[spelling]
        except ModelNotFoundError:
            continue
        return spelling
    models.check(name, caller)
    raise AssertionError("it was found after all")


def seconds(duration: str | float) -> float | None:
    """Seconds of a `keep_alive`; infinity for ever. None: no duration."""
    if isinstance(duration, str):
        text = duration.strip()
        if re.fullmatch(r"[+-]?\d+(\.\d+)?", text):
            value = float(text)
        elif _DURATION.fullmatch(text):
            value = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
            value = -value if text.startswith("-") else value
        else:
            return None
    else:
        value = duration
    return math.inf if value < 0 else value
