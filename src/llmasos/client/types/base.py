"""What all wire types share: strict requests, lenient responses, the error body.

Requests are strict: a wrong type, an unknown field or a documented field that we can't honour is an error that names
it, never ignored. Responses keep fields that we don't know, so that a newer server's additions survive.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

from llmasos.errors import InvalidInputError, UnsupportedError

MOST_FIELDS = 10_000
"""Of one object. Each that is wrong is an error of its own, and making millions of errors holds the server for minutes;
for the same reason a list is looked through only to its first wrong entry."""


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, list | tuple):
        for one in schema:
            _fail_fast(one)
    elif isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for one in schema.values():
            _fail_fast(one)


class WireRequest(BaseModel):
    """Base of request bodies and their parts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """OpenAI's documented fields that we don't support, each with the values (beside null) that ask for nothing."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(handler.resolve_ref_schema(schema))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for value in (data, *data.values()) if len(data) <= MOST_FIELDS else (data,):
            if isinstance(value, dict) and len(value) > MOST_FIELDS:
                raise InvalidInputError(f"An object has {len(value)} fields; at most {MOST_FIELDS} are allowed.")
        for name in cls.UNSUPPORTED.keys() & data.keys():
            value, neutral = data[name], cls.UNSUPPORTED[name]
            if value is not None and value not in neutral:
                allowed = "".join(f" or set it to {v!r}" for v in neutral[:1])
                raise UnsupportedError(f"{name!r} is not supported yet.", hint=f"Leave it out{allowed}.", param=name)
        return {k: v for k, v in data.items() if k not in cls.UNSUPPORTED}


class KeptRequest(WireRequest):
    """Base of bodies that are stored or repeated in the answer: what UTF-8 and JSON can't carry is refused."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unprintable(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        try:
            json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError as e:
            raise InvalidInputError(f"The body holds {e.object[e.start]!r}, which is not Unicode text.") from None
        except (ValueError, TypeError, RecursionError) as e:
            raise InvalidInputError(f"The body can't be kept as JSON: {e}.") from None
        return data


class WireResponse(BaseModel):
    """Base of response bodies and their parts."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(WireResponse):
    """`param` names the field that is wrong; `code` is stable, `message` is for people."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(WireResponse):
    error: ErrorDetail
