"""A route's inputs out of an HTTP request: path and query, JSON or a form."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import anyio.to_thread
import pydantic_core
from pydantic import ValidationError
from starlette.requests import Request

from llmasos.apps import files, problems
from llmasos.apps.routes import QUERY_METHODS, Route

_LARGE = 1 << 20
"""Bytes from which a body is looked at in a thread: others need not wait for it."""


async def read_inputs(route: Route, request: Request) -> dict[str, Any]:
    """The validated inputs by their names. Raises RequestError with a 4xx problem."""
    place = "query" if request.method in QUERY_METHODS else "body"
    if place == "query":
        values = _query(route, request)
    elif route.takes_files and _media_type(request) == "multipart/form-data":
        values = await files.read_form(request, route)
    else:
        values = await read_json(request, route.value_names, route.max_body)
    misplaced = [
        {"type": "extra_forbidden", "loc": (place, name), "msg": "", "input": values.pop(name)}
        for name in route.path_names
        if name in values
    ]
    if place == "body":
        misplaced += [
            {"type": "extra_forbidden", "loc": ("query", name), "msg": "", "input": value}
            for name, value in request.query_params.items()
        ]
    try:
        read = functools.partial(route.read, values | request.path_params)
        found = await anyio.to_thread.run_sync(read) if _is_large(request) else read()
    except ValidationError as e:
        errors = problems.located(e, place, route.path_names) + misplaced
        raise problems.RequestError(problems.wrong_input(errors, route.value_names)) from e
    if misplaced:
        raise problems.RequestError(problems.wrong_input(misplaced, route.value_names))
    return found


def _is_large(request: Request) -> bool:
    length = request.headers.get("content-length", "")
    return int(length) >= _LARGE if length.isdigit() else "transfer-encoding" in request.headers


def _query(route: Route, request: Request) -> dict[str, Any]:
    many = {i.name for i in route.inputs if i.shapes == {"many"}}
    values: dict[str, Any] = {}
    for name in request.query_params:
        found = request.query_params.getlist(name)
        values[name] = found if name in many or len(found) > 1 else found[0]
    return values


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, names: Iterable[str], limit: int = files.MAX_BODY) -> dict[str, Any]:
    """The object in a request's body; `names`: what it may hold. Raises RequestError with a 4xx problem."""
    body = await files.read_body(request, limit)
    if not body:
        return {}
    kind = _media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        message = f"The body's Content-Type is {kind or 'missing'}; JSON is taken here."
        hint = "With curl: -H 'Content-Type: application/json'."
        raise problems.RequestError(problems.problem(415, "unsupported_media_type", message, hint=hint))
    try:
        parse = functools.partial(pydantic_core.from_json, body, allow_inf_nan=False)
        values = await anyio.to_thread.run_sync(parse) if len(body) >= _LARGE else parse()
    except ValueError as e:
        message = f"The body is not valid JSON: {e}."
        raise problems.RequestError(problems.problem(400, "malformed_json", message)) from e
    if not isinstance(values, dict):
        error = {"type": "dict_type", "loc": ("body",), "msg": "The body must be a JSON object", "input": values}
        raise problems.RequestError(problems.wrong_input([error], list(names)))
    return values
