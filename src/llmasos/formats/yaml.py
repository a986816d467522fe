"""Files of names and values, as people write them: YAML in which each name is said once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmasos.errors import FormatError, NotFoundError


def read_yaml(path: Path, *, like: str) -> dict[str, Any]:
    """Names and values of a file. like: a line that such a file may have, for who has written another kind.

    Raises NotFoundError, FormatError."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        document, found = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError as e:
        raise NotFoundError(f"There is no file {path}.", hint="Name a YAML file.") from e
    except OSError as e:
        raise FormatError(f"{path} cannot be read: {e.strerror}.", hint="Name a YAML file.") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise FormatError(f"{path} is not valid YAML: {e}.", hint="Correct that line.") from e
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds no names and values.", hint=f"Write lines like {like}.")
    lines: dict[str, int] = {}
    for name, line in _names(document, "", set()):
        if name in lines:
            raise FormatError(
                f"{path} gives {name} twice: in line {lines[name]} and in line {line}.", hint="Leave one of them out."
            )
        lines[name] = line
    return found


def _names(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Whole names of what is inside of a node, with their lines from 1. YAML itself takes the last of two alike, and
    `lora.r` may be written in two ways. What is used in several places is looked at once: it may be used in itself."""
    if node.id == "scalar" or id(node) in seen:
        return
    seen.add(id(node))
    if node.id == "sequence":
        for i, item in enumerate(node.value):
            yield from _names(item, f"{name}[{i}]", seen)
        return
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":  # <<: what stands beside it has the last word
            continue
        whole = f"{name}.{key.value}" if name else str(key.value)
        yield whole, key.start_mark.line + 1
        yield from _names(value, whole, seen)
