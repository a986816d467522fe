"""`open_checkpoint`: which format a path holds, decided by its bytes and names, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

from llmasos.errors import FormatError, InvalidInputError, NotFoundError, PickleRefusedError
from llmasos.formats.gguf import GGUFCheckpoint, split_parts
from llmasos.formats.safetensors import INDEX, SINGLE, SafetensorsCheckpoint
from llmasos.formats.types import Checkpoint, describe, is_pickle, reading, shown

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_PICKLE_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt"}


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face folder (one file or shards with an index), a `.safetensors` or a `.gguf` file.

    A folder is searched for safetensors first, then for exactly one GGUF model. Any part of a split GGUF model stands
    for the whole. Raises NotFoundError, PickleRefusedError for checkpoints that run code when loaded, FormatError else.
    """
    path = Path(path)
    with reading(path):
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise NotFoundError(f"There is no file or folder {path}.", hint="`llmasos ls` lists the installed models.")
        if not path.is_file():
            raise FormatError(f"{path} is neither a file nor a folder.")
        with path.open("rb") as file:
            first = file.read(512)
    if first.startswith(b"GGUF") or path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if is_pickle(first) or path.suffix in _PICKLE_SUFFIXES:
        raise _pickle_refused(path, path.name)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return SafetensorsCheckpoint(path)
    if first[8:9] == b"{" and first[7:8] == b"\0":  # a hub's cache stores files under their hash, without a suffix
        return SafetensorsCheckpoint(path)
    raise FormatError(
        f"{path} is neither a safetensors nor a GGUF file: {describe(first)}.",
        hint="Give the model's folder, its .safetensors or its .gguf file.",
    )


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(entry.name for entry in folder.iterdir())
    if SINGLE in names:
        return SafetensorsCheckpoint(folder / SINGLE)
    if INDEX in names:
        return SafetensorsCheckpoint(folder / INDEX)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    for candidates in (indexes, weights):
        if len(candidates) == 1:
            return SafetensorsCheckpoint(folder / candidates[0])
    if weights:
        raise FormatError(
            f"{folder} holds {len(weights)} safetensors files and no index of them: {shown(weights)}.",
            hint=f"Fetch the model's {INDEX} as well, or give one file.",
        )
    gguf = {split_parts(folder / name)[0] for name in names if name.endswith(".gguf")}
    if len(gguf) == 1:
        return GGUFCheckpoint(gguf.pop())
    if gguf:
        models = shown(sorted(file.name for file in gguf))
        raise FormatError(
            f"{folder} holds {len(gguf)} GGUF models: {models}.", hint="Give the path of the one you want."
        )
    pickles = [n for n in names if Path(n).suffix in _PICKLE_SUFFIXES and n not in _PICKLE_NOT_WEIGHTS]
    if pickles:
        raise _pickle_refused(folder, shown(pickles))
    raise FormatError(
        f"{folder} holds no model that can be loaded; it holds {shown(names) or 'nothing'}.",
        hint="Give a folder with model.safetensors, or a .gguf file.",
    )


def _pickle_refused(path: Path, names: str) -> PickleRefusedError:
    return PickleRefusedError(
        f"{path} is a pickle checkpoint ({names}). Unpickling runs any code that its author put there, so it is "
        "refused.",
        hint="Take a revision of the model that has safetensors files, or convert it on a machine that you don't mind "
        "losing: load it with transformers there and call save_pretrained, which writes model.safetensors.",
    )


def gguf_in(path: Path) -> Path:
    """A folder that holds one GGUF model (one file, or the parts of one) and no config.json -> its first file."""
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        firsts = [f for f in files if not re.search(r"-\d{5}-of-\d{5}$", f.stem) or "-00001-of-" in f.stem]
        if len(firsts) == 1:
            return firsts[0]
        if firsts:
            names = ", ".join(f.name for f in firsts)
            raise InvalidInputError(f"{path} holds several GGUF models: {names}.", hint="Name one of the files.")
    return path
