"""The server's OpenAPI document: FastAPI's, with what it can't know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmasos.client.types import ChatCompletionChunk, TextCompletion
from llmasos.client.types.native import LogLine
from llmasos.serve.shapes import ANTHROPIC, OLLAMA, OPENAI, shape_of

_ERRORS = (OPENAI.model, ANTHROPIC.model, OLLAMA.model)
_EXTRA: tuple[type[BaseModel], ...] = (ChatCompletionChunk, TextCompletion, LogLine, *_ERRORS)
"""What events and errors hold: no operation's answer need name these."""


def install(app: FastAPI) -> None:
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]  # FastAPI's own way


def _document(app: FastAPI) -> dict[str, Any]:
    """With the streamed models, with the errors of every operation, and without FastAPI's own 422 answers, which are
    400 here."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, operations in schema["paths"].items():
            error = shape_of({"path": path, "headers": []}).model.__name__
            for operation in operations.values():
                found = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
                if found.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
                    del operation["responses"]["422"]
                operation["responses"]["default"] = {
                    "description": "What went wrong",
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}},
                }
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        shown: Any = [(model, "serialization") for model in _EXTRA]
        _, extra = models_json_schema(shown, ref_template="#/components/schemas/{model}")
        for name, definition in extra["$defs"].items():
            schemas.setdefault(name, definition)
        app.openapi_schema = schema
    return app.openapi_schema
