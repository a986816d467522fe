"""The OpenAPI documents of several applications as one: paths below `/apps/NAME`, names of components with the
application's before them. The documents come from applications: what is not as it should be is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmasos import __version__

_METHODS = ("get", "post", "put", "patch", "delete", "head", "options")
_REF = re.compile(r"#/components/([A-Za-z]+)/([A-Za-z0-9._-]+)")
MOST_DEPTH = 60


def merged(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`documents`: by the applications' names."""
    paths: dict[str, Any] = {}
    components: dict[str, dict[str, Any]] = {}
    tags = []
    for name, document in documents.items():
        prefix = "".join(word.capitalize() for word in name.split("-"))
        info = document.get("info")
        tags.append({"name": name, "description": str(info.get("title", name)) if isinstance(info, dict) else name})
        for path, item in _dict(document.get("paths")).items():
            operations = {method: one for method, one in _dict(item).items() if method in _METHODS}
            if isinstance(path, str) and path.startswith("/") and operations:
                paths[f"/apps/{name}{path}"] = {
                    method: _operation(one, name, method, path, prefix) for method, one in operations.items()
                }
        for kind, found in _dict(document.get("components")).items():
            for key, value in _dict(found).items():
                components.setdefault(kind, {})[f"{prefix}_{key}"] = _renamed(value, prefix)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Applications of LLMasOS", "version": __version__},
        "paths": paths,
        "components": components,
        "tags": tags,
    }


def _operation(one: Any, name: str, method: str, path: str, prefix: str) -> Any:
    found = {**_dict(_renamed(one, prefix)), "tags": [name]}
    own = found.get("operationId") or f"{method}_{path}"
    found["operationId"] = re.sub(r"\W+", "_", f"{name}_{own}")
    found.pop("servers", None)
    found.pop("security", None)
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _renamed(value: Any, prefix: str, depth: int = 0) -> Any:
    """With references to the components' new names."""
    if depth > MOST_DEPTH:
        return {}
    if isinstance(value, dict):
        return {
            key: _reference(one, prefix) if key in ("$ref", "mapping") else _renamed(one, prefix, depth + 1)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_renamed(one, prefix, depth + 1) for one in value]
    return value


def _reference(value: Any, prefix: str) -> Any:
    if isinstance(value, dict):  # a discriminator's mapping, or a property of that name
        return {
            key: _reference(one, prefix) if isinstance(one, str) else _renamed(one, prefix, 1)
            for key, one in value.items()
        }
    if not isinstance(value, str):
        return value
    return _REF.sub(lambda match: f"#/components/{match[1]}/{prefix}_{match[2]}", value)
