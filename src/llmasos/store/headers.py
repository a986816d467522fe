"""What a model is, told from the first bytes of its files: architecture, configuration, tensors. No weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from llmasos.errors import FormatError

if TYPE_CHECKING:
    from llmasos.formats.types import TensorInfo
    from llmasos.models.config import ModelConfig

_FIRST = 1 << 18
_MAX_CONFIG = 16 << 20

Opener = Callable[[str], IO[bytes]]


@dataclass(frozen=True)
class Facts:
    """What headers tell. `weights` are the files that hold tensors."""

    format: Literal["safetensors", "gguf"]
    config: ModelConfig
    weights: tuple[str, ...]


def read_facts(names: Iterable[str], open_file: Opener) -> Facts:
    """Architecture and configuration of the model that the files `names` make up.

    Raises UnknownArchitectureError naming the architecture, FormatError when a header is damaged.
    """
    names = sorted(names)
    gguf = tuple(name for name in names if name.lower().endswith(".gguf"))
    if gguf:
        from llmasos.models.families.gguf import config_from_gguf

        header = _gguf(gguf[0], open_file)
        return Facts("gguf", config_from_gguf(header.metadata, header.tensors), gguf)
    from llmasos.models.families import config_from_hf

    with open_file("config.json") as f:
        try:
            raw = json.loads(f.read(_MAX_CONFIG))
        except ValueError as e:
            raise FormatError(f"config.json is not valid JSON: {e}.", hint="Fetch it again.") from e
    if not isinstance(raw, dict):
        raise FormatError("config.json is not a JSON object.", hint="Fetch it again.")
    tensors = tuple(name for name in names if name.endswith(".safetensors"))
    return Facts("safetensors", config_from_hf(raw), tensors)


def read_tensors(facts: Facts, open_file: Opener) -> list[TensorInfo]:
    """Names, types and sizes of all tensors, from the header of every weight file."""
    from llmasos.formats.safetensors import parse_safetensors_header

    found: list[TensorInfo] = []
    for name in facts.weights:
        header = _gguf(name, open_file) if facts.format == "gguf" else _grow(name, open_file, parse_safetensors_header)
        found += header.tensors.values()
    return found


def _gguf(name: str, open_file: Opener) -> Any:
    from llmasos.formats.gguf import parse_gguf_header

    return _grow(name, open_file, parse_gguf_header)


def _grow(name: str, open_file: Opener, parse: Callable[..., Any]) -> Any:
    """Parse a header of unknown length: read on as long as the parser asks for more."""
    from llmasos.formats.types import NeedMoreBytes

    with open_file(name) as f:
        data = f.read(_FIRST)
        while True:
            try:
                return parse(data, name=name)
            except NeedMoreBytes as more:
                extra = f.read(max(more.needed - len(data), len(data)))
                if not extra:
                    raise
                data += extra


def opener(folder: Path) -> Opener:
    """Files of a folder on this machine."""
    return lambda name: (folder / name).open("rb")
