"""A run's place on disk: trained weights, optimizers, step, place in the data, random numbers.

    RUN/checkpoints/000200/   weights.safetensors  optimizer.pt  state.json
    RUN/checkpoints/000200.…tmp                   one that is being written; what a kill leaves is removed later

A folder gets its name when all of it is on the disk, so the newest named one is whole. optimizer.pt is read with
`weights_only`: tensors and numbers, no code.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmasos.errors import DiskFullError, FormatError
from llmasos.train.optim import Optimizers

VERSION = 1


class Checkpoints:
    """In `folder`; the latest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        found = sorted(p for p in self.folder.glob("[0-9]*") if p.name.isdecimal())
        return found[-1] if found else None

    def save(self, step: int, module: nn.Module, optimizers: Optimizers, state: Mapping[str, Any]) -> Path:
        """Raises DiskFullError; the checkpoints before it stay then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{step:06d}"
        temporary = self.folder / f"{final.name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir()
            weights = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
            save_file(weights, temporary / "weights.safetensors")
            torch.save({"optimizers": optimizers.state_dict(), "random": _random_state()}, temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}))
            for file in temporary.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        except (OSError, RuntimeError) as e:  # torch and safetensors say RuntimeError or their own for a full disk
            if isinstance(e, OSError) or "write" in str(e).lower():
                raise DiskFullError(
                    f"The checkpoint of step {step} could not be written: {e}.",
                    hint=f"Free some space in {self.folder}; the run goes on from the last checkpoint with resume.",
                ) from e
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._sweep()
        return final

    def load(self, path: Path, module: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Everything as it was when it was saved; returns what `save` got as `state`, and `step`."""
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state.get("version") != VERSION:
            raise FormatError(f"{path} is a checkpoint of version {state.get('version')!r}.", hint="Begin a new run.")
        weights = read_weights(path)
        own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if weights.keys() != own.keys() or any(weights[n].shape != own[n].shape for n in own):
            raise FormatError(
                f"{path} holds other weights than this run trains.",
                hint="Go on with the model, adapter options and recipe that it was begun with, or begin a new run.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        rest = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizers.load_state_dict(rest["optimizers"])
        _set_random_state(rest["random"])
        return state

    def _sweep(self) -> None:
        whole = sorted(p for p in self.folder.glob("[0-9]*") if p.name.isdecimal())
        for old in [*whole[: -self.keep], *self.folder.glob("*.tmp")]:
            shutil.rmtree(old, ignore_errors=True)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds, whole, by their names in the trained module: what is exported."""
    return load_file(path / "weights.safetensors")


def _random_state() -> dict[str, Any]:
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.array(words, np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
