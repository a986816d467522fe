"""What OpenAI's routes share: their documented errors, the head of an answer, events written without pydantic."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from llmasos.client.types import ErrorBody, Usage, WireRequest
from llmasos.serve import render

_WRONG = {
    400: "A field is wrong, unknown or not supported; `param` names it.",
    404: "The model is not served here.",
    413: "The body is too long.",
    500: "The server failed; `message` has the id of the request in its log.",
    503: "Too many requests wait for the model; see Retry-After.",
}


def responses(streamed: str = "") -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {k: {"model": ErrorBody, "description": v} for k, v in _WRONG.items()}
    if streamed:
        schema = {"type": "string", "description": f"`data:` lines of {streamed} objects, then `data: [DONE]`."}
        found[200] = {"description": "The answer", "content": {"text/event-stream": {"schema": schema}}}
    return found


def refusals(model: type[WireRequest]) -> str:
    return f"Refused by name when set: {', '.join(f'`{name}`' for name in sorted(model.UNSUPPORTED))}."


def head(kind: str, object_: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": object_, "created": int(time.time()), "model": model}


class Events:
    """The events of one stream. Their common part is written once; what differs is put together as text, because many
    streams share one thread and a token's event must cost little."""

    def __init__(self, kind: str, object_: str, model: str, *, with_usage: bool) -> None:
        self._head = json.dumps(head(kind, object_, model), ensure_ascii=False)[:-1]
        usage = ', "usage": null' if with_usage else ""
        self._before = f'data: {self._head}{usage}, "choices": [{{"index": '

    def choice(self, index: int, fields: str) -> str:
        """`fields`: the choice's other fields as JSON, without braces."""
        return f"{self._before}{index}, {fields}}}]}}\n\n"

    def usage(self, usage: Usage) -> str:
        """The last event: no choices."""
        return f'data: {self._head}, "usage": {render.dump(usage)}, "choices": []}}\n\n'
