"""Supervised fine-tuning: a model learns to say what the assistant says in the data, all weights or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmasos.train.config import TrainConfig
from llmasos.train.methods.base import Method, NextToken
from llmasos.train.parallel.shard import Spreader


class Sft(Method):
    @classmethod
    def defaults(cls, config: TrainConfig) -> Mapping[str, Any]:
        is_full = config.tuning == "full"
        return {
            "tuning": "lora",
            "lr": 1e-5 if is_full else 2e-4,
            "optimizer": "adamw",
            "weight_decay": 0.01 if is_full else 0.0,
            "batch_tokens": 16_384,
        }

    def build(self, device: torch.device, spreader: Spreader) -> NextToken:
        model = self.weights(device, spreader.dtype, spreader)
        return NextToken(model, self.trainee(model, spreader))
