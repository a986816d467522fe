"""Floating-point operations of training, and what GPUs can do: for the MFU (model FLOPs utilisation, arXiv:2204.02311)
that the progress shows, the plan's time and the benchmarks.

T = tokens of a sequence.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder

FORWARD = 2
"""A multiplication and an addition for each weight and token; as much again for the gradient of the layer's input, and
once more for that of a weight that is trained."""

PEAKS = (
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)
"""Parts of a GPU's name, the more special one first, and its dense bfloat16 rate in FLOP/s, from the data sheets."""


@cache
def num_weights(config: ModelConfig) -> int:
    """All of a model's weights; a tied head counts once."""
    return sum(parameter.numel() for parameter in _shape(config).parameters())


@cache
def num_multiplied(config: ModelConfig) -> int:
    """The weights that every token is multiplied with: all matrices, the head too, but no table that rows are taken
    from."""
    return sum(m.weight.numel() for m in _shape(config).modules() if isinstance(m, nn.Linear))


def _shape(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def flops_per_token(config: ModelConfig, *, length: float, frozen: bool = False) -> float:
    """Of one training step, mean over the tokens of a sequence of `length`: 6 N for the N weights of `num_multiplied`
    (4 N where they are frozen beside an adapter, whose own few are not counted), and attention's two products. What is
    computed again to save memory does not count."""
    return (4 if frozen else 6) * num_multiplied(config) + 3 * FORWARD * attention_width(config, length)


def attention_width(config: ModelConfig, length: float) -> float:
    """Multiplications of queries with keys and of weights with values, mean over the tokens of a causal sequence."""
    seen = (_seen(length, config.window(layer)) for layer in range(config.num_layers))
    return sum(2 * config.num_heads * config.head_dim * keys for keys in seen)


def _seen(length: float, window: int) -> float:
    """Keys that a query sees, mean over a sequence."""
    if not window or length <= window:
        return length / 2
    return window - window * window / (2 * length)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device computes at most, FLOP/s; None where no data sheet tells: other GPUs, CPUs, float32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """By a GPU's name, e.g. "NVIDIA H100 80GB HBM3"."""
    return next((rate for part, rate in PEAKS if f" {part} " in f" {name.replace('-', ' ')} "), None)
