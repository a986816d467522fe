"""What a model's reply is made of: reasoning, text, tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The call number `index` (from 0) begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the JSON text of a call's arguments; pieces are to be joined."""

    index: int
    arguments: str


ReplyEvent = TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta
