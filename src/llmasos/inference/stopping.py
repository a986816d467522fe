"""Stop strings in a stream: text is released as soon as no stop string can begin in it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed text with `push`; it returns what may be shown. After a match `stopped` names the string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops, self.include = tuple(stops), include
        self.stopped: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        if not self.stops or self.stopped is not None:
            return "" if self.stopped is not None else text
        held = self._held + text
        found = [(at, -len(stop), stop) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            at, _, self.stopped = min(found)
            self._held = ""
            return held[: at + len(self.stopped)] if self.include else held[:at]
        keep = max(_overlap(held, stop) for stop in self.stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back: the text ended and no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
