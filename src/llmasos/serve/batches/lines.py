"""The lines of a batch's input file: read one by one, checked as a whole before the first is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmasos.client.types.files import BatchError, BatchLine
from llmasos.errors import InvalidInputError
from llmasos.serve.problems import validation_problem

MAX_LINES = 50_000
"""Requests of one batch (OpenAI's limit)."""
MAX_LINE_BYTES = 32 * 2**20
"""As much as the body of an HTTP request."""
SHOWN_ERRORS = 100
"""How many errors the batch itself shows; its error file has all."""


@dataclass(frozen=True)
class Line:
    """A request; `number` counts from 1."""

    number: int
    custom_id: str
    body: dict[str, Any]


class LineError(Exception):
    def __init__(self, error: BatchError, custom_id: str | None = None) -> None:
        super().__init__(error.message)
        self.error, self.custom_id = error, custom_id


@dataclass
class Report:
    """What was found in an input file. `models`: by the number of the first line that asks for them."""

    total: int = 0
    models: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[BatchError, str | None]] = field(default_factory=list)


def parse(number: int, raw: bytes, endpoint: str) -> Line:
    """Raises LineError."""

    def wrong(code: str, message: str, param: str | None = None, custom_id: str | None = None) -> LineError:
        return LineError(BatchError(code=code, message=message, param=param, line=number), custom_id)

    if len(raw) > MAX_LINE_BYTES:
        raise wrong("line_too_long", f"The line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise wrong("invalid_json_line", "The line is not UTF-8 text.") from None
    except (ValueError, RecursionError) as e:
        raise wrong("invalid_json_line", f"The line is not valid JSON: {e}.") from None
    if not isinstance(value, dict):
        raise wrong("invalid_json_line", "The line is no JSON object.")
    given = value.get("custom_id")
    custom_id = given if isinstance(given, str) else None
    try:
        line = BatchLine.model_validate(value)
    except InvalidInputError as e:
        raise wrong("invalid_request", e.message, e.param, custom_id) from None
    except ValidationError as e:
        problem = validation_problem(e.errors())
        raise wrong(problem["code"], problem["message"], problem["param"], custom_id) from None
    if line.url != endpoint:
        raise wrong("mismatched_url", f"url is {line.url!r}, and the batch's endpoint {endpoint!r}.", "url", custom_id)
    if not isinstance(line.body.get("model"), str):
        raise wrong("missing_required_parameter", "body.model must name a model.", "body.model", custom_id)
    return Line(number, line.custom_id, line.body)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read(path: Path, endpoint: str) -> Iterator[Line | LineError]:
    """Every line of the file that is not blank. Duplicates of a custom_id are errors. Blocking."""
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(_raw_lines(file), start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                line = parse(number, raw, endpoint)
                if first := seen.get(line.custom_id):
                    message = f"custom_id {line.custom_id!r} is line {first}'s already."
                    error = BatchError(code="duplicate_custom_id", message=message, param="custom_id", line=number)
                    raise LineError(error, line.custom_id)
                seen[line.custom_id] = number
                yield line
            except LineError as e:
                yield e


def _raw_lines(file: Any) -> Iterator[bytes]:
    """Lines without their ends. Of one that is too long only the beginning."""
    while raw := file.readline(MAX_LINE_BYTES + 2):
        found = raw
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES)
        yield found.rstrip(b"\r\n")


def check(path: Path, endpoint: str) -> Report:
    """Read the whole file. Blocking."""
    report = Report()
    for found in read(path, endpoint):
        report.total += 1
        if isinstance(found, LineError):
            report.errors.append((found.error, found.custom_id))
        else:
            report.models.setdefault(found.body["model"], found.number)
        if report.total > MAX_LINES:
            message = f"The file has more than {MAX_LINES} requests, the most of one batch."
            report.errors = [(BatchError(code="too_many_requests", message=message), None)]
            return report
    if not report.total:
        report.errors.append((BatchError(code="empty_file", message="The file has no requests."), None))
    return report
