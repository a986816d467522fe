"""Models behind HTTP: OpenAI's, Anthropic's and Ollama's APIs and LLMasOS's own, for many users, with keys."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.serve.server import create_app as create_app
    from llmasos.serve.service import serve as serve

_HOME = {"create_app": "server", "serve": "service"}
__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"llmasos.serve.{_HOME[name]}"), name)
    raise AttributeError(f"module 'llmasos.serve' has no attribute {name!r}")
