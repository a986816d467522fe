"""Words of a command line as a route's inputs, by its JSON Schema.

    llmasos app run app.py ask "why?" --style long --tag a --tag b --point '{"x": 1}' --text @file.txt --loud

Words without a flag fill the inputs in their order. A list takes a word for each element, a nested input takes JSON,
`@file` stands for what is in a file and `-` for standard input (`@@` for an @ at the front), a bare flag for true and
`--no-NAME` for false. Where the input is a file itself, `@photo.png` is that file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmasos.cli.messages import t
from llmasos.client import dataurl
from llmasos.errors import InvalidInputError

FILE = "file"
_MEDIA, _MAX_BYTES = "x-llmasos-media", "x-llmasos-max-bytes"  # marks of apps/files.py
_NUMBERS = {"integer": int, "number": float}


def parse(schema: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Inputs by name; they are not checked against the schema beyond what reading them needs. Raises InvalidInputError
    for flags that there are not, words too many, and files that can't be read."""
    known = {name: _kinds(one, schema.get("$defs", {})) for name, one in schema.get("properties", {}).items()}
    limits = {name: _limit(one) for name, one in schema.get("properties", {}).items()}
    flags = {name.replace("_", "-"): name for name in known}
    found: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += queue
            break
        if not word.startswith("--"):
            rest.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("_", "-")
        if flag.startswith("no-") and flag not in flags and "boolean" in known.get(flags.get(flag[3:], ""), ()):
            found[flags[flag[3:]]] = False
            continue
        if flag not in flags:
            options = ", ".join(f"--{one}" for one in flags) or "-"
            raise InvalidInputError(
                t("usage.unknown_option", option=f"--{flag}"), hint=t("app.inputs", inputs=options), param=flag
            )
        name = flags[flag]
        if not equals and "boolean" in known[name] and not (queue and queue[0] in ("true", "false")):
            found[name] = True
            continue
        if not equals and not queue:
            raise InvalidInputError(t("usage.missing_value", option=f"--{flag}"), param=name)
        _put(found, name, known[name], value if equals else queue.pop(0), limits[name])
    _fill(found, known, rest, limits)
    return found


def _fill(
    found: dict[str, Any], known: Mapping[str, Sequence[str]], rest: list[str], limits: Mapping[str, int | None]
) -> None:
    """Words without a flag; a list takes all that are left."""
    for name in [name for name in known if name not in found]:
        if not rest:
            return
        while rest:
            _put(found, name, known[name], rest.pop(0), limits[name])
            if "array" not in known[name]:
                break
    if rest:
        raise InvalidInputError(t("usage.extra", value=rest[0]), hint=t("app.inputs", inputs=", ".join(known) or "-"))


def _put(found: dict[str, Any], name: str, kinds: Sequence[str], word: str, limit: int | None) -> None:
    value = _value(name, kinds, _text(word)) if FILE not in kinds else _file(word, limit)
    is_one = ("string" if isinstance(value, str) else "object" if isinstance(value, dict) else "") in kinds
    if "array" in kinds and not isinstance(value, list) and (name in found or not is_one):
        before = found.get(name, [])
        found[name] = [*(before if isinstance(before, list) else [before]), value]
    elif name in found:
        raise InvalidInputError(t("usage.repeated", option=f"--{name.replace('_', '-')}"), param=name)
    else:
        found[name] = value


def _text(word: str) -> str:
    if word == "-":
        return sys.stdin.read()
    if word.startswith("@@"):
        return word[1:]
    if not word.startswith("@"):
        return word
    try:
        return Path(word[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else t("app.not_utf8")
        raise InvalidInputError(t("app.unreadable", file=word[1:], why=why), hint=t("app.at_sign")) from e


def _file(word: str, limit: int | None) -> Any:
    """A file as a data: URL; what is one already, or null, stays."""
    if word == "-":
        return dataurl.encode(sys.stdin.buffer.read())
    if not word.startswith("@") or word.startswith("@@"):
        return None if word == "null" else word.removeprefix("@")
    path = Path(word[1:]).expanduser()
    try:
        if limit is not None and path.stat().st_size > limit:
            raise dataurl.too_large(path.stat().st_size, limit)
        return dataurl.encode_path(path)
    except OSError as e:
        raise InvalidInputError(t("app.unreadable", file=word[1:], why=e.strerror), hint=t("app.at_sign")) from e


def _limit(schema: Mapping[str, Any]) -> int | None:
    """Bytes that a file may have, where the input is one."""
    inner = [*schema.get("anyOf", ()), schema.get("items", {})]
    found = [one[_MAX_BYTES] for one in (schema, *inner) if isinstance(one, dict) and _MAX_BYTES in one]
    return max(found, default=None)


def _value(name: str, kinds: Sequence[str], text: str) -> Any:
    """JSON where that is what the input is; words stay words where it may be one."""
    if "string" in kinds and not {"object", "array"} & set(kinds):
        return text
    if not kinds or {"object", "array"} & set(kinds):
        try:
            value = json.loads(text)
            return text if "string" in kinds and not isinstance(value, list | dict) else value
        except ValueError:
            if not kinds or "array" in kinds or "string" in kinds:
                return text
            raise InvalidInputError(t("app.not_json", name=name, value=text[:80]), param=name) from None
    for kind in kinds:
        if kind in _NUMBERS:
            try:
                return _NUMBERS[kind](text)
            except ValueError:
                continue
        if kind == "boolean" and text in ("true", "false"):
            return text == "true"
    return text  # whoever checks the inputs says what is wrong with it


def _kinds(schema: Mapping[str, Any], defs: Mapping[str, Any], depth: int = 8) -> tuple[str, ...]:
    """The JSON types that a value may have, of a list those of its elements too; none: any."""
    if _MEDIA in schema:
        return (FILE, "string")
    if schema.get("type") == "array" and _MEDIA in (schema.get("items") or ()):
        return (FILE, "array")
    if "$ref" in schema:
        return _kinds(defs.get(schema["$ref"].rsplit("/", 1)[-1], {}), defs, depth - 1) if depth else ()
    if members := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        found = [_kinds(member, defs, depth) for member in members]
        return () if not all(found) else tuple(dict.fromkeys(kind for kinds in found for kind in kinds))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        names = {str: "string", bool: "boolean", int: "integer", float: "number"}
        return tuple(dict.fromkeys(names[type(v)] for v in values if type(v) in names))
    kinds = schema.get("type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)
