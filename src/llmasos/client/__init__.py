"""Python SDK for LLMasOS and any OpenAI-compatible server, and the protocols of other providers. Loads no torch.

from llmasos.client import Client
with Client("http://127.0.0.1:8000/v1") as client:
    print(client.chat("Hello!", model="smollm2-135m-instruct").choices[0].message.content)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.client.app import AppClient as AppClient
    from llmasos.client.app import AppJob as AppJob
    from llmasos.client.app import AsyncAppClient as AsyncAppClient
    from llmasos.client.client import AsyncClient as AsyncClient
    from llmasos.client.client import Client as Client
    from llmasos.client.tools import Tool as Tool
    from llmasos.client.tools import ToolRun as ToolRun
    from llmasos.client.tools import tool as tool

_MODULES = {
    **dict.fromkeys(("AsyncClient", "Client"), "client"),
    **dict.fromkeys(("AppClient", "AppJob", "AsyncAppClient"), "app"),
    **dict.fromkeys(("Tool", "ToolRun", "tool"), "tools"),
}
__all__ = ["AppClient", "AppJob", "AsyncAppClient", "AsyncClient", "Client", "Tool", "ToolRun", "tool"]


def __getattr__(name: str) -> Any:
    if module := _MODULES.get(name):
        return getattr(importlib.import_module(f"llmasos.client.{module}"), name)
    raise AttributeError(f"module 'llmasos.client' has no attribute {name!r}")
