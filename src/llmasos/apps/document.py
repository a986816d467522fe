"""An application's routes as one JSON document: what every surface but Python is made from.

Pages, command lines, tools and generated clients read this and nothing else, so they can't differ from the function or
from each other. Schemas are JSON Schema 2020-12, each whole, with its own `$defs`. A route:

    name, path, methods, summary, description    the function's name, where it answers, its docstring
    input      schema of the object of all inputs, by the names that callers write; `path_inputs`: those in the path
    output     schema of the result; of a stream, of the elements put together
    stream     null, or {"item": schema of an element, "joins": whether the whole is one text}
    session    whether it keeps state between the calls of a client (see `sessions.py`)
    examples   inputs
    hints      tool, read_only, destructive; null: unknown. output: how a result is best shown (text, markdown, table,
               json, image, audio, file); null: as its type says

A text with "x-llmasos-media" is a file as a data: URL, of these media types; "x-llmasos-max-bytes" is its limit.

`chat` is null, or says how the application chats (see `chat.py`): name, model (`app/NAME`), path, summary, description,
the request's `fields` that it takes, whether it streams, whether it keeps a session. `schedules`: name, summary, cron
or every (seconds) of functions that run by the clock; `GET /schedules` says when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmasos.apps.routes import Route


def document(title: str, version: str, routes: Sequence[Route], chat: Mapping[str, Any] | None) -> dict[str, Any]:
    described = [describe_route(route) for route in routes]
    return {"title": title, "version": version, "routes": described, "chat": chat and dict(chat)}


def describe_route(route: Route) -> dict[str, Any]:
    hints = route.hints
    return {
        "name": route.name,
        "path": route.path,
        "methods": list(route.methods),
        "summary": route.summary,
        "description": route.description,
        "input": route.model.model_json_schema(),
        "path_inputs": list(route.path_names),
        "output": route.result.json_schema(mode="serialization"),
        "stream": {"item": route.item.json_schema(mode="serialization"), "joins": route.joins}
        if route.streams
        else None,
        "session": route.node.uses("session"),
        "examples": [dict(example) for example in route.examples],
        "hints": {
            "tool": hints.tool,
            "read_only": hints.read_only,
            "destructive": hints.destructive,
            "output": hints.output,
        },
    }
