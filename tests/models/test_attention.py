"""Attention by the definition in float64, against every way that models take: varlen, cache, one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.models import attention
from llmasos.models.attention import AttentionSpec, ContiguousCache, Varlen, alibi_slopes
from llmasos.models.config import ModelConfig

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """softmax(scale · q kᵀ + bias) v, written out in loops; one sequence, queries at its end."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    start = k.shape[0] - q.shape[0]
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            at = start + i
            seen = [j for j in range(k.shape[0]) if not spec.causal or j <= at]
            seen = [j for j in seen if not spec.window or abs(at - j) < spec.window]
            scores = torch.stack([q[i, head].double() @ k[j, kv].double() for j in seen]) * spec.scale
            if spec.softcap:
                scores = torch.tanh(scores / spec.softcap) * spec.softcap
            if spec.slopes:
                scores = scores - spec.slopes[head] * spec.alibi_scale * (at - torch.tensor(seen, dtype=torch.float64))
            out[i, head] = scores.softmax(-1) @ v[seen, kv].double()
    return out


SPECS = {
    "plain": AttentionSpec(WIDTH**-0.5),
    "scaled": AttentionSpec(0.7),
    "window": AttentionSpec(WIDTH**-0.5, window=5),
    "softcap": AttentionSpec(WIDTH**-0.5, softcap=2.0),
    "window and softcap": AttentionSpec(WIDTH**-0.5, window=4, softcap=2.0),
    "alibi": AttentionSpec(WIDTH**-0.5, slopes=alibi_slopes(HEADS)),
    "both ways": AttentionSpec(WIDTH**-0.5, causal=False),
    "window both ways": AttentionSpec(WIDTH**-0.5, window=4, causal=False),
}


def tokens(num: int, heads: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num, heads, WIDTH, generator=generator)


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rows", [3, 512])
def test_packed_sequences_equal_the_definition(spec: AttentionSpec, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 12]
    q, k, v = (tokens(sum(lengths), heads, generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = Varlen([spec], lengths)(0, q, k, v)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), out.split(lengths), strict=True)
    for queries, keys, values, ours in parts:
        close(ours, definition(queries, keys, values, spec))


@pytest.mark.parametrize("window", [0, 5])
def test_a_long_prompt_needs_no_mask_of_its_length_squared(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", 4)
    masks: list[tuple[int, ...]] = []
    kernel = attention.F.scaled_dot_product_attention

    def watched(*args: torch.Tensor, attn_mask: torch.Tensor, **options: object) -> torch.Tensor:
        masks.append(tuple(attn_mask.shape))
        return kernel(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    cache = cache_of(AttentionSpec(WIDTH**-0.5, window=window), 1, capacity=64)
    cache.lengths[0] = 20
    cache.plan([0], [30])
    generator = torch.Generator().manual_seed(0)
    cache(0, *(tokens(30, heads, generator) for heads in (HEADS, KV_HEADS, KV_HEADS)))
    assert [rows for rows, _ in masks] == [4] * 7 + [2]
    assert [keys for _, keys in masks] == [
        window + min(4, 30 - at) - 1 if window else min(50, 24 + at) for at in range(0, 30, 4)
    ]


def cache_of(spec: AttentionSpec, num_rows: int, capacity: int) -> ContiguousCache:
    config = ModelConfig(
        architecture="", family="", vocab_size=1, hidden_size=HEADS * WIDTH, intermediate_size=1, num_layers=1,
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH, context_length=64,
    )  # fmt: skip
    cache = ContiguousCache(config, num_rows, device=torch.device("cpu"), dtype=torch.float32, capacity=capacity)
    cache.specs = [spec]
    return cache


@settings(max_examples=60)
@given(
    st.sampled_from([name for name, spec in SPECS.items() if spec.causal]),
    st.lists(st.lists(st.sampled_from([0, 1, 1, 1, 2, 5]), min_size=3, max_size=3), min_size=1, max_size=10),
)
def test_any_order_of_steps_through_the_cache_equals_the_definition(name: str, steps: list[list[int]]) -> None:
    """Rows get none, one or several new tokens per step, in any mix; every query sees its own row's past only."""
    spec, generator = SPECS[name], torch.Generator().manual_seed(1)
    cache = cache_of(spec, 3, capacity=4)
    past = [tuple(torch.empty(0, KV_HEADS, WIDTH) for _ in range(2)) for _ in range(3)]
    for step in steps:
        rows = [r for r in range(3) if step[r]]
        if not rows:
            continue
        sizes = [step[r] for r in rows]
        q, k, v = (tokens(sum(sizes), heads, generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
        starts = [cache.lengths[r] for r in rows]
        positions = cache.plan(rows, sizes)
        assert positions.tolist() == [s + i for s, n in zip(starts, sizes, strict=True) for i in range(n)]
        out = cache(0, q, k, v).split(sizes)
        cache.advance()
        for row, queries, keys, values, ours in zip(
            rows, q.split(sizes), k.split(sizes), v.split(sizes), out, strict=True
        ):
            past[row] = (torch.cat([past[row][0], keys]), torch.cat([past[row][1], values]))
            close(ours, definition(queries, *past[row], spec))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == pytest.approx([2.0**-i for i in range(1, 9)])
    assert len(alibi_slopes(12)) == 12
    assert alibi_slopes(12)[8] == pytest.approx(math.sqrt(0.5))
