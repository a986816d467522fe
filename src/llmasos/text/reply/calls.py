"""What every format of tool calls has in common, and where their readers write to."""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmasos.text.reply.events import ReplyEvent, ToolCallDelta, ToolCallStart
from llmasos.text.reply.layout import CallLayout, function_of, parameters_of
from llmasos.text.reply.source import Malformed, Reading, Source

Tools = Sequence[Mapping[str, Any]]
NAME = re.compile(r"[\w.:/-]{1,128}")
_ALPHANUMERIC = string.ascii_letters + string.digits


def random_id(length: int = 24, prefix: str = "call_") -> str:
    return prefix + "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))


class Calls:
    """The calls of one reply. Once `begin` was said a call stands, whatever comes after."""

    def __init__(self, tools: Tools, emit: Callable[[ReplyEvent], None], new_id: Callable[[], str]) -> None:
        self.parameters = {function_of(tool)["name"]: parameters_of(tool) for tool in tools}
        self.count = 0
        self.read_to = 0
        """Up to where the source is in events."""
        self._emit, self._new_id = emit, new_id

    def begin(self, name: str, id: str | None = None) -> None:
        self._emit(ToolCallStart(self.count, id or self._new_id(), name))
        self.count += 1

    def add(self, arguments: str) -> None:
        self._emit(ToolCallDelta(self.count - 1, arguments))

    def end(self, source: Source) -> None:
        self.read_to = source.at


class CallForm(ABC):
    """How the models of some family write tool calls."""

    begins: tuple[str, ...] = ()
    """Texts that begin a call wherever they stand."""
    at_start: str = ""
    """Characters that may begin a call at the start of the reply, and only there."""
    tokens: tuple[str, ...] = ()
    """Further texts of the format that may be special tokens of the tokenizer."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that must be readable in the output, special tokens or not."""
        return (*self.begins, *self.tokens)

    @abstractmethod
    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        """Read calls behind `begin` (empty: at the start of the reply). Raises Malformed when they are none."""

    @abstractmethod
    def layout(self, tools: Tools) -> CallLayout: ...

    def new_id(self) -> str:
        return random_id()


def named(text: str) -> str:
    """`text` as the name of a function. Raises Malformed when it can't be one."""
    name = text.strip()
    if not NAME.fullmatch(name):
        raise Malformed
    return name


def arguments_of(source: Source, calls: Calls, ends: Sequence[str]) -> Reading[bool]:
    """The arguments of a call that was begun, at their `{`; whether they were right. What is wrong in them is handed on
    as it was written, up to one of `ends`, which is read."""
    try:
        yield from source.value(calls.add)
    except Malformed:
        yield from source.pass_until(ends, calls.add)
        calls.end(source)
        return False
    calls.end(source)
    return True


def object_text(text: str) -> str | None:
    """Arguments that were given as JSON text in a string, or as null; None when they are no object."""
    try:
        value = json.loads(text, strict=False)
        if isinstance(value, str):
            text = value
            value = json.loads(text, strict=False) if text.strip() else None
    except (ValueError, RecursionError):
        return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None
