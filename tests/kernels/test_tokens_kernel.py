"""Tokens from the pool."""

import pytest
import torch

pytest.importorskip("triton")

from llmasos.inference.kernels.tokens import resolve_tokens


def test_tokens_that_only_the_device_knows_come_from_the_pool(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 7, 256, 1000):
        tokens = torch.randint(-64, 50_000, (num_tokens,), generator=generator, dtype=torch.int32)
        pool = torch.randint(0, 1 << 18, (64,), generator=generator)
        out = torch.full((num_tokens,), -9, dtype=torch.int32, device=device)
        resolve_tokens(tokens.to(device), pool.to(device), out)
        expected = [pool[-1 - t].item() if t < 0 else t for t in tokens.tolist()]
        assert out.tolist() == expected
