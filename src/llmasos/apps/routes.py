"""One typed description per route; HTTP, OpenAPI and every later surface are projections of it.

A `Route` is read off a function once, when it is decorated: the inputs from its type hints, the words from its
docstring, the result from its return annotation. It knows nothing of HTTP beyond the path and the methods, so a
command line or an MCP tool can validate with `arguments()` and serialise with `dump()` just as the web server does.

How hints are read: an unannotated parameter takes the type of its default where that is a bool, int, float or str, and
any JSON value otherwise (in a query string: text). Python rules decide what is required: a parameter without a default.
Numbers must be finite. Names that the function does not have are errors.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from llmasos.apps.depends import Node, node_of
from llmasos.apps.files import MARK, MAX_BODY, body_limit, mark_of
from llmasos.errors import InvalidInputError

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
QUERY_METHODS = frozenset({"GET", "DELETE"})
"""Methods whose inputs come from the query string; the others take a JSON body."""

Output = Literal["text", "markdown", "table", "json", "image", "audio", "file"]
OUTPUTS: tuple[Output, ...] = typing.get_args(Output)
_STREAMS = (Iterator, AsyncIterator, Generator, AsyncGenerator, AsyncIterable)
_INFERRED = (bool, int, float, str)


@dataclass(frozen=True)
class Input:
    """One parameter of a route. `name` is what callers write, `parameter` what the function calls it (they differ only
    where the hint has an alias); `schema` is its JSON Schema, with its own `$defs`."""

    name: str
    parameter: str
    place: Literal["path", "value"]
    annotation: Any
    default: Any
    description: str
    schema: dict[str, Any]
    shapes: frozenset[str]
    """What a query string can carry: {"one"}, {"many"} (a repeated name), both, or nothing."""

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def files(self) -> Literal["one", "many"] | None:
        """Whether it is a file, or a list of files."""
        return mark_of(self.schema)


@dataclass(frozen=True)
class Hints:
    """What callers may know beside the types. None: unknown."""

    tool: bool = False
    """Language models may call it."""
    read_only: bool | None = None
    """It changes nothing."""
    destructive: bool | None = None
    """What it changes may be lost."""
    output: Output | None = None
    """How a result is best shown; None: as its type says."""


@dataclass(frozen=True)
class Route:
    """What a decorated function accepts and returns. `item` is the element type of a stream, else equal to `result`."""

    path: str
    methods: tuple[str, ...]
    function: Callable[..., Any]
    name: str
    summary: str
    description: str
    inputs: tuple[Input, ...]
    model: type[BaseModel]
    streams: bool
    result: TypeAdapter[Any]
    item: TypeAdapter[Any]
    joins: bool
    """The collected form of the stream is one string, the pieces put together."""
    examples: tuple[Mapping[str, Any], ...]
    node: Node
    """The function, its dependencies, and which inputs they get."""
    hints: Hints = Hints()
    max_body: int = MAX_BODY
    """Bytes that a request may have."""

    @property
    def takes_files(self) -> bool:
        return any(i.files for i in self.inputs)

    @cached_property
    def returns_files(self) -> Literal["one", "many"] | None:
        """Whether the result is a file, or a list of files."""
        return mark_of(self.result.json_schema(mode="serialization"))

    @property
    def path_names(self) -> tuple[str, ...]:
        return tuple(i.name for i in self.inputs if i.place == "path")

    @property
    def value_names(self) -> tuple[str, ...]:
        return tuple(i.name for i in self.inputs if i.place == "value")

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Validated inputs by their names. Raises pydantic.ValidationError (`loc`: an input's name)."""
        checked = self.model.model_validate(dict(values))
        given = checked.model_fields_set
        # An absent input is left to the function's own default, so a call over HTTP is the same call as in Python.
        return {i.name: getattr(checked, f"input_{n}") for n, i in enumerate(self.inputs) if f"input_{n}" in given}

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Validated keyword arguments of the function, without its dependencies. Raises pydantic.ValidationError."""
        checked = self.read(values)
        return {parameter: checked[name] for parameter, name in self.node.inputs.items() if name in checked}

    def dump(self, value: Any) -> bytes:
        """The JSON of a result; it must be what the return annotation promises (pydantic.ValidationError otherwise)."""
        return _dump(self.result, value)

    def dump_item(self, value: Any) -> bytes:
        """The JSON of one element of a stream."""
        return _dump(self.item, value)

    def collect(self, items: list[Any]) -> bytes:
        """The JSON of a whole stream: one string if the pieces are text, a list otherwise."""
        if self.joins or (items and self.item.core_schema["type"] == "any" and all(isinstance(i, str) for i in items)):
            return _dump(TypeAdapter(str), "".join(items))
        return b"[" + b",".join(self.dump_item(item) for item in items) + b"]"


def describe(
    function: Callable[..., Any],
    path: str,
    methods: Iterable[str] | None,
    examples: Iterable[Mapping[str, Any]] = (),
    hints: Hints = Hints(),
    dependencies: Iterable[Any] = (),
) -> Route:
    """Read a function's description. Raises InvalidInputError that names the function and the parameter at fault."""
    if not callable(function) or inspect.isclass(function):
        raise InvalidInputError(f"@app.route({path!r}) decorates a function, not {function!r}.")
    name = getattr(function, "__name__", type(function).__name__)
    placeholders = _placeholders(path, name)
    types = type_hints_of(function, name)
    words = docstring_parser.parse(inspect.getdoc(function) or "")
    notes = {p.arg_name: " ".join((p.description or "").split()) for p in words.params}
    found: dict[str, Input] = {}

    def read_input(owner: str, p: inspect.Parameter, annotation: Any) -> str:
        entry = _input(owner, p, annotation, notes.get(p.name, ""), placeholders)
        known = found.setdefault(entry.name, entry)
        if known is not entry and (known.schema, known.required) != (entry.schema, entry.required):
            raise InvalidInputError(
                f"{name}() and its dependencies want {entry.name!r} differently.",
                hint="Give them the same type, and all or none a default.",
                param=entry.name,
            )
        return entry.name

    node = node_of(function, read_input, before=tuple(dependencies))
    inputs = tuple(found.values())
    if missing := placeholders - {i.name for i in inputs}:
        raise InvalidInputError(
            f"The path {path!r} has {{{min(missing)}}}, but {name}() has no parameter of that name.", param=min(missing)
        )
    model = _model(function, name, inputs)
    streams, item, result = _output(function, name, types.get("return", Any))
    if hints.output is None:
        hints = replace(hints, output=_shown_as(result))
    route = Route(
        path=path,
        methods=_methods(name, methods, inputs),
        function=function,
        name=name,
        summary=words.short_description or name.replace("_", " ").strip().capitalize(),
        description=words.long_description or "",
        inputs=inputs,
        model=model,
        streams=streams,
        result=result,
        item=item,
        joins=streams and item.core_schema["type"] == "str",
        examples=tuple(examples),
        node=node,
        hints=hints,
        max_body=body_limit([i.schema for i in inputs]),
    )
    _check_hints(route)
    for example in route.examples:
        try:
            route.read(example)
        except ValidationError as e:
            raise InvalidInputError(
                f"The example {dict(example)!r} of {name}() is not valid input: {e}", param="examples"
            ) from e
    return route


def _check_hints(route: Route) -> None:
    hints, name = route.hints, route.name
    if hints.read_only and hints.destructive:
        raise InvalidInputError(f"{name}() can't be read_only and destructive.", param="destructive")
    if hints.output is not None and hints.output not in OUTPUTS:
        raise InvalidInputError(
            f"output={hints.output!r} of {name}() is no way to show a result.",
            hint=f"Known: {', '.join(OUTPUTS)}.",
            param="output",
        )
    if hints.tool and not inspect.getdoc(route.function):
        raise InvalidInputError(
            f"{name}() is a tool without a docstring: a model would not know what it is for.",
            hint="Say in its docstring what it does and when to use it.",
            param="tool",
        )


def _shown_as(result: TypeAdapter[Any]) -> Output | None:
    schema = result.json_schema(mode="serialization")
    if mark_of(schema) is None:
        return None
    media = next(iter(re.findall(r"'x-llmasos-media': '(\w+)/", str(schema))), "")
    return "image" if media == "image" else "audio" if media == "audio" else "file"


def _placeholders(path: str, name: str) -> frozenset[str]:
    if not isinstance(path, str) or not path.startswith("/"):
        raise InvalidInputError(
            f"The path {path!r} of {name}() does not begin with a slash.",
            hint=f'Write @app.route("/{name}").',
            param="path",
        )
    found = re.findall(r"{([^{}:]*)(?::[^{}]*)?}", path)
    if bad := [p for p in found if not p.isidentifier()]:
        raise InvalidInputError(
            f"{{{bad[0]}}} in the path {path!r} of {name}() is not a parameter's name.", param="path"
        )
    if len(set(found)) < len(found):
        raise InvalidInputError(f"The path {path!r} of {name}() has the same parameter twice.", param="path")
    return frozenset(found)


def type_hints_of(function: Callable[..., Any], name: str) -> dict[str, Any]:
    function = function.func if isinstance(function, partial) else function
    target = function.__init__ if inspect.isclass(function) else function
    target = target if inspect.isroutine(target) else type(target).__call__
    try:
        return typing.get_type_hints(inspect.unwrap(target), include_extras=True)
    except NameError as e:
        raise InvalidInputError(
            f"A type hint of {name}() can't be resolved: {e}.",
            hint="Define or import the type at the top of the module.",
        ) from e


def parameters_of(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    found = list(inspect.signature(function).parameters.values())
    for p in found:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            what = "positional-only" if p.kind is p.POSITIONAL_ONLY else f"of the kind {p}"
            raise InvalidInputError(
                f"The parameter {p.name!r} of {name}() is {what}; a request names every value.",
                hint="Give the parameters names; take a list or a dict for any number of values.",
                param=p.name,
            )
    return found


def _input(function: str, p: inspect.Parameter, annotation: Any, note: str, placeholders: frozenset[str]) -> Input:
    if isinstance(p.default, FieldInfo):
        raise InvalidInputError(
            f"The default of {p.name!r} of {function}() is a Field, so a plain call would receive it.",
            hint=f"Write {p.name}: Annotated[TYPE, Field(...)] = DEFAULT.",
            param=p.name,
        )
    if annotation is inspect.Parameter.empty:
        annotation = type(p.default) if isinstance(p.default, _INFERRED) else Any
    extras = [a for a in typing.get_args(annotation)[1:] if isinstance(a, FieldInfo)] if _annotated(annotation) else []
    aliases = [a for f in extras for a in (f.validation_alias, f.alias) if isinstance(a, str)]
    try:
        # The limits of Annotated[..., Field()] belong to the schema of a field, so look at it as one.
        schema = create_model("Input", value=(annotation, ...)).model_json_schema(by_alias=False)
    except PydanticUserError as e:
        raise InvalidInputError(
            f"The parameter {p.name!r} of {function}() has the type {annotation!r}, "
            f"which can't be written as JSON: {e.message.rstrip('.')}.",
            hint="Use plain types, lists, dicts, dataclasses or pydantic models.",
            param=p.name,
        ) from e
    value = schema["properties"]["value"]
    name = aliases[0] if aliases else p.name
    entry = Input(
        name=name,
        parameter=p.name,
        place="path" if name in placeholders else "value",
        annotation=annotation,
        default=p.default,
        description=next((f.description for f in extras if f.description), note),
        schema=value | ({"$defs": schema["$defs"]} if "$defs" in schema else {}),
        shapes=_shapes(value, schema.get("$defs", {})),
    )
    if entry.place == "path" and "one" not in entry.shapes:
        raise InvalidInputError(
            f"The path parameter {name!r} of {function}() has the type {annotation!r}; a path holds one plain value.",
            param=name,
        )
    return entry


def _annotated(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Annotated


def _shapes(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> frozenset[str]:
    """Read from the JSON Schema rather than from the type, so it covers whatever pydantic can describe."""
    one, many, neither = frozenset({"one"}), frozenset({"many"}), frozenset[str]()
    if MARK in schema:
        return neither
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return _shapes(defs[name], {k: v for k, v in defs.items() if k != name}) if name in defs else neither
    if members := schema.get("anyOf") or schema.get("oneOf"):
        shapes = [_shapes(m, defs) for m in members if m.get("type") != "null"]
        return frozenset().union(*shapes) if all(shapes) else neither
    if schema.get("type") == "array":
        elements = (
            [*schema.get("prefixItems", ()), schema["items"]] if "items" in schema else schema.get("prefixItems", [{}])
        )
        return many if all("one" in _shapes(e, defs) for e in elements if e is not False) else neither
    return neither if schema.get("type") == "object" else one


def _model(function: Callable[..., Any], name: str, inputs: tuple[Input, ...]) -> type[BaseModel]:
    # Fields are called input_0, input_1, ... with the real names as aliases: a parameter may then be called anything,
    # `json`, `_x` and `model_config` included.
    fields: dict[str, Any] = {
        f"input_{n}": (
            Annotated[i.annotation, Field(alias=i.name, description=i.description or None)],
            ... if i.required else i.default,
        )
        for n, i in enumerate(inputs)
    }
    title = "".join(part[:1].upper() + part[1:] for part in name.split("_")) + "Input"
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    try:
        return create_model(title, __config__=config, __module__=function.__module__, **fields)
    except PydanticUserError as e:
        raise InvalidInputError(f"The parameters of {name}() can't be described: {e}") from e


def _methods(name: str, wanted: Iterable[str] | None, inputs: tuple[Input, ...]) -> tuple[str, ...]:
    nested = [i for i in inputs if i.place == "value" and not i.shapes]
    if wanted is None:
        return ("POST",) if nested else ("GET", "POST")
    methods = tuple(dict.fromkeys(m.upper() for m in ([wanted] if isinstance(wanted, str) else wanted)))
    if unknown := [m for m in methods if m not in METHODS] or ([] if methods else ["none"]):
        raise InvalidInputError(
            f"{unknown[0]!r} is not a method that {name}() can have.",
            hint=f"Known: {', '.join(METHODS)}.",
            param="methods",
        )
    if nested and QUERY_METHODS & set(methods):
        raise InvalidInputError(
            f"The parameter {nested[0].name!r} of {name}() is nested or a file; a query holds only plain values.",
            hint='Use methods=["POST"].',
            param=nested[0].name,
        )
    return methods


def _output(
    function: Callable[..., Any], name: str, annotation: Any
) -> tuple[bool, TypeAdapter[Any], TypeAdapter[Any]]:
    """Whether it streams, the type of an element, the type of the whole."""
    args = typing.get_args(annotation)
    generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    streams = generator or is_stream_type(annotation)
    element: Any = (args[0] if args else Any) if streams else annotation
    whole: Any = (element if element in (Any, str) else list[element]) if streams else annotation
    try:
        if inspect.isclass(element) and _is_response(element):
            element = whole = Any
        item, result = TypeAdapter(element), TypeAdapter(whole)
        result.json_schema(mode="serialization")
    except PydanticUserError as e:
        raise InvalidInputError(
            f"{name}() returns {annotation!r}, which can't be written as JSON.",
            hint="Return plain types, lists, dicts, dataclasses or pydantic models.",
            param="return",
        ) from e
    return streams, item, result


def is_stream_type(annotation: Any) -> bool:
    return typing.get_origin(annotation) in _STREAMS or annotation in _STREAMS


def _is_response(kind: type) -> bool:
    from starlette.responses import Response

    return issubclass(kind, Response)


def _dump(adapter: TypeAdapter[Any], value: Any) -> bytes:
    return adapter.dump_json(adapter.validate_python(value, from_attributes=True), by_alias=True)
