"""On a GPU every fast path writes the same text: CUDA graphs, overlap, shared prefixes, adapters, sleep; and the
batch-invariant mode the same bits. Run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_llm_invariant import bits

from llmasos.inference.llm import LLM
from llmasos.inference.request import RequestOutput, SamplingParams
from llmasos.models.load import load_model
from tiny import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDE,  # heads of 64
    "qwen3": {**WIDE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    "gemma3": {
        **WIDE,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 64,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
ADAPTED = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (128, 256), "mlp.down_proj": (256, 512)}
FEW = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "kv_cache_memory": 256 << 20}
Job = tuple[list[int], SamplingParams, str | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("graphs")
    return {name: write_tiny_model(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    ranks = {"a": 4, "b": 16, "c": 40}
    return {n: write_tiny_adapter(root / n, seed=r, rank=r, shapes=ADAPTED) for n, r in ranks.items()}


def load(folder: Path, device: str = DEVICE, dtype: str = "float32", **options: Any) -> LLM:
    """In float32, where two ways to sum hardly ever choose different tokens."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return LLM(load_model(folder, device=device, dtype=dtype), name=device, **{**FEW, **options})


@pytest.fixture
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with load(folders["llama"]) as llm:
        yield llm


def jobs(num: int, names: str = "") -> list[Job]:
    """Greedy and sampled; of four, the last three begin with the same 300 tokens: enough for a shared pass."""
    rng = random.Random(0)
    head = [rng.randrange(5, 250) for _ in range(300)]
    out: list[Job] = []
    for i in range(num):
        own = [rng.randrange(5, 250) for _ in range(rng.choice([1, 9, 70]))]
        options: dict[str, Any] = {"seed": i, "top_p": 0.9} if i % 3 == 2 else {"temperature": 0}
        params = SamplingParams(max_tokens=rng.choice([6, 24, 40]), ignore_eos=True, **options)
        out.append((head + own if i % 4 else own, params, (*names, None)[i % (len(names) + 1)]))
    return out


def results(llm: LLM, work: list[Job]) -> list[RequestOutput]:
    """All at once."""

    async def ask() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(llm.acomplete([ids], [params], adapter=name) for ids, params, name in work))

    return [output for outputs in asyncio.run(ask()) for output in outputs]


def tokens(llm: LLM, work: list[Job]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in results(llm, work)]


def graphs(llm: LLM) -> dict[tuple[int, int, bool, bool], Any]:
    engine = llm._loop.current_engine
    assert engine is not None
    return {} if engine.runner._graphs is None else engine.runner._graphs.graphs  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_and_overlap_write_what_the_cpu_writes(shape: str, folders: dict[str, Path]) -> None:
    work = jobs(16)
    with load(folders[shape], "cpu") as llm:
        expected = tokens(llm, work)
    with load(folders[shape], enforce_eager=True) as llm:
        assert tokens(llm, work) == expected
        assert not graphs(llm)
    with load(folders[shape]) as llm:
        assert tokens(llm, work) == expected
        assert {shared for _, _, shared, _ in graphs(llm)} == {False, True}
        for num in (1, 2, 3, 5, 9, 16):  # prefixes come from the cache now, and each number has its graph
            assert tokens(llm, work[:num]) == expected[:num]
        assert {size for size, *_ in graphs(llm)} >= {1, 2, 4, 8, 16}
        engine = llm._loop.current_engine
        assert engine is not None and engine.overlap
        engine.overlap = False
        assert tokens(llm, work) == expected


def test_adapters_run_in_graphs_of_their_own(llm: LLM, folders: dict[str, Path], adapters: dict[str, Path]) -> None:
    work = jobs(16, "ab")
    plain = jobs(16)
    unadapted = tokens(llm, plain)
    with load(folders["llama"], "cpu") as slow:
        for name in "abc":
            slow.load_adapter(name, adapters[name])
        expected, with_c = tokens(slow, work), tokens(slow, jobs(16, "abc"))
    for name in "ab":
        llm.load_adapter(name, adapters[name])
    assert tokens(llm, work) == expected != unadapted
    assert {adapted for *_, adapted in graphs(llm)} == {False, True}
    assert tokens(llm, plain) == unadapted, "graphs without adapters are what they were"
    for num in (1, 3, 9):
        assert tokens(llm, work[:num]) == expected[:num]
    llm.load_adapter("c", adapters["c"])  # of a higher rank: the adapters' memory moves
    assert tokens(llm, jobs(16, "abc")) == with_c
    assert tokens(llm, work) == expected
    for name in "abc":
        llm.unload_adapter(name)
    assert tokens(llm, plain) == unadapted
    llm.load_adapter("b", adapters["a"])  # other content in b's place
    assert tokens(llm, [(ids, params, name and "b") for ids, params, name in jobs(16, "a")]) == tokens_of_a(
        folders, adapters
    )


def tokens_of_a(folders: dict[str, Path], adapters: dict[str, Path]) -> list[tuple[int, ...]]:
    with load(folders["llama"], "cpu") as slow:
        slow.load_adapter("a", adapters["a"])
        return tokens(slow, jobs(16, "a"))


def test_a_model_that_slept_gives_its_memory_back_and_writes_the_same(llm: LLM, adapters: dict[str, Path]) -> None:
    llm.load_adapter("a", adapters["a"])
    work = jobs(9, "a")
    before = tokens(llm, work)
    held = torch.cuda.memory_allocated()
    freed = llm.sleep()
    assert freed > 20 << 20
    assert torch.cuda.memory_allocated() < held - 0.9 * freed
    assert not graphs(llm)
    assert tokens(llm, work) == before
    assert graphs(llm) and not llm.is_sleeping
    llm.sleep()
    assert len(llm.embed("The quick brown")) == 256
    assert tokens(llm, work) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_invariant_bits_do_not_depend_on_company(shape: str, dtype: str, folders: dict[str, Path]) -> None:
    work = [(ids, with_logprobs(params), None) for ids, params, _ in jobs(12)]
    with load(folders[shape], dtype=dtype, batch_invariant=True) as llm:
        alone = [bits(results(llm, [job])[0]) for job in work]
    with load(folders[shape], dtype=dtype, batch_invariant=True) as llm:
        assert [bits(out) for out in results(llm, work)] == alone
        order = list(reversed(range(12)))
        assert [bits(out) for out in results(llm, [work[i] for i in order])] == [alone[i] for i in order]


def with_logprobs(params: SamplingParams) -> SamplingParams:
    return replace(params, logprobs=1)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_keys_and_values_serve_graphs_too(shape: str, kv_dtype: str, folders: dict[str, Path]) -> None:
    work = jobs(9)
    text = "The quick brown fox jumps over the lazy dog. What is the capital of France? " * 6
    with load(folders[shape]) as llm:
        exact = llm.score(text).logprob
    with load(folders[shape], kv_cache_dtype=kv_dtype, enforce_eager=True) as llm:
        expected = tokens(llm, work)
        assert llm.score(text).logprob == pytest.approx(exact, rel=0.05)
    with load(folders[shape], kv_cache_dtype=kv_dtype) as llm:
        assert [len(ids) for ids in tokens(llm, work)] == [params.max_tokens for _, params, _ in work]
        # one rounding that differs may change a token: most texts are the same
        same = [a == b for a, b in zip(tokens(llm, work), expected, strict=True)]
        assert sum(same) > len(same) // 2
        assert graphs(llm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_write_what_one_does(folders: dict[str, Path]) -> None:
    work = jobs(16)
    with load(folders["llama"]) as llm:
        expected = tokens(llm, work)
    options: dict[str, Any] = {**FEW, "tensor_parallel_size": 2}
    with LLM.from_pretrained(folders["llama"], device="cuda", dtype="float32", **options) as both:
        assert isinstance(both, LLM)
        assert tokens(both, work) == expected
        for num in (1, 3, 9):
            assert tokens(both, work[:num]) == expected[:num]
        assert both.sleep() > 20 << 20
        assert tokens(both, work) == expected


def test_memory_is_measured_and_bounded(folders: dict[str, Path]) -> None:
    total = torch.cuda.mem_get_info()[1]
    options: dict[str, Any] = {"kv_cache_memory": None, "gpu_memory_utilization": 0.3, "max_model_len": 1024}
    with load(folders["llama"], max_num_batched_tokens=2048, **options) as llm:
        assert tokens(llm, jobs(4))
        free = torch.cuda.mem_get_info()[0]
        assert total - free < 0.35 * total
