"""Fused losses equal the plain ones, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from llmasos.train import losses
from llmasos.train.losses import linear_cross_entropy

N, D, V = 37, 24, 301


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float,
    cap: float,
) -> torch.Tensor:
    x = F.linear(hidden, weight, bias).float() * scale
    x = torch.tanh(x / cap) * cap if cap else x
    return F.cross_entropy(x, labels, reduction="sum")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.3, 0.0), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_sum_and_its_gradients_are_those_of_the_whole_matrix(
    scale: float, cap: float, with_bias: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PIECE", 10 * V)  # four pieces, the last one not full
    torch.manual_seed(0)
    values = [torch.randn(N, D), torch.randn(V, D) * 0.5, torch.randn(V) if with_bias else None]
    ours = [None if v is None else v.to(device).clone().requires_grad_() for v in values]
    theirs = [None if v is None else v.to(device, torch.float64).requires_grad_() for v in values]
    labels = torch.randint(V, (N,), device=device)
    found = linear_cross_entropy(ours[0], ours[1], labels, bias=ours[2], scale=scale, softcap=cap)
    expected = plain(*theirs, labels, scale, cap)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    (found * 0.25).backward()
    (expected * 0.25).backward()
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a.grad.double(), b.grad.double(), rtol=1e-4, atol=1e-5)


def test_frozen_heads_get_no_gradient_and_nothing_is_built_for_scoring(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, device=device, requires_grad=True), torch.randn(V, D, device=device)
    labels = torch.randint(V, (N,), device=device)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None and weight.grad is None
    asked = []
    whole = losses.cross_entropy_
    monkeypatch.setattr(
        losses, "cross_entropy_", lambda *a, gradient, **k: asked.append(gradient) or whole(*a, gradient=gradient, **k)
    )
    with torch.no_grad():
        scored = linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    assert asked == [False]
    torch.testing.assert_close(scored, plain(hidden, weight, None, labels, 1.0, 0.0), rtol=1e-5, atol=1e-4)


def test_no_trained_rows_give_nothing_and_gradients_of_zero(device: torch.device) -> None:
    hidden, weight = torch.randn(0, D, device=device, requires_grad=True), torch.randn(V, D, device=device)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64, device=device))
    loss.backward()
    assert loss == 0 and weight.grad is not None and not weight.grad.any()
