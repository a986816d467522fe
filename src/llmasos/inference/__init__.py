"""Running models: `generate_text` for the shortest way, `LLM` for everything else. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM as LLM
    from llmasos.inference.llm import Score as Score
    from llmasos.inference.request import RequestOutput as RequestOutput
    from llmasos.inference.request import SamplingParams as SamplingParams
    from llmasos.inference.request import StructuredOutput as StructuredOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams", "Score", "StructuredOutput", "generate_text"]


def generate_text(
    model: LLM, prompt: str | list[str], *, max_length: int | None = None, **options: Any
) -> str | list[str]:
    """Continue a prompt with a model from `get_model`; the same as `model.generate_text`."""
    return model.generate_text(prompt, max_length=max_length, **options)


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Score"):
        from llmasos.inference import llm

        return getattr(llm, name)
    if name in ("RequestOutput", "SamplingParams", "StructuredOutput"):
        from llmasos.inference import request

        return getattr(request, name)
    raise AttributeError(f"module 'llmasos.inference' has no attribute {name!r}")
