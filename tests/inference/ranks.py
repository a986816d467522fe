"""What each rank of a two-process model computes in tests. Spawned processes import it: no test libraries here."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmasos.errors import InsufficientMemoryError
from llmasos.models.attention import ContiguousCache, Varlen, layer_specs
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.parallel import Group


@torch.inference_mode()
def logits(model: LoadedModel, prompt: Sequence[int]) -> torch.Tensor:
    """[T, V] of one prompt."""
    device = model.module.device
    attend = Varlen(layer_specs(model.module.config), [len(prompt)])
    hidden = model.module(torch.tensor(prompt, device=device), attend.positions(device), attend)
    return model.module.logits(hidden).cpu()


@torch.inference_mode()
def greedy(model: LoadedModel, prompt: Sequence[int], num: int) -> list[int]:
    """New tokens, through a cache of this rank's key heads."""
    device = model.module.device
    cache = ContiguousCache(model.module.config, 1, device=device, dtype=torch.float32)
    tokens, out = list(prompt), []
    for _ in range(num):
        positions = cache.plan([0], [len(tokens)])
        hidden = model.module(torch.tensor(tokens, device=device), positions, cache)
        cache.advance()
        tokens = [int(model.module.logits(hidden[-1:]).argmax())]
        out += tokens
    return out


class Rank:
    """One rank's object: loads models and runs them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.model: Any = None
        self.seen: list[Any] = []

    def load(self, folder: Path, load_format: str = "auto") -> dict[str, tuple[int, ...]]:
        options = {"dtype": "float32", "with_tokenizer": False, "load_format": load_format}
        self.model = load_model(folder, group=self.group, **options)
        return {name: tuple(p.shape) for name, p in self.model.module.named_parameters()}

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        return logits(self.model, prompt)

    def greedy(self, prompt: Sequence[int], num: int) -> list[int]:
        return greedy(self.model, prompt, num)

    def identity(self) -> tuple[int, int]:
        return self.group.rank, os.getpid()

    def sum(self, value: float) -> float:
        """Twice: through memory that GPUs share (16 bytes are its grain), and through the library."""
        small, odd = (torch.full((n,), value, device=self.group.device) for n in (4, 3))
        total = self.group.all_reduce(small)[0]
        assert total == self.group.all_reduce(odd)[2]
        return float(total)

    def remember(self, what: Any) -> None:
        self.seen.append(what)

    def recall(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen

    def fail_elsewhere(self, kind: str) -> None:
        if self.group.rank == 1:
            if kind == "memory":
                raise InsufficientMemoryError("No room for pages.", hint="Take fewer.")
            raise Unpicklable(lambda: None)

    def fail(self) -> None:
        raise ValueError("no such step")

    def nap(self, seconds: float) -> None:
        if self.group.rank == 1:
            time.sleep(seconds)


class Unpicklable(Exception):
    pass


def failing(group: Group) -> None:
    """A factory that can't make its object in rank 1."""
    if group.rank == 1:
        raise InsufficientMemoryError("No room for weights.", hint="Take a smaller model.")
