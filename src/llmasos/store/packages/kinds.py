"""What packages of each kind hold, and how large they may be."""

from __future__ import annotations

from collections.abc import Collection

from llmasos.store.packages.manifest import Manifest
from llmasos.store.sources import is_pickle_name

MAX_BIG = 1 << 40
"""Bytes of a package that is no application, packed or unpacked."""
_WEIGHTS = (".gguf", ".safetensors")
_DENSE: tuple[str, ...] = (*_WEIGHTS, ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".npy", ".npz")
_DENSE += (".png", ".jpg", ".jpeg", ".webp", ".mp3", ".ogg", ".flac", ".mp4", ".whl")


def is_dense(name: str) -> bool:
    """Whether packing would hardly make the file smaller, but take long."""
    return name.lower().endswith(_DENSE)


def problem_of_contents(manifest: Manifest, names: Collection[str]) -> str:
    """What is wrong with the files of a package of this kind, as a sentence; empty if nothing is."""
    app, kind = manifest.app, manifest.kind
    if kind == "app":
        entry = app.entry.partition(":")[0]
        return "" if entry in names else f"app.entry = {app.entry!r}: there is no such file."
    if pickled := next((name for name in names if is_pickle_name(name)), None):
        return f"{pickled} is a pickle, which can run any code when it is loaded. Use safetensors or GGUF."
    if kind == "model" and not any(name.lower().endswith(_WEIGHTS) for name in names):
        return "A model has weights: .safetensors or .gguf files."
    if kind == "adapter":
        lacking = [name for name in ("adapter_config.json", "adapter_model.safetensors") if name not in names]
        return f"An adapter has a file {lacking[0]}." if lacking else ""
    own = {"llmasos.toml", "LICENSE", "README.md"}
    return "A dataset has files." if kind == "dataset" and not set(names) - own else ""
