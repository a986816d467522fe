"""What the two file formats share: facts about a tensor, the face of a checkpoint, the table of GGML block types.

Nothing here loads torch, so that a plan can be made from a header alone.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmasos.errors import FormatError, NotFoundError, StoreError

if TYPE_CHECKING:
    import torch

DAMAGED = "The file is damaged, incomplete or not what its name says: fetch it again and compare its hash."
MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header. `shape` is row-major (torch order); `nbytes` counts the bytes stored in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint(Protocol):
    """Named tensors and metadata of one model, wherever its bytes lie. Tensors stay valid after `close()`."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, a view of the mapped file where possible; block types become float32."""
        ...

    def raw(self, name: str) -> torch.Tensor:
        """The stored bytes as uint8 [rows, bytes per row], a view of the mapped file."""
        ...

    def close(self) -> None: ...


class NeedMoreBytes(FormatError):
    """The bytes given end inside the header. `needed` is a lower bound of how many, from the file's start, it takes."""

    def __init__(self, name: str, given: int, needed: int) -> None:
        super().__init__(
            f"{name}: the header goes on after the {given} bytes that were read; at least {needed} are needed.",
            hint=DAMAGED,
        )
        self.needed = needed


@dataclass(frozen=True, slots=True)
class BlockType:
    """`block_size` consecutive elements of a row are stored in `type_size` bytes."""

    name: str
    block_size: int
    type_size: int


# Numbers of `enum ggml_type` in ggml.h, sizes of its block structs in ggml-common.h.
GGML_TYPES: dict[int, BlockType] = {
    number: BlockType(name, block_size, type_size)
    for number, name, block_size, type_size in [
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    ]
}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` into our errors."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"There is no file {path}.") from None
    except OSError as error:
        raise StoreError(f"{path} could not be read: {error.strerror}.") from error


def find_tensor(tensors: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """Raises NotFoundError with the names that look most like the one asked for."""
    if name in tensors:
        return tensors[name]
    candidates = [n for n in tensors if len(n) <= 100][:2000]  # the search takes time in proportion to both
    close = difflib.get_close_matches(name[:100], candidates, n=3)
    hint = f"Similar names: {', '.join(close)}." if close else f"It has {len(tensors)} other tensors."
    raise NotFoundError(f"{path} has no tensor {name!r}.", hint=hint)


def shown(names: Iterable[str], limit: int = 8) -> str:
    """A list of names for an error message, cut after `limit` names and 80 characters of each."""
    every = [n if len(n) <= 80 else f"{n[:77]}..." for n in names]
    rest = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + rest


def describe(first: bytes) -> str:
    """What the first bytes of a file look like, for messages about a file that is not what it should be."""
    if not first:
        return "it is empty"
    start = first.lstrip()[:40]
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if start[:5].lower() in (b"<!doc", b"<html"):
        return "it is an HTML page"
    if first.startswith(b"GGUF"):
        return "it is a GGUF file"
    if first[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "it is a GGML file from before GGUF (convert it with llama.cpp)"
    if is_pickle(first):
        return "it is a PyTorch pickle or a ZIP archive"
    if not first.strip(b"\0"):
        return "it begins with zeros, as an interrupted download does"
    return f"it begins with {first[:8]!r}"


def is_pickle(first: bytes) -> bool:
    """True for a ZIP archive (torch.save since 1.6) and for a bare pickle of protocol 2 to 5.

    A safetensors header of 640 bytes begins with `80 02` as well; but its JSON follows at byte 8.
    """
    if first.startswith(b"PK\x03\x04"):
        return True
    return first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and first[8:9] != b"{"
