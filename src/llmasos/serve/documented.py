"""What the OpenAPI document says of an operation beside its answer: errors, streams, fields that are refused."""

from __future__ import annotations

from typing import Any

from llmasos.client.types import WireRequest
from llmasos.serve.shapes import OPENAI, Shape

Responses = dict[int | str, dict[str, Any]]
"""FastAPI's `responses`."""

ASKED = (400, 404, 413, 500, 503)
"""What may come of a request to a model."""
_MEANINGS = {
    400: "A field is wrong, unknown or not supported; the error names it.",
    403: "The caller may not do this.",
    404: "There is nothing of this name.",
    409: "Not in its present state, or somebody else is at it.",
    413: "Too long for this server, or more than the key may store.",
    422: "The file is not what it claims to be, or of an unknown architecture.",
    500: "The server failed; the message has the id of the request in its log.",
    502: "A host could not be reached or answered wrongly.",
    503: "Not now: too much waits (see Retry-After), the server is stopping, or offline.",
    507: "There is no room: on the disk, or in memory.",
}


def errors(*statuses: int, shape: Shape = OPENAI) -> Responses:
    """In the words of the wire format of this shape."""
    return {shape.status(one): {"model": shape.model, "description": _MEANINGS[one]} for one in statuses}


def stream(description: str, media_type: str = "text/event-stream") -> Responses:
    """An answer that may come, or always comes, in pieces."""
    schema = {"type": "string", "description": description}
    return {200: {"description": "The answer", "content": {media_type: {"schema": schema}}}}


def refusals(model: type[WireRequest]) -> str:
    return f"Refused by name when set: {', '.join(f'`{name}`' for name in sorted(model.UNSUPPORTED))}."
