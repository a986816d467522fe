"""LoRA (arXiv:2106.09685): PEFT's adapters read, and a linear layer that adds one adapter or another to each token.

T = packed tokens, K = inputs of a layer, N = its outputs, R = rank. Our fused layers stand for P modules of Hugging
Face (query, key, value; gate, up), each with an adapter of its own: A is kept as [P, R, K], and B as [N, R], whose rows
belong to the P modules one after the other. The scaling (alpha / R) is folded into B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmasos.errors import FormatError, NotFoundError, UnsupportedError
from llmasos.formats import Checkpoint, open_checkpoint
from llmasos.models.families import family_of
from llmasos.models.families.mapping import source_of, spellings
from llmasos.models.load import LoadedModel, read_json
from llmasos.models.parallel import RowParallel

Ints = NDArray[Any]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK_STEP = 16
"""Room for ranks grows in these steps: tensor cores multiply 16 columns at a time."""
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole modules beside LoRA)",
    "lora_bias": "lora_bias",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
}
"""Features of PEFT's LoraConfig that change what is computed, and how they are called here."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of init_lora_weights whose training starts by changing the base weights; converted on saving, such an
adapter says `true` here."""
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class Target:
    """Where the numbers of one Hugging Face module are in ours."""

    module: str
    """Our layer, e.g. layers.3.attn.qkv."""
    part: int
    rows: Tensor
    """int64: row i of theirs is row rows[i] of ours. Serves both ways."""


@dataclass(frozen=True)
class LoraWeights:
    """What an adapter adds to one of our layers."""

    a: Tensor
    """[P, R, K] float32, zero where a module has no adapter."""
    b: Tensor
    """[N, R] float32, scaling included."""
    ranks: tuple[int, ...]
    """Of each module; 0: it has no adapter."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in our layout."""

    layers: Mapping[str, LoraWeights]

    @property
    def rank(self) -> int:
        return max(max(weights.ranks) for weights in self.layers.values())


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a decoder's blocks that can have an adapter, by name; wrapped or not."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if name.startswith("layers.") and hasattr(layer, "in_features") and not name.endswith(".base")
    }


def part_rows(model: LoadedModel, name: str, num_rows: int) -> tuple[tuple[str, ...], list[Tensor]]:
    """Hugging Face modules behind one of our layers, and which of our rows are those of each, in their order.

    The family's weight map splits a bias that holds the row numbers: no fused or interleaved layout is known here.
    """
    names, how = source_of(family_of(model.config), model.config, f"{name}.bias")
    rows = how.split(torch.arange(num_rows), model.config)
    return tuple(n.removesuffix(".bias") for n in names), list(rows)


def lora_targets(model: LoadedModel) -> dict[str, Target]:
    """Every module that an adapter of this model can name, in all spellings of its family."""
    targets = {}
    for name, layer in linear_layers(model.module).items():
        for part, (theirs, rows) in enumerate(zip(*part_rows(model, name, layer.out_features), strict=True)):
            for spelled in spellings(family_of(model.config), theirs):
                targets[spelled] = Target(name, part, rows)
    return targets


# reading


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says about the arithmetic."""

    path: Path
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank(self, module: str) -> int:
        return int(_matching(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        rank = self.rank(module)
        return float(_matching(self.alpha_pattern, module, self.alpha)) / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first name that is the module's, or its end behind a dot; `^` asks for the whole name."""
    for key, value in pattern.items():
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith("." + name)):
            return value
    return default


def read_lora_config(folder: Path) -> LoraConfig:
    """Raises NotFoundError, FormatError, and UnsupportedError that names a feature which can't be computed here."""
    file = folder / CONFIG
    if not file.is_file():
        raise NotFoundError(f"{folder} has no {CONFIG}.", hint="Give the folder of a PEFT adapter.")
    config = read_json(file)
    _refuse(config, file)
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_number(r) or r != int(r) or r < 1 or not _is_number(alpha):
        raise FormatError(f"{file}: r={r!r} and lora_alpha={alpha!r} are not a rank and a number.")
    return LoraConfig(
        file,
        int(r),
        float(alpha),
        _pattern(config, "rank_pattern", file),
        _pattern(config, "alpha_pattern", file),
        bool(config.get("use_rslora")),
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    features = [name for key, name in _REFUSED.items() if config.get(key)]
    if kind != "LORA":
        features.insert(0, f"the adapter type {kind!r}")
    if (bias := config.get("bias") or "none") != "none":
        features.append(f"trained biases (bias={bias!r})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        features.append(f"changed base weights (init_lora_weights={init!r})")
    if features:
        raise UnsupportedError(
            f"{file} asks for {', '.join(features)}, which this build can't compute.",
            hint="Plain and rank-stabilised LoRA work; else merge the adapter into its model with PEFT.",
        )


def _pattern(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(_is_number(v) and v > 0 for v in pattern.values()):
        raise FormatError(f"{file}: {key} is not a table of names and numbers.")
    # patterns of strangers are not run as regular expressions: some never end
    if odd := [name for name in pattern if not re.fullmatch(r"\^?[\w.-]+", name)]:
        raise UnsupportedError(
            f"{file}: {key} names modules by the regular expression {odd[0][:80]!r}.", hint="Write the names out."
        )
    return pattern


def read_adapter(folder: Path | str, model: LoadedModel) -> Adapter:
    """A PEFT adapter folder for this model. Nothing in the model changes.

    Raises NotFoundError, PickleRefusedError; UnsupportedError for what is no plain LoRA of the linear layers of blocks;
    FormatError that names the tensor for one whose shape or rank is another than model and config say.
    """
    folder = Path(folder)
    config = read_lora_config(folder)
    weights = folder / WEIGHTS
    with closing(open_checkpoint(weights if weights.exists() else folder)) as checkpoint:
        return _Reader(config, checkpoint, model).read()


class _Reader:
    def __init__(self, config: LoraConfig, checkpoint: Checkpoint, model: LoadedModel) -> None:
        self.config, self.checkpoint, self.model = config, checkpoint, model
        self.layers = linear_layers(model.module)
        self.targets = lora_targets(model)

    def read(self) -> Adapter:
        pairs: dict[str, dict[str, str]] = {}
        for name in self.checkpoint.tensors:
            module, kind = self._parse(name)
            if kind in pairs.setdefault(module, {}):
                raise FormatError(f"{self.checkpoint.path} holds two adapters: {pairs[module][kind]} and {name}.")
            pairs[module][kind] = name
        if not pairs:
            raise FormatError(f"{self.checkpoint.path} holds no tensors.", hint="Fetch the adapter again.")
        ours: dict[str, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
        for module, pair in pairs.items():
            target = self.targets[module]
            if target.part in ours.setdefault(target.module, {}):
                raise FormatError(f"{self.checkpoint.path} holds the adapter of {module} twice.")
            ours[target.module][target.part] = (*self._matrices(module, pair, target), target.rows)
        return Adapter({name: self._join(name, parts) for name, parts in ours.items()})

    def _parse(self, tensor: str) -> tuple[str, str]:
        """Module and A or B. Raises UnsupportedError for a tensor that is something else, or no module of blocks."""
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {tensor[:120]!r} is no LoRA matrix of a linear layer.",
                hint="Train the adapter on linear layers only.",
            )
        module, kind = match.groups()
        if module not in self.targets:
            known = sorted({name.rpartition(".")[2] for name in self.targets})
            raise UnsupportedError(
                f"{self.checkpoint.path} adapts {module[:120]!r}, which is no layer of a block of this "
                f"{self.model.config.architecture}.",
                hint=f"Layers that can be adapted: {', '.join(known)}, in {self.model.config.num_layers} blocks.",
            )
        return module, kind

    def _matrices(self, module: str, pair: Mapping[str, str], target: Target) -> tuple[Tensor, Tensor]:
        """A [R, K] and scaled B [their N, R] of one Hugging Face module."""
        for kind in "AB":
            if kind not in pair:
                raise FormatError(
                    f"{self.checkpoint.path} has no lora_{kind} of {module}.", hint="Fetch the adapter again."
                )
        rank = self.config.rank(module)
        a = self._tensor(pair["A"], (rank, self.layers[target.module].in_features))
        b = self._tensor(pair["B"], (len(target.rows), rank))
        return a, b * self.config.scaling(module)

    def _tensor(self, name: str, shape: tuple[int, int]) -> Tensor:
        found = self.checkpoint.tensors[name].shape
        if tuple(found) != shape:
            raise FormatError(
                f"{self.checkpoint.path}: {name} has the shape {list(found)}; this model and {CONFIG} ask for "
                f"{list(shape)}.",
                hint="The adapter belongs to another model.",
            )
        tensor = self.checkpoint.tensor(name)
        if not tensor.is_floating_point():
            raise UnsupportedError(f"{self.checkpoint.path}: {name} holds {tensor.dtype} numbers.")
        return tensor.float()

    def _join(self, name: str, parts: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> LoraWeights:
        layer = self.layers[name]
        num_parts = len(part_rows(self.model, name, layer.out_features)[0])
        ranks = tuple(parts[p][0].shape[0] if p in parts else 0 for p in range(num_parts))
        a = torch.zeros(num_parts, max(ranks), layer.in_features)
        b = torch.zeros(layer.out_features, max(ranks))
        for p, (theirs_a, theirs_b, rows) in parts.items():
            a[p, : ranks[p]] = theirs_a
            b[rows, : ranks[p]] = theirs_b
        return LoraWeights(a, b, ranks)


# computing


class LoraState:
    """Which adapter each token of the coming pass has; shared by all wrapped layers of a model. This one computes with
    torch operations, adapter by adapter."""

    def __init__(self) -> None:
        self._groups: list[tuple[int, slice | Tensor]] = []
        self.version = 0
        """Grows when layers were wrapped, or the adapters' memory was exchanged."""

    @property
    def active(self) -> bool:
        """Some token has an adapter; else wrapped layers compute their base only."""
        return bool(self._groups)

    def plan(self, token_slots: Ints | None) -> None:
        """Announce a pass: slots [T], -1 for no adapter; None: no token has one."""
        self._groups = []
        for slot in np.unique(token_slots).tolist() if token_slots is not None else ():
            if slot >= 0:
                rows = np.flatnonzero(token_slots == slot)
                first, end = int(rows[0]), int(rows[-1]) + 1
                run = end - first == len(rows)
                self._groups.append((slot, slice(first, end) if run else torch.from_numpy(rows)))

    def add(self, y: Tensor, x: Tensor, layer: LoraLinear) -> None:
        """y [T, N] += x [T, K] times the adapters, in place."""
        x = x.to(layer.a.dtype)
        for slot, rows in self._groups:
            if not isinstance(rows, slice):
                rows = rows.to(x.device)
            chosen, first = x[rows], 0
            for part, (size, rank) in enumerate(zip(layer.sizes, layer.ranks[slot], strict=True)):
                columns = slice(first, first + size)
                first += size
                if not rank:
                    continue
                low = F.linear(chosen, layer.a[slot, part, :rank])
                out = F.linear(low, layer.b[slot, columns, :rank])
                if isinstance(rows, slice):
                    y[rows, columns].add_(out)
                else:
                    y[:, columns].index_add_(0, rows, out.to(y.dtype))


class LoraLinear(nn.Module):
    """y = base(x) + the adapter of each token. Stands in for any linear layer; adapters lie in slots.

    `sizes` are the outputs of the P modules behind the layer, one after the other. The adapters are no part of the
    state dict, which is the base's.
    """

    a: Tensor
    """[slots, P, R, K]; R has room for the largest rank."""
    b: Tensor
    """[slots, N, R]."""

    def __init__(self, base: Any, sizes: Sequence[int], state: LoraState, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.sizes, self.state = base, tuple(sizes), state
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features
        self.ranks: list[tuple[int, ...]] = []
        device = next(t for t in (*base.parameters(), *base.buffers())).device
        empty = {"dtype": dtype, "device": device}
        self.register_buffer("a", torch.empty(0, len(self.sizes), 0, self.in_features, **empty), persistent=False)
        self.register_buffer("b", torch.empty(0, self.out_features, 0, **empty), persistent=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.state_dict(*args, **kwargs)

    def reserve(self, num_slots: int, rank: int) -> bool:
        """Make room; True if the adapters' memory moved (CUDA graphs that use it are stale)."""
        slots, _, room, _ = self.a.shape
        if num_slots <= slots and rank <= room:
            return False
        num_slots, rank = max(num_slots, slots), max(-(-rank // RANK_STEP) * RANK_STEP, room)
        a = self.a.new_zeros(num_slots, len(self.sizes), rank, self.in_features)
        b = self.b.new_zeros(num_slots, self.out_features, rank)
        a[:slots, :, :room], b[:slots, :, :room] = self.a, self.b
        self.a, self.b = a, b
        self.ranks += [(0,) * len(self.sizes)] * (num_slots - slots)
        return True

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Fill a slot that `reserve` made; None empties it."""
        self.a[slot].zero_()
        self.b[slot].zero_()
        self.ranks[slot] = (0,) * len(self.sizes)
        if weights is not None:
            rank = max(weights.ranks)
            self.a[slot, :, :rank].copy_(weights.a)
            self.b[slot, :, :rank].copy_(weights.b)
            self.ranks[slot] = weights.ranks

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        y: Tensor = self.base(x)
        if self.state.active:
            self.state.add(y, x, self)
        return y


def wrap(model: LoadedModel, name: str, state: LoraState) -> LoraLinear:
    """Put a LoraLinear in the place of the layer `name`, or return the one that is there."""
    layer = model.module.get_submodule(name)
    if not isinstance(layer, LoraLinear):
        parts = part_rows(model, name, layer.out_features)[1]
        sizes = [len(rows) for rows in parts]
        assert [int(rows.min()) for rows in parts] == [sum(sizes[:p]) for p in range(len(sizes))], "parts are mixed"
        # a CPU starts small products in float32 three times as fast as those in bfloat16
        on_cpu = model.module.device.type == "cpu"
        layer = LoraLinear(layer, sizes, state, torch.float32 if on_cpu else model.module.dtype)
        model.module.set_submodule(name, layer)
    return layer


def unwrap(model: LoadedModel) -> None:
    """Give every layer its base back."""
    for name, layer in linear_layers(model.module).items():
        if isinstance(layer, LoraLinear):
            model.module.set_submodule(name, layer.base)


def check_adaptable(model: LoadedModel) -> None:
    """Raises UnsupportedError for models that can't have adapters."""
    if model.config.is_encoder:
        raise UnsupportedError("Adapters work on decoders; this model is an encoder.", param="adapter")
    if any(isinstance(layer, RowParallel) for layer in model.module.modules()):
        raise UnsupportedError(
            "Adapters don't work on a model that is split over several devices.",
            hint="Use tensor_parallel_size=1, or merge the adapter into the model with PEFT.",
            param="adapter",
        )
