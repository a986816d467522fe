"""safetensors: one file or shards with an index; headers without the weights, memory-mapped tensors, saving.

Layout (the format's own README): 8 bytes little-endian header length, a JSON header, the data without holes. The header
is read and checked here, so that a plan needs neither torch nor the weights; tensors come from the safetensors library.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.errors import DiskFullError, FormatError, InvalidInputError, StoreError, UnsupportedError
from llmasos.formats.types import (
    DAMAGED,
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

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The library allows 100 MB. 32 MiB name 250 thousand tensors; brackets are counted, since two of them take 64 bytes.
MAX_HEADER_BYTES = 32 << 20
MAX_CONTAINERS = 1 << 20
MAX_NAME_CHARS = 4096

# dtype -> bits per element, as in the library's `Dtype`
_BITS = {
    **dict.fromkeys(["C64", "F64", "I64", "U64"], 64),
    **dict.fromkeys(["F32", "I32", "U32"], 32),
    **dict.fromkeys(["F16", "BF16", "I16", "U16"], 16),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    "F4": 4,
}
# Torch has no type of one such element: six bits at all, four bits only in pairs, with another shape.
_NO_TORCH_TYPE = {"F6_E2M3", "F6_E3M2", "F4"}


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of one file. `metadata` is its `__metadata__`; `data_start` and `data_size` count bytes."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int
    data_size: int


def parse_safetensors_header(data: bytes, *, name: str, file_size: int | None = None) -> SafetensorsHeader:
    """Reads the header from the first bytes of a file, e.g. of a ranged request.

    `name` stands for the file in messages; `file_size` is its whole length where known. Raises NeedMoreBytes, whose
    `needed` is then exact, when `data` ends inside the header, and FormatError when the header is wrong.
    """
    if file_size is not None and file_size < 8:
        raise FormatError(f"{name} has {file_size} bytes, too few for a safetensors file.", hint=DAMAGED)
    if len(data) < 8:
        raise NeedMoreBytes(name, len(data), 8)
    length = int.from_bytes(data[:8], "little")
    data_start = 8 + length
    most = MAX_HEADER_BYTES if file_size is None else min(MAX_HEADER_BYTES, file_size - 8)
    if length > most:
        raise FormatError(
            f"{name}: this is not a whole safetensors file: its header length is {length}, at most {most} is possible; "
            f"{describe(data[:512])}.",
            hint=DAMAGED,
        )
    if len(data) < data_start:
        raise NeedMoreBytes(name, len(data), data_start)
    entries = _load_json(data[8:data_start], f"{name}: the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{name}: __metadata__ is not a mapping of strings to strings.", hint=DAMAGED)
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in entries.items():
        tensors[key], start, end = _entry(key, entry, name)
        spans.append((start, end, key))
    data_size = _check_spans(spans, name)
    if file_size is not None and data_start + data_size != file_size:
        raise FormatError(
            f"{name}: header and tensors take {data_start + data_size} bytes, but the file has {file_size}.",
            hint=DAMAGED,
        )
    return SafetensorsHeader(metadata, tensors, data_start, data_size)


def _load_json(data: bytes, what: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise FormatError(f"{what} names {twice[:80]!r} twice.", hint=DAMAGED)
        return result

    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise FormatError(f"{what} holds over {MAX_CONTAINERS} lists and objects.", hint=DAMAGED)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, integers of thousands of digits
        raise FormatError(f"{what} is not valid JSON: {str(error)[:120]}.", hint=DAMAGED) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is a JSON {type(value).__name__}, not an object.", hint=DAMAGED)
    return value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_ELEMENTS for v in value)


def _entry(key: str, entry: Any, name: str) -> tuple[TensorInfo, int, int]:
    """One tensor of the header, with where its bytes begin and end in the data."""

    def error(message: str) -> FormatError:
        return FormatError(f"{name}: {message}.", hint=DAMAGED)

    label = repr(key[:80])
    if len(key) > MAX_NAME_CHARS or any("\ud800" <= c <= "\udfff" for c in key):
        raise error(f"the tensor name {label} is longer than {MAX_NAME_CHARS} or not Unicode text")
    if not isinstance(entry, dict):
        raise error(f"the entry of {label} is {str(entry)[:80]}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise error(f"the dtype of {label} is {str(dtype)[:80]}; known are {', '.join(_BITS)}")
    if not isinstance(shape, list) or not _is_sizes(shape):
        raise error(f"the shape of {label} is {str(shape)[:80]}, not a list of sizes")
    if not isinstance(offsets, list) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"the data_offsets of {label} are {str(offsets)[:80]}, not [begin, end]")
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:  # 64: torch's limit
        raise error(f"the shape of {label} is {str(shape)[:80]}: over 64 dimensions or 2^63 elements")
    bits, num_bytes = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != num_bytes * 8:
        raise error(
            f"{label} of shape {str(shape)[:80]} and dtype {dtype} takes {bits} bits, its offsets {num_bytes} bytes"
        )
    return TensorInfo(key, dtype, tuple(shape), num_bytes), offsets[0], offsets[1]


def _check_spans(spans: list[tuple[int, int, str]], name: str) -> int:
    """The format allows no holes and no overlaps: each tensor begins where the one before it ends."""
    position = 0
    for start, end, key in sorted(spans):
        if start != position:
            kind = "overlaps the tensor before it" if start < position else "leaves a hole"
            raise FormatError(
                f"{name}: {key[:80]!r} begins at {start} and {kind}, which ends at {position}.", hint=DAMAGED
            )
        position = end
    return position


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of one file on disk; reads nothing else of it."""
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(512)
        try:
            return parse_safetensors_header(data, name=str(path), file_size=size)
        except NeedMoreBytes as more:
            data += file.read(more.needed - len(data))
        return parse_safetensors_header(data, name=str(path), file_size=size)


def read_safetensors_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Tensor name -> shard file name, and the `metadata`, of a `model.safetensors.index.json`."""
    with reading(path), path.open("rb") as file:
        data = file.read(MAX_HEADER_BYTES + 1)
    return parse_safetensors_index(data, name=str(path))


def parse_safetensors_index(data: bytes, *, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Raises FormatError for bad JSON and for shard names that are not plain `*.safetensors` file names."""
    if len(data) > MAX_HEADER_BYTES:
        raise FormatError(f"{name} is longer than {MAX_HEADER_BYTES} bytes.", hint=DAMAGED)
    index = _load_json(data, name)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(f"{name} has no weight_map of tensor names to shards.", hint=DAMAGED)
    for tensor, shard in weight_map.items():
        # A name with a folder in it could point anywhere on this computer, so it is never joined to a path.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,255}\.safetensors", shard):
            raise FormatError(
                f"{name}: the shard of {tensor[:80]!r} is {str(shard)[:80]!r}, not the name of a .safetensors file.",
                hint="Take the model from a source that you trust.",
            )
    return weight_map, metadata


class SafetensorsCheckpoint:
    """One `.safetensors` file, or the shards that an index names. See `Checkpoint`; tensors are views of the map.

    Opening reads headers only; a file is mapped when the first tensor is taken from it. With an index, `tensors` are
    those that it names, and `metadata` is the first shard's together with the index's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if path.name.endswith(".json"):
            self._read_shards(path)
        else:
            header = read_safetensors_header(path)
            self.tensors, self.metadata = header.tensors, dict(header.metadata)
            self._files = dict.fromkeys(header.tensors, path)

    def _read_shards(self, index: Path) -> None:
        weight_map, metadata = read_safetensors_index(index)
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not index.with_name(shard).is_file()]
        if missing:
            raise FormatError(
                f"{index} names {len(shards)} shards; missing: {shown(missing)}.",
                hint="Fetch the model again; an interrupted download continues where it stopped.",
            )
        headers = {shard: read_safetensors_header(index.with_name(shard)) for shard in shards}
        for name, shard in weight_map.items():
            if name not in headers[shard].tensors:
                raise FormatError(f"{index}: the tensor {name[:80]!r} is not in {shard}.", hint=DAMAGED)
            self.tensors[name] = headers[shard].tensors[name]
            self._files[name] = index.with_name(shard)
        self.metadata = {**headers[shards[0]].metadata, **metadata}

    def tensor(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        info = find_tensor(self.tensors, name, self.path)
        if name not in self._files:
            raise InvalidInputError(f"{self.path} is closed; {name} can't be read from it any more.")
        if info.dtype in _NO_TORCH_TYPE:
            raise UnsupportedError(
                f"{self.path}: the tensor {name[:80]} has dtype {info.dtype}, which torch has no type for.",
                hint="Take the model in another precision: BF16, F16 or F8_E4M3.",
            )
        file = self._files[name]
        try:
            with reading(file):
                if file not in self._open:
                    self._open[file] = safe_open(file, framework="pt")
                tensor: torch.Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"{file}: {error}.", hint=DAMAGED) from error
        return tensor

    def raw(self, name: str) -> torch.Tensor:
        import torch

        info, tensor = find_tensor(self.tensors, name, self.path), self.tensor(name)
        rows = math.prod(info.shape[:-1])
        return tensor.reshape(-1).view(torch.uint8).view(rows, info.nbytes // rows if rows else 0)

    def close(self) -> None:
        """Lets go of the files. They stay mapped as long as a tensor taken from them lives."""
        self._files.clear()
        self._open.clear()


def save_safetensors(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    max_shard_size: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with their index, as transformers does.

    Everything is written beside its final name first and moved into place when all of it is on disk; only then are
    files of an earlier save removed. A tensor larger than a shard gets one of its own; tensors that share memory are
    written in full, each. Returns the files written. Raises DiskFullError or StoreError; what was in the folder stays.
    """
    if max_shard_size < 1:
        raise InvalidInputError(
            f"max_shard_size is {max_shard_size}; at least 1 byte is needed.", param="max_shard_size"
        )
    shards = _shards(tensors, max_shard_size)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    temporary = {name: folder / f".{name}.{secrets.token_hex(4)}.tmp" for name in [*names, INDEX]}
    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, shard in zip(names, shards, strict=True):
                _write(temporary[name], {key: tensors[key] for key in shard}, {"format": "pt", **(metadata or {})})
            if len(shards) > 1:
                total = sum(t.numel() * t.element_size() for t in tensors.values())
                weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                temporary[INDEX].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
                names.append(INDEX)
            for name in names:
                os.replace(temporary[name], folder / name)
            for old in folder.iterdir():
                if old.name not in names and re.fullmatch(
                    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name
                ):
                    old.unlink()
    finally:
        for path in temporary.values():
            with suppress(OSError):  # not there, or the disk that made us stop
                path.unlink()
    return [folder / name for name in names]


def stream_safetensors(
    like: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    max_shard_size: int = 5_000_000_000,
) -> list[Path]:
    """As `save_safetensors` writes them, but one tensor after the other, so that one of them is in memory.

    like: tensors of the final shapes and dtypes by name (on the meta device); `tensors` come in the same order. For a
    folder that nobody reads yet: files are not moved into place. Raises DiskFullError or StoreError."""
    shards = _shards(like, max_shard_size)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    given = iter(tensors)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, shard in zip(names, shards, strict=True):
            _stream(folder / file, {key: like[key] for key in shard}, given)
        assert next(given, None) is None, "more tensors than were announced"
        if len(shards) > 1:
            total = sum(t.numel() * t.element_size() for t in like.values())
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            names.append(INDEX)
    return [folder / name for name in names]


def _stream(path: Path, like: Mapping[str, torch.Tensor], given: Iterator[tuple[str, torch.Tensor]]) -> None:
    import torch

    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for wanted, of in like.items():
            name, tensor = next(given)
            assert name == wanted and tensor.shape == of.shape, name
            plain = tensor.detach().to("cpu", of.dtype).contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(tensors: Mapping[str, torch.Tensor], max_shard_size: int) -> list[list[str]]:
    """Names in their order, cut where the next tensor would not fit; always at least one shard."""
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    import torch
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # what the user's umask makes of a new file; the library makes it private
    ready: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise UnsupportedError(f"The tensor {name} is sparse or has no data; safetensors holds dense ones.")
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in memory:  # the library refuses tensors that share memory
            plain = plain.clone()
        memory.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    try:
        save_file(ready, path, metadata=metadata)
    except (KeyError, ValueError) as error:  # a dtype or layout that the format does not have
        raise UnsupportedError(f"{path.name} can't hold these tensors: {str(error)[:200]}.") from None
    path.chmod(mode)
    sync(path)


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk afterwards."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return  # folders can't be opened there
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as e:
        if not (is_folder and e.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems do so with files only
            raise
    finally:
        os.close(handle)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in text
        if full:
            raise DiskFullError(f"{folder} has no room for the model: {text}.", hint="Free some space.") from error
        raise StoreError(f"{folder} could not be written: {text}.") from error
