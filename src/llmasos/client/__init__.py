"""Python SDK for LLMasOS and any OpenAI-compatible server, and the protocols of other providers. Loads no torch.

from llmasos.client import Client
with Client("http://127.0.0.1:8000/v1") as client:
    print(client.chat("Hello!", model="smollm2-135m-instruct").choices[0].message.content)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.client.client import AsyncClient as AsyncClient
    from llmasos.client.client import Client as Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("llmasos.client.client"), name)
    raise AttributeError(f"module 'llmasos.client' has no attribute {name!r}")
