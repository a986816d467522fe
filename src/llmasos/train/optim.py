"""The optimizers of a run as one: AdamW for all weights, or Muon for the matrices inside of blocks and AdamW for the
rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from llmasos.errors import InvalidInputError

Name = Literal["adamw", "muon"]
NAMES = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerOptions:
    """lr: the highest rate. weight_decay: of matrices; vectors (norms, biases) never shrink. max_norm: to which a
    step's gradient is clipped, 0: not at all. muon: momentum with orthogonal steps (Jordan 2024), scaled to the size of
    AdamW's (arXiv:2502.16982), so that `lr` means the same."""

    name: Name = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InvalidInputError(
                f"There is no optimizer {self.name!r}.", hint=f"Use {', '.join(NAMES)}.", param="optimizer"
            )
        if not self.lr > 0:
            raise InvalidInputError(
                f"lr={self.lr} is no rate.", hint="Use 2e-4 for LoRA, 1e-5 for all weights.", param="lr"
            )


class Optimizers:
    """Over the weights of `module` that require a gradient."""

    def __init__(self, module: nn.Module, options: OptimizerOptions) -> None:
        self.options = options
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in trained]
        inside = [p for name, p in trained if name.startswith("layers.") and p.dim() == 2]
        muon = inside if options.name == "muon" else []
        rest = [p for p in self.parameters if not any(p is m for m in muon)]
        fused = all(p.device.type in ("cuda", "cpu") for p in rest)
        self.each: list[torch.optim.Optimizer] = []
        if rest:
            groups = [
                {"params": [p for p in rest if p.dim() > 1], "weight_decay": options.weight_decay},
                {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            self.each.append(
                torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
            )
        if muon:
            self.each.append(
                torch.optim.Muon(muon, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, factor: float) -> Tensor:
        """Clip, then a step at `factor` of the rate. Returns the gradient's norm before, a scalar on the device."""
        norm = clip_grad_norm_(self.parameters, self.options.max_norm or float("inf"))
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * factor
            optimizer.step()
        self.zero()
        return norm

    def zero(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)
