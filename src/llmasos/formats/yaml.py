"""Files of names and values, as people write them: YAML in which each name is said once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmasos.errors import FormatError, NotFoundError

MOST_REPEATED = 100_000
"""Values that a file may use again by aliases, counted wherever they are used: a few lines may ask for 2^60."""


def read_yaml(path: Path, *, like: str, is_dotted: bool = False) -> dict[str, Any]:
    """Names and values of a file. like: a line that such a file may have, for who has written another kind; is_dotted:
    `a.b: 1` says the same as `a: {b: 1}`, so that only one of them may be said.

    Raises NotFoundError, FormatError."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = path.name  # in what it says
        found = loader.checked(is_dotted)
    except FileNotFoundError as e:
        raise NotFoundError(f"There is no file {path}.", hint="Name a YAML file.") from e
    except OSError as e:
        raise FormatError(f"{path} cannot be read: {e.strerror}.", hint="Name a YAML file.") from e
    except _TwiceError as e:
        raise FormatError(f"{path} gives {e}.", hint="Leave one of them out.") from e
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as e:
        raise FormatError(f"{path} is not valid YAML: {e}.", hint="Correct that line.") from e
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds no names and values.", hint=f"Write lines like {like}.")
    return found


class _TwiceError(Exception):
    pass


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses what YAML's own would read as something else, or never: see `checked`."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as e:  # 2024-13-45, !!bool x, !!timestamp x
            said = f"{node.value!r:.40} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from e

    def checked(self, is_dotted: bool) -> Any:
        """The document, in which no mapping has a name twice (YAML takes the last), nothing is inside of itself, and
        aliases repeat no more than MOST_REPEATED values."""
        try:
            node = self.get_single_node()
            if node is None:
                return None
            sizes: dict[int, int] = {}
            if _size(node, sizes) - len(sizes) > MOST_REPEATED:
                said = f"its aliases repeat more than {MOST_REPEATED:,} values"
                raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
            lines: dict[tuple[Any, ...], int] = {}
            for name, shown, line in self._names(node, (), "", is_dotted):
                if name in lines:
                    raise _TwiceError(f"{shown} twice: in line {lines[name]} and in line {line}")
                lines[name] = line
            return self.construct_document(node)
        finally:
            self.dispose()

    def _names(
        self, node: Any, inside: tuple[Any, ...], shown: str, is_dotted: bool
    ) -> Iterator[tuple[tuple[Any, ...], str, int]]:
        """Whole names of what is inside of a node: what their scalars mean (`yes` and `true` are one), as they are
        written, and their lines from 1."""
        if node.id == "sequence":
            for i, item in enumerate(node.value):
                yield from self._names(item, (*inside, i), f"{shown}[{i}]", is_dotted)
        elif node.id == "mapping":
            for key, value in node.value:
                if key.id != "scalar":
                    continue  # construct_document refuses it
                name = key.value if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key)
                whole = (*inside, *str(name).split(".")) if is_dotted else (*inside, name)
                written = f"{shown}.{key.value}" if shown else key.value
                yield whole, written, key.start_mark.line + 1
                yield from self._names(value, whole, written, is_dotted)


def _size(node: Any, sizes: dict[int, int]) -> int:
    """Of a node, with everything in it: as many as `sizes` has then, where nothing is used again."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands inside of what it names", node.start_mark
            )
        return sizes[id(node)]
    sizes[id(node)] = 0  # not known yet
    inner = node.value if node.id == "sequence" else []
    if node.id == "mapping":
        inner = [one for pair in node.value for one in pair]
    sizes[id(node)] = 1 + sum(_size(one, sizes) for one in inner)
    return sizes[id(node)]
