"""Batch-invariant mode on a CPU through LLM: bit for bit what a request gets alone, whatever runs beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llmasos.errors import UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.inference.request import RequestOutput, SamplingParams
from llmasos.inference.speculate import SpeculativeConfig
from llmasos.models.load import load_model
from tiny import write_tiny_model

GEMMA: dict[str, Any] = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16}
GEMMA |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
LONG = {"max_position_embeddings": 512}
FEW = {"max_model_len": 200, "max_num_seqs": 6, "max_num_batched_tokens": 40}
GUESSING = {"speculative": SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_min=1)}


def requests_of(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts shorter than a pass and longer, some with a common beginning; greedy, sampled, two texts of one."""
    rng = random.Random(seed)
    head = [rng.randrange(5, 250) for _ in range(148)]
    out = []
    for i in range(9):
        shared = {6: len(head), 8: len(head), 5: 20}.get(i, 0)
        own = [rng.randrange(5, 250) for _ in range([1, 30, 7][i % 3])]
        options: dict[str, Any] = {"temperature": 0} if i % 3 == 0 else {"seed": i, "top_p": [0.9, 1.0][i % 2]}
        options |= {"n": 2} if i in (4, 8) else {}
        params = SamplingParams(max_tokens=[45, 30, 15][i // 3], ignore_eos=True, logprobs=1, **options)
        out.append((head[:shared] + own, params))
    return out


def bits(output: RequestOutput) -> list[Any]:
    """Tokens, and their log-probabilities to the last bit."""
    return [(c.token_ids, [(p.logprob, p.top) for p in c.logprobs or ()]) for c in output.outputs]


@pytest.mark.parametrize(
    ("changes", "dtype", "num_pages"),
    [({}, "float32", 17), ({}, "bfloat16", 17), (GEMMA, "float32", 17)],
    ids=["llama", "llama in bfloat16", "gemma"],
)
def test_a_request_gets_the_bits_that_it_gets_alone(
    changes: dict[str, Any], dtype: str, num_pages: int, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", **{**LONG, **changes})
    requests = requests_of(len(dtype) + num_pages)
    prompts, params = [list(p) for p, _ in requests], [p for _, p in requests]
    model = load_model(folder, device="cpu", dtype=dtype)
    size = 16 * 2 * 2 * 2 * model.config.head_dim * (4 if dtype == "float32" else 2)
    memory = {"kv_cache_memory": num_pages * size}
    with LLM(model, name="alone", batch_invariant=True, enable_prefix_caching=False, max_num_seqs=1) as llm:
        alone = [bits(llm.complete([p], [s])[0]) for p, s in zip(prompts, params, strict=True)]
    preemptions = 0
    for guessing in ({}, GUESSING):
        with LLM(model, name="together", batch_invariant=True, **FEW, **memory, **guessing) as llm:
            for _ in range(2):  # the second time with prefixes of the first in the cache
                assert [bits(o) for o in llm.complete(prompts, params)] == alone
            assert llm.stats.num_cached_tokens > 148
            assert (llm.stats.num_accepted_tokens > 0) == bool(guessing)
            preemptions += llm.stats.num_preemptions
    assert preemptions


def test_without_the_mode_company_shows(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    model = load_model(write_tiny_model(tmp_path / "m", **LONG), device="cpu", dtype="float32")
    requests = requests_of(51)
    with LLM(model, name="plain", **FEW) as llm:
        together = [bits(o) for o in llm.complete([p for p, _ in requests], [s for _, s in requests])]
        alone = [bits(llm.complete([p], [s], cache_salt=str(i))[0]) for i, (p, s) in enumerate(requests)]
    assert together != alone


def test_adapters_are_refused(tiny_model: Path) -> None:
    with LLM(load_model(tiny_model, device="cpu"), name="tiny", batch_invariant=True) as llm:
        with pytest.raises(UnsupportedError, match="batch_invariant"):
            llm.load_adapter("a", "anywhere")
        assert llm.generate("The", max_tokens=2)
