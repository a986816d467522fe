"""OpenAPI 3.1 of an application's routes, made from their descriptions.

The body of a 200 is the bare JSON of the return value, so its schema is the return annotation's. Routes that were added
to `app.asgi` the FastAPI way are described by FastAPI and stand beside ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from llmasos.apps.files import MARK
from llmasos.apps.problems import Problem
from llmasos.apps.routes import QUERY_METHODS, Input, Route

_SESSION = {
    "name": "LLMasOS-Session",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{16,128}$"},
    "description": "The client's state, kept between its calls; else a cookie names it.",
}
_Schemas = dict[tuple[str, JsonSchemaMode], dict[str, Any]]


def openapi(asgi: FastAPI, routes: Sequence[Route], chat: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`chat`: what the application's document says of it."""
    document = get_openapi(
        title=asgi.title,
        version=asgi.version,
        description=asgi.description or None,
        routes=asgi.routes,
        openapi_version="3.1.0",
    )
    components = document.setdefault("components", {}).setdefault("schemas", {})
    schemas, definitions = _schemas(routes, "")
    if any(components.get(name, body) != body for name, body in definitions.items()):
        schemas, definitions = _schemas(routes, "app.")  # a FastAPI route has another type of the same name
    components.update(definitions)
    paths = document.setdefault("paths", {})
    for n, route in enumerate(routes):
        entry = paths.setdefault(re.sub(r":[^{}]*}", "}", route.path), {})
        for method in route.methods:
            entry[method.lower()] = _operation(route, method, f"route{n}", schemas, definitions)
    if chat is not None:
        paths[chat["path"]] = {"post": _chat(chat)}
    return document


def _chat(chat: Mapping[str, Any]) -> dict[str, Any]:
    """In brief: it is OpenAI's."""
    message = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}
    properties = {
        "model": {"type": "string", "const": chat["model"]},
        "messages": {"type": "array", "items": message, "minItems": 1},
        "stream": {"type": "boolean", "default": False},
    }
    schema = {"type": "object", "properties": properties, "required": ["model", "messages"]}
    whole: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    operation = {
        "operationId": "chat",
        "summary": chat["summary"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "A chat completion in OpenAI's form, or its chunks as server-sent events.",
                "content": whole | {"text/event-stream": {"schema": {"type": "string"}}},
            },
            "default": {"description": "An error in OpenAI's form.", "content": whole},
        },
    }
    return operation | ({"description": chat["description"]} if chat["description"] else {})


def _schemas(routes: Sequence[Route], prefix: str) -> tuple[_Schemas, dict[str, Any]]:
    """Schemas by key, and the shared definitions they refer to; pydantic keeps equal names apart."""
    wanted: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [("problem", "serialization", TypeAdapter(Problem))]
    for n, route in enumerate(routes):
        wanted.append((f"route{n}", "validation", TypeAdapter(route.model)))
        wanted.append((f"route{n}", "serialization", route.result))
        wanted.append((f"route{n}.item", "serialization", route.item))
    schemas, shared = TypeAdapter.json_schemas(wanted, ref_template="#/components/schemas/" + prefix + "{model}")
    return schemas, {prefix + name: body for name, body in shared.get("$defs", {}).items()}


def _operation(
    route: Route, method: str, key: str, schemas: _Schemas, definitions: Mapping[str, Any]
) -> dict[str, Any]:
    reference = schemas[key, "validation"]
    whole = definitions[reference["$ref"].rsplit("/", 1)[-1]] if "$ref" in reference else reference
    properties = whole.get("properties", {})
    query = method in QUERY_METHODS
    parameters = [
        _parameter(i, properties[i.name], route)
        for i in route.inputs
        if i.place == "path" or (query and i.place == "value")
    ]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_"),
        "summary": route.summary,
        "responses": _responses(key, route, schemas),
    }
    if route.description:
        operation["description"] = route.description
    if parameters:
        operation["parameters"] = parameters
    if route.node.uses("session"):
        operation.setdefault("parameters", []).append(_SESSION)
    if not query and route.value_names:
        operation["requestBody"] = _body(route, reference, whole)
    return operation


def _parameter(entry: Input, schema: Mapping[str, Any], route: Route) -> dict[str, Any]:
    untyped = not set(schema) - {"title", "description", "default"}
    parameter: dict[str, Any] = {
        "name": entry.name,
        "in": "path" if entry.place == "path" else "query",
        "required": entry.place == "path" or entry.required,
        "schema": dict(schema) | ({"type": "string"} if untyped else {}),
    }
    if entry.description:
        parameter["description"] = entry.description
    if shown := {f"example{n}": {"value": e[entry.name]} for n, e in enumerate(route.examples, 1) if entry.name in e}:
        parameter["examples"] = shown
    return parameter


def _body(route: Route, reference: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    schema = dict(reference)
    if route.path_names:  # the model holds the path's parameters too; the body must not
        schema = {k: v for k, v in whole.items() if k != "required"}
        schema["properties"] = {k: v for k, v in whole["properties"].items() if k not in route.path_names}
        if required := [k for k in whole.get("required", []) if k not in route.path_names]:
            schema["required"] = required
    media: dict[str, Any] = {"schema": schema}
    if route.examples:
        media["examples"] = {
            f"example{n}": {"value": {k: v for k, v in e.items() if k not in route.path_names}}
            for n, e in enumerate(route.examples, 1)
        }
    needed = any(i.required for i in route.inputs if i.place == "value")
    content = {"application/json": media}
    if route.takes_files:
        content["multipart/form-data"] = {"schema": _form(route, whole)}
    return {"required": needed, "content": content}


def _form(route: Route, whole: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in a form, whose files are bytes."""
    binary = {"type": "string", "format": "binary"}
    many = {"type": "array", "items": binary}
    inputs = [i for i in route.inputs if i.place == "value"]
    properties = {
        i.name: (binary if i.files == "one" else many) if i.files else whole["properties"][i.name] for i in inputs
    }
    required = [i.name for i in inputs if i.required]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _responses(key: str, route: Route, schemas: _Schemas) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": schemas["problem", "serialization"]}}
    content: dict[str, Any] = {"application/json": {"schema": schemas[key, "serialization"]}}
    good = "The return value as JSON."
    schema = schemas[key, "serialization"]
    if MARK in schema and not route.streams:
        good = "The file as a data: URL, or as it is for who accepts its media type rather than JSON."
        content |= {one: {"schema": {}} for one in schema["contentMediaType"].split(",")}
    if route.streams:
        good = (
            "Server-sent events, one JSON value each, then `event: done`; all at once for `Accept: application/json`."
        )
        events = {"schema": {"type": "string"}, "x-item-schema": schemas[f"{key}.item", "serialization"]}
        content = {"text/event-stream": events} | content
    return {
        "200": {"description": good, "content": content},
        "422": {"description": "Wrong input: `detail` names each field.", "content": problem},
        "default": {"description": "Any other error.", "content": problem},
    }
