"""The engine's flags: the fields of EngineConfig, and speculation in two."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from llmasos.cli.messages import t
from llmasos.errors import InvalidInputError
from llmasos.inference.config import EngineConfig

_SPECULATION = {"speculative_ngram": int, "speculative_model": str}


def _flags() -> dict[str, str]:
    """Field by flag; what is on by default has a flag that turns it off."""
    names = [(f.name, f.default is True) for f in dataclasses.fields(EngineConfig) if f.name != "speculative"]
    return {f"no_{name}" if is_on else name: name for name, is_on in names}


def engine_types() -> dict[str, Any]:
    """The engine's flags and the types of their values."""
    hints = typing.get_type_hints(EngineConfig, localns={"SpeculativeConfig": object})
    return {flag: hints[name] for flag, name in _flags().items()} | _SPECULATION


def take_engine(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the engine's flags out of `options` and returns the fields of EngineConfig that they set. Raises
    InvalidInputError for what could never run."""
    engine = {}
    for flag, name in _flags().items():
        if flag in options:
            value = options.pop(flag)
            engine[name] = value if flag == name else not value
    ngram, draft = (options.pop(name, None) for name in _SPECULATION)
    if ngram is not None and draft is not None:
        raise InvalidInputError(t("engine.two"), hint=t("engine.two.hint"), param="speculative_ngram")
    if ngram is not None or draft is not None:
        from llmasos.inference.speculate import SpeculativeConfig

        engine["speculative"] = (
            SpeculativeConfig(method="draft", model=draft)
            if ngram is None
            else SpeculativeConfig(num_speculative_tokens=ngram)
        )
    EngineConfig.of(**engine)
    return engine
