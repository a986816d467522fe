"""Clients with a typed method for each route, from an application's document: a Python module, a JavaScript one.

Both stand on the SDKs (`llmasos.client.AppClient`, `llmasos.js`), which carry the calls; what is written here is names,
types and words. The JavaScript module has its types in JSDoc, so it runs as it is and TypeScript reads them.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from typing import Any

from llmasos.client.app import doors_of

_PYTHON = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
_SCRIPT = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
_RESERVED = {
    "call",
    "stream",
    "start",
    "jobs",
    "job",
    "wait",
    "follow",
    "cancel",
    "close",
    "document",
    "doors",
    "target",
}


def python_client(document: Mapping[str, Any]) -> str:
    """A module with one class, and a TypedDict for each object that routes take or give."""
    name, words = _class_name(document["title"]), f"{document['title']} {document['version']}"
    types = _PythonTypes(name)
    methods = [_python_method(route, types) for route in document["routes"]]
    doors = [f"        {name!r}: Door{tuple(door)!r}," for name, door in doors_of(document).items()]
    parts = [
        *types.definitions(),
        f"class {name}(AppClient):",
        f'    """{_plain(words)}"""',
        "",
        "    doors: ClassVar = {",
        *doors,
        "    }",
        "",
        *methods,
    ]
    return f"{_python_head(words, parts)}\n\n\n{chr(10).join(parts).rstrip()}\n"


def _python_head(words: str, parts: list[str]) -> str:
    """Docstring and imports of what the parts use."""
    used = set(re.findall(r"\w+", "\n".join(parts)))
    names = [name for name in ("Any", "ClassVar", "Literal", "NotRequired", "TypedDict") if name in used]
    ours = [name for name in ("UNSET", "AppClient", "Door", "FileLike") if name in used]
    return "\n".join(
        [
            f'"""Client of {_plain(words)}. Written by `llmasos app client`: write it again when the routes change."""',
            "",
            "from __future__ import annotations",
            "",
            *(["from collections.abc import Generator"] if "Generator" in used else []),
            f"from typing import {', '.join(names)}",
            "",
            f"from llmasos.client.app import {', '.join(ours)}",
        ]
    )


def _python_method(route: Mapping[str, Any], types: _PythonTypes) -> str:
    schema, stream = route["input"], route["stream"]
    defs, required = schema.get("$defs", {}), set(schema.get("required", ()))
    words = [
        f"{_python_name(name)}: {types.of(one, defs, is_input=True)}" + ("" if name in required else " = UNSET")
        for name, one in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    ]
    given = [
        f"{name}={_python_name(name)}" if name.isidentifier() else f"**{{{name!r}: {_python_name(name)}}}"
        for name in schema.get("properties", {})
    ]
    result = stream["item"] if stream else route["output"]
    kind = types.of(result, result.get("$defs", {}))
    name = _method_name(route["name"])
    sent = ", ".join([repr(route["name"]), *given])
    signature = ", ".join(["self", *words])
    call, kind = ("stream", f"Generator[{kind}, None, None]") if stream else ("call", kind)
    body = f"return self.{call}({sent})" if stream else f"result: {kind} = self.{call}({sent})\n        return result"
    about = _plain(" ".join(filter(None, (route["summary"], route["description"]))))
    return f'    def {name}({signature}) -> {kind}:\n        """{about}"""\n        {body}\n'


class _PythonTypes:
    """JSON Schema to type hints; objects become TypedDicts, equal ones one."""

    def __init__(self, *taken: str) -> None:
        self._classes: dict[str, str] = dict.fromkeys(taken, "")
        self._names: dict[str, str] = {}

    def of(self, schema: Any, defs: Mapping[str, Any], *, is_input: bool = False) -> str:
        if not isinstance(schema, dict):
            return "Any"
        if is_input and "x-llmasos-media" in schema:
            return "FileLike"
        if "$ref" in schema:
            name = schema["$ref"].rsplit("/", 1)[-1]
            body = defs.get(name, {})
            return self._object(name, body, defs) if body.get("properties") else self.of(body, defs)
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return f"Literal[{', '.join(map(repr, values))}]"
        if members := schema.get("anyOf") or schema.get("oneOf"):
            return " | ".join(dict.fromkeys(self.of(member, defs, is_input=is_input) for member in members))
        if isinstance(schema.get("type"), list):
            return " | ".join(self.of({**schema, "type": kind}, defs) for kind in schema["type"])
        match schema.get("type"):
            case "array":
                return f"list[{self.of(schema.get('items', {}), defs, is_input=is_input)}]"
            case "object" if schema.get("properties"):
                return self._object(schema.get("title") or "Object", schema, defs)
            case "object":
                return f"dict[str, {self.of(schema.get('additionalProperties', {}), defs)}]"
        return _PYTHON.get(schema.get("type", ""), "Any")

    def _object(self, title: str, body: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
        known = json.dumps([title, body, defs], sort_keys=True)
        if known in self._names:
            return self._names[known]
        name = _class_name(title)
        while name in self._classes:
            name += "_"
        self._names[known], self._classes[name] = name, ""  # it may hold itself
        required = set(body.get("required", ()))
        fields = {
            key: kind if key in required else f"NotRequired[{kind}]"
            for key, one in body["properties"].items()
            for kind in [self.of(one, defs)]
        }
        if all(key.isidentifier() and not keyword.iskeyword(key) for key in fields):
            lines = [f"class {name}(TypedDict):", *(f"    {key}: {kind}" for key, kind in fields.items())]
            self._classes[name] = "\n".join(lines)
        else:
            inner = ", ".join(f"{key!r}: {kind!r}" for key, kind in fields.items())
            self._classes[name] = f'{name} = TypedDict("{name}", {{{inner}}})'
        return name

    def definitions(self) -> list[str]:
        return [line for text in self._classes.values() if text for line in (text, "", "")]


def javascript_client(document: Mapping[str, Any]) -> str:
    """An ES module with one class; its types in JSDoc."""
    doors = doors_of(document)
    methods = [
        _script_method(route, doors[route["name"]].method, doors[route["name"]].path) for route in document["routes"]
    ]
    words = _plain(f"{document['title']} {document['version']}").replace("*/", "* /")
    lines = [
        f"/** Client of {words}. Written by `llmasos app client`: write it again when the routes change. */",
        "",
        'import { LLMasOS } from "llmasos";',
        "",
        f"/** {words} */",
        f"export class {_class_name(document['title'])} {{",
        "  #apps;",
        "  #url;",
        "",
        '  /** @param {string} url @param {import("llmasos").Options} [options] */',
        '  constructor(url = "http://127.0.0.1:8000", options) {',
        "    this.#url = url;",
        "    this.#apps = new LLMasOS({ baseURL: url, ...options }).apps;",
        "  }",
        "",
        "\n".join(methods).rstrip(),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _script_method(route: Mapping[str, Any], method: str, path: str) -> str:
    schema, stream = route["input"], route["stream"]
    result = stream["item"] if stream else route["output"]
    kind = _script_type(result, result.get("$defs", {}))
    kind = f"AsyncGenerator<{kind}, void, undefined>" if stream else f"Promise<{kind}>"
    inputs = _script_type({**schema, "type": "object"}, schema.get("$defs", {})) if schema.get("properties") else "{}"
    optional = "" if schema.get("required") else " = {}"
    about = _plain(" ".join(filter(None, (route["summary"], route["description"])))).replace("*/", "* /")
    name = _method_name(route["name"])
    options = json.dumps(method)
    return "\n".join(
        [
            "  /**",
            f"   * {about}",
            f"   * @param {{{inputs}}} {'[inputs]' if optional else 'inputs'}",
            '   * @param {import("llmasos").CallOptions} [options]',
            f"   * @returns {{{kind}}}",
            "   */",
            f"  {name}(inputs{optional}, options) {{",
            f"    return this.#apps.{'stream' if stream else 'run'}(this.#url, {json.dumps(path)}, inputs, "
            f"{{ method: {options}, ...options }});",
            "  }",
            "",
        ]
    )


def _script_type(schema: Any, defs: Mapping[str, Any], depth: int = 12) -> str:
    """Objects are written out where they are used; one that holds itself ends in `any`."""
    if not isinstance(schema, dict) or not depth:
        return "any"
    if "x-llmasos-max-bytes" in schema:  # which inputs have
        return "string | Blob"
    if "$ref" in schema:
        return _script_type(defs.get(schema["$ref"].rsplit("/", 1)[-1], {}), defs, depth - 4)
    if "const" in schema or "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(dict.fromkeys(_script_type(member, defs, depth) for member in members))
    if isinstance(schema.get("type"), list):
        return " | ".join(_script_type({**schema, "type": kind}, defs, depth) for kind in schema["type"])
    match schema.get("type"):
        case "array":
            return f"Array<{_script_type(schema.get('items', {}), defs, depth)}>"
        case "object" if schema.get("properties"):
            required = set(schema.get("required", ()))
            fields = [
                f"{json.dumps(key)}{'' if key in required else '?'}: {_script_type(one, defs, depth)}"
                for key, one in schema["properties"].items()
            ]
            return f"{{ {'; '.join(fields)} }}"
        case "object":
            return f"Record<string, {_script_type(schema.get('additionalProperties', {}), defs, depth)}>"
    return _SCRIPT.get(schema.get("type", ""), "any")


def _class_name(words: str) -> str:
    name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^0-9A-Za-z]+", words) if part) or "App"
    return name if name[0].isalpha() else f"App{name}"


def _method_name(name: str) -> str:
    return f"{name}_" if name in _RESERVED or keyword.iskeyword(name) else name


def _python_name(name: str) -> str:
    found = re.sub(r"\W", "_", name)
    return f"{found}_" if keyword.iskeyword(found) or found in ("self", "") or found[:1].isdigit() else found


def _plain(words: str) -> str:
    """One line that can stand in a docstring."""
    return " ".join(words.replace("\\", "\\\\").replace('"', "'").split())
