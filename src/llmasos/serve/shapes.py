"""Errors in the words of the wire format that a request speaks, which its path tells, and for two paths a header.

Everything that answers before or instead of a route (the gate, the check of keys, validation) renders its errors
through `shape_of(scope)`, so that every official client raises its usual exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import Scope

from llmasos.client.types import ErrorBody, ErrorDetail
from llmasos.client.types.anthropic import AnthropicErrorBody, AnthropicErrorDetail, AnthropicErrorDetails
from llmasos.client.types.ollama import OllamaErrorBody

_ANTHROPIC_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
ANTHROPIC_OVERLOADED = 529
"""Anthropic's status for what others call 503: too much to do, try again."""


@dataclass(frozen=True)
class Problem:
    """What went wrong. `param` names the field that is wrong; `code` is stable, `message` is for people."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class Shape:
    """How one wire format says that something failed: by a `model`. `id_header`: where its clients look for the
    request's id."""

    model: type[BaseModel]
    body: Callable[[Problem], BaseModel]
    status: Callable[[int], int] = int
    id_header: str = "x-request-id"


def _openai(problem: Problem) -> ErrorBody:
    status = problem.status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    detail = ErrorDetail(message=problem.message, type=kind, param=problem.param, code=problem.code)
    return ErrorBody(error=detail)


def _anthropic(problem: Problem) -> AnthropicErrorBody:
    status = _anthropic_status(problem.status)
    kind = _ANTHROPIC_ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    known = _known(error_code=problem.code, param=problem.param)
    details = {"details": AnthropicErrorDetails(**known)} if known else {}
    error = AnthropicErrorDetail(type=kind, message=problem.message, **details)
    return AnthropicErrorBody(type="error", error=error, request_id=problem.request_id)


def _known(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _anthropic_status(status: int) -> int:
    return ANTHROPIC_OVERLOADED if status == 503 else status


def _ollama(problem: Problem) -> OllamaErrorBody:
    return OllamaErrorBody(error=problem.message, **_known(code=problem.code, param=problem.param))


OPENAI = Shape(ErrorBody, _openai)
ANTHROPIC = Shape(AnthropicErrorBody, _anthropic, _anthropic_status, "request-id")
OLLAMA = Shape(OllamaErrorBody, _ollama)


def shape_of(scope: Scope) -> Shape:
    path: str = scope["path"]
    if f"{path}/".startswith("/api/"):
        return OLLAMA
    if f"{path}/".startswith("/v1/messages/") or (f"{path}/".startswith("/v1/models/") and speaks_anthropic(scope)):
        return ANTHROPIC
    return OPENAI


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the request comes from one of Anthropic's clients: /v1/models is both theirs and OpenAI's."""
    return "anthropic-version" in Headers(scope=scope)
