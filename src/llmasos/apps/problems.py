"""Errors as answers: RFC 9457 problem documents (`application/problem+json`).

Every one has `type`, `title`, `status`, `code` (snake_case, stable), `message` (what happened, with the value) and,
where there is one, `hint` (what to do next). `detail` repeats the message, except for wrong input: there it is the
list of `{type, loc, msg, input}` that clients of FastAPI know. A failure of the function itself has `error_id`: the
traceback is in the log of `llmasos.apps` under that id and never in the answer.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmasos.errors import InvalidInputError, LLMasOSError

log = logging.getLogger("llmasos.apps")

_SHOWN_TEXT, _SHOWN_ITEMS, _SHOWN_DEPTH = 200, 20, 4


class Problem(BaseModel):
    """The answer to a request that failed (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    message: str
    hint: str | None = None
    error_id: str | None = None
    detail: str | list[dict[str, Any]]


class RequestError(Exception):
    """A request that can't be understood; becomes the problem that it carries."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["message"])
        self.body = body


def problem(status: int, code: str, message: str, *, hint: str = "", **members: Any) -> dict[str, Any]:
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    body = {"type": f"urn:llmasos:error:{code}", "title": title, "status": status, "code": code, "message": message}
    return body | ({"hint": hint} if hint else {}) | {"detail": message} | members


def wrong_input(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> dict[str, Any]:
    """A 422 from pydantic's errors, whose `loc` begins with the place: body, query or path."""
    detail = [
        {"type": e["type"], "loc": list(e["loc"]), "msg": _words(e), "input": shown(e.get("input"))} for e in errors
    ]
    parts = [f"{'.'.join(map(str, e['loc'][1:])) or e['loc'][0]}: {e['msg']}{_given(e)}" for e in detail]
    message = "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
    unknown = any(e["type"] == "extra_forbidden" and len(e["loc"]) == 2 for e in errors)
    hint = (f"Known: {', '.join(known)}." if known else "It takes no input.") if unknown else ""
    return problem(422, "wrong_input", message + ".", hint=hint, detail=detail)


def located(error: ValidationError, place: str, path_names: Sequence[str]) -> list[dict[str, Any]]:
    """pydantic's errors with the place in front of each `loc`."""
    found: list[dict[str, Any]] = [dict(e) for e in error.errors(include_url=False, include_context=False)]
    for e in found:
        e["loc"] = ("path" if e["loc"] and e["loc"][0] in path_names else place, *e["loc"])
    return found


def of_exception(error: BaseException, function: str) -> dict[str, Any]:
    """The problem for whatever a function raised; what nobody foresaw is logged under a new id."""
    if isinstance(error, RequestError):
        return error.body
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, LLMasOSError):
        members = {"param": error.param} if isinstance(error, InvalidInputError) and error.param else {}
        if error.http_status < 500:
            return problem(error.http_status, error.code, error.message, hint=error.hint, **members)
        return _logged(error, function, error.http_status, error.code, error.message, error.hint)
    return _logged(
        error, function, 500, "internal", f"{function}() failed.", "The log has the reason under this error_id."
    )


def response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(body), body["status"], headers, "application/problem+json")


def encode(body: Mapping[str, Any]) -> bytes:
    # A lone surrogate can't be UTF-8; backslashreplace writes it as \ud800, which is the JSON escape for it.
    return json.dumps(body, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")


def of_http_exception(error: HTTPException, *, hint: str = "") -> Response:
    return response(_of_http(error, hint), error.headers)


def shown(value: Any, depth: int = _SHOWN_DEPTH) -> Any:
    """`value` as JSON, shortened, so that an answer never echoes a megabyte."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict | list | tuple) and not depth:
        return "…"
    if isinstance(value, dict):
        return {str(shown(k)): shown(v, depth - 1) for k, v in list(value.items())[:_SHOWN_ITEMS]}
    if isinstance(value, list | tuple):
        return [shown(v, depth - 1) for v in value[:_SHOWN_ITEMS]]
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}… ({len(text)} characters)"


def _words(error: Mapping[str, Any]) -> str:
    return "No such input" if error["type"] == "extra_forbidden" else str(error["msg"])


def _given(error: Mapping[str, Any]) -> str:
    return "" if error["type"] == "missing" else f" (given {json.dumps(error['input'], ensure_ascii=False)})"


def _of_http(error: HTTPException, hint: str = "") -> dict[str, Any]:
    code = _CODES.get(error.status_code, "http_error")
    members: dict[str, Any] = {} if isinstance(error.detail, str) else {"detail": error.detail}
    message = error.detail if isinstance(error.detail, str) else HTTPStatus(error.status_code).phrase
    return problem(error.status_code, code, message, hint=hint, **members)


_CODES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def _logged(error: BaseException, function: str, status: int, code: str, message: str, hint: str) -> dict[str, Any]:
    error_id = f"err_{secrets.token_hex(6)}"
    log.error("%s: %s() failed: %s", error_id, function, error, exc_info=error)
    return problem(status, code, message, hint=hint, error_id=error_id)
