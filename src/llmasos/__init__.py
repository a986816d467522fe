"""LLMasOS: the operating system for language models. Public names load on first use, so importing this is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.apps import Application as Application
    from llmasos.inference.llm import LLM as LLM
    from llmasos.inference.request import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Application", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "llmasos.inference.llm",
    "SamplingParams": "llmasos.inference.request",
    "Application": "llmasos.apps",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmasos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
