"""The kernel of AdamW with 8-bit states steps as the plain arithmetic does, and touches nothing beside its weights."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl

from llmasos.train.codes import DYNAMIC, Code
from llmasos.train.kernels.adamw8bit import ZERO, _place, _value, step_
from llmasos.train.lowbit import SCALES
from llmasos.train.optim import AdamW8bit


@triton.jit
def _there_and_back(numbers, places, values, TOP: tl.constexpr, LEAST: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    place = _place(tl.load(numbers + at), TOP, LEAST)
    tl.store(places + at, place)
    tl.store(values + at, _value(tl.maximum(place, 1), TOP))


@pytest.mark.parametrize(("signed", "top", "least", "zero"), [(True, 6, 0, ZERO.value), (False, 7, 1, -1)])
def test_arithmetic_finds_the_tables_nearest_value(
    signed: bool, top: int, least: int, zero: int, device: torch.device
) -> None:
    code = Code.of(DYNAMIC[signed], torch.device("cpu"))
    positive, middles = code.values[code.values > 0], code.middles[:-1][code.middles[:-1] > 0]
    torch.manual_seed(0)
    anything = 10 ** (torch.rand(20_000) * 8 - 8)
    numbers = torch.cat([positive, middles * (1 + 1e-5), middles * (1 - 1e-5), torch.tensor([0.0, 1e-30]), anything])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 1024))
    there, places = numbers.to(device), torch.empty(len(numbers), dtype=torch.int32, device=device)
    values = torch.empty(len(numbers), device=device)
    _there_and_back[(len(numbers) // 1024,)](there, places, values, TOP=top, LEAST=least, SIZE=1024)
    expected, found = code.nearest(numbers).int(), places.cpu() + zero
    near = (numbers[:, None] - middles).abs().amin(1) < 5e-6 * numbers  # whose side rounding decides
    assert torch.equal(found[~near], expected[~near])
    assert (found - expected).abs().max() <= 1
    is_value = found > max(zero, 0)
    torch.testing.assert_close(values.cpu()[is_value], code.values[found.long()][is_value], rtol=2e-6, atol=0)


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
    astray = torch.zeros(size, dtype=torch.bool)
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
        expected, now = optimizer.state[plain], astray.clone()
        for name in ("mean", "root"):
            torch.testing.assert_close(state[f"{name}_scale"].cpu(), expected[f"{name}_scale"], rtol=1e-5, atol=0)
            apart = (state[f"{name}_code"].cpu().int() - expected[f"{name}_code"].int()).abs()
            # a value in the middle of two may go to either, and goes another way from there on
            assert apart.view(-1)[:size][~astray].max() <= 1
            now |= (apart > 0).view(-1)[:size]
            assert now.float().mean() < 2e-3
        astray = now
    there = ~astray
    torch.testing.assert_close(weights.cpu()[there], plain.detach().view(-1)[there], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights.cpu(), plain.detach().view(-1), rtol=0, atol=2 * rate)
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
