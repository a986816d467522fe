"""Bytes <-> named tensors and metadata: safetensors and GGUF, read from memory maps; nothing that could run code.

Importing this loads no torch; headers can be read and planned with before a tensor is touched. `formats.quants` decodes
GGML blocks.
"""

from llmasos.formats.checkpoint import open_checkpoint
from llmasos.formats.gguf import GGUFCheckpoint, GGUFHeader, parse_gguf_header, read_gguf_header, split_parts
from llmasos.formats.safetensors import (
    SafetensorsCheckpoint,
    SafetensorsHeader,
    parse_safetensors_header,
    parse_safetensors_index,
    read_safetensors_header,
    save_safetensors,
    sync,
)
from llmasos.formats.types import Checkpoint, NeedMoreBytes, TensorInfo

__all__ = [
    "Checkpoint",
    "GGUFCheckpoint",
    "GGUFHeader",
    "NeedMoreBytes",
    "SafetensorsCheckpoint",
    "SafetensorsHeader",
    "TensorInfo",
    "open_checkpoint",
    "parse_gguf_header",
    "parse_safetensors_header",
    "parse_safetensors_index",
    "read_gguf_header",
    "read_safetensors_header",
    "save_safetensors",
    "split_parts",
    "sync",
]
