"""The simplest JSON value that a schema lets, for models that are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def simplest(schema: Mapping[str, Any]) -> Any:
    """A value that the schema lets."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: simplest(one) for name, one in schema["properties"].items()}
        case "array":
            return [simplest(schema["items"])] * schema.get("minItems", 0)
        case "string":
            return "A word."[: schema.get("maxLength", 99)]
        case "boolean":
            return False
        case "integer":
            return 7
    return None
