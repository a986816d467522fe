"""LoRA that learns (arXiv:2106.09685): frozen linear layers beside which two thin matrices are trained.

T = packed tokens, K = inputs, N = outputs, R = rank. Our fused layers stand for P modules of Hugging Face (query, key,
value), each with an adapter of its own, as PEFT makes them: A is [P, R, K], and B is [N, R], whose rows belong to the P
modules one after the other. So an adapter is what `models.lora` reads, and saves as PEFT writes it.

Variants: rank-stabilised (arXiv:2312.03732: alpha / sqrt R instead of alpha / R), DoRA (arXiv:2402.09353: a trained
length for every row of the sum of weight and adapter).
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.formats import sync
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.load import LoadedModel, write_atomically
from llmasos.models.lora import CONFIG, WEIGHTS, check_adaptable, linear_layers, part_rows
from llmasos.train.lowbit import FrozenLinear


@dataclass(frozen=True)
class LoraOptions:
    """r: rank. alpha: strength, the adapter is scaled by alpha / r. dropout: of the adapter's input. targets: names of
    Hugging Face modules (q_proj …), empty for all linear layers of the blocks. rslora, dora: see the module."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InvalidInputError(f"r={self.r} is no rank.", hint="Use 8, 16 or 32.", param="r")
        if not 0 <= self.dropout < 1:
            raise InvalidInputError(f"dropout={self.dropout} is not from 0 to below 1.", param="dropout")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def check_rank(config: ModelConfig, options: LoraOptions) -> None:
    """Raises InvalidInputError for a rank that no matrix of the model can have. Takes no memory."""
    with torch.device("meta"):
        model = LoadedModel(Decoder(config), config, None, Path())
    most = 0
    for name, layer in linear_layers(model.module).items():
        for their, rows in zip(*part_rows(model, name, layer.out_features), strict=True):
            if not options.targets or their.rsplit(".", 1)[-1] in options.targets:
                most = max(most, min(layer.in_features, len(rows)))
    if most and options.r > most:
        raise InvalidInputError(
            f"lora.r={options.r:,} is more than the rank of any matrix that it adapts: {most:,} is the largest.",
            hint=f"Use at most {most}; 8 to 64 are usual. tuning=full trains the matrices themselves.",
            param="lora.r",
        )


class TrainedLora(nn.Module):
    """y = base(x) + scaling · B A x; with DoRA, that times length / |W + scaling · B A| by row. `base` is frozen,
    and may be in few bits."""

    def __init__(
        self, base: nn.Linear | FrozenLinear, parts: Sequence[Tensor], chosen: Sequence[bool], options: LoraOptions
    ) -> None:
        super().__init__()
        self.base, self.options = base.requires_grad_(False), options
        self.in_features, self.out_features = base.in_features, base.out_features
        self.parts, self.chosen = list(parts), list(chosen)
        device = next(chain(base.parameters(), base.buffers())).device
        self.a = nn.Parameter(torch.empty(len(parts), options.r, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, options.r, device=device))
        own = torch.zeros(base.out_features, len(parts), dtype=torch.bool)
        for p, (rows, taken) in enumerate(zip(parts, chosen, strict=True)):
            own[rows, p] = taken
            nn.init.kaiming_uniform_(self.a.data[p], a=math.sqrt(5))  # as PEFT begins
            if not taken:
                self.a.data[p] = 0.0
        self.register_buffer("own", own.to(device), persistent=False)
        if options.dora:
            self.length = nn.Parameter(torch.linalg.vector_norm(self.weight(), dim=1))

    own: Tensor
    """[N, P]: whether a row belongs to a module that has an adapter."""

    def weight(self) -> Tensor:
        """The base's, [N, K] float32, to compute with; nothing to change."""
        return self.base.dequantize() if isinstance(self.base, FrozenLinear) else self.base.weight.detach().float()

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.base, FrozenLinear):
            return self.base.product(x)
        return F.linear(x, self.base.weight.to(x.dtype))

    def spread_b(self, dtype: torch.dtype) -> Tensor:
        """[N, P · R]: each row's B beside the A of its own module, zeros beside the others."""
        wide = self.b[:, None, :] * self.own[:, :, None]
        return wide.reshape(self.out_features, -1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        y = self._product(x)  # first: what stays has its place in the heap before what goes
        dropped = F.dropout(x, self.options.dropout, self.training)
        low = F.linear(dropped, self.a.reshape(-1, self.in_features).to(x.dtype))
        y = y.add_(F.linear(low * self.options.scaling, self.spread_b(x.dtype)))
        if self.options.dora:
            y = y * (self.length / self._norms()).to(x.dtype)
        return y if self.base.bias is None else y + self.base.bias.to(x.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """|W + scaling · B A| by row, [N], without that matrix; a constant to the gradient, as the paper proposes."""
        weight, a, b = self.weight(), self.a.reshape(-1, self.in_features), self.spread_b(torch.float32)
        b = b * self.options.scaling
        squares = weight.square().sum(1) + 2 * ((weight @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
        return squares.clamp_min(1e-12).sqrt()

    def merged(self) -> Tensor:
        """The weight that computes the same, [N, K] float32."""
        wide = self.a.detach().reshape(-1, self.in_features)
        weight = self.weight() + self.options.scaling * self.spread_b(torch.float32).detach() @ wide
        if self.options.dora:
            weight = weight * (self.length.detach() / self._norms())[:, None]
        return weight


def add_lora(model: LoadedModel, options: LoraOptions, part: str = "") -> list[str]:
    """Freeze the model and put an adapter beside the layers that `options.targets` name; in one block only, if `part`
    is its name. Returns those layers' names.

    Raises InvalidInputError for a target that the model has not, UnsupportedError for models and layers that can't have
    adapters."""
    check_adaptable(model)
    model.module.get_submodule(part).requires_grad_(False)
    known, done = set(), []
    for name, layer in linear_layers(model.module).items():
        if part and not name.startswith(f"{part}."):
            continue
        theirs, parts = part_rows(model, name, layer.out_features)
        ends = [their.rsplit(".", 1)[-1] for their in theirs]
        known.update(ends)
        chosen = [not options.targets or end in options.targets for end in ends]
        if not any(chosen):
            continue
        if type(layer) not in (nn.Linear, FrozenLinear):
            raise UnsupportedError(
                f"{name} is a {type(layer).__name__}, made for answering, beside which nothing can be trained.",
                hint='Load the model with quantization="none", or train with tuning="qlora".',
            )
        model.module.set_submodule(name, TrainedLora(layer, parts, chosen, options))
        done.append(name)
    if missing := set(options.targets) - known:
        raise InvalidInputError(
            f"This model has no module {', '.join(sorted(missing))}.",
            hint=f"It has {', '.join(sorted(known))}.",
            param="targets",
        )
    return done


def lora_layers(module: nn.Module) -> Iterator[tuple[str, TrainedLora]]:
    for name, layer in module.named_modules():
        if isinstance(layer, TrainedLora):
            yield name, layer


def merge_lora(model: LoadedModel) -> None:
    """Fold every adapter into its layer, which is a plain one again. Layers in few bits get full weights, in the dtype
    of the rest, with an adapter or without: so the model can be saved."""
    dtype = model.module.dtype
    for name, layer in list(lora_layers(model.module)):
        if isinstance(layer.base, FrozenLinear):
            model.module.set_submodule(name, _plain(layer.merged().to(dtype), layer.base.bias))
        else:
            layer.base.weight.data = layer.merged().to(layer.base.weight.dtype)
            model.module.set_submodule(name, layer.base)
    for name, left in list(model.module.named_modules()):
        if isinstance(left, FrozenLinear):
            model.module.set_submodule(name, _plain(left.dequantize(dtype), left.bias))


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias  # type: ignore[assignment]
    return layer


def save_adapter(model: LoadedModel, folder: Path) -> None:
    """Write what PEFT writes: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    options = LoraOptions()
    for name, layer in lora_layers(model.module):
        options = layer.options
        theirs, _ = part_rows(model, name, layer.out_features)
        for p, (their, rows) in enumerate(zip(theirs, layer.parts, strict=True)):
            if not layer.chosen[p]:
                continue
            prefix = f"base_model.model.{their}"
            targets.add(their.rsplit(".", 1)[-1])
            tensors[f"{prefix}.lora_A.weight"] = layer.a.detach()[p].contiguous()
            tensors[f"{prefix}.lora_B.weight"] = layer.b.detach()[rows].contiguous()
            if layer.options.dora:
                tensors[f"{prefix}.lora_magnitude_vector"] = layer.length.detach()[rows].contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.path),
        "r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": sorted(targets),
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    temporary = folder / f".{WEIGHTS}.{secrets.token_hex(4)}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        sync(temporary)
        os.replace(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
