"""Batch invariance on a CPU: the bits of a text do not depend on its company, nor on how its tokens are cut."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch

from llmasos.inference.invariant import TILE, in_tiles, make_invariant
from llmasos.inference.pages import Pages
from llmasos.models.config import RopeScaling
from llmasos.models.load import load_model
from paged_world import FAMILIES, PAGE, Text, World, random_tokens, world_of

STRETCHED = dataclasses.replace(FAMILIES["llama"], rope_scaling=RopeScaling("dynamic", 4.0, 16))
CONFIGS = FAMILIES | {
    "stretched": STRETCHED,
    "softcapped": dataclasses.replace(FAMILIES["gemma"], final_softcap=5.0, vocab_size=50),
}


def whole(world: World, tokens: list[int]) -> torch.Tensor:
    """Logits of a text computed in one pass of its own."""
    text = world.text(tokens)
    logits = world.module.logits(world.run([(text, len(tokens))]))
    world.release(text)
    return logits


def mixed(world: World, texts: list[list[int]], rng: random.Random) -> list[torch.Tensor]:
    """Logits of texts computed together in random pieces."""
    running = [world.text(tokens) for tokens in texts]
    parts: list[list[torch.Tensor]] = [[] for _ in running]
    while any(left(text) for text in running):
        chosen = [i for i, text in enumerate(running) if left(text) and rng.random() < 0.7]
        work = [(running[i], min(left(running[i]), rng.choice([1, 1, 3, 17, 40]))) for i in chosen]
        if work:
            logits = world.module.logits(world.run(work))
            for i, part in zip(chosen, logits.split([n for _, n in work]), strict=True):
                parts[i].append(part)
    return [torch.cat(p) for p in parts]


def left(text: Text) -> int:
    return len(text.tokens) - text.computed


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, torch.float32) for name in CONFIGS), ("llama", torch.bfloat16), ("gemma", torch.bfloat16)],
)
def test_a_text_has_the_same_bits_in_any_company(family, dtype):
    world = world_of(CONFIGS[family], dtype=dtype, batch_invariant=True)
    make_invariant(world.module)
    rng = random.Random(0)
    texts = [random_tokens(rng, n) for n in (35, 7, 20)]
    for tokens, together in zip(texts, mixed(world, texts, rng), strict=True):
        assert torch.equal(together, whole(world, tokens))


def test_without_it_bits_differ():
    world = world_of(FAMILIES["llama"])
    rng = random.Random(0)
    texts = [random_tokens(rng, n) for n in (35, 7, 20)]
    together = torch.cat(mixed(world, texts, rng))
    assert not torch.equal(together, torch.cat([whole(world, tokens) for tokens in texts]))


@pytest.mark.parametrize("num_rows", [1, TILE, TILE + 1, 3 * TILE - 1])
def test_tiles_have_one_shape_and_all_rows_come_back(num_rows):
    shapes = []

    def double(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    x = torch.randn(num_rows, 2, 3)
    assert torch.equal(in_tiles(double, TILE)(x), 2 * x)
    assert set(shapes) == {(TILE, 2, 3)}


@pytest.mark.shared
def test_a_low_bit_model_has_the_same_bits_in_any_company():
    folder = Path(os.environ["LLMASOS_TEST_DATA"])
    loaded = load_model(next(folder.rglob("SmolLM2-135M-Instruct.Q4_1.gguf")), with_tokenizer=False)
    make_invariant(loaded.module)
    pages = Pages(loaded.config, [80], PAGE, device="cpu", dtype=loaded.module.dtype, batch_invariant=True)
    world = World(loaded.config, loaded.module, pages)
    rng = random.Random(0)
    texts = [random_tokens(rng, n) for n in (100, 7, 60)]
    for tokens, together in zip(texts, mixed(world, texts, rng), strict=True):
        assert torch.equal(together, whole(world, tokens))
