"""The cross-entropy kernel equals its formula, and touches nothing beside its rows."""

import pytest
import torch

pytest.importorskip("triton")

from llmasos.train.kernels.cross_entropy import cross_entropy_ as kernel
from llmasos.train.losses import cross_entropy_


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 301, 20000])
def test_the_kernel_equals_the_formula(
    size: int, dtype: torch.dtype, scale: float, cap: float, device: torch.device
) -> None:
    torch.manual_seed(0)
    wide = (torch.randn(3, size + 5) * 6).to(dtype)
    before = wide.clone()
    labels = torch.tensor([0, size - 1, size // 2])
    expected = wide[:, :size].clone()
    losses_of_rows = cross_entropy_(expected, labels, scale=scale, softcap=cap, gradient=True)
    there = wide.to(device, copy=True)
    rows = there[:, :size]
    found = kernel(rows, labels.to(device), scale=scale, softcap=cap, gradient=True)
    torch.testing.assert_close(found.cpu(), losses_of_rows, rtol=1e-5, atol=1e-5)
    near = {"rtol": 0.02, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(rows.cpu(), expected, **near)
    assert torch.equal(there[:, size:].cpu(), before[:, size:])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("size", [7, 5001])
def test_a_label_far_below_the_best_word_has_a_loss_and_a_gradient(size: int, device: torch.device) -> None:
    """Exponents beside the label's own are infinite there."""
    torch.manual_seed(0)
    logits = torch.randn(5, size) * 3
    logits[0, 0], logits[1, 0], logits[2, 0], logits[3, 0] = -300.0, -90.0, -87.0, -float("inf")
    logits[4, 3] = float("nan")
    labels = torch.zeros(5, dtype=torch.int64)
    expected, rows = logits.clone(), logits.to(device, copy=True)
    losses_of_rows = cross_entropy_(expected, labels, scale=1.0, softcap=0.0, gradient=True)
    found = kernel(rows, labels.to(device), scale=1.0, softcap=0.0, gradient=True)
    torch.testing.assert_close(found.cpu(), losses_of_rows, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(rows.cpu(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found[:3].isfinite().all() and found[3].isinf() and found[4].isnan()
