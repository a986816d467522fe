"""A run's place on disk: trained weights, optimizers, step, place in the data, random numbers.

    RUN/checkpoints/000200/   .metadata  __0_0.distcp …  random-0.pt …  state.json
    RUN/checkpoints/000200.tmp                        one that is being written; what a kill leaves is removed later

Tensors are written by torch.distributed.checkpoint, each rank its own part, and can be read by another number of ranks.
A GPU's are copied first and written by a thread, while the run goes on. A folder gets its name when all of it is on the
disk, so the newest named one is whole; state.json has the CRC-32 of every file. What is read holds tensors and numbers,
no code: the index, which torch pickles, may name nothing but its own classes.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from llmasos.errors import DiskFullError, FormatError, LLMasOSError
from llmasos.formats import sync
from llmasos.train.optim import BLOCKS, Optimizers
from llmasos.train.parallel.ranks import Ranks
from llmasos.train.parallel.shard import at_rest, whole_shape, whole_tensor
from llmasos.train.parallel.tensor import cut_of

VERSION = 2
_log = logging.getLogger("llmasos")
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"
_CHUNK = 1 << 24


class Checkpoints:
    """In `folder`; the latest `keep` stay. As a context, it waits for what is being written."""

    def __init__(self, folder: Path, keep: int = 2, ranks: Ranks | None = None) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks or Ranks()
        self._writer: _Writer | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:  # the run fails: what it wrote before stays good
            self._writer.join()
            if self._writer.failed is not None:
                _log.warning("%s", self._writer.failed)
            self._writer = None

    def latest(self) -> Path | None:
        found = self._whole()
        return found[-1] if found else None

    def _whole(self) -> list[Path]:
        return sorted((p for p in self.folder.glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name))

    # --- writing

    @property
    def is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def save(self, step: int, module: nn.Module, optimizers: Optimizers, state: Mapping[str, Any]) -> Path:
        """Raises DiskFullError; the checkpoints before it stay then."""
        path = self.begin(step, module, optimizers, state)
        self.finish()
        return path

    def begin(self, step: int, module: nn.Module, optimizers: Optimizers, state: Mapping[str, Any]) -> Path:
        """Write everything: a GPU's from a copy, in a thread; a CPU's at once, which would need the copy's memory and
        is busy with training itself. All ranks call it; returns what the folder will be."""
        self.finish()
        groups = [optimizer["param_groups"] for optimizer in optimizers.state_dict()]
        facts = {"version": VERSION, "step": step, "world_size": self.ranks.world_size, "groups": groups, **state}
        tensors = _tensors(module, optimizers, self.ranks)
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if on_gpu:
            tensors = _copied(tensors)
        final = self.folder / f"{step:06d}"
        self._writer = _Writer(self, final, tensors, _random_state(), facts)
        self._writer.start()
        if not on_gpu:
            self._writer.join()
        return final

    def finish(self) -> tuple[int, Path] | None:
        """Wait for what is being written: its step and folder. Raises DiskFullError on all ranks together."""
        writer, self._writer = self._writer, None
        if writer is None:
            return None
        writer.join()
        self.ranks.check(writer.failed)
        return int(writer.facts["step"]), writer.final

    def sweep(self) -> None:
        for old in [*self._whole()[: -self.keep], *self.folder.glob("*.tmp")]:
            shutil.rmtree(old, ignore_errors=True)

    # --- reading

    def load(self, path: Path, module: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Everything as it was when it was saved; returns what `save` got as `state`, and `step`.

        Raises FormatError for one that is damaged, naming the one before, or of other weights."""
        ranks = self.ranks
        state, problem = self._checked(path)
        ranks.check(problem)
        metadata = _Reader(path).read_metadata()
        at_rest(module)
        own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        targets = _targets(metadata, own, optimizers, ranks, path)
        _read(targets, path, ranks)
        random_state = _random_of(path, ranks, state["world_size"])
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(_part(targets[_WEIGHTS + name], parameter, ranks))
        for number, optimizer in enumerate(optimizers.each):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            found: dict[int, dict[str, Any]] = {}
            for name, value in targets.items():
                if name.startswith(f"{_OPTIMIZER}{number}/"):
                    _, _, index, key = name.split("/")
                    part = _part(value, held[int(index)], ranks) if value.dim() else value
                    found.setdefault(int(index), {})[key] = part
            optimizer.load_state_dict({"state": found, "param_groups": state["groups"][number]})
        _set_random_state(random_state)
        return state

    def _checked(self, path: Path) -> tuple[dict[str, Any], Exception | None]:
        """What the checkpoint says of itself, and what is wrong with it; each rank looks at some of the files."""
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            if state.get("version") != VERSION:
                return {}, FormatError(
                    f"{path} is a checkpoint of version {state.get('version')!r}.", hint="Begin a new run."
                )
            for i, (name, crc) in enumerate(sorted(state["files"].items())):
                if i % self.ranks.world_size == self.ranks.rank and _crc(path / name) != crc:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, KeyError, AttributeError) as e:
            before = [p for p in self._whole() if int(p.name) < int(path.name)]
            hint = "Begin a new run; there is no checkpoint before it."
            if before:
                hint = f"Remove that folder, and resume goes on from {before[-1].name}, the one before it."
            return {}, FormatError(f"The checkpoint {path} is damaged: {e}.", hint=hint)
        return state, None


class _Writer(threading.Thread):
    """Writes one checkpoint. What goes wrong on one rank goes wrong on all, and nothing is left."""

    def __init__(
        self, owner: Checkpoints, final: Path, tensors: dict[str, Tensor], random: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.owner, self.final, self.facts = owner, final, facts
        self._tensors, self._random = tensors, random
        self.failed: Exception | None = None

    def run(self) -> None:
        temporary = self.final.with_name(f"{self.final.name}.tmp")
        ranks = self.owner.ranks
        try:
            self._write(temporary, ranks)
        except BaseException as e:  # dcp's own is no Exception
            reason = _reason(e)
            if isinstance(reason, OSError) or "write" in str(reason).lower():
                self.failed = DiskFullError(
                    f"The checkpoint of step {self.facts['step']} could not be written: {reason}.",
                    hint=f"Free some space in {self.final.parent}; `resume` goes on from the last checkpoint.",
                )
            else:
                self.failed = LLMasOSError(f"The checkpoint of step {self.facts['step']} failed: {reason!r}.")
            self.failed.__cause__ = reason
        finally:
            self._tensors = {}
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, temporary: Path, ranks: Ranks) -> None:
        def make() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def own() -> dict[str, int]:
            torch.save(self._random, temporary / f"random-{ranks.rank}.pt")
            names = [f"random-{ranks.rank}.pt", *(p.name for p in temporary.glob(f"__{ranks.rank}_*"))]
            names += [".metadata"] if ranks.is_first else []
            return {name: _crc(temporary / name) for name in names}

        def finish(found: list[dict[str, int]]) -> None:
            files = {name: crc for each in found for name, crc in each.items()}
            (temporary / "state.json").write_text(json.dumps({**self.facts, "files": files}))
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            if self.final.exists():
                shutil.rmtree(self.final)
            os.replace(temporary, self.final)
            sync(self.final.parent)  # before those that it makes superfluous go
            self.owner.sweep()

        _together(ranks, make if ranks.is_first else _nothing)
        options: dict[str, Any] = {"no_dist": True} if ranks.world_size == 1 else {"process_group": ranks.saving}
        with _unwarned():
            write_tensors(self._tensors, storage_writer=FileSystemWriter(temporary), **options)
        found = _together(ranks, own)
        _together(ranks, (lambda: finish(found)) if ranks.is_first else _nothing)


def _nothing() -> None:
    return None


def _together(ranks: Ranks, work: Any) -> list[Any]:
    """What it gives on each rank; raised on all if one fails."""
    result, failed = None, None
    try:
        result = work()
    except Exception as e:
        failed = e
    if ranks.world_size == 1:
        found = [(result, failed)]
    else:
        found = [None] * ranks.world_size  # type: ignore[list-item]
        dist.all_gather_object(found, (result, failed), group=ranks.saving)
    for _, problem in found:
        if problem is not None:
            raise problem
    return [given for given, _ in found]


def _reason(e: BaseException) -> BaseException:
    failures = getattr(e, "failures", None)
    return next(iter(failures.values()))[0] if failures else e


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, whole, by their names in the trained module: what is exported."""
    _, problem = Checkpoints(path.parent)._checked(path)
    if problem is not None:
        raise problem
    metadata = _Reader(path).read_metadata()
    found = {
        name: torch.empty(tuple(facts.size), dtype=facts.properties.dtype)
        for name, facts in metadata.state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(facts, TensorStorageMetadata)
    }
    _read(found, path, Ranks())
    return {name.removeprefix(_WEIGHTS): tensor for name, tensor in found.items()}


def _tensors(module: nn.Module, optimizers: Optimizers, ranks: Ranks) -> dict[str, Tensor]:
    """By name, whole or DTensors: nothing in them depends on the number of ranks."""
    at_rest(module)

    def given(tensor: Tensor, like: Tensor) -> Tensor:
        return whole_tensor(tensor, like, ranks) if ranks.tensor > 1 else tensor

    found = {_WEIGHTS + n: given(p.detach(), p) for n, p in module.named_parameters() if p.requires_grad}
    for number, optimizer in enumerate(optimizers.each):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                found[f"{_OPTIMIZER}{number}/{index}/{key}"] = given(value, held[index])
    return found


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the CPU's memory, and no longer what training changes."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    cpu = {n: t if t.is_cuda else t.detach().clone() for n, t in tensors.items()}
    staged: dict[str, Tensor] = BlockingAsyncStager(cache_staged_state_dict=False).stage(cpu)
    return staged


def _targets(
    metadata: Metadata, own: dict[str, nn.Parameter], optimizers: Optimizers, ranks: Ranks, path: Path
) -> dict[str, Tensor]:
    """Tensors to read into: like the parameters they belong to, where they have their shape."""
    facts = {n: f for n, f in metadata.state_dict_metadata.items() if isinstance(f, TensorStorageMetadata)}
    saved = {n.removeprefix(_WEIGHTS): tuple(f.size) for n, f in facts.items() if n.startswith(_WEIGHTS)}
    if saved != {name: whole_shape(p) for name, p in own.items()}:
        raise FormatError(
            f"{path} holds other weights than this run trains.",
            hint="Go on with the model, adapter options and recipe that it was begun with, or begin a new run.",
        )
    held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers.each]
    targets = {}
    for name, fact in facts.items():
        is_of_blocks = name.endswith(BLOCKS)
        if name.startswith(_WEIGHTS):
            like = own[name.removeprefix(_WEIGHTS)]
        else:
            _, number, index, _ = name.split("/")
            like = held[int(number)][int(index)]
        dtype, size = fact.properties.dtype, tuple(fact.size)
        if hasattr(like, "to_local") and size == tuple(like.shape) and not is_of_blocks:
            targets[name] = torch.zeros_like(like.detach(), dtype=dtype)
        else:
            targets[name] = torch.zeros(size, dtype=dtype)
    return targets


def _part(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    cut = getattr(like, "cut", None)
    return tensor if cut is None else cut_of(tensor, cut, ranks)


class _Reader(FileSystemReader):
    """Its index is unpickled with torch's own classes only."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                found: Metadata = _Unpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as e:
            raise FormatError(f"The checkpoint {self.path} is damaged: .metadata: {e}.", hint="Remove it.") from e
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_plain = (module, name) in _PLAIN
        if "." not in name and (is_plain or module.startswith("torch.distributed.checkpoint.")):
            found = super().find_class(module, name)
            if is_plain or isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", str(d).removeprefix("torch.")) for d in vars(torch).values() if isinstance(d, torch.dtype)),
    *(("pathlib", n) for n in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", n) for n in ("Path", "PosixPath", "PurePosixPath")),
    ("collections", "OrderedDict"),
}


def _read(targets: dict[str, Tensor], path: Path, ranks: Ranks) -> None:
    options: dict[str, Any] = {"no_dist": True} if ranks.world_size == 1 else {"process_group": ranks.control}
    try:
        with _unwarned():
            read_tensors(targets, storage_reader=_Reader(path), **options)
    except BaseException as e:
        reason = _reason(e)
        if isinstance(reason, KeyboardInterrupt):
            raise
        raise FormatError(f"The checkpoint {path} cannot be read: {reason}.", hint="Remove it.") from e


@contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _random_state() -> dict[str, Any]:
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.array(words, np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }


def _random_of(path: Path, ranks: Ranks, saved: int) -> dict[str, Any]:
    """This rank's; ranks that were not there before begin with one of those that were."""
    file = path / f"random-{ranks.rank % saved}.pt"
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:  # that says at length how to run the code
        why = "it holds more than tensors and numbers" if isinstance(e, pickle.UnpicklingError) else str(e)
        raise FormatError(f"The checkpoint {path} is damaged: {file.name}: {why}.", hint="Remove it.") from e
    return found


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
