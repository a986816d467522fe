"""Tokens with different adapters in one call equal each token's own product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmasos.inference.kernels.lora import FEW_TOKENS, Routes, add_lora, cuts_of, sort

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Relative to the largest number; the short ones round x A and the result."""
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # not in the interpreter


def reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: tuple[int, ...], ranks: Tensor, slots: np.ndarray
) -> Tensor:
    """float64, token by token; columns beyond an adapter's rank are not looked at."""
    out = y.double()
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for part, rows in enumerate(torch.arange(b.shape[1]).split(sizes)):
            rank = int(ranks[slot, part])
            low = a[slot, part, :rank].double() @ x[t].double()
            out[t, rows] += b[slot, rows, :rank].double() @ low
    return out


def check(
    slots: np.ndarray,
    sizes: tuple[int, ...],
    width: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_slots: int = 4,
    padded: int = 0,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_out = len(slots) + padded, sum(sizes)
    ranks = torch.randint(0, room + 1, (num_slots, len(sizes)), generator=generator)
    ranks[0] = room
    a = torch.randn(num_slots, len(sizes), room, width, generator=generator) / width**0.5
    b = torch.randn(num_slots, num_out, room, generator=generator) / room**0.5
    parts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    a *= (torch.arange(room) < ranks[..., None])[..., None]  # what no adapter filled is zero
    b *= torch.arange(room) < ranks[:, parts, None]
    x = torch.randn(num_tokens, width, generator=generator)
    x[len(slots) :] = torch.nan  # padding may hold anything
    y = torch.randn(num_tokens, num_out, generator=generator)
    a, b, x, y = (tensor.to(device, dtype) for tensor in (a, b, x, y))
    routes = Routes.empty(num_tokens, num_slots, device)
    routes.table.fill_(99)  # left from another pass
    routes.table.copy_(torch.from_numpy(sort(slots, num_tokens, num_slots)))
    wanted = reference(*(tensor.cpu() for tensor in (y, x, a, b)), sizes, ranks, slots)
    untouched = y[np.flatnonzero(slots < 0)].clone(), y[len(slots) :].clone()
    add_lora(y, x, a, b, cuts_of(sizes, device), routes)
    used = len(slots)
    error = (y[:used].cpu().double() - wanted[:used]).abs().max() / wanted[:used].abs().max().clamp_min(1)
    assert error < TOLERANCE[dtype], f"{error:.2e}"
    assert torch.equal(y[np.flatnonzero(slots < 0)], untouched[0])
    assert torch.equal(y[used:], untouched[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes, width, room",
    [
        ((48, 16, 16), 40, 16),  # query, key, value
        ((72, 72), 130, 48),  # gate and up, an odd width
        ((100,), 1100, 32),  # K is shared out
    ],
    ids=["qkv", "gate and up", "wide"],
)
def test_mixed_adapters_equal_each_tokens_own(
    sizes: tuple[int, ...], width: int, room: int, dtype: torch.dtype, device: torch.device
) -> None:
    slots = np.random.default_rng(0).integers(-1, 4, 37)
    check(slots, sizes, width, room, dtype, device, padded=3)


@pytest.mark.parametrize(
    "slots",
    [np.array([2]), np.array([-1, 3]), np.full(20, 1), np.array([0, 1, 2, 3]), np.full(3, -1)],
    ids=["one token", "last slot", "one adapter", "all different", "none"],
)
def test_small_batches_of_every_kind(slots: np.ndarray, device: torch.device) -> None:
    check(slots, (24,), 32, 16, torch.float32, device)


def test_a_long_prompt_beside_decodes(device: torch.device) -> None:
    """Larger tiles; K is summed in one program."""
    slots = np.array([1] * 400 + [-1] * 50 + [0, 2, 1, 0] * 20)
    assert len(slots) > FEW_TOKENS
    check(slots, (24, 8), 520, 16, torch.float32, device)


def test_tiles_hold_every_token_with_an_adapter_once() -> None:
    rng = np.random.default_rng(1)
    for num_tokens in (1, 5, 16, 17, 100, 513, 700):
        slots = rng.integers(-1, rng.integers(1, 8), num_tokens)
        padded = num_tokens + int(rng.integers(0, 9))
        routes = Routes.empty(padded, 8, torch.device("cpu"))
        table = sort(slots, padded, 8)
        assert len(table) == len(routes.table)
        order = table[3 * routes.num_tiles :]
        seen = []
        for slot, first, end in table[: 3 * routes.num_tiles].reshape(-1, 3).tolist():
            assert 0 <= end - first <= routes.block
            assert (slots[order[first:end]] == slot).all()
            seen += order[first:end].tolist()
        assert sorted(seen) == np.flatnonzero(slots >= 0).tolist()


def test_what_a_token_gets_does_not_depend_on_the_others(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 600, generator=generator).to(device)
    a = torch.randn(2, 1, 16, 600, generator=generator).to(device)
    b = torch.randn(2, 40, 16, generator=generator).to(device)
    slots = np.array([0, 1, 0, 1, 1, -1, 0, 0, 1])

    def added(rows: list[int]) -> Tensor:
        y = torch.zeros(len(rows), 40, device=device)
        routes = Routes.empty(len(rows), 2, device)
        routes.table.copy_(torch.from_numpy(sort(slots[rows], len(rows), 2)))
        add_lora(y, x[rows], a, b, cuts_of((40,), device), routes)
        return y

    together = added(list(range(9)))
    for t in range(9):
        assert torch.equal(added([t])[0], together[t])
