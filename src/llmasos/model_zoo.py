"""Names -> models: `get_model` loads one, `list_models` and `search_models` look through catalogue and library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.inference.remote import RemoteLLM
    from llmasos.store import Progress


@dataclass(frozen=True)
class ModelInfo:
    """One line of a listing. `installed` models lie in the home folder; others are fetched on first use."""

    name: str
    family: str
    licence: str
    upstream: str
    installed: bool
    notice: str = ""


def get_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> LLM | RemoteLLM:
    """A model by name, fetched if need be; the same as `LLM.from_pretrained`."""
    from llmasos.inference.llm import LLM

    return LLM.from_pretrained(name, device=device, dtype=dtype, quantization=quantization, on_progress=on_progress)
