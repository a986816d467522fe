"""Attention of training: inside each of several packed sequences, with gradients.

On GPUs, in bfloat16 and float16: sequences of one length, as texts cut into windows are, are a plain batch to cuDNN,
which has Hopper's own kernels; others go to torch's kernel for sequences of any lengths (FlashAttention 2). Anywhere
else, and for soft-caps and ALiBi, the plain `Varlen` of the models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmasos.models.attention import Attend, AttentionSpec, Varlen, prefill
from llmasos.train.losses import whole_rows


class PackedAttention:
    """Sequences of `lengths` tokens, one after the other. One object serves one pass."""

    def __init__(self, specs: Sequence[AttentionSpec], lengths: Sequence[int], device: torch.device) -> None:
        self._kernel = _kernel()
        self._options = [_options(spec) for spec in specs]
        self._alike = all(options == self._options[0] for options in self._options)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.ends = ends.pin_memory().to(device, non_blocking=True)
        # rounded up, so that compiled blocks see few values
        self.longest = 1 << (max(lengths) - 1).bit_length()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # a layer's number that is not looked at does not make compiled blocks differ
        options = self._options[0] if self._alike else self._options[layer]
        out: Tensor = self._kernel(q, k, v, self.ends, self.ends, self.longest, self.longest, **options)
        return out


class EqualAttention:
    """Causal attention inside sequences that all have `length` tokens."""

    def __init__(self, specs: Sequence[AttentionSpec], length: int) -> None:
        self.scales, self.length = [spec.scale for spec in specs], length
        self._alike = len(set(self.scales)) == 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.scales[0] if self._alike else self.scales[layer]
        shared = q.shape[1] != k.shape[1]
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(_BEST_FIRST, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
        return out.transpose(1, 2).flatten(0, 1)


class FilledAttention(Varlen):
    """The same on a CPU in bfloat16, with each sequence filled up behind its end to a number of rows whose kernels are
    few (see `losses.ROWS`): its backward pass would have some compiled for every length."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = self.specs[layer]
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        filled = ((len(q), whole_rows(q), whole_rows(k), whole_rows(v)) for q, k, v in parts)
        return torch.cat([prefill(q, k, v, spec, 0)[:length] for length, q, k, v in filled])


_BEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def packed_attention(
    specs: Sequence[AttentionSpec], lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Attend:
    """The fastest attention that computes what `specs` ask for. Sum of `lengths` = T."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _kernel() is not None
    if fits and all(spec.plain for spec in specs):
        if len(set(lengths)) == 1 and all(spec.causal and not spec.window for spec in specs):
            return EqualAttention(specs, lengths[0])
        return PackedAttention(specs, lengths, device)
    if dtype == torch.bfloat16 and all(spec.causal for spec in specs):
        return FilledAttention(specs, lengths)
    return Varlen(specs, lengths)


def _options(spec: AttentionSpec) -> dict[str, Any]:
    """A layer's arithmetic in the words of this torch's kernel: 2.13 wants shared keys and values said, and 2.11 takes
    them unsaid."""
    left = spec.window - 1 if spec.window else -1
    options: dict[str, Any] = {"scale": spec.scale, "window_size": (left, 0 if spec.causal else left)}
    if "enable_gqa" in inspect.signature(_kernel()).parameters:
        options["enable_gqa"] = True
    return options


@cache
def _kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
