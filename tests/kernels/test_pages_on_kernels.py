"""Pages answer alike with kernels and with torch."""

import random

import pytest
import torch

from llmasos.inference import pages as pages_module
from paged_world import FAMILIES, random_tokens, world_of

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="takes the kernels on a CPU, in the interpreter; test_graphs.py takes them on a GPU",
)


@pytest.mark.parametrize(("family", "kv_dtype"), [("llama", "auto"), ("gemma", "int8")])
def test_the_kernels_serve_a_pass_as_torch_does(family, kv_dtype, monkeypatch):
    worlds = []
    for kernels in (False, True):
        monkeypatch.setattr(pages_module, "uses_kernels", lambda *_, kernels=kernels: kernels)
        worlds.append(world_of(FAMILIES[family], kv_dtype=kv_dtype))
    rng = random.Random(0)
    prompts = [random_tokens(rng, n) for n in (22, 7, 18)]
    results = []
    for world in worlds:
        texts = [world.text(p) for p in prompts]
        passes = [[(texts[0], 20), (texts[1], 5)], [(texts[0], 1), (texts[2], 17)], [(t, 1) for t in texts]]
        results.append(torch.cat([world.run(work) for work in passes]))
    tolerance = 1e-4 if kv_dtype == "auto" else 2e-2  # halves round to even in torch, up in the kernel
    torch.testing.assert_close(*results, atol=tolerance, rtol=0)
