"""Training: from data to a better model, with the definition that serves it. Names load on first use.

    from llmasos.train import sft
    sft(model="smollm2-135m-instruct", data="chats.jsonl")

`sft`, `pretrain` and `distill` take the options of `TrainConfig` by name and give a `Result`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.train.config import TrainConfig as TrainConfig
    from llmasos.train.run import Result as Result
    from llmasos.train.run import resume as resume
    from llmasos.train.run import train as train

__all__ = ["Result", "TrainConfig", "distill", "pretrain", "resume", "sft", "train"]

_HOMES = {"TrainConfig": "config", "Result": "run", "resume": "run", "train": "run"}


def sft(**options: Any) -> Result:
    """Supervised fine-tuning; see `run.train` for what is raised, and for `listeners`, `progress` and `export`."""
    return _method("sft", options)


def pretrain(**options: Any) -> Result:
    """From a corpus to a model of one's own, or further training of one on texts."""
    return _method("pretrain", options)


def distill(**options: Any) -> Result:
    """A student learns from a teacher."""
    return _method("distill", options)


def _method(method: str, options: dict[str, Any]) -> Result:
    from llmasos.train.config import TrainConfig
    from llmasos.train.run import train

    of_run = {name: options.pop(name) for name in ("listeners", "on_progress", "progress", "export") if name in options}
    return train(TrainConfig.of(method=method, **options), **of_run)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"llmasos.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llmasos.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
