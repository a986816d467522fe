"""GGUF, versions 2 and 3, little endian: metadata, tensor table, memory-mapped tensors, files split in parts.

Layout (docs/gguf.md in the ggml repository): magic, version, counts; then key/value pairs; then the tensor table; then,
at the next multiple of `general.alignment`, the data. Everything read here comes from outside: each count, length,
offset and size is compared with the file before it is used, and what a header may make us allocate is capped.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmasos.errors import FormatError, InvalidInputError, UnsupportedError
from llmasos.formats.types import (
    DAMAGED,
    GGML_TYPES,
    MAX_ELEMENTS,
    NeedMoreBytes,
    TensorInfo,
    describe,
    find_tensor,
    reading,
    shown,
)

if TYPE_CHECKING:
    import torch

# The largest real headers (vocabularies of 260 thousand tokens) take some 16 MB, 600 thousand strings and 100 keys.
MAX_HEADER_BYTES = 256 << 20
MAX_OBJECTS = 2 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1 << 16  # of a key (the format's own limit) or a tensor name
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_DEPTH = 8  # of arrays in arrays
MAX_ALIGNMENT = 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_SCALARS = {t: struct.Struct("<" + np.dtype(code).char) for t, code in _NUMBERS.items()} | {
    10: struct.Struct("<Q"),  # numpy calls 64-bit integers by the platform's C type
    11: struct.Struct("<q"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFHeader:
    """Everything before the data of one file.

    `metadata`: numbers, booleans and strings as Python values; arrays of numbers or booleans as 1-D numpy arrays;
    arrays of strings or arrays as lists. `offsets`: where a tensor's bytes begin, from the start of the file.
    """

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    data_start: int


class _Cursor:
    """Reads forward through a header. `size` is the whole file's length where known, else None (a prefix)."""

    def __init__(self, buffer: bytes | mmap.mmap, name: str, size: int | None) -> None:
        self.buffer, self.name, self.size = buffer, name, size
        self.given = len(buffer)
        self.pos = 0
        self.objects = 0

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.name}: {message}.", hint=DAMAGED)

    def need(self, num_bytes: int, field: str) -> int:
        """The position after `num_bytes` more bytes, all of which are there."""
        end = self.pos + num_bytes
        if self.size is not None and end > self.size:
            raise self.error(
                f"{field} takes {num_bytes} bytes from offset {self.pos}, but the file has only {self.size} bytes"
            )
        if end > MAX_HEADER_BYTES:
            raise self.error(
                f"{field} takes {num_bytes} bytes from offset {self.pos}; headers over {MAX_HEADER_BYTES} are refused"
            )
        if end > self.given:
            raise NeedMoreBytes(self.name, self.given, end)
        return end

    def count_objects(self, count: int, field: str) -> None:
        self.objects += count
        if self.objects > MAX_OBJECTS:
            raise self.error(f"{field} has {count} elements; headers with over {MAX_OBJECTS} strings are refused")

    def u32(self, field: str) -> int:
        return int(self.scalar(_U32, field))

    def u64(self, field: str) -> int:
        return int(self.scalar(_U64, field))

    def scalar(self, layout: struct.Struct, field: str) -> Any:
        end = self.need(layout.size, field)
        (value,) = layout.unpack_from(self.buffer, self.pos)
        self.pos = end
        return value

    def string(self, field: str, *, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(f"the length of {field}")
        if length > max_bytes:
            raise self.error(f"the length of {field} is {length} bytes; at most {max_bytes} are allowed")
        end = self.need(length, field)
        data = self.buffer[self.pos : end]
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{field} is not UTF-8 (byte {error.start} of {data[:40]!r})") from None
        self.pos = end
        return text

    def strings(self, count: int, field: str) -> list[str]:
        """The vocabulary's hot loop: the checks of `string`, without its calls."""
        self.count_objects(count, field)
        self.need(count * 8, field)
        buffer, position, end = self.buffer, self.pos, min(self.given, MAX_HEADER_BYTES)
        unpack = _U64.unpack_from
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                if position > end:
                    break
                append(buffer[start:position].decode())
        except (struct.error, UnicodeDecodeError):
            pass
        if len(result) < count:  # the careful way, from the element that failed, names it and raises
            self.pos = self.pos + sum(8 + len(text.encode()) for text in result)
            self.string(f"{field}[{len(result)}]")
            raise AssertionError("unreachable: an element that the fast loop refused was read")
        self.pos = position
        return result

    def value(self, kind: int, field: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], field)
        if kind == _STRING:
            self.count_objects(1, field)
            return self.string(field)
        if kind == _BOOL:
            return bool(self.booleans(1, field)[0])
        if kind == _ARRAY:
            return self.array(field, depth)
        raise self.error(f"the type of {field} is {kind}, which is not a GGUF value type")

    def booleans(self, count: int, field: str) -> np.ndarray[Any, Any]:
        values = self.numbers("<u1", count, field)
        if count and values.max() > 1:
            raise self.error(f"{field} holds the boolean {values.max()}; 0 or 1 is allowed")
        return values.astype(np.bool_)

    def numbers(self, code: str, count: int, field: str) -> np.ndarray[Any, Any]:
        end = self.need(count * np.dtype(code).itemsize, field)
        data = self.buffer[self.pos : end]
        self.pos = end
        return np.frombuffer(data, code).copy() if count else np.empty(0, code)

    def array(self, field: str, depth: int) -> Any:
        kind, count = self.u32(f"the element type of {field}"), self.u64(f"the length of {field}")
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], count, field)
        if kind == _BOOL:
            return self.booleans(count, field)
        if kind == _STRING:
            return self.strings(count, field)
        if kind != _ARRAY:
            raise self.error(f"the element type of {field} is {kind}, which is not a GGUF value type")
        if depth >= MAX_DEPTH:
            raise self.error(f"{field} nests arrays deeper than {MAX_DEPTH}")
        self.count_objects(count, field)
        self.need(count * 12, field)
        return [self.array(f"{field}[{i}]", depth + 1) for i in range(count)]


def parse_gguf_header(data: bytes | mmap.mmap, *, name: str, file_size: int | None = None) -> GGUFHeader:
    """Reads the header from the first bytes of a file, e.g. of a ranged request.

    `name` stands for the file in messages; `file_size` is its whole length where known, and lets lies about sizes be
    found. Raises NeedMoreBytes when `data` ends inside the header, FormatError when the header is wrong.
    """
    cursor = _Cursor(data, name, file_size)
    version = _version(cursor)
    num_tensors, num_keys = cursor.u64("the tensor count"), cursor.u64("the key count")
    if num_tensors > MAX_TENSORS:
        raise cursor.error(f"the tensor count is {num_tensors}; over {MAX_TENSORS} are refused")
    if num_keys > MAX_KEYS:
        raise cursor.error(f"the key count is {num_keys}; over {MAX_KEYS} are refused")
    metadata: dict[str, Any] = {}
    for i in range(num_keys):
        key = cursor.string(f"key {i}", max_bytes=MAX_NAME_BYTES)
        if not key or key in metadata:
            raise cursor.error(f"key {i}, {key[:80]!r}, {'occurs twice' if key else 'is empty'}")
        field = f"the value of {key[:80]}"
        metadata[key] = cursor.value(cursor.u32(f"the type of {key[:80]}"), field)
    alignment = _alignment(cursor, metadata)
    table = _tensor_table(cursor, num_tensors)
    data_start = -(-cursor.pos // alignment) * alignment
    tensors, offsets = _place(cursor, table, alignment, data_start)
    return GGUFHeader(version, alignment, metadata, tensors, offsets, data_start)


def _version(cursor: _Cursor) -> int:
    first = cursor.buffer[:512]
    if not b"GGUF".startswith(first[:4]) or cursor.size == 0:
        raise cursor.error(f"this is not a GGUF file: {describe(first)}")
    cursor.pos = cursor.need(4, "the magic")
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version and version % 65536 == 0:
        raise UnsupportedError(
            f"{cursor.name} is a big-endian GGUF file, which this build does not read.",
            hint="Convert it with the gguf package: `gguf-convert-endian FILE little`.",
        )
    raise UnsupportedError(
        f"{cursor.name} is GGUF version {version}; versions 2 and 3 are supported.",
        hint="Convert the model again with a current llama.cpp, or update LLMasOS if the version is newer than 3.",
    )


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool):
        raise cursor.error(f"general.alignment is {str(value)[:80]!r}, not a whole number")
    if value < 1 or value > MAX_ALIGNMENT or value & (value - 1):
        raise cursor.error(f"general.alignment is {value}; a power of two up to {MAX_ALIGNMENT} is allowed")
    return value


_Entry = tuple[str, tuple[int, ...], int, int]  # name, shape, type number, offset in the data


def _tensor_table(cursor: _Cursor, count: int) -> list[_Entry]:
    cursor.need(count * 24, "the tensor table")  # an entry's name length, dimension count, type and offset
    table: list[_Entry] = []
    names: set[str] = set()
    for i in range(count):
        name = cursor.string(f"the name of tensor {i}", max_bytes=MAX_NAME_BYTES)
        if name in names:
            raise cursor.error(f"the tensor {name[:80]!r} occurs twice")
        names.add(name)
        num_dims = cursor.u32(f"the dimension count of {name[:80]}")
        if num_dims > MAX_DIMS:
            raise cursor.error(f"the dimension count of {name[:80]} is {num_dims}; at most {MAX_DIMS} are allowed")
        end = cursor.need(num_dims * 8 + 12, f"the table entry of {name[:80]}")
        *dims, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", cursor.buffer, cursor.pos)
        cursor.pos = end
        table.append((name, tuple(reversed(dims)), kind, offset))  # ggml names the fastest dimension first
    return table


def _place(
    cursor: _Cursor, table: list[_Entry], alignment: int, data_start: int
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Sizes every tensor and checks that all of them lie in the file, aligned, without overlap."""
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for name, shape, kind, offset in table:
        if offset % alignment:
            raise cursor.error(f"the offset of {name[:80]} is {offset}, not a multiple of the alignment {alignment}")
        info = _tensor_info(cursor, name, shape, kind)
        start = offsets[name] = data_start + offset
        if start + info.nbytes > (MAX_ELEMENTS if cursor.size is None else cursor.size):
            raise cursor.error(
                f"{name[:80]} takes {info.nbytes} bytes from offset {start}, past the file's end at {cursor.size}"
            )
        tensors[name] = info
    last_end, last_name = data_start, ""
    for name in sorted((n for n in tensors if tensors[n].nbytes), key=offsets.__getitem__):
        if offsets[name] < last_end:
            raise cursor.error(f"{name[:80]} begins at offset {offsets[name]}, inside {last_name[:80]}")
        last_end, last_name = offsets[name] + tensors[name].nbytes, name
    return tensors, offsets


def _tensor_info(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> TensorInfo:
    num_elements = math.prod(shape)
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise cursor.error(f"the shape of {name[:80]} is {shape}, over 2^63 elements")
    block = GGML_TYPES.get(kind)
    if block is None:  # a type from the future or from the past: named when it is touched, sized by nobody
        return TensorInfo(name, f"GGML_TYPE_{kind}", shape, 0)
    row = shape[-1] if shape else 1
    if row % block.block_size:
        raise cursor.error(
            f"a row of {name[:80]} has {row} elements, not a multiple of {block.name}'s {block.block_size}"
        )
    return TensorInfo(name, block.name, shape, num_elements // block.block_size * block.type_size)


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of one file on disk; of a split model, that of this part alone."""
    size, mapped = _map(path)
    return parse_gguf_header(mapped, name=str(path), file_size=size)


def _map(path: Path) -> tuple[int, bytes | mmap.mmap]:
    """Maps a file copy-on-write, so that writing to a tensor changes memory, never the file."""
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return 0, b""
        if sys.platform == "linux":
            # Without MAP_NORESERVE (0x4000; Python has no name for it before 3.13) the kernel refuses a private
            # mapping that is larger than memory, although no page of it is ever copied.
            flags, protection = mmap.MAP_PRIVATE | 0x4000, mmap.PROT_READ | mmap.PROT_WRITE
            return size, mmap.mmap(file.fileno(), size, flags=flags, prot=protection)
        return size, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def split_parts(path: Path) -> list[Path]:
    """All parts of a split model, in order, from any one of them; `[path]` for a file that is not split.

    Parts are named `STEM-00001-of-00003.gguf`. Raises FormatError naming the first part that is not there.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    part, count = int(match["part"]), int(match["count"])
    if not 1 <= part <= count:
        raise FormatError(f"{path}: the name says part {part} of {count}.", hint=DAMAGED)
    parts = []
    for i in range(1, count + 1):
        sibling = path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf")
        if not sibling.is_file():
            raise FormatError(
                f"{path} is one of {count} parts, and {sibling.name} is missing.",
                hint="Put all parts of the model into one folder.",
            )
        parts.append(sibling)
    return parts


class GGUFCheckpoint:
    """An open GGUF model: one file, or all parts of a split one. See `Checkpoint`; tensors are views of the map.

    Metadata is that of the first part. Raises FormatError if a header is wrong or the parts don't belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[bytes | mmap.mmap, int]] = {}
        parts = split_parts(path)
        for number, part in enumerate(parts):
            size, mapped = _map(part)
            header = parse_gguf_header(mapped, name=str(part), file_size=size)
            if number == 0:
                self.metadata = header.metadata
            _check_part(part, header.metadata, number, len(parts))
            twice = self.tensors.keys() & header.tensors.keys()
            if twice:
                raise FormatError(f"{part}: {shown(sorted(twice))} also in an earlier part.", hint=DAMAGED)
            self.tensors |= header.tensors
            self._places |= {name: (mapped, offset) for name, offset in header.offsets.items()}
        expected = str(self.metadata.get("split.tensors.count", len(self.tensors)))[:40]
        if expected != str(len(self.tensors)):
            raise FormatError(
                f"{path}: split.tensors.count is {expected}, but there are {len(self.tensors)} tensors.",
                hint=DAMAGED,
            )

    def _bytes(self, name: str) -> tuple[TensorInfo, torch.Tensor]:
        import torch

        info = find_tensor(self.tensors, name, self.path)
        if info.dtype.startswith("GGML_TYPE_"):
            raise _unsupported(self.path, info)
        if name not in self._places:
            raise InvalidInputError(f"{self.path} is closed; {name} can't be read from it any more.")
        if info.nbytes == 0:
            return info, torch.empty(0, dtype=torch.uint8)
        mapped, offset = self._places[name]
        return info, torch.from_numpy(np.frombuffer(mapped, np.uint8, info.nbytes, offset))

    def raw(self, name: str) -> torch.Tensor:
        info, data = self._bytes(name)
        rows = math.prod(info.shape[:-1])
        return data.view(rows, info.nbytes // rows if rows else 0)

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        from llmasos.formats import quants

        info, data = self._bytes(name)
        plain = {
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F64": torch.float64,
            "I8": torch.int8,
            "I16": torch.int16,
            "I32": torch.int32,
            "I64": torch.int64,
        }.get(info.dtype)
        if plain is not None:
            if data.data_ptr() % plain.itemsize:  # general.alignment may be smaller than an element
                data = data.clone()
            return data.view(plain).view(info.shape)
        if info.dtype not in quants.BLOCK:
            raise _unsupported(self.path, info)
        return quants.dequantize(info.dtype, self.raw(name)).view(info.shape)

    def close(self) -> None:
        """Lets go of the files. They stay mapped as long as a tensor taken from them lives."""
        self._places.clear()


def _unsupported(path: Path, info: TensorInfo) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the tensor {info.name[:80]} has type {info.dtype}, which this build can't decode.",
        hint="Take another quantisation of this model: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, F16 or BF16.",
    )


def _check_part(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    """A part must say what its name says; `split.no` counts from 0, file names from 1."""
    said_number, said_count = str(metadata.get("split.no"))[:40], str(metadata.get("split.count"))[:40]
    if count > 1 and (said_number, said_count) != (str(number), str(count)):
        raise FormatError(
            f"{path}: by its name this is part {number + 1} of {count}, "
            f"but its split.no is {said_number} and its split.count {said_count}.",
            hint=DAMAGED,
        )
    if count == 1 and said_count not in ("None", "0", "1"):
        raise FormatError(
            f"{path}: split.count is {said_count}, but the file is not named as a part.",
            hint="Give the parts their names back (NAME-00001-of-00003.gguf and so on), all in one folder.",
        )
