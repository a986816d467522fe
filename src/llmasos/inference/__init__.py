"""Running models: `generate_text` for the shortest way, `LLM` for everything else. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig as EngineConfig
    from llmasos.inference.config import SpeculativeConfig as SpeculativeConfig
    from llmasos.inference.llm import LLM as LLM
    from llmasos.inference.llm import Score as Score
    from llmasos.inference.request import RequestOutput as RequestOutput
    from llmasos.inference.request import SamplingParams as SamplingParams
    from llmasos.inference.request import StructuredOutput as StructuredOutput

_HOMES = {
    "EngineConfig": "config",
    "LLM": "llm",
    "RequestOutput": "request",
    "SamplingParams": "request",
    "Score": "llm",
    "SpeculativeConfig": "config",
    "StructuredOutput": "request",
}
__all__ = [
    "LLM",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "SpeculativeConfig",
    "StructuredOutput",
    "generate_text",
]


def generate_text(
    model: LLM, prompt: str | list[str], *, max_length: int | None = None, **options: Any
) -> str | list[str]:
    """Continue a prompt with a model from `get_model`; the same as `model.generate_text`."""
    return model.generate_text(prompt, max_length=max_length, **options)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"llmasos.inference.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llmasos.inference' has no attribute {name!r}")
