"""The passes between matrix products equal their definitions in float64 and round where the plain layers round."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmasos.inference.kernels.fused import KVTarget, add_rms_norm, gated_activation, rope_write
from llmasos.models.config import Activation, ModelConfig
from llmasos.models.layers import Norm, Rope, activate

# numpy says so in the interpreter; 1 / (1 + inf) is the 0 that is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
ROUNDINGS: dict[str, dict[str, Any]] = {
    "before the weight": {},
    "after the weight": {"norm_late_rounding": True},
    "one plus the weight": {"norm_unit_offset": True},
}
PAGE = 16


def config(**changes: Any) -> ModelConfig:
    return ModelConfig("", "", 16, 32, 32, 1, 4, 2, 8, 64, **changes)


def norm(width: int, device: torch.device, dtype: torch.dtype, **changes: Any) -> Norm:
    out = Norm(config(**changes), width).to(device, dtype).requires_grad_(False)
    assert out.weight is not None
    out.weight.normal_()
    return out


def exact(x: Tensor, by: Norm) -> Tensor:
    """RMSNorm by its formula in float64."""
    assert by.weight is not None
    weight = by.weight.double() + (1 if by.unit_offset else 0)
    return x.double() / (x.double().square().mean(-1, keepdim=True) + by.eps).sqrt() * weight


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("changes", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_a_sum_and_its_norm_equal_the_formula(changes: dict[str, Any], num_tokens: int, device: torch.device) -> None:
    by = norm(96, device, torch.float32, **changes)
    x, residual = random(num_tokens, 96, device=device), random(num_tokens, 96, device=device)
    summed = x.double() * 0.5 + residual.double()
    out = add_rms_norm(x, residual, by, scale=0.5)
    torch.testing.assert_close(residual.double(), summed, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.double(), exact(summed, by), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", ROUNDINGS.values(), ids=ROUNDINGS)
def test_half_precision_rounds_where_the_plain_norm_rounds(changes: dict[str, Any], device: torch.device) -> None:
    by = norm(160, device, torch.float16, **changes)
    x, residual = (random(33, 160, device=device, dtype=torch.float16) for _ in range(2))
    expected = by(x + residual)
    out = add_rms_norm(x, residual, by)
    # a mean that is summed in another order may round one number in a hundred the other way
    assert (out == expected).float().mean() > 0.99
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-3)


def test_without_a_sum_the_residual_stays_as_it_is(device: torch.device) -> None:
    by = norm(32, device, torch.float32)
    residual = random(3, 32, device=device)
    before = residual.clone()
    torch.testing.assert_close(add_rms_norm(None, residual, by), exact(before, by).float())
    assert torch.equal(residual, before)


def test_what_is_added_can_pass_a_norm_first(device: torch.device) -> None:
    by, post = (norm(48, device, torch.float32) for _ in range(2))
    x, residual = random(5, 48, device=device), random(5, 48, device=device)
    summed = residual.double() + exact(x, post)
    out = add_rms_norm(x, residual, by, post=post)
    torch.testing.assert_close(residual.double(), summed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), exact(summed, by), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 40), (7, 2100)])
def test_gate_and_up_become_one(kind: Activation, num_tokens: int, width: int, device: torch.device) -> None:
    wide = random(num_tokens, 2 * width, device=device) * 3
    gate, up = wide.double().chunk(2, -1)
    expected = activate(gate, kind) * up
    torch.testing.assert_close(gated_activation(wide, kind).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations_round_where_torch_rounds(kind: Activation, device: torch.device) -> None:
    wide = random(9, 128, device=device, dtype=torch.float16)
    gate, up = wide.chunk(2, -1)
    expected = activate(gate, kind) * up
    out = gated_activation(wide, kind)
    assert (out == expected).float().mean() > 0.98
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


class Case:
    """Five tokens of three sequences, the last of which only fills a graph; pages are poisoned."""

    def __init__(self, device: torch.device, width: int, kv_dtype: torch.dtype = torch.float32) -> None:
        self.num_heads, self.num_kv, self.width = 3, 2, width
        self.qkv = random(5, (3 + 2 * 2) * width, device=device)
        self.positions = torch.tensor([17, 18, 4, 5, 0], device=device)
        self.sequences = torch.tensor([0, 0, 1, 1, 2], dtype=torch.int32, device=device)
        self.seq_lens = torch.tensor([19, 6, 0], dtype=torch.int32, device=device)
        table = torch.tensor([[3, 1], [2, 0], [0, 0]], dtype=torch.int32, device=device)
        self.slots = [PAGE + 1, PAGE + 2, 2 * PAGE + 4, 2 * PAGE + 5]
        shape = (4 * PAGE, 2, width)
        quantised = kv_dtype not in (torch.float32, torch.float16)
        poison = [torch.full(shape, 99.0, device=device).to(kv_dtype) for _ in range(2)]
        scales = [torch.full(shape[:2], 99.0, device=device) if quantised else None for _ in range(2)]
        self.target = KVTarget(*poison, *scales, table, PAGE)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv.double().view(5, -1, self.width)
        return heads[:, :3], heads[:, 3:5], heads[:, 5:]

    def run(self, tables: tuple[Tensor, Tensor] | None, **options: Any) -> Tensor:
        arguments = self.positions, self.sequences, self.seq_lens
        return rope_write(self.qkv, self.target, tables, *arguments, num_heads=3, **options)

    def untouched(self, pages: Tensor) -> bool:
        others = torch.ones(pages.shape[0], dtype=torch.bool)
        others[self.slots] = False
        return bool((pages.float()[others.to(pages.device)] == 99.0).all())


def rope_of(dim: int, interleaved: bool, device: torch.device) -> tuple[Rope, tuple[Tensor, Tensor]]:
    rope = Rope(dim, 10000.0, interleaved, None, 32)
    rope.prepare(32, device, torch.float32)
    return rope, rope.whole(device, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "dim"), [(16, 16), (24, 24), (16, 8)])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_turn_and_keys_and_values_reach_their_slots(
    interleaved: bool, width: int, dim: int, normed: bool, device: torch.device
) -> None:
    case = Case(device, width)
    rope, tables = rope_of(dim, interleaved, device)
    norms = (norm(width, device, torch.float32), norm(width, device, torch.float32)) if normed else None
    q, k, v = case.heads()
    if norms:
        q, k = exact(q, norms[0]), exact(k, norms[1])
    angles = tuple(t.double() for t in rope.tables(case.positions, torch.float32))
    q, k = rope.rotate(q, angles), rope.rotate(k, angles)  # type: ignore[arg-type]
    out = case.run(tables, norms=norms, interleaved=interleaved)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.double(), q, **close)
    torch.testing.assert_close(case.target.keys[case.slots].double(), k[:4], **close)
    torch.testing.assert_close(case.target.values[case.slots].double(), v[:4], **close)
    assert case.untouched(case.target.keys) and case.untouched(case.target.values)


def test_without_tables_nothing_turns(device: torch.device) -> None:
    case = Case(device, 16)
    q, k, _ = case.heads()
    assert torch.equal(case.run(None), q.float())
    assert torch.equal(case.target.keys[case.slots], k[:4].float())


@pytest.mark.parametrize(("kv_dtype", "largest"), [(torch.float8_e4m3fn, 448), (torch.int8, 127)])
def test_quantised_pages_hold_each_head_by_its_largest_number(
    kv_dtype: torch.dtype, largest: int, device: torch.device
) -> None:
    case = Case(device, 16, kv_dtype)
    case.qkv[1].zero_()
    case.run(None)
    target = case.target
    _, k, v = case.heads()
    for pages, scales, expected in ((target.keys, target.key_scales, k), (target.values, target.value_scales, v)):
        assert scales is not None
        wanted = expected[:4].abs().amax(-1) / largest
        torch.testing.assert_close(scales[case.slots].double(), wanted, atol=1e-7, rtol=1e-5)
        assert case.untouched(scales)
        kept = pages[case.slots].double() * scales[case.slots].double()[..., None]
        step = wanted[..., None] * (16 if kv_dtype == torch.float8_e4m3fn else 0.51)
        right = (kept - expected[:4]).abs() <= step + 1e-9
        # the interpreter rounds some float8 numbers to the half of what they are
        assert right.all() if device.type == "cuda" or kv_dtype == torch.int8 else right.float().mean() > 0.8


def test_half_precision_rotations_round_where_the_plain_ones_round(device: torch.device) -> None:
    case = Case(device, 16, torch.float16)
    case.qkv = case.qkv.half()
    rope = Rope(16, 10000.0, False, None, 32)
    rope.prepare(32, device, torch.float16)
    q = case.qkv.view(5, -1, 16)[:, :3]
    expected = rope.rotate(q, rope.tables(case.positions, torch.float16))
    # a GPU multiplies and adds in one rounding
    tolerance = 0.0 if device.type == "cpu" else 2e-3
    torch.testing.assert_close(case.run(rope.whole(device, torch.float16)), expected, atol=tolerance, rtol=tolerance)
