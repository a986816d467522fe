"""What OpenAI's answers share: their head, and events written without pydantic."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from llmasos.client.types import Usage
from llmasos.serve import render


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
