"""The kernel of AdamW with 8-bit states steps as the plain arithmetic does, and touches nothing beside its weights."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from llmasos.train.kernels.adamw8bit import step_
from llmasos.train.lowbit import SCALES
from llmasos.train.optim import AdamW8bit


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 130), (5001,), (64, 256)])
def test_steps_equal_those_of_the_plain_arithmetic(
    shape: tuple[int, ...], gradient: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    rate, decay, betas, eps = 1e-2, 0.1, (0.9, 0.95), 1e-8
    plain = nn.Parameter(torch.randn(shape))
    optimizer = AdamW8bit([plain], lr=rate, weight_decay=decay, betas=betas, eps=eps)
    size = plain.numel()
    room = torch.full((size + 300,), 7.0, device=device)
    weights = room[:size]
    weights.copy_(plain.detach().view(-1))
    blocks = -(-size // SCALES)
    state = {f"{name}_scale": torch.zeros(blocks, device=device) for name in ("mean", "root")}
    zero = {"mean": 127, "root": 0}
    state |= {
        f"{name}_code": torch.full((blocks, SCALES), code, dtype=torch.uint8, device=device)
        for name, code in zero.items()
    }
    for step in range(1, 5):
        # from steps of no gradient to large ones: codes of all decades
        noise = torch.randn(shape).to(gradient) * 10 ** (torch.rand(shape) * 6 - 5) * (torch.rand(shape) > 0.1)
        noise = noise.to(gradient)
        plain.grad = noise.float()
        optimizer.step()
        step_(
            weights, noise.view(-1).to(device), state, rate=rate, weight_decay=decay, betas=betas, eps=eps,
            biases=(1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5),
        )  # fmt: skip
        expected = optimizer.state[plain]
        for name in ("mean", "root"):
            torch.testing.assert_close(state[f"{name}_scale"].cpu(), expected[f"{name}_scale"], rtol=1e-5, atol=0)
            apart = (state[f"{name}_code"].cpu().int() - expected[f"{name}_code"].int()).abs()
            # a value in the middle of two may go to either
            assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    torch.testing.assert_close(weights.cpu(), plain.detach().view(-1), rtol=1e-3, atol=1e-5)
    assert (room[size:] == 7.0).all()


def test_a_root_never_becomes_0_beside_a_large_one(device: torch.device) -> None:
    weights = torch.zeros(SCALES, device=device)
    gradients = torch.full((SCALES,), 1e-12, device=device)
    gradients[0] = 1.0
    state = {f"{name}_scale": torch.zeros(1, device=device) for name in ("mean", "root")}
    state |= {f"{name}_code": torch.zeros(1, SCALES, dtype=torch.uint8, device=device) for name in ("mean", "root")}
    options: dict[str, Any] = {
        "rate": 1.0,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "betas": (0.9, 0.95),
        "biases": (0.1, 0.05**0.5),
    }
    step_(weights, gradients, state, **options)
    assert state["root_code"].min() == 1 and state["root_code"][0, 0] == 255
