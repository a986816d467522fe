"""What is known of a run before its first step, as JSON values for run.json: so that it can be told, and had, again."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmasos import __version__
from llmasos.data import Batches, Stats
from llmasos.devices import total_memory
from llmasos.errors import LLMasOSError
from llmasos.models.config import ModelConfig
from llmasos.store.card import read_card
from llmasos.train.config import TrainConfig
from llmasos.train.flops import num_multiplied, num_weights

LIBRARIES = ("torch", "numpy", "tokenizers", "triton", "torchao", "datasets")
_GIT_SECONDS = 10


def run_facts(
    config: TrainConfig,
    shape: ModelConfig,
    batches: Batches,
    stats: Stats,
    device: torch.device,
    dtype: torch.dtype,
    *,
    path: Path | None = None,
    world_size: int = 1,
    num_trained: int | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """path: of the model to begin with. num_trained: weights that are. plan: what was predicted."""
    return {
        "name": config.name,
        "method": config.method,
        "config": config.model_dump(mode="json", by_alias=True),
        "model": model_facts(config, shape, path) | {"num_trained": num_trained},
        "data": {
            "num_samples": stats.num_samples,
            "num_tokens": stats.num_tokens,
            "num_trained": stats.num_trained,
            "files": data_facts(batches),
        },
        "device": device_facts(device) | {"dtype": str(dtype).removeprefix("torch."), "count": world_size},
        "versions": versions(),
        "git": git_facts(),
        "plan": dict(plan) if plan else None,
    }


def model_facts(config: TrainConfig, shape: ModelConfig, path: Path | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": config.model,
        "architecture": shape.architecture,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "num_weights": num_weights(shape),
        "num_multiplied": num_multiplied(shape),
    }
    if path is not None:
        facts["path"] = str(path)
        try:
            card = read_card(path if path.is_dir() else path.parent)
        except LLMasOSError:  # a folder that is not of the library
            return facts
        facts |= {"source": card.source, "files": [{"path": one.path, "sha256": one.sha256} for one in card.files]}
    return facts


def data_facts(batches: Batches) -> list[dict[str, Any]]:
    weights: Sequence[float | None] = batches.weights or [None] * len(batches.sources)
    found = []
    for caches, weight in zip(batches.sources, weights, strict=True):
        for cache in caches:
            totals = cache.totals
            one = {"file": cache.file.name, "schema": cache.schema, "digest": cache.file.digest(), "weight": weight}
            one |= {"num_samples": totals.num_rows, "num_tokens": totals.num_tokens} if totals else {}
            found.append(one)
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": device.type, "memory": total_memory(device), "host": platform.node()}
    if device.type == "cuda":
        facts |= {"name": torch.cuda.get_device_name(device), "runtime": torch.version.cuda or torch.version.hip}
    else:
        facts |= {"name": platform.machine(), "threads": torch.get_num_threads()}
    return facts


def versions() -> dict[str, str]:
    found = {"llmasos": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, which the package's metadata may leave out
    return found


def git_facts(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the working folder, and whether files differ from it; None outside of a repository."""

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "is_changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
