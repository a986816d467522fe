"""How much memory tensors take that are alive at the same time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts what operations of this thread allocate: mapped files and views are none, nor is the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    @property
    def now(self) -> int:
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        return sum(size for _, size in self._held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in given and storage.device.type != "meta":
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now)
        return out


def _storages(tree: Any) -> list[Any]:
    tensors = (t.to_local() if hasattr(t, "to_local") else t for t in tree_leaves(tree) if isinstance(t, Tensor))
    return [t.untyped_storage() for t in tensors if t.layout == torch.strided]
