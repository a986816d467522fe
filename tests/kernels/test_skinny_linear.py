"""Matrix products of few tokens equal float64, with all that is fused into them; invariant ones are invariant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from llmasos.inference.kernels.linear import Tiling, invariant_linear, skinny_linear, tiling_for
from llmasos.models.config import ModelConfig
from llmasos.models.layers import Norm

TILINGS = {
    "through registers": Tiling(4, 128),
    "through shared memory": Tiling(8, 64, stages=3),
    "tensor cores": Tiling(16, 64, stages=3, dot=True),
    "the whole row at once": Tiling(2, 256),
}


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def norm(width: int, device: torch.device, **changes: Any) -> Norm:
    out = Norm(ModelConfig("", "", 16, 32, 32, 1, 4, 2, 8, 64, **changes), width).to(device).requires_grad_(False)
    assert out.weight is not None
    out.weight.normal_()
    return out


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    scale = exact.abs().max().item()
    torch.testing.assert_close(ours.double(), exact, atol=2e-6 * scale, rtol=2e-5)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize(("num_tokens", "num_rows", "width"), [(1, 32, 256), (3, 37, 72), (8, 20, 136)])
def test_the_product_equals_float64(
    tiling: Tiling, num_tokens: int, num_rows: int, width: int, device: torch.device
) -> None:
    x, weight = random(num_tokens, width, device=device), random(num_rows, width, device=device)
    bias = random(num_rows, device=device)
    exact = F.linear(x.double(), weight.double(), bias.double())
    close(skinny_linear(x, weight, bias, tiling=tiling), exact)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("changes", [{}, {"norm_late_rounding": True}, {"norm_unit_offset": True}], ids=str)
def test_the_input_can_pass_a_norm_first(tiling: Tiling, changes: dict[str, Any], device: torch.device) -> None:
    x, weight = random(2, 200, device=device), random(20, 200, device=device)
    by = norm(200, device, **changes)
    exact = F.linear(by.double()(x.double().repeat(5, 1))[:2], weight.double())
    close(skinny_linear(x, weight, norm=by.float(), tiling=tiling), exact)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_gate_and_up_meet_and_are_added_to_the_residual(tiling: Tiling, device: torch.device) -> None:
    x, weight, bias = random(3, 96, device=device), random(52, 96, device=device), random(52, device=device)
    residual = random(3, 26, device=device)
    gate, up = F.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
    exact = residual.double() + 0.25 * F.silu(gate) * up
    out = skinny_linear(x, weight, bias, activation="silu", residual=residual, scale=0.25, tiling=tiling)
    close(out, exact)
    assert out is residual


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
def test_half_precision_rounds_once(num_tokens: int, device: torch.device) -> None:
    x, weight = (random(n, 512, device=device, dtype=torch.float16) for n in (num_tokens, 24))
    exact = F.linear(x.double(), weight.double())
    out = skinny_linear(x, weight)
    assert (out == exact.half()).float().mean() > 0.95
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)


def test_weights_may_be_rows_of_a_wider_matrix(device: torch.device) -> None:
    x, weight = random(2, 64, device=device), random(20, 80, device=device)[:, :64]
    close(skinny_linear(x, weight), F.linear(x.double(), weight.double()))
    close(invariant_linear(x, weight), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 16])
@pytest.mark.parametrize(("num_rows", "width"), [(1024, 3072), (28672, 4096), (151936, 1024), (576, 576), (40, 24)])
def test_every_shape_has_a_tiling_that_fits(num_tokens: int, num_rows: int, width: int) -> None:
    for gated in (False, True):
        cut = tiling_for(num_tokens, num_rows, width, gated=gated)
        for number in (cut.rows, cut.block):
            assert number > 0 and number & (number - 1) == 0
        # cp.async stages of a program must fit into a multiprocessor's shared memory
        assert cut.stages * cut.block * (cut.rows * (1 + gated) + num_tokens) * 2 <= 200_000


@pytest.mark.usefixtures("rows_anywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_invariant_row_is_the_same_alone_and_anywhere_in_a_batch(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = (random(*s, device=device, dtype=dtype) for s in ((70, 136), (150, 136), (150,)))
    whole = invariant_linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(whole.double(), exact, atol=10 * tolerance, rtol=tolerance)
    for row in (0, 5, 63, 64, 69):
        assert torch.equal(invariant_linear(x[row : row + 1], weight, bias)[0], whole[row])
    assert torch.equal(invariant_linear(x[7:40], weight, bias), whole[7:40])
