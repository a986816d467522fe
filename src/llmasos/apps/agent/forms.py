"""The form of an agent's answer: a JSON Schema, or a pydantic model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import pydantic

from llmasos.errors import InvalidInputError
from llmasos.tasks.base import json_schema


class Form:
    """`schema` goes to the model; `read` gives the answer as JSON, or raises ValueError that says what is wrong."""

    def __init__(self, given: type[pydantic.BaseModel] | Mapping[str, Any]) -> None:
        self._model: type[pydantic.BaseModel] | None = None
        if isinstance(given, Mapping):
            self.schema: dict[str, Any] = dict(given)
        elif isinstance(given, type) and issubclass(given, pydantic.BaseModel):
            self._model, self.schema = given, json_schema(given)
        else:
            raise InvalidInputError(f"{given!r} is no pydantic model or JSON Schema.", param="output")
        if problem := schema_problem(self.schema):
            raise InvalidInputError(f"The form of the output is no JSON Schema: {problem}.", param="output")

    def read(self, text: str) -> Any:
        try:
            if self._model is not None:
                return self._model.model_validate_json(text).model_dump(mode="json")
            found = json.loads(text)
        except pydantic.ValidationError as e:
            raise ValueError(wrong(e)) from e
        except RecursionError as e:
            raise ValueError("it is nested too deeply") from e
        if problem := mismatch(self.schema, found):
            raise ValueError(problem)
        return found


def wrong(error: pydantic.ValidationError) -> str:
    """What is wrong, and where, on one line."""
    found = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in found)


def mismatch(schema: Mapping[str, Any], value: Any) -> str:
    """How a value breaks a JSON Schema; empty if it does not. Without the package `jsonschema` (part of the extra
    `mcp`) only the kind of value and the required properties of an object are looked at."""
    try:
        jsonschema: Any = importlib.import_module("jsonschema")
    except ImportError:
        return _mismatch_outside(schema, value)
    try:
        error = jsonschema.exceptions.best_match(_validator(jsonschema, schema).iter_errors(value))
    except Exception as e:  # schemas come from outside: wrong keywords, references to what is not there, ...
        return f"the schema itself is wrong: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    if error is None:
        return ""
    where = ".".join(map(str, error.absolute_path))
    return f"{where}: {error.message}".lstrip(": ")[:500]


def _validator(jsonschema: Any, schema: Mapping[str, Any]) -> Any:
    """References to other documents are not followed: nothing is fetched for a schema."""
    from referencing import Registry

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, registry=Registry())


def schema_problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with a JSON Schema itself; empty: nothing that could be seen without the package `jsonschema`."""
    try:
        jsonschema: Any = importlib.import_module("jsonschema")
    except ImportError:
        return ""
    try:
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except Exception as e:  # it comes from outside
        return (str(e).splitlines() or [type(e).__name__])[0]
    return ""


def _mismatch_outside(schema: Mapping[str, Any], value: Any) -> str:
    if schema.get("type") == "object":
        if not isinstance(value, dict):
            return "it is not a JSON object"
        missing = [name for name in schema.get("required", ()) if name not in value]
        return f"{missing[0]!r} is a required property" if missing else ""
    return ""
