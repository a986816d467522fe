"""The methods of training, by name. Each is a loss over batches and what a run of it does where nothing is said."""

from __future__ import annotations

from llmasos.train.config import TrainConfig
from llmasos.train.methods.base import Method
from llmasos.train.methods.distill import Distill
from llmasos.train.methods.pretrain import Pretrain
from llmasos.train.methods.sft import Sft

METHODS: dict[str, type[Method]] = {"pretrain": Pretrain, "sft": Sft, "distill": Distill}

__all__ = ["METHODS", "Method", "method_of"]


def method_of(config: TrainConfig) -> Method:
    return METHODS[config.method](config)
