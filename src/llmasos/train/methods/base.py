"""What a method is: a model to begin with, a loss, and defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmasos.data import Totals
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.load import LoadedModel, load_model, read_config
from llmasos.store import ensure
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.train.config import TrainConfig
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.lowbit import FrozenLinear
from llmasos.train.model import Placed, Trainee
from llmasos.train.parallel.shard import Spreader


@dataclass
class NextToken:
    """Cross-entropy of the next token, over what is trained."""

    model: LoadedModel
    trainee: Trainee
    step: int = field(default=0, kw_only=True)
    """Done, when a step begins."""

    @property
    def module(self) -> nn.Module:
        return self.trainee.decoder

    def loss(self, batch: Placed) -> Tensor:
        return self.trainee.loss(batch)

    def parts(self) -> dict[str, Tensor]:
        return {}


class Method(ABC):
    """`config` is settled: nothing is None but what has no meaning for the method."""

    on_progress: Callable[[str, Totals], None] | None = None
    """Is told how far data are that the method makes itself."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def defaults(cls, config: TrainConfig) -> Mapping[str, Any]:
        """Of tuning, lr, weight_decay, optimizer, where they are None."""

    @cached_property
    def path(self) -> Path:
        """Of the model to begin with; fetched if need be."""
        if self.config.model is None:
            raise InvalidInputError(
                f"{self.config.method} needs a model to begin with.",
                hint=f"llmasos train {self.config.method} --model NAME --data FILE",
                param="model",
            )
        return ensure(self.config.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    @cached_property
    def shape(self) -> ModelConfig:
        """Of what is trained; no weights are loaded for it."""
        return decoder_config(self.path)

    def reading(self, config: TrainConfig) -> TrainConfig:
        """The options by which the data is read, where they are not those of the run; `config` has them settled."""
        return config

    @cached_property
    def layers(self) -> tuple[int, ...] | None:
        """Of the model to begin with, that are taken; None: all."""
        return None

    @property
    def teacher_shape(self) -> ModelConfig | None:
        """Of a second model that is there during training and only read."""
        return None

    @abstractmethod
    def build(self, device: torch.device, spreader: Spreader) -> NextToken:
        """Load or make the weights, spread, and say how they learn."""

    def weights(self, device: torch.device, dtype: torch.dtype, spreader: Spreader | None = None) -> LoadedModel:
        """The model with what is trained of it requiring gradients. dtype: of the computation, and of frozen weights.
        spreader: over processes, block by block."""
        config = self.config

        def ready(model: LoadedModel, part: str) -> None:
            self.made_to_learn(model, part, spreader)

        return load_model(
            self.path,
            device=device,
            dtype=torch.float32 if config.tuning == "full" else dtype,
            quantization="none",
            linear=partial(FrozenLinear, kind=config.quantization) if config.tuning == "qlora" else None,
            ready=ready,
            layers=self.layers,
        )

    def made_to_learn(self, model: LoadedModel, part: str, spreader: Spreader | None) -> None:
        """Of a block, or of the rest of the model, whose weights are there now."""
        if self.config.tuning == "full":
            model.module.get_submodule(part).requires_grad_()
        elif part:
            add_lora(model, lora_options(self.config), part)
        if spreader is not None:
            spreader.part(model.module, part)

    def trainee(self, model: LoadedModel, spreader: Spreader) -> Trainee:
        found = Trainee(
            model.module,
            dtype=spreader.dtype,
            recompute=bool(self.config.recompute),
            compiled=self.is_compiled(model.module.device),
        )
        spreader.prepare(found)
        return found

    def is_compiled(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.config.compile is None else self.config.compile


def lora_options(config: TrainConfig) -> LoraOptions:
    return LoraOptions(**dict(config.lora))


def decoder_config(path: Path) -> ModelConfig:
    """Raises UnsupportedError for an encoder."""
    config = read_config(path)
    if config.is_encoder:
        raise UnsupportedError(
            f"{path.name} is an encoder ({config.architecture}); decoders can be trained.",
            hint="Choose a model that generates text.",
        )
    return config
