"""The optimizers of a run as one: AdamW for all weights, with states in float32 or in 8 bits, or Muon for the matrices
inside of blocks and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from llmasos.errors import InvalidInputError
from llmasos.train.codes import DYNAMIC, SCALES, Code, in_blocks, largest
from llmasos.train.lowbit import PIECE
from llmasos.train.parallel.ranks import Ranks, local
from llmasos.train.parallel.shard import joined_on_device, own_part, shard_dim, shard_of, shards_of, whole_shape

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
            for parameters in _alike([p for p in group["params"] if p.grad is not None]):
                self._step(parameters, group)

    def _step(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        updates = [self._moved(parameter, group["momentum"]) for parameter in parameters]
        steps = orthogonal(torch.stack(updates))
        scale = 0.2 * math.sqrt(max(steps.shape[1:]))
        for parameter, step in zip(parameters, steps, strict=True):
            weights = local(parameter)
            weights.mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(own_part(step, parameter, self._ranks), alpha=-group["lr"] * scale)

    def _moved(self, parameter: Tensor, momentum: float) -> Tensor:
        """The whole matrix that is to be made orthogonal, after its momentum has taken the gradient."""
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, mean = local(parameter.grad), local(state["momentum_buffer"])
        mean.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum)  # Nesterov's
        if update.is_cuda:  # half as much to send, and products that are fast; rounding moves what is near 0 before
            update = update.bfloat16()
        return joined_on_device(update, parameter, self._ranks)


def _alike(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, as many as are multiplied at once: one by one, those of small models do not fill a GPU."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault(whole_shape(parameter), []).append(parameter)
    for shape, alike in found.items():
        each = max(1, AT_ONCE // math.prod(shape))
        yield from (alike[at : at + each] for at in range(0, len(alike), each))


AT_ONCE = 2**23
"""Weights whose steps are made orthogonal together."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of a x + b x^3 + c x^5, which five times over brings singular values near 1."""


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices [B, N, K] with singular values near 1 (0.7 to 1.2), in the dtype they come in."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose two states take 8 bits a weight each, in blocks of 256 with a scale of their own
    (arXiv:2110.02861, whose code book this is).

    What is kept of the second moment is its root: it spans half as many decades, so a small gradient beside a large one
    does not become 0, by which the next step would divide. Tensors of a few weights keep float32.

    Where FSDP divides a tensor, blocks are those of each rank's part. Groups keep the number of parts, `shards`: states
    are coded anew for another one."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._tell_shards()
        self._codes: dict[torch.device, tuple[Code, Code]] = {}

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
        # on a GPU a kernel starts sooner than tensors on the CPU would be computed with; a plan's have no value
        step: Any = float(state["step"]) if parameter.is_cuda else state["step"]
        biases = tuple(1 - beta**step for beta in group["betas"])
        biases = biases[0], biases[1] ** 0.5
        parts = {name: local(value) for name, value in state.items()}
        if "mean" in parts:
            gradient = local(gradient).float()
            update = _moved(parts["mean"], parts["root"], gradient, group["betas"], group["eps"], biases)
            local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
            return
        weights, gradients = local(parameter.data).view(-1), local(gradient).reshape(-1)
        if weights.is_cuda:
            from llmasos.train.kernels.adamw8bit import step_

            own = {"rate": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
            step_(weights, gradients, parts, betas=group["betas"], biases=biases, **own)
        else:
            self._step_in_pieces(weights, gradients, parts, group, biases)

    def _step_in_pieces(
        self,
        weights: Tensor,
        gradients: Tensor,
        parts: dict[str, Tensor],
        group: dict[str, Any],
        biases: tuple[Any, Any],
    ) -> None:
        for at in range(0, len(weights), PIECE):
            part, own = slice(at, at + PIECE), slice(at // SCALES, (at + PIECE) // SCALES)
            mean, root = self._read(parts, own)
            moving = in_blocks(gradients[part].float(), SCALES)
            update = _moved(mean, root, moving, group["betas"], group["eps"], biases).view(-1)
            self._write(parts, own, mean, root)
            piece = weights[part]
            piece.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update[: len(piece)], alpha=group["lr"])

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() <= FEW:
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            return {"mean": zeros, "root": zeros.clone()}
        blocks, device = _num_blocks(parameter.shape, shards_of(parameter)[0]), parameter.device
        state = {}
        for name, signed in (("mean", True), ("root", False)):
            zero = DYNAMIC[signed].index(0.0)
            code = torch.full((blocks, SCALES), zero, dtype=torch.uint8, device=device)
            state[f"{name}_code"] = _spread_as(parameter, code)
            state[f"{name}_scale"] = _spread_as(parameter, torch.zeros(blocks, device=device))
        return state

    def _read(self, state: dict[str, Tensor], own: slice) -> tuple[Tensor, Tensor]:
        """Both states of some blocks, [B, 256] float32."""
        found = []
        for name, code in zip(("mean", "root"), self._code(state["mean_code"].device), strict=True):
            index = state[f"{name}_code"][own].int()
            values = code.values.index_select(0, index.view(-1)).view(index.shape)
            found.append(values.mul_(state[f"{name}_scale"][own, None]))
        return found[0], found[1]

    def _write(self, state: dict[str, Tensor], own: slice, mean: Tensor, root: Tensor) -> None:
        signed, unsigned = self._code(mean.device)
        for name, values, code in (("mean", mean, signed), ("root", root, unsigned)):
            scale = largest(values)
            state[f"{name}_scale"][own] = scale
            shares = values.div_(scale[:, None])
            index = code.nearest(shares)
            if name == "root":
                index = torch.where(shares > 0, index.clamp(min=1), index)  # what is divided by never becomes 0
            state[f"{name}_code"][own] = index

    def _code(self, device: torch.device) -> tuple[Code, Code]:
        """Of the mean and of the root."""
        if device not in self._codes:
            self._codes[device] = Code.of(DYNAMIC[True], device), Code.of(DYNAMIC[False], device)
        return self._codes[device]

    def _tell_shards(self) -> None:
        for group in self.param_groups:
            group["shards"] = max(shards_of(p)[0] for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Blocks of all ranks are given. Codes keep their dtype; torch's own way would make them weights' dtype, of
        four times the size."""
        plain = {i: {k: v for k, v in s.items() if not k.endswith(BLOCKS)} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": plain})
        self._tell_shards()
        for given, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for i, parameter in zip(given["params"], group["params"], strict=True):
                blocks = {k: v for k, v in state_dict["state"].get(i, {}).items() if k.endswith(BLOCKS)}
                if blocks:
                    own = self._own(parameter, blocks, given.get("shards", 1))
                    self.state[parameter].update({k: _spread_as(parameter, v) for k, v in own.items()})

    def _own(self, parameter: Tensor, blocks: dict[str, Tensor], saved: int) -> dict[str, Tensor]:
        """This rank's of all blocks, which were those of `saved` ranks."""
        shards, own = shards_of(parameter)
        if saved == shards:
            each = len(blocks["mean_scale"]) // shards
            return {k: v[own * each : (own + 1) * each].to(parameter.device, copy=True) for k, v in blocks.items()}
        shape, dim = parameter.shape, shard_dim(parameter.shape, saved)
        states: tuple[list[Tensor], list[Tensor]] = ([], [])
        each = _num_blocks(shape, saved)
        for number in range(saved):
            part = list(shape)
            part[dim] = shard_of(shape[dim], number, saved)[1]
            rows = slice(number * each, (number + 1) * each)
            for values, found in zip(self._read(blocks, rows), states, strict=True):
                found.append(values.view(-1)[: math.prod(part)].view(part))
        fresh = {k: local(v) for k, v in self._fresh(parameter).items()}
        mean, root = (own_part(torch.cat(found, dim), parameter, Ranks()).reshape(-1) for found in states)
        rows = slice(0, -(-len(mean) // SCALES))
        if len(mean):
            device = parameter.device
            self._write(fresh, rows, in_blocks(mean.to(device), SCALES), in_blocks(root.to(device), SCALES))
        return fresh


BLOCKS = ("_code", "_scale")
"""Ends of the names of states that are not of their weight's shape."""


def _num_blocks(shape: Sequence[int], shards: int) -> int:
    """Of each rank; of the largest part, so that all have as many."""
    dim = shard_dim(shape, shards)
    return -(-math.prod(shape) // shape[dim] * -(-shape[dim] // shards) // SCALES)


def _spread_as(parameter: Any, own: Tensor) -> Tensor:
    """Each rank's blocks as one tensor, where the parameter is spread."""
    if not hasattr(parameter, "to_local"):
        return own
    from torch.distributed.tensor import DTensor, Shard

    placements = [*parameter.placements[:-1], Shard(0)]
    found: Tensor = DTensor.from_local(own, parameter.device_mesh, placements, run_check=False)
    return found


def _moved(
    mean: Tensor,
    root: Tensor,
    gradient: Tensor,
    betas: tuple[float, float],
    eps: float,
    biases: tuple[Any, Any],
) -> Tensor:
    """Moves both states in place, and returns what the weights move against, without the rate."""
    mean.lerp_(gradient, 1 - betas[0])
    root.square_().mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1]).sqrt_()
    return (mean / biases[0]).div_((root / biases[1]).add_(eps))
