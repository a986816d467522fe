"""The kernel of distillation equals its formulas, and touches nothing beside its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from llmasos.train.divergence import Divergence, Kind, Scores, _Pair
from llmasos.train.kernels.divergence import divergence_


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("size", "their_size", "temperature", "beta", "weight"),
    [(301, 301, 1.0, 0.5, 1.0), (301, 320, 2.0, 0.3, 0.4), (320, 301, 0.7, 0.8, 0.9), (5000, 4500, 1.0, 0.5, 0.5)],
)
@pytest.mark.parametrize("caps", [(0.0, 0.0), (4.0, 0.0), (0.0, 3.0)])
def test_values_and_gradients_are_those_of_the_formula(
    kind: Kind,
    size: int,
    their_size: int,
    temperature: float,
    beta: float,
    weight: float,
    caps: tuple[float, float],
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    wide, theirs = torch.randn(3, size + 5) * 3, torch.randn(3, their_size) * 3
    labels = torch.tensor([0, min(size, their_size) - 1, 77])
    none = torch.empty(0)
    student, teacher = (Scores(none, none, scale=s, softcap=cap) for s, cap in zip((0.5, 1.5), caps, strict=True))
    expected = wide[:, :size].clone()
    pair = _Pair(expected, theirs, labels, student, teacher, Divergence(kind, beta, temperature, weight))
    divergences = pair.divergence()
    pair.turn()
    options: dict[str, Any] = {
        "kind": kind,
        "beta": beta,
        "temperature": temperature,
        "weight": weight,
        "scales": (0.5, 1.5),
        "caps": caps,
    }
    for gradient in (False, True):
        there = wide.to(device, copy=True)
        rows = there[:, :size]
        found = divergence_(rows, theirs.to(device), labels.to(device), gradient=gradient, **options)
        torch.testing.assert_close(found[0].cpu(), pair.cross_entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].cpu(), divergences, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            rows.cpu(), expected if gradient else wide[:, :size].contiguous(), rtol=1e-4, atol=1e-6
        )
        assert torch.equal(there[:, size:].cpu(), wide[:, size:])


def test_bfloat16_logits_take_their_gradient(device: torch.device) -> None:
    torch.manual_seed(0)
    ours, theirs = ((torch.randn(4, 3000) * 2).bfloat16() for _ in range(2))
    labels = torch.arange(4)
    expected = ours.clone()
    none = torch.empty(0)
    pair = _Pair(expected, theirs, labels, Scores(none, none), Scores(none, none), Divergence(weight=0.5))
    divergences = pair.divergence()
    pair.turn()
    rows = ours.to(device, copy=True)
    _, found = divergence_(
        rows,
        theirs.to(device),
        labels.to(device),
        kind="forward_kl",
        beta=0.5,
        temperature=1.0,
        weight=0.5,
        scales=(1.0, 1.0),
        caps=(0.0, 0.0),
        gradient=True,
    )
    torch.testing.assert_close(found.cpu(), divergences, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.cpu(), expected, rtol=0.02, atol=1e-6)
