"""Ollama's wire."""

from __future__ import annotations

from llmasos.client.types.base import WireResponse


class OllamaErrorBody(WireResponse):
    """`code` and `param` are extensions: a stable name, and the field that is wrong."""

    error: str
    code: str | None = None
    param: str | None = None
