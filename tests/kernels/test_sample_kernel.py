"""The sampler's kernels equal its rows: draws, what top-k, top-p and min-p keep, masks. Memory that torch has not
written is poisoned."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from llmasos.inference.kernels import sample
from llmasos.inference.kernels.sample import apply_bitmask, find_floor, fused_sample
from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import Sampler, SamplingRow, Truncation, make_batch, survivors

SIZE = 4500
"""Three blocks, the last one not full."""


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty: Callable[..., torch.Tensor] = torch.empty
    like: Callable[..., torch.Tensor] = torch.empty_like

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(sample.torch, "empty", lambda *args, **kwargs: spoiled(empty(*args, **kwargs)))
    monkeypatch.setattr(sample.torch, "empty_like", lambda *args, **kwargs: spoiled(like(*args, **kwargs)))


def random_logits(num_rows: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return (torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(seed)) * 3).to(device)


def floats(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def chosen(logits: torch.Tensor, *args: torch.Tensor | None) -> list[int]:
    out = torch.full((len(logits),), -5, dtype=torch.int64, device=logits.device)
    fused_sample(logits, *args[:2], out, *args[2:])
    return out.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_first_of_the_largest(dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(4, device).to(dtype)
    logits[1, [700, 2100, 4400]] = 50.0
    logits[2, [2100, 4400]] = 50.0
    logits[3] = 1.0
    expected = [int(logits[0].float().cpu().argmax()), 700, 2100, 0]
    assert chosen(logits, None, None) == expected
    mixed = chosen(logits, floats([0, 0, 1, 0], device), floats([0.9] * 4, device))
    assert [mixed[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_invert_the_distribution_function(dtype: torch.dtype, device: torch.device) -> None:
    """Against float64. Rows of a wider matrix; block 1 of row 3 is empty."""
    numbers = [0.0, 1e-4, 0.25, 0.5, 0.77, 0.9999, 1 - 2.0**-24]
    logits = torch.cat([random_logits(len(numbers), device)] * 2, 1)[:, SIZE // 2 : SIZE // 2 + SIZE].to(dtype)
    logits[3, 2048:4096] = -math.inf
    temperature = floats([0.3, 0.7, 1.0, 1.0, 2.0, 5.0, 1.0], device)
    tokens = chosen(logits, temperature, floats(numbers, device))
    weights = (logits.double() / temperature[:, None]).softmax(-1).cpu()
    below = weights.cumsum(-1)
    for i, (token, u) in enumerate(zip(tokens, numbers, strict=True)):
        assert weights[i, token] > 0
        assert below[i, token] > u - 1e-5
        assert below[i, token] - weights[i, token] < u + 1e-5


@pytest.mark.parametrize("u", [0.0, 0.3, 0.999, 1 - 2.0**-24])
def test_a_removed_token_is_never_drawn(u: float, device: torch.device) -> None:
    logits = torch.full((4, SIZE), -math.inf, device=device)
    logits[0, [3, 9]] = 0.0
    logits[1, 4100] = -1e4
    logits[2, [2047, 2048, 4499]] = floats([1.0, 1.0, -200.0], device)
    logits[3] = math.nan
    tokens = chosen(logits, floats([1.0, 0.01, 1.0, 1.0], device), floats([u] * 4, device))
    assert tokens[0] in (3, 9)
    assert tokens[1] == 4100
    assert tokens[2] in (2047, 2048)
    assert 0 <= tokens[3] < SIZE


KINDS = [
    Truncation(0.0, 5, 0.5, 0.5, 1.0),
    Truncation(0.7, 0, 1.0, 0.0, 1.0),
    Truncation(1.0, 20, 1.0, 0.0, 1.0),
    Truncation(1.5, 400, 1.0, 0.0, 1.0),
    Truncation(0.8, 0, 0.9, 0.0, 1.0),
    Truncation(1.3, 50, 0.5, 0.0, 1.0),
    Truncation(1.0, 0, 1.0, 0.05, 1.0),
    Truncation(0.9, 30, 0.95, 0.2, 1.0),
    Truncation(1.0, SIZE, 0.0, 0.0, 1.0),
    Truncation(1.0, 0, 0.3, 1.0, 1.0),
]


def floors(logits: torch.Tensor, kinds: list[Truncation]) -> torch.Tensor:
    temperature, _, top_p, min_p, _ = (floats(list(column), logits.device) for column in zip(*kinds, strict=True))
    top_k = torch.tensor([k.top_k for k in kinds], dtype=torch.int32, device=logits.device)
    return find_floor(logits, temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("room", [sample.CANDIDATES, 24])
def test_floors_keep_what_rows_keep(room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where the candidates have room and where the row is searched as it lies."""
    monkeypatch.setattr(sample, "CANDIDATES", room)
    logits = random_logits(len(KINDS), device, seed=1)
    found = logits >= floors(logits, KINDS)[:, None]
    for kept, row, kind in zip(found.cpu(), logits.cpu(), KINDS, strict=True):
        ids = None if kind.temperature == 0 else survivors(row, kind)[0]
        expected = torch.arange(SIZE) if ids is None else ids
        assert kept.nonzero()[:, 0].tolist() == expected.tolist(), kind


def test_of_bfloat16_logits_all_that_tie_with_the_last_kept_stay(device: torch.device) -> None:
    kinds = [Truncation(1.0, 30, 1.0, 0.0, 1.0), Truncation(1.0, 0, 0.6, 0.0, 1.0), Truncation(1.0, 90, 0.8, 0.0, 1.0)]
    logits = random_logits(len(kinds), device, seed=2).bfloat16()
    found = logits >= floors(logits, kinds)[:, None]
    for kept, row, kind in zip(found.cpu(), logits.float().cpu(), kinds, strict=True):
        ids, _ = survivors(row, kind)
        assert ids is not None
        assert torch.equal(kept, row >= row[ids].min())


def test_top_k_beyond_what_a_grammar_allows_keeps_just_that(device: torch.device) -> None:
    logits = torch.full((2, SIZE), -math.inf, device=device)
    logits[:, [5, 2050, 4400]] = floats([1.0, 2.0, -300.0], device)
    found = floors(logits, [Truncation(1.0, 50, 1.0, 0.0, 1.0), Truncation(1.0, 50, 0.9, 0.0, 1.0)])
    assert (logits > -math.inf).sum(1).tolist() == [3, 3]
    kept = (logits > -math.inf) & (logits >= found[:, None])
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[5, 2050, 4400], [5, 2050]]


def test_masks_remove_what_their_bits_forbid_and_what_lies_behind_them(device: torch.device) -> None:
    random = np.random.default_rng(0)
    bits = random.random((2, 140 * 32)) < 0.5
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = random_logits(3, device)
    expected = logits.clone()
    for row, allowed in zip((2, 0), torch.from_numpy(bits).to(device), strict=True):
        expected[row, : 140 * 32][~allowed] = -math.inf
        expected[row, 140 * 32 :] = -math.inf
    apply_bitmask(logits, torch.tensor([2, 0], dtype=torch.int32, device=device), torch.from_numpy(words).to(device))
    assert torch.equal(logits, expected)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.8, "top_k": 50, "frequency_penalty": 0.7},
    {"temperature": 1.2, "typical_p": 0.8, "repetition_penalty": 1.3},
    {"top_k": 60, "min_p": 0.01, "typical_p": 0.9},
    {"min_p": 0.05, "logit_bias": {5: 8.0}},
]


def mixed_rows() -> list[SamplingRow]:
    rows = [SamplingRow(SamplingParams(**options, seed=i), [1, 2]) for i, options in enumerate(MIXED)]
    for row in rows:
        row.add(40)
    return rows


def test_the_sampler_by_kernels_equals_the_sampler_by_rows(device: torch.device) -> None:
    logits, rows = random_logits(len(MIXED), device, seed=3), mixed_rows()
    words = np.full((len(rows), SIZE // 32 + 1), -1, np.int32)
    words[1, :90] = 0x0F0F0F
    pending = torch.tensor([40, -1, 7, 40, 7, -1, 2], device=device)
    batch = make_batch(rows, [1] * len(rows), words)
    by_kernels, by_rows = Sampler(device, kernels=True), Sampler(torch.device("cpu"))
    expected = by_rows.probabilities(logits.cpu(), batch, pending.cpu())
    found = by_kernels.probabilities(logits, batch, pending).cpu()
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)
    expected_tokens = by_rows.sample(logits.cpu(), batch, pending.cpu()).tokens.tolist()
    assert by_kernels.sample(logits, batch, pending).tokens.tolist() == expected_tokens


def test_a_row_gives_the_same_bits_alone_and_in_any_batch(device: torch.device) -> None:
    logits, rows = random_logits(len(MIXED), device, seed=4), mixed_rows()
    sampler = Sampler(device, kernels=True)
    some = [6, 3, 0, 4, 2]
    batch = make_batch([rows[i] for i in some], [9] * len(some))
    together, tokens = sampler.probabilities(logits[some], batch), sampler.sample(logits[some], batch).tokens
    for n, i in enumerate(some):
        alone = make_batch([rows[i]], [9])
        assert torch.equal(sampler.probabilities(logits[i : i + 1], alone)[0], together[n])
        assert sampler.sample(logits[i : i + 1], alone).tokens[0] == tokens[n]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    rows = [*mixed_rows(), SamplingRow(SamplingParams(logprobs=3, top_p=0.9, seed=1), [])]
    logits = random_logits(len(rows), device)
    pending = torch.full((len(rows),), 4, device=device)
    words = np.full((len(rows), SIZE // 32 + 1), -1, np.int32)
    words[1, :40] = 7
    batch, sampler = make_batch(rows, [1] * len(rows), words), Sampler(device)
    expected = sampler.sample(logits, batch, pending).tokens
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = sampler.sample(logits, batch, pending).tokens
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_graph_takes_new_numbers() -> None:
    device = torch.device("cuda")
    logits = random_logits(5, device)
    temperature, uniform = floats([0, 1, 1, 1, 2], device), floats([0.5] * 5, device)
    out = torch.zeros(5, dtype=torch.int64, device=device)
    fused_sample(logits, temperature, uniform, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_sample(logits, temperature, uniform, out)
    uniform.copy_(floats([0.1, 0.2, 0.6, 0.9, 0.999], device))
    temperature[1] = 0
    graph.replay()
    assert out.tolist() == chosen(logits, temperature, uniform)
