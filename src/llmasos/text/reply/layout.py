"""How a tool call is written, as data: what grammars for constrained output are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Literal:
    """Text that is written as it stands."""

    text: str


@dataclass(frozen=True)
class Schema:
    """A JSON value that fits a schema."""

    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Free:
    """Any text, and the `end` that ends it."""

    end: str


@dataclass(frozen=True)
class Matching:
    """Text that a regular expression matches as a whole."""

    regex: str


@dataclass(frozen=True)
class Optional:
    """Pieces that may be left out together."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class OneOf:
    """One of these texts."""

    texts: tuple[str, ...]


Piece = Literal | Schema | Free | Matching | Optional | OneOf


@dataclass(frozen=True)
class CallLayout:
    """`begin`, then calls with `between` between them, then `end`. `calls`: one alternative per tool.

    `at_start`: nothing else is written beside calls, so text must not begin with one of these characters.
    """

    begin: str
    calls: tuple[tuple[Piece, ...], ...]
    between: str
    end: str
    at_start: str = ""


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of OpenAI's tool object; a bare function is itself."""
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def parameters_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON Schema of a tool's arguments; a tool without one takes none."""
    return function_of(tool).get("parameters") or {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


def definitions_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What `$ref`s in a tool's parameters point to; they go by the root of the schema that is enforced."""
    parameters = parameters_of(tool)
    return {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
