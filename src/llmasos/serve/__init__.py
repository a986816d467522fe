"""Models behind HTTP. Not covered yet: keys, quotas, several processes, Anthropic's and Ollama's API."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.serve.server import create_app as create_app
    from llmasos.serve.server import serve as serve

__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("llmasos.serve.server"), name)
    raise AttributeError(f"module 'llmasos.serve' has no attribute {name!r}")
