"""A model in two processes through LLM: the texts of one, the same refusals, and an end that is said."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmasos.errors import DeviceError, InvalidInputError, LLMasOSError, UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.inference.parallel import ParallelRanks
from llmasos.inference.request import RequestOutput, SamplingParams, StructuredOutput
from tiny import write_tiny_adapter, write_tiny_model

PROMPTS = [
    "The quick brown fox",
    "What is the capital of France?",
    "Models are found, run, trained: an application answers questions about",
    "The",
]
FEW_PAGES = {"max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 40, "kv_cache_memory": 12 * 2048}


def load(folder: Path, **options: Any) -> LLM:
    llm = LLM.from_pretrained(folder, device="cpu", dtype="float32", **options)
    assert isinstance(llm, LLM)
    return llm


@pytest.fixture(scope="module")
def one(tiny_model: Path) -> Iterator[LLM]:
    with load(tiny_model, max_model_len=96) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(tiny_model: Path) -> Iterator[LLM]:
    threads = torch.get_num_threads()
    with load(tiny_model, tensor_parallel_size=2, **FEW_PAGES) as llm:
        yield llm
    torch.set_num_threads(threads)


def mixed() -> list[SamplingParams]:
    def params(**options: Any) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 50, "ignore_eos": True, **options})

    return [
        params(temperature=0),
        params(temperature=0, logprobs=3, prompt_logprobs=2),
        params(seed=1, n=3, top_p=0.9, max_tokens=30),
        params(seed=2, temperature=1.5, top_k=20, repetition_penalty=1.2, presence_penalty=0.3),
        params(seed=3, min_p=0.02, stop=("q", "7"), logit_bias={9: 2.0}),
        params(seed=4, structured=StructuredOutput(regex="(fox|dog)( and (fox|dog)){4,6}"), ignore_eos=False),
        params(temperature=0, num_beams=3, n=2, max_tokens=12),
        params(seed=5, typical_p=0.9, ignore_eos=False, logprobs=0),
    ]


def texts(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in out.outputs] for out in outputs]


def chances(outputs: list[RequestOutput]) -> list[float]:
    """Every log-probability that was asked for."""
    found = [p for out in outputs for p in out.prompt_logprobs or () if p is not None]
    found += [p for out in outputs for c in out.outputs for p in c.logprobs or ()]
    return [value for p in found for value in (p.logprob, *(t[2] for t in p.top))]


def test_every_kind_of_request_gets_one_processs_tokens_with_few_pages(one: LLM, two: LLM) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(mixed()))]
    alone, shared = (llm.complete(prompts, mixed()) for llm in (one, two))
    assert texts(shared) == texts(alone)
    assert len(chances(alone)) > 200
    assert chances(shared) == pytest.approx(chances(alone), abs=1e-4)
    assert two.stats.num_preemptions > 0 == one.stats.num_preemptions
    again = two.complete(prompts, mixed())  # prefixes from the cache
    assert texts(again) == texts(alone)
    assert two.stats.num_cached_tokens > 0


def test_streams_scores_and_embeddings_are_one_processs(one: LLM, two: LLM) -> None:
    for prompt in PROMPTS:
        assert "".join(c.text for c in two.stream(prompt, max_tokens=20)) == one.generate(prompt, max_tokens=20)
    stream = two.stream(PROMPTS[0], max_tokens=60, ignore_eos=True)
    next(stream)
    assert two.embed(PROMPTS) == [pytest.approx(v, abs=1e-5) for v in one.embed(PROMPTS)]  # between two steps
    stream.close()
    assert two.score(PROMPTS[1]).logprob == pytest.approx(one.score(PROMPTS[1]).logprob, abs=1e-3)


def test_what_several_processes_can_not_do_is_refused_for_that_request_only(one: LLM, two: LLM, tmp_path: Path) -> None:
    stream = two.stream(PROMPTS[0], max_tokens=40, ignore_eos=True)
    begun = next(stream).text
    with pytest.raises(UnsupportedError, match=r"function of yours.*tensor_parallel_size=1"):
        two.generate("The", logits_processors=(lambda output, logits: logits,))
    with pytest.raises(UnsupportedError, match=r"split over several devices.*tensor_parallel_size=1"):
        two.load_adapter("a", write_tiny_adapter(tmp_path / "a"))
    with pytest.raises(UnsupportedError, match="pooling='median'"):
        two.embed("The", pooling="median")
    with pytest.raises(UnsupportedError, match="only a part of the model"):
        two.save_pretrained(tmp_path / "m")
    assert begun + "".join(c.text for c in stream) == one.generate(PROMPTS[0], max_tokens=40, ignore_eos=True)


def test_all_processes_sleep_and_wake(two: LLM) -> None:
    before = two.generate(PROMPTS, max_tokens=20)
    assert two.sleep() > 0
    assert two.is_sleeping
    assert two.generate(PROMPTS, max_tokens=20) == before
    two.sleep()
    assert two.embed("The quick") == two.embed("The quick")
    assert not two.is_sleeping


def test_the_smallest_room_counts() -> None:
    workers = SimpleNamespace(local=SimpleNamespace(sizes=None), call=lambda method: [700, 500])
    assert ParallelRanks(workers).room() == 500  # type: ignore[arg-type]


def test_a_model_that_can_not_be_shared_out_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    with pytest.raises(InvalidInputError, match=r"tensor_parallel_size=3 does not divide .*4 heads.*1, 2, 4"):
        load(folder, tensor_parallel_size=3)
    bloom = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 4, "n_layer": 2}
    with pytest.raises(UnsupportedError, match="ALiBi"):
        load(write_tiny_model(tmp_path / "b", **bloom), tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="batch_invariant"):
        load(folder, tensor_parallel_size=2, batch_invariant=True)
    with pytest.raises(InvalidInputError, match="tensor_parallel_size=0"):
        load(folder, tensor_parallel_size=0)


def test_closing_ends_the_processes_in_order(two: LLM) -> None:
    [process] = ranks_of(two)
    two.close()
    assert process.exitcode == 0
    with pytest.raises(LLMasOSError, match=r"closed.*Load the model again"):
        two.generate("The")


def ranks_of(llm: LLM) -> list[Any]:
    assert llm._ranks is not None
    return llm._ranks.workers._processes


def test_a_killed_process_fails_what_runs_and_says_what_to_do(tiny_model: Path) -> None:
    with load(tiny_model, tensor_parallel_size=2) as llm:
        errors: list[Exception] = []

        def ask(prompt: str) -> None:
            with pytest.raises(DeviceError) as info:
                for _ in range(1000):
                    llm.generate(prompt, max_tokens=200, ignore_eos=True)
            errors.append(info.value)

        assert llm.generate("The", max_tokens=4)
        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        while llm.stats.num_running < len(PROMPTS):
            time.sleep(0.01)
        [process] = ranks_of(llm)
        os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()
        for thread in threads:
            thread.join()
        with pytest.raises(DeviceError, match=r"SIGKILL.*load the model again"):
            llm.generate("The", max_tokens=4)
        assert time.monotonic() - started < 10
        assert [str(e) for e in errors] == [str(errors[0])] * len(PROMPTS)
        assert "SIGKILL" in errors[0].message and "load the model again" in errors[0].hint
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("llmasos-rank")]
