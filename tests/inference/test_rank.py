"""Memory for pages: counted, divided, and refused with the counts; options that contradict the model are named."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llmasos.errors import InsufficientMemoryError, InvalidInputError
from llmasos.inference.cache import CachedSequence, Group, PageCache
from llmasos.inference.config import EngineConfig
from llmasos.inference.llm import LLM
from llmasos.inference.pages import Pages
from llmasos.inference.rank import Sizes, divide, resolve
from llmasos.models.load import load_model
from paged_world import FAMILIES, config_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@st.composite
def all_sizes(draw: st.DrawFn) -> Sizes:
    page_size = 2 ** draw(st.integers(4, 8))
    num_seqs = draw(st.integers(1, 300))
    windows = draw(st.sampled_from([(0,), (64,), (0, 128), (0, 4096), (32, 1024)]))
    return Sizes(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs + draw(st.integers(0, 9000)),
        max_model_len=draw(st.integers(1, 200_000)),
        page_size=page_size,
        windows=windows,
        bytes_per_page=tuple(draw(st.integers(1, 10**7)) for _ in windows),
    )


def taken(sizes: Sizes, pages: list[int]) -> int:
    return sum(n * b for n, b in zip(pages, sizes.bytes_per_page, strict=True))


def needed_for_one(sizes: Sizes) -> int:
    """The fewest bytes that are not refused."""
    low, high = 0, 10**15
    while high - low > 1:
        middle = (low + high) // 2
        try:
            divide(sizes, middle)
            high = middle
        except InsufficientMemoryError:
            low = middle
    return high


@given(all_sizes(), st.integers(0, 10**12))
def test_pages_never_take_more_bytes_than_given_and_always_hold_a_context(sizes: Sizes, num_bytes: int) -> None:
    try:
        pages = divide(sizes, num_bytes)
    except InsufficientMemoryError:
        assume(False)
    assert taken(sizes, pages) <= num_bytes
    cache = PageCache([Group(n, w) for n, w in zip(pages, sizes.windows, strict=True)], sizes.page_size)
    assert cache.fits(sizes.max_model_len + 1), "one to copy on write"
    seq = CachedSequence(0, [0] * sizes.max_model_len)
    cache.match(seq)
    assert cache.allocate(seq, min(sizes.max_num_batched_tokens, sizes.max_model_len)), "a pass as large as it may be"


@given(all_sizes())
def test_more_bytes_are_never_fewer_pages_and_the_refusal_has_the_counts(sizes: Sizes) -> None:
    least = needed_for_one(sizes)
    steps = [divide(sizes, least + extra) for extra in (0, 1, least, 10 * least, 10**15)]
    for fewer, more in pairwise(steps):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
    assert taken(sizes, steps[0]) == least, "not a byte is asked for in vain"
    assert steps[-1] == [1 + (n - 1) * sizes.max_num_seqs for n in steps[0]], "what all sequences can need, no more"
    with pytest.raises(InsufficientMemoryError) as info:
        divide(sizes, least - 1)
    numbers = [float(n) for n in re.findall(r"[\d.]+(?= [Mk]B)", info.value.message)]
    assert numbers[0] == pytest.approx(least / 1e6, abs=0.06)
    assert numbers[-1] == pytest.approx((least - 1) / 1e6, abs=0.06)
    assert f"context of {sizes.max_model_len} tokens" in info.value.message
    with pytest.raises(InsufficientMemoryError, match=r" 0\.0 MB are left"):
        divide(sizes, -(10**9))


def test_a_page_costs_what_its_memory_takes() -> None:
    config = FAMILIES["gemma"]
    for kv_dtype in ("auto", "int8"):
        pages = Pages(config, [3, 5], 16, device="cpu", dtype=torch.float32, kv_dtype=kv_dtype)
        each = [Pages.bytes_per_page(config, g, 16, kv_dtype, torch.float32) for g in range(2)]
        assert pages.release() == 3 * each[0] + 5 * each[1]


def test_what_is_left_open_follows_from_model_and_device() -> None:
    config = config_of(sliding_window=20, layer_types=("sliding", "full", "sliding"))
    here = resolve(config, EngineConfig(), CPU, torch.float32)
    assert (here.max_model_len, here.page_size, here.max_num_batched_tokens) == (256, 16, 1024)
    assert here.windows == (0, 20)
    there = resolve(config, EngineConfig(max_model_len=100), CUDA, torch.bfloat16)
    assert (there.max_model_len, there.page_size, there.max_num_batched_tokens) == (100, 64, 8192)
    many = resolve(config, EngineConfig(max_num_seqs=2000), CPU, torch.float32)
    assert many.max_num_batched_tokens == 4000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 257}, r"max_model_len=257 .*context of 256"),
        ({"max_num_batched_tokens": 200}, r"max_num_batched_tokens=200 .*256 sequences.*at least 256"),
        ({"page_size": 24}, "page_size=24 is not a power of two"),
        ({"page_size": 8}, "page_size=8 is not a power of two from 16"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_seqs": 2.0}, r"max_num_seqs=2\.0"),
        ({"max_num_seqs": True}, "max_num_seqs=True"),
        ({"max_model_len": -1}, "max_model_len=-1"),
        ({"kv_cache_dtype": "fp4"}, r"kv_cache_dtype='fp4'.*auto, bfloat16"),
        ({"kv_cache_memory": 0}, "kv_cache_memory=0"),
        ({"kv_cache_memory": "1GB"}, "kv_cache_memory='1GB'"),
        ({"gpu_memory_utilization": "all"}, "gpu_memory_utilization='all'"),
        ({"batch_invariant": "no"}, "batch_invariant='no'"),
        ({"speculative": "ngram"}, r"speculative='ngram'.*SpeculativeConfig\("),
        ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization=0\.0"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization=90"),
        ({"max_num_sequences": 4}, r"'max_num_sequences' is not an engine option.*max_num_seqs"),
    ],
)
def test_options_that_can_not_be_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as info:
        resolve(config_of(), EngineConfig.of(**options), CPU, torch.float32)
    assert info.value.param == next(iter(options))


def test_too_little_memory_for_pages_is_refused_with_the_counts(tiny_model: Path) -> None:
    def load(num_bytes: int) -> LLM:
        llm = LLM.from_pretrained(tiny_model, device="cpu", dtype="float32", kv_cache_memory=num_bytes)
        assert isinstance(llm, LLM)
        return llm

    with load(60_000) as llm:
        for _ in range(2):
            with pytest.raises(
                InsufficientMemoryError, match=r"context of 256 tokens needs 0\.1 MB.*0\.3 kB per token"
            ):
                llm.generate("The", max_tokens=2)
    with load(80_000) as llm:
        assert llm.generate("The", max_tokens=250, ignore_eos=True)


def test_a_contradiction_is_said_before_the_first_request(tiny_model: Path) -> None:
    with pytest.raises(InvalidInputError, match="max_model_len=1000"):
        LLM(load_model(tiny_model, device="cpu"), name="tiny", max_model_len=1000)
