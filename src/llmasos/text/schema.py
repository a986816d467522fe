"""A Python function -> the JSON schema that chat templates and APIs expect for a tool.

Reads type hints and a Google-style docstring (`Args:` with one `name: description` per argument), like transformers'
`get_json_schema`.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmasos.errors import InvalidInputError

_SIMPLE: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SECTION = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Yields|Example|Examples):\s*$", re.MULTILINE)


def json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """`{"type": "function", "function": {name, description, parameters}}`.

    Raises InvalidInputError when the function has no docstring, or an argument no type hint or description.
    """
    name = getattr(function, "__name__", type(function).__name__)
    document = inspect.getdoc(function)
    if not document:
        raise InvalidInputError(
            f"The tool {name} has no docstring.", hint="Say in it what the tool does.", param="tools"
        )
    described = _described(document)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidInputError(f"The tool {name} takes *{parameter.name}; list its arguments.", param="tools")
        if parameter.name not in hints:
            raise InvalidInputError(
                f"The argument {parameter.name} of the tool {name} has no type hint.", param="tools"
            )
        if parameter.name not in described:
            raise InvalidInputError(
                f"The argument {parameter.name} of the tool {name} is not described in its docstring.",
                hint=f"Add a line '{parameter.name}: ...' under 'Args:'.",
                param="tools",
            )
        schema = _schema(hints[parameter.name], f"{name}.{parameter.name}")
        properties[parameter.name] = schema | {"description": described[parameter.name]}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    section = _SECTION.search(document)
    description = document[: section.start() if section else None].strip()
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _described(document: str) -> dict[str, str]:
    parts = _SECTION.split(document)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = inspect.cleandoc(sections.get("Args", sections.get("Arguments", ""))).splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if (start := re.match(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)) and not line[:1].isspace():
            name = start[1]
            found[name] = start[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [_schema(arg, where) for arg in args if arg is not type(None)]
        if len(kinds) == 1:
            schema = kinds[0]
        elif all(kind.keys() == {"type"} for kind in kinds):
            schema = {"type": sorted({kind["type"] for kind in kinds})}
        else:
            schema = {"anyOf": kinds}
        return schema | ({"nullable": True} if type(None) in args else {})
    if origin is Literal:
        return _choices(list(args))
    if origin in (list, set, frozenset) and args:
        return {"type": "array", "items": _schema(args[0], where)}
    if origin is tuple and args and ... not in args:
        return {"type": "array", "prefixItems": [_schema(arg, where) for arg in args]}
    if origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": _schema(args[1], where)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint])
    try:
        return dict(_SIMPLE[hint])
    except (KeyError, TypeError):
        raise InvalidInputError(
            f"The type {hint!r} of {where} has no JSON schema here.",
            hint="Use int, float, str, bool, list, dict, Literal or an Enum, or pass the schema itself as the tool.",
            param="tools",
        ) from None


def _choices(values: list[Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_SIMPLE[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
