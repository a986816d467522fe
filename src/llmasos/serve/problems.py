"""Every error as a body of the wire format that the request speaks (`shapes`), so that its official clients raise their
usual exceptions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from llmasos.errors import ContextOverflowError, LLMasOSError, ServerError
from llmasos.serve.shapes import Problem, shape_of

log = logging.getLogger("llmasos.serve")

CLIENT_CLOSED_REQUEST = 499
"""Nginx's status for "the client went away"; nobody is left to read it."""

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_FIELD = re.compile(r"[a-z_][a-z0-9_]*")
_TYPE_TAGS = {"str", "int", "float", "bool", "dict", "list"}


class StoppingError(ServerError):
    """The server was told to stop and this request took longer than it may wait."""

    http_status = 503
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The server is stopping; this request was not finished.", hint="Try again when it is back.")


def error_body(
    scope: Scope,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> BaseModel:
    """What a stream that has begun says last; there is no place for `headers` any more."""
    # A value that the caller sent may hold half a surrogate pair, which UTF-8 can't carry.
    problem = Problem(
        status, _printable(message), param and _printable(param), code, scope.get("state", {}).get("request_id")
    )
    return shape_of(scope).body(problem)


def error_response(
    scope: Scope,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """`scope` is the request's: it tells in whose words to answer."""
    body = error_body(scope, status, message, param=param, code=code).model_dump_json(exclude_unset=True)
    return Response(body, shape_of(scope).status(status), dict(headers or {}), media_type="application/json")


def problem_of(e: LLMasOSError) -> dict[str, Any]:
    """Arguments of `error_response` (beside the scope) for one of our errors. Names are OpenAI's where it has one."""
    code = "context_length_exceeded" if isinstance(e, ContextOverflowError) else e.code
    retry_after = getattr(e, "retry_after", None)
    headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
    return {
        "status": e.http_status,
        "message": str(e),
        "param": getattr(e, "param", None),
        "code": code,
        "headers": headers,
    }


def unexpected(request_id: str) -> dict[str, Any]:
    """Arguments of `error_response` for the exception being handled, which is logged with the request's id."""
    log.exception("request %s failed", request_id)
    message = f"The server failed on this request. Its log has the cause under {request_id}."
    return {"status": 500, "message": message, "code": "internal_error"}


def install(app: FastAPI) -> None:
    app.add_exception_handler(LLMasOSError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


async def _ours(request: Request, e: Exception) -> Response:
    assert isinstance(e, LLMasOSError)
    return error_response(request.scope, **problem_of(e))


async def _http(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    message = e.detail
    if e.status_code in (404, 405) and message == HTTPStatus(e.status_code).phrase:
        message = f"There is no {request.method} {request.url.path}. See /openapi.json."
    code = HTTPStatus(e.status_code).name.lower()
    return error_response(request.scope, e.status_code, message, code=code, headers=e.headers)


async def _validation(request: Request, e: Exception) -> Response:
    assert isinstance(e, RequestValidationError)
    return error_response(request.scope, **validation_problem([{**one, "loc": one["loc"][1:]} for one in e.errors()]))


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of `error_response` (beside the scope) for pydantic's errors in a body."""
    first = errors[0]
    param = _path(first)
    if first["type"] == "json_invalid":
        message = f"The body is not valid JSON: {first['ctx']['error']}."
        return {"status": 400, "message": message, "param": None, "code": "invalid_json"}
    if first["type"] == "model_attributes_type" and not param:
        message = "The body must be a JSON object, sent with content-type application/json."
        return {"status": 400, "message": message, "param": None, "code": "invalid_type"}
    code = _CODES.get(first["type"]) or ("invalid_type" if first["type"].endswith("_type") else "invalid_value")
    if first["type"] == "missing":
        message = (
            f"The field {param!r} is required." if param else "A JSON body (content-type application/json) is required."
        )
    elif first["type"] == "extra_forbidden":
        message = f"Unknown field {param!r}."
    else:
        # One value that fits none of several allowed forms gives one error per form.
        reasons = dict.fromkeys(error["msg"] for error in errors if _path(error) == param)
        message = f"{param or 'body'}: {'; or: '.join(reasons)}{_shown(first.get('input'))}."
    return {"status": 400, "message": message, "param": param or None, "code": code}


def _path(error: Mapping[str, Any]) -> str:
    """`messages.0.content` of an error's location, without the names of union members that pydantic adds."""
    location: Sequence[Any] = error["loc"]
    parts: list[str] = []
    for i, part in enumerate(location):
        if isinstance(part, str) and part.startswith("<"):  # a tag of ours: exactly one member was tried
            continue
        own_name = error["type"] == "extra_forbidden" and i == len(location) - 1
        if isinstance(part, str) and not own_name and (part in _TYPE_TAGS or not _FIELD.fullmatch(part)):
            break
        parts.append(str(part))
    return ".".join(parts)


def _shown(value: Any) -> str:
    return (
        f" (it is {value!r})" if isinstance(value, str | int | float | bool | None) and len(repr(value)) <= 60 else ""
    )


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
