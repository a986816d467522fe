"""Every attention of training is that of the models, gradients included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmasos.models.attention import Attend, AttentionSpec, Varlen
from llmasos.train.attention import EqualAttention, PackedAttention, packed_attention


def both_ways(
    attend: Attend, heads: tuple[int, int, int], lengths: Sequence[int], device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, as float32 on the CPU. Queries, keys and values are slices of one tensor, as in models."""
    num_q, num_kv, size = heads
    draw = torch.Generator().manual_seed(0)
    joined = torch.randn(sum(lengths), (num_q + 2 * num_kv) * size, generator=draw).to(device, dtype).requires_grad_()
    parts = joined.split([num_q * size, num_kv * size, num_kv * size], -1)
    out = attend(0, *(part.unflatten(-1, (-1, size)) for part in parts))
    weights = torch.randn(out.shape, generator=draw).to(device, dtype)
    (out * weights).sum().backward()
    assert joined.grad is not None
    return [out.detach().float().cpu(), joined.grad.float().cpu()]


@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 16)])
def test_sequences_of_one_length_are_a_batch(heads: tuple[int, int, int]) -> None:
    specs = [AttentionSpec(scale=0.2)]
    ours = both_ways(EqualAttention(specs, 9), heads, [9] * 3, "cpu", torch.float32)
    expected = both_ways(Varlen(specs, [9] * 3), heads, [9] * 3, "cpu", torch.float32)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(12, 12, 64), (16, 8, 128)])
@pytest.mark.parametrize(
    ("lengths", "window", "kind"),
    [([512] * 3, 0, EqualAttention), ([512] * 3, 100, PackedAttention), ([700, 1, 33, 290], 0, PackedAttention)],
)
def test_kernels_of_a_gpu(heads: tuple[int, int, int], lengths: list[int], window: int, kind: type) -> None:
    specs = [AttentionSpec(scale=0.1, window=window)]
    attend = packed_attention(specs, lengths, torch.device("cuda"), torch.bfloat16)
    assert type(attend) is kind
    ours = both_ways(attend, heads, lengths, "cuda", torch.bfloat16)
    expected = both_ways(Varlen(specs, lengths), heads, lengths, "cpu", torch.float32)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
