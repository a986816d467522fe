"""Server-sent events from bytes, as they come (WHATWG HTML, section 9.2.6 "Interpreting an event stream")."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    data: str
    event: str = "message"
    id: str = ""


class EventParser:
    """Feed it bytes in pieces of any size; each call returns the events that became complete.

    An event without its closing blank line is dropped at the end of the stream, as the standard says. Bytes that are
    not UTF-8 become U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._line = ""
        self._skip_newline = False  # a piece ended with \r: a \n at the start of the next belongs to it
        self._data: list[str] = []
        self._event = self._id = ""

    def feed(self, piece: bytes) -> list[Event]:
        text = self._decoder.decode(piece)
        if not text:
            return []
        if self._skip_newline and text[0] == "\n":
            text = text[1:]
        self._skip_newline = text.endswith("\r") if text else False
        *lines, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return [event for line in lines if (event := self._read(line)) is not None]

    def _read(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Event | None:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        return Event("\n".join(data), event or "message", self._id) if data else None
