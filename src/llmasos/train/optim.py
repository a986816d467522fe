"""The optimizers of a run as one: AdamW for all weights, with states in float32 or in 8 bits, or Muon for the matrices
inside of blocks and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from llmasos.errors import InvalidInputError
from llmasos.train.lowbit import DYNAMIC, PIECE, SCALES, in_blocks, largest, nearest
from llmasos.train.parallel.ranks import Ranks, local
from llmasos.train.parallel.shard import joined_on_device, own_part

Name = Literal["adamw", "adamw8bit", "muon"]
NAMES = ("adamw", "adamw8bit", "muon")
FEW = 4096
"""Weights of a tensor up to which 8-bit states would save nothing worth their rounding."""


@dataclass(frozen=True)
class OptimizerOptions:
    """lr: the highest rate. weight_decay: of matrices; vectors (norms, biases) never shrink. max_norm: to which a
    step's gradient is clipped, 0: not at all. adamw8bit: see AdamW8bit. muon: momentum with orthogonal steps (Jordan
    2024), scaled to the size of AdamW's (arXiv:2502.16982), so that `lr` means the same."""

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
    """Over the weights of `module` that require a gradient. ranks: over which it is spread already."""

    def __init__(self, module: nn.Module, options: OptimizerOptions, ranks: Ranks | None = None) -> None:
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
            if options.name == "adamw8bit":
                self.each.append(AdamW8bit(groups, lr=options.lr, betas=options.betas, eps=options.eps))
            else:
                self.each.append(
                    torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
                )
        if muon:
            self.each.append(Muon(muon, lr=options.lr, weight_decay=options.weight_decay, ranks=ranks))

    def step(self, factor: float, norm: Tensor | None = None) -> Tensor:
        """Clip, then a step at `factor` of the rate. norm: the gradient's, where it is spread over processes. Returns
        the gradient's norm before, a scalar on the device."""
        if norm is None:
            norm = clip_grad_norm_(self.parameters, self.options.max_norm or float("inf"))
        elif self.options.max_norm:
            clip = (self.options.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch clips
            torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], clip)
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


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon) and as large as AdamW's
    (arXiv:2502.16982), for matrices [N, K]; as `torch.optim.Muon` is, but for the precision on CPUs.

    Where matrices are spread over ranks, so is their momentum; a step needs them whole, one after another, and every
    rank keeps its own part of it."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, ranks: Ranks | None = None) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self._ranks = ranks or Ranks()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, momentum = local(parameter.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
        if update.is_cuda:  # half as much to send, and products that are fast; rounding moves what is near 0 before
            update = update.bfloat16()
        step = orthogonal(joined_on_device(update, parameter, self._ranks))
        scale = 0.2 * math.sqrt(max(step.shape))
        weights = local(parameter)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.add_(own_part(step, parameter, self._ranks), alpha=-group["lr"] * scale)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of a x + b x^3 + c x^5, which five times over brings singular values near 1."""


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1 (0.7 to 1.2), in the dtype it comes in."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose two states take 8 bits a weight each, in blocks of 256 with a scale of their own
    (arXiv:2110.02861, whose code book this is).

    What is kept of the second moment is its root: it spans half as many decades, so a small gradient beside a large one
    does not become 0, by which the next step would divide. Tensors of a few weights keep float32."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if any(type(p.data).__name__ == "DTensor" for group in self.param_groups for p in group["params"]):
            raise InvalidInputError(
                "adamw8bit keeps its states in blocks of one GPU's weights, and these are spread over several.",
                hint='Use optimizer="adamw", whose states are spread, too.',
                param="optimizer",
            )
        self._codes: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state.update(self._fresh(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        biases = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]).sqrt()
        if "mean" in state:
            update = _moved(state["mean"], state["root"], gradient.float(), group["betas"], group["eps"], biases)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
            return
        weights, gradients = parameter.data.view(-1), gradient.reshape(-1)
        for at in range(0, len(weights), PIECE):
            part, own = slice(at, at + PIECE), slice(at // SCALES, (at + PIECE) // SCALES)
            mean, root = self._read(state, own)
            moving = in_blocks(gradients[part].float(), SCALES)
            update = _moved(mean, root, moving, group["betas"], group["eps"], biases).view(-1)
            self._write(state, own, mean, root)
            piece = weights[part]
            piece.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update[: len(piece)], alpha=group["lr"])

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() <= FEW:
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            return {"mean": zeros, "root": zeros.clone()}
        blocks, device = -(-parameter.numel() // SCALES), parameter.device
        state = {}
        for name, signed in (("mean", True), ("root", False)):
            zero = DYNAMIC[signed].index(0.0)
            state[f"{name}_code"] = torch.full((blocks, SCALES), zero, dtype=torch.uint8, device=device)
            state[f"{name}_scale"] = torch.zeros(blocks, device=device)
        return state

    def _read(self, state: dict[str, Tensor], own: slice) -> tuple[Tensor, Tensor]:
        """Both states of some blocks, [B, 256] float32."""
        found = []
        for name, code in zip(("mean", "root"), self._code(state["mean_code"].device), strict=True):
            index = state[f"{name}_code"][own].int()
            values = code.index_select(0, index.view(-1)).view(index.shape)
            found.append(values.mul_(state[f"{name}_scale"][own, None]))
        return found[0], found[1]

    def _write(self, state: dict[str, Tensor], own: slice, mean: Tensor, root: Tensor) -> None:
        signed, unsigned = self._code(mean.device)
        for name, values, code in (("mean", mean, signed), ("root", root, unsigned)):
            scale = largest(values)
            state[f"{name}_scale"][own] = scale
            shares = values.div_(scale[:, None])
            index = nearest(shares, code)
            if name == "root":
                index = torch.where(shares > 0, index.clamp_(min=1), index)  # what is divided by never becomes 0
            state[f"{name}_code"][own] = index

    def _code(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._codes:
            self._codes[device] = tuple(torch.tensor(DYNAMIC[signed], device=device) for signed in (True, False))  # type: ignore[assignment]
        return self._codes[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Codes keep their dtype; torch's own way would make them weights' dtype, of four times the size."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = {i: {k: v for k, v in s.items() if not k.endswith("_code")} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": own})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name.endswith("_code"):
                    self.state[parameter][name] = value.to(parameter.device, torch.uint8, copy=True)


def _moved(
    mean: Tensor,
    root: Tensor,
    gradient: Tensor,
    betas: tuple[float, float],
    eps: float,
    biases: tuple[Tensor, Tensor],
) -> Tensor:
    """Moves both states in place, and returns what the weights move against, without the rate."""
    mean.lerp_(gradient, 1 - betas[0])
    root.square_().mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1]).sqrt_()
    return (mean / biases[0]).div_((root / biases[1]).add_(eps))
