"""Attention over pages equals the contiguous cache, whatever the passes are made of and wherever the pages lie."""

from __future__ import annotations

import random
import resource

import pytest
import torch

from llmasos.inference.paged_torch import MOST_PADDING, Plan, quantize
from llmasos.inference.pages import Pages, page_groups
from paged_world import FAMILIES, PAGE, Text, alone, random_tokens, world_of


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_mix_of_chunks_decodes_and_forks_equals_the_contiguous_cache(family, scattered):
    world = world_of(FAMILIES[family], scattered=scattered)
    rng = random.Random(family)
    texts: list[Text] = []
    seen: dict[int, list[torch.Tensor]] = {}
    for _ in range(20):
        if len(texts) < 4 and rng.random() < 0.5:
            texts.append(world.text(random_tokens(rng, 75)))
            seen[id(texts[-1])] = []
        if texts and len(texts) < 5 and rng.random() < 0.3:
            parent = rng.choice(texts)
            child = world.fork(parent)
            child.tokens[child.computed :] = random_tokens(rng, 75 - child.computed)
            texts.append(child)
            seen[id(child)] = list(seen[id(parent)])
        work = []
        for text in rng.sample(texts, rng.randint(0, len(texts))):
            left = len(text.tokens) - text.computed
            if left:
                work.append((text, min(left, rng.choice([1, 1, 1, 2, 7, 30]))))
        if work:
            out = world.run(work)
            for (text, num), part in zip(work, out.split([n for _, n in work]), strict=True):
                assert part.shape[0] == num
                seen[id(text)].append(part)
    assert sum(text.computed for text in texts) > 100
    for text in texts:
        if text.computed:
            expected = alone(world, text.tokens, [1] * text.computed)
            torch.testing.assert_close(torch.cat(seen[id(text)]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma", "falcon"])
def test_greedy_tokens_are_those_of_the_contiguous_cache(family):
    world = world_of(FAMILIES[family])
    rng = random.Random(1)
    texts = [world.text(random_tokens(rng, n)) for n in (5, 31, 50)]
    prompts = [list(text.tokens) for text in texts]
    work = [(text, len(text.tokens)) for text in texts]
    for _ in range(20):
        lasts = torch.tensor([n for _, n in work]).cumsum(0) - 1
        choices = world.module.logits(world.run(work)[lasts]).argmax(-1).tolist()
        for text, token in zip(texts, choices, strict=True):
            text.tokens.append(token)
        work = [(text, 1) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        pieces = [len(prompt)] + [1] * 19
        hidden = alone(world, text.tokens, pieces)[len(prompt) - 1 :]
        assert world.module.logits(hidden).argmax(-1).tolist() == text.tokens[len(prompt) :]


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.02), ("fp8", 0.08), ("bfloat16", 0.02), ("float16", 0.003)])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_smaller_keys_and_values_cost_little_and_something(family, kv_dtype, bound):
    world = world_of(FAMILIES[family], kv_dtype=kv_dtype)
    rng = random.Random(2)
    texts = [world.text(random_tokens(rng, 60)) for _ in range(3)]
    outs: list[list[torch.Tensor]] = [[], [], []]
    for step in ([20, 1, 33], [1, 1, 1], [30, 40, 17], [1, 1, 1]):
        work = list(zip(texts, step, strict=True))
        for out, part in zip(outs, world.run(work).split(step), strict=True):
            out.append(part)
    for text, out in zip(texts, outs, strict=True):
        expected = alone(world, text.tokens, [text.computed])
        error = ((torch.cat(out) - expected).norm() / expected.norm()).item()
        assert bound / 100 < error < bound


def test_tokens_are_scaled_by_their_own_largest_number():
    x = torch.tensor([[[1.0, -2.0, 0.5, 0.0]], [[1e-3, 0.0, 4e-3, 0.0]], [[0.0] * 4]])
    for dtype, largest in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        values, scales = quantize(x, dtype)
        assert scales.shape == (3, 1, 1) and values.dtype == dtype
        assert values.float().abs().amax(-1).flatten().tolist() == [largest, largest, 0.0]
        torch.testing.assert_close(values.float() * scales, x, atol=2e-2, rtol=0.07)


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest():
    world = world_of(FAMILIES["llama"])
    texts = [world.text(random_tokens(random.Random(i), n)) for i, n in enumerate([200, 3, 9, 5, 6])]
    for text in texts:
        world.run([(text, len(text.tokens) - 1)])
    batch = world.batch([(text, 1) for text in texts])
    parts = Plan(batch, 0, 0, world.config.num_kv_heads, 80).parts
    read = [part.span.num * part.span.length for part in parts]
    assert sum(read) <= sum(len(text.tokens) for text in texts) + MOST_PADDING
    assert len(Plan(world.batch([(text, 1) for text in texts[1:]]), 0, 0, 2, 80).parts) == 1


def test_layers_that_keep_the_same_tokens_share_a_group():
    assert page_groups(FAMILIES["llama"]) == ([0], [0, 0, 0])
    assert page_groups(FAMILIES["mistral"]) == ([20], [0, 0, 0])
    assert page_groups(FAMILIES["gemma"]) == ([0, 20], [1, 0, 1])


def test_a_page_has_the_bytes_that_it_is_said_to_have():
    for kv_dtype in ("auto", "int8", "fp8"):
        config = FAMILIES["gemma"]
        pages = Pages(config, [8, 4], PAGE, device="cpu", dtype=torch.bfloat16, kv_dtype=kv_dtype)
        said = [Pages.bytes_per_page(config, group, PAGE, kv_dtype, torch.bfloat16) for group in (0, 1)]
        assert pages.release() == 8 * said[0] + 4 * said[1]
    assert said == [2 * 1 * PAGE * 2 * (8 + 4), 2 * 2 * PAGE * 2 * (8 + 4)]


def test_memory_that_nobody_wrote_costs_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = Pages(FAMILIES["llama"], [1 << 20], PAGE, device="cpu", dtype=torch.float32)
    assert sum(memory.nbytes for memory in (*pages.keys, *pages.values)) > 6e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
