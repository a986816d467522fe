"""Attention over pages equals the contiguous cache, whatever the passes are made of and wherever the pages lie."""

from __future__ import annotations

import random

import pytest
import torch

from paged_world import FAMILIES, Text, alone, random_tokens, world_of


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
    for _ in range(25):
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
