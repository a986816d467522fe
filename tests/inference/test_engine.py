"""Every fast path of the engine gives the tokens of the slow one (`plain`), in float32; what fails, fails alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Oracle, Results, check_idle, engine_of, finish, model_of, request_of, run
from plain import next_logits, plain, plain_scored
from test_gpt_families import FAMILIES as GPT_FAMILIES
from test_llama_families import LLAMA3, YARN, gemma3, read
from test_llama_families import SIZES as HF_SIZES
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from llmasos.errors import InsufficientMemoryError, InvalidInputError, ServerError
from llmasos.inference.engine import SMALLEST_CHUNK, Engine
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.inference.scheduler import Plan
from llmasos.inference.speculate import NGramProposer, SpeculativeConfig, Speculator
from llmasos.inference.state import Request
from llmasos.models.config import ModelConfig
from llmasos.models.families import config_from_hf
from llmasos.models.load import LoadedModel
from paged_world import config_of

SHARED = list(range(10, 50))


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def odd_then_even(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Depends on every token before, so that one that comes late shows."""
    logits = logits.clone()
    logits[sum(output) % 2 :: 2] -= 3
    return logits


WORDS = StructuredOutput(regex="(fox|dog|cat)( and (fox|dog|cat)){3,5}")
OBJECT = StructuredOutput(json={"type": "object", "properties": {"quick": {"enum": ["brown", "lazy"]}}})
MIX: list[tuple[list[int], SamplingParams]] = [
    ([*SHARED, 60], greedy(24)),
    ([*SHARED, 61, 62], greedy(9, logprobs=2)),
    (SHARED[:7], SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True)),
    (SHARED, SamplingParams(n=2, seed=2, max_tokens=30, temperature=1.4, top_p=0.9, logprobs=0)),
    ([5, 6], SamplingParams(seed=3, max_tokens=30, repetition_penalty=1.3, frequency_penalty=0.4)),
    ([5, 6, 7], SamplingParams(seed=4, max_tokens=16, top_k=9, typical_p=0.9, logit_bias={9: 2.0, 12: -1.0})),
    (list(range(20, 90)), SamplingParams(seed=5, max_tokens=12, min_p=0.02, logits_processors=(odd_then_even,))),
    ([*SHARED, 60], SamplingParams(seed=6, max_tokens=40, structured=WORDS)),
    ([7], SamplingParams(temperature=0, max_tokens=40, structured=OBJECT)),
    (
        [8, 9, 10],
        SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.2, stop_token_ids=(*range(90, 120),)),
    ),
]
BEAMS = [
    ([*SHARED, 63], SamplingParams(num_beams=3, n=2, max_tokens=12)),
    ([9], SamplingParams(num_beams=4, max_tokens=9)),
]


@pytest.fixture(scope="module")
def expected(tiny_llm: LLM) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Tokens of MIX by the slow path; those of BEAMS one request at a time (equal to transformers: test_beam)."""
    texts = [[plain(tiny_llm.model, ids, params, i) for i in range(params.n)] for ids, params in MIX]
    beams = []
    for ids, params in BEAMS:
        request = request_of(ids, params)
        beams.append(run(engine_of(tiny_llm.model), [request]).tokens[request])
    return texts, beams


def ngram(engine: Engine) -> None:
    always_draft(engine, NGramProposer(3, 1), 3)


def always_draft(engine: Engine, proposer: Any, k: int) -> None:
    engine.speculator = Speculator(proposer, k)
    engine.speculator.controller.num_drafts = lambda id, num_sequences: k  # type: ignore[method-assign]


FEW_PAGES = {"num_pages": 14, "max_model_len": 128}
CHUNKS = {"max_num_batched_tokens": 11}
MODES: dict[str, tuple[dict[str, Any], Callable[[Engine], bool]]] = {
    "plain": ({}, lambda e: e.stats.num_cached_tokens > 0),
    "chunks": (CHUNKS, lambda e: e.stats.num_steps > 60),
    "few pages": (FEW_PAGES, lambda e: e.stats.num_preemptions > 0),
    "few rows": ({"max_num_seqs": 4}, lambda e: e.stats.num_steps > 60),
    "no cached prefixes": ({"enable_prefix_caching": False}, lambda e: e.stats.num_cached_tokens == 0),
    "n-grams": ({"draft": "ngram"}, lambda e: e.stats.num_accepted_tokens > 10),
    "an oracle": ({"draft": "oracle"}, lambda e: e.stats.num_accepted_tokens > 50),
    "all at once": (
        FEW_PAGES | CHUNKS | {"draft": "oracle"},
        lambda e: min(e.stats.num_accepted_tokens, e.stats.num_preemptions) > 0,
    ),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("mode", MODES)
def test_all_kinds_of_requests_at_once_give_what_each_gives_slowly(
    tiny_llm: LLM, expected: Any, mode: str, overlap: bool
) -> None:
    options, happened = MODES[mode]
    draft = options.get("draft")
    engine = engine_of(tiny_llm.model, overlap=overlap, **{k: v for k, v in options.items() if k != "draft"})
    texts, beams = expected
    if draft == "ngram":
        ngram(engine)
    elif draft == "oracle":
        known = [[*ids, *t] for (ids, _), some in zip(MIX, texts, strict=True) for t in some]
        always_draft(engine, Oracle(known), 4)
    requests = [request_of(ids, params, arrival=float(i)) for i, (ids, params) in enumerate([*MIX, *BEAMS])]
    for _ in range(2):  # the second time with the prefixes of the first
        results = run(engine, requests)
        assert [results.tokens[r] for r in requests] == [*texts, *beams]
        requests = [request_of(r.prompt, r.params, arrival=r.arrival) for r in requests]
    assert happened(engine), engine.stats


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
def test_a_draft_model_changes_no_token(tiny_llm: LLM, tiny_model: Path, expected: Any, overlap: bool) -> None:
    speculative = SpeculativeConfig(method="draft", model=str(tiny_model), num_speculative_tokens=3)
    engine = engine_of(tiny_llm.model, overlap=overlap, speculative=speculative)
    assert engine.speculator is not None
    engine.speculator.controller.num_drafts = lambda id, num_sequences: 3  # type: ignore[method-assign]
    requests = [request_of(ids, params) for ids, params in MIX]
    results = run(engine, requests)
    assert [results.tokens[r] for r in requests] == expected[0]
    assert engine.stats.num_accepted_tokens > 50


def test_drafting_is_judged_by_the_time_of_the_step_that_drafts(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, speculative=SpeculativeConfig(num_speculative_tokens=3))
    assert engine.speculator is not None
    told: list[tuple[int, float]] = []

    def record_step(num: int, drafted: int, seconds: float) -> None:
        told.append((num, seconds))

    engine.speculator.controller.record_step = record_step  # type: ignore[method-assign]
    engine.add(request_of(SHARED, greedy(8)))
    steps: list[float] = []
    while engine.has_work:
        engine.step()
        steps.append(engine.stats.last_step_seconds)
    assert told == [(1, seconds) for seconds in steps[1:]], "once each, proposing included"


# families


def hf(config: Any) -> ModelConfig:
    keys = json.loads(json.dumps(config.to_dict()))
    return config_from_hf(keys | {"architectures": []})


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA_FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**HF_SIZES, attention_bias=True, mlp_bias=True, head_dim=12),
    "llama-3": LlamaConfig(**HF_SIZES, rope_parameters=dict(LLAMA3)),
    "llama-dynamic": LlamaConfig(**HF_SIZES | {"max_position_embeddings": 32}, rope_parameters=DYNAMIC),
    "mistral": MistralConfig(**HF_SIZES, sliding_window=8, head_dim=16),
    "qwen2": Qwen2Config(**HF_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2-yarn": Qwen2Config(**HF_SIZES, rope_parameters=dict(YARN)),
    "qwen3": Qwen3Config(**HF_SIZES, head_dim=16, attention_bias=True),
    "smollm3": SmolLM3Config(**HF_SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=8),
    "granite": GraniteConfig(**HF_SIZES, attention_multiplier=0.4, residual_multiplier=0.22, logits_scaling=0.7),
    "phi3-longrope": Phi3Config(**HF_SIZES, original_max_position_embeddings=32, rope_parameters=dict(LONGROPE)),
    "olmo": OlmoConfig(**HF_SIZES, clip_qkv=0.8),
    "olmo2": Olmo2Config(**HF_SIZES),
    "stablelm": StableLmConfig(**HF_SIZES, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": Starcoder2Config(**HF_SIZES, sliding_window=8),
    "gemma": GemmaConfig(**HF_SIZES, head_dim=16),
    "gemma2": Gemma2Config(**HF_SIZES, head_dim=16, sliding_window=8, attn_logit_softcapping=3.0),
    "gemma3": gemma3(),
}
FAMILIES = {name: lambda c=c: read(c) for name, c in LLAMA_FAMILIES.items()}
FAMILIES |= {name: lambda c=c: hf(c) for name, c in GPT_FAMILIES.items()}


def draw_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(n)] for n in lengths]


def preempting(engine: Engine) -> Callable[[int], object]:
    """Before every fifth step the sequence that came last loses its pages, as if they had run out."""
    return lambda step: step % 5 == 4 and engine.scheduler.preempt(max(engine.scheduler.running, key=lambda s: s.rank))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_of_every_family_is_that_of_the_slow_path(name: str) -> None:
    """Together, in chunks of a few tokens, preempted, with drafts, overlapped: across windows, and across the
    length where dynamic and longrope change their frequencies (32)."""
    model = model_of(FAMILIES[name]())
    prompts = draw_prompts((5, 20, 28, 40), model.config.vocab_size)
    # random models repeat themselves for ever, unless that costs them something
    params = greedy(20, frequency_penalty=1.0, logprobs=0)
    slow = [tuple(zip(*plain_scored(model, ids, params), strict=True)) for ids in prompts]
    known = [[*ids, *tokens] for ids, (tokens, _) in zip(prompts, slow, strict=True)]
    for options in ({}, {"max_num_batched_tokens": 9}, {"num_pages": 12, "max_num_batched_tokens": 16}):
        for drafts, overlap in ((False, True), (True, False)):
            engine = engine_of(model, overlap=overlap, max_num_seqs=4, max_model_len=64, **options)
            if drafts:
                always_draft(engine, Oracle(known, every=5), 3)
            requests = [request_of(ids, params) for ids in prompts]
            results = run(engine, requests, preempting(engine) if "num_pages" in options else lambda step: None)
            for request, (tokens, logprobs) in zip(requests, slow, strict=True):
                assert results.tokens[request] == [list(tokens)], (options, drafts, overlap)
                assert results.logprobs[request][0] == pytest.approx(logprobs, abs=1e-4), (options, drafts, overlap)


@pytest.mark.parametrize("kind", ["fp8", "int8", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma", "bloom"])
def test_keys_of_few_bits_change_log_probabilities_by_little(family: str, kind: str) -> None:
    from paged_world import FAMILIES as TINY

    model = model_of(TINY[family])
    ids = draw_prompts((60,), model.config.vocab_size)[0]
    found = []
    for kv in ("float32", kind):
        engine = engine_of(model, kv_cache_dtype=kv, max_num_batched_tokens=16)
        request = request_of(ids, greedy(0, prompt_logprobs=0), score_from=1)
        scores = run(engine, [request]).states[request].prompt_logprobs
        found.append(torch.tensor([scores[i][0].logprob for i in range(1, 60)]))
        assert len(run(engine, [request_of(ids, greedy(10))]).ended) == 1
    off = (found[0] - found[1]).abs()
    assert 0 < off.max() < 0.5 and off.mean() < 0.08


# numbers


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
def test_prompt_logprobs_are_the_same_in_chunks_and_behind_cached_prefixes(tiny_llm: LLM, overlap: bool) -> None:
    ids = [*SHARED, *range(60, 100)]
    logprobs = [
        logits.log_softmax(-1) for logits in (next(next_logits(tiny_llm.model, ids[:i])) for i in range(1, len(ids)))
    ]
    for options in ({}, CHUNKS):
        engine = engine_of(tiny_llm.model, overlap=overlap, **options)
        run(engine, [request_of(SHARED, greedy(1))])
        whole = request_of(ids, greedy(3, prompt_logprobs=2, n=1), score_from=1)
        rest = request_of(ids, greedy(0), score_from=60)
        found = run(engine, [whole, rest, request_of([*SHARED, 3], greedy(5))])
        scores = found.states[whole].prompt_logprobs
        assert sorted(scores) == list(range(1, len(ids)))
        for position, (raw, best) in scores.items():
            row = logprobs[position - 1]
            assert raw.token_id == ids[position]
            assert raw.logprob == pytest.approx(float(row[ids[position]]), abs=1e-4)
            assert [p for _, p in raw.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            assert best == (int(row.argmax()) == ids[position])
        assert sorted(found.states[rest].prompt_logprobs) == list(range(60, len(ids)))
        assert found.states[rest].num_cached == 48, "what need not be scored is not computed"
        assert found.tokens[whole] == [plain(tiny_llm.model, ids, greedy(3))] and found.tokens[rest] == [[]]


def test_logprobs_are_those_of_the_tokens_also_where_drafts_are_verified(tiny_llm: LLM) -> None:
    ids, params = SHARED, greedy(20, logprobs=3)
    tokens = plain(tiny_llm.model, ids, params)
    engine = engine_of(tiny_llm.model)
    always_draft(engine, Oracle([[*ids, *tokens]], every=3), 4)
    request = request_of(ids, params)
    found = run(engine, [request]).logprobs[request][0]
    rows = [next(next_logits(tiny_llm.model, ids + tokens[:i])).log_softmax(-1) for i in range(20)]
    assert found == pytest.approx([float(row[t]) for row, t in zip(rows, tokens, strict=True)], abs=1e-4)


def test_no_tokens_wanted_is_nothing_to_do_but_to_score(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model)
    nothing = request_of([5, 6], greedy(0, n=3))
    scored = request_of([5, 6], greedy(0, n=2), score_from=1)
    found = run(engine, [nothing, scored])
    assert found.reasons[nothing] == dict.fromkeys(range(3), "length")
    assert found.reasons[scored] == dict.fromkeys(range(2), "length")
    assert list(found.states[scored].prompt_logprobs) == [1]


# order


def test_the_most_urgent_go_first_and_equals_in_order_of_arrival(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, max_num_seqs=1)
    priorities = [0, 5, -1, 0, 5, -1]
    requests = [request_of([7, i + 5], greedy(3), priority=p, arrival=float(i)) for i, p in enumerate(priorities)]
    ended = run(engine, requests).ended
    assert [requests.index(r) for r in ended] == [2, 5, 0, 3, 1, 4]


def test_metrics_say_what_happened(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, max_num_seqs=1)
    first, second = request_of(SHARED, greedy(4)), request_of([*SHARED, 5], greedy(6, n=2))
    found = run(engine, [first, second])
    one, two = (found.states[r].metrics() for r in (first, second))
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 32)
    assert (one.num_output_tokens, two.num_output_tokens) == (4, 12)
    assert 0 < one.queue_seconds <= one.time_to_first_token < two.queue_seconds <= two.time_to_first_token
    assert one.decode_seconds > 0 and one.time_per_output_token == pytest.approx(one.decode_seconds / 3)
    stats = engine.stats
    assert (stats.num_finished, stats.num_failed, stats.num_generated_tokens) == (2, 0, 16)
    assert stats.num_cached_tokens == 32


# what fails, fails alone


OTHERS = [(SHARED, greedy(20)), ([5, 6], SamplingParams(seed=1, n=2, max_tokens=15, ignore_eos=True)), *BEAMS[:1]]


def texts_of_others(model: LoadedModel) -> list[list[list[int]]]:
    requests = [request_of(ids, params) for ids, params in OTHERS]
    tokens = run(engine_of(model), requests).tokens
    return [tokens[r] for r in requests]


def check_others(engine: Engine, guilty: Sequence[Request], alone: list[list[list[int]]]) -> Results:
    """OTHERS beside `guilty`: their texts are those they have alone. Returns all results."""
    others = [request_of(ids, params) for ids, params in OTHERS]
    results = run(engine, [others[0], *guilty, *others[1:]])
    assert [results.tokens[r] for r in others] == alone
    assert all(r in results.errors for r in guilty) and not any(r in results.errors for r in others)
    return results


def raises(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output) == 3:
        raise KeyError("a mistake")
    return logits


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("processor", [raises, lambda output, logits: None], ids=["raises", "returns nothing"])
def test_a_processor_that_fails_ends_its_own_request(tiny_llm: LLM, processor: Any, overlap: bool) -> None:
    engine = engine_of(tiny_llm.model, overlap=overlap)
    guilty = [request_of([9, 9], greedy(10, n=n, logits_processors=(processor,))) for n in (1, 2)]
    found = check_others(engine, guilty, texts_of_others(tiny_llm.model))
    assert all(isinstance(found.errors[r], InvalidInputError) for r in guilty)
    assert "processor" in str(found.errors[guilty[0]])


def test_what_can_never_run_is_refused_before_it_is_queued(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, num_pages=6, max_model_len=48)
    with pytest.raises(InsufficientMemoryError, match="100 tokens"):
        engine.add(request_of([5] * 90, greedy(10)))
    with pytest.raises(InvalidInputError, match="num_beams=9"):
        engine.add(request_of([5], SamplingParams(num_beams=9, max_tokens=2)))
    with pytest.raises(InvalidInputError):
        engine.add(
            request_of(
                [5], greedy(2) if False else SamplingParams(max_tokens=2, structured=StructuredOutput(regex="("))
            )
        )
    with pytest.raises(InvalidInputError, match="adapter"):
        engine.add(request_of([5], greedy(2), adapter="none"))
    check_idle(engine)


POISON = 77


def failing_forward(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: Callable[[Any], Exception | None]) -> None:
    forward = engine.runner.forward

    def checked(step: Any) -> Any:
        if (error := fails(step)) is not None:
            raise error
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", checked)


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("after", [0, 3, 11])
def test_a_pass_that_fails_once_is_done_again(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, after: int, overlap: bool
) -> None:
    engine = engine_of(tiny_llm.model, overlap=overlap, **CHUNKS)
    left = [after]

    def fails(step: Any) -> Exception | None:
        left[0] -= len(step.seq_lens) > 1
        return RuntimeError("a cosmic ray") if left[0] == -1 and len(step.seq_lens) > 1 else None

    failing_forward(engine, monkeypatch, fails)
    check_others(engine, [], texts_of_others(tiny_llm.model))
    assert left[0] < -1


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("position", [0, 30], ids=["first chunk", "a later chunk"])
def test_a_prompt_that_breaks_its_pass_fails_alone(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, position: int, overlap: bool
) -> None:
    engine = engine_of(tiny_llm.model, overlap=overlap, **CHUNKS)
    failing_forward(engine, monkeypatch, lambda s: ValueError("poison") if POISON in s.tokens else None)
    prompt = [*range(80, 80 + position), POISON, 80]
    found = check_others(engine, [request_of(prompt, greedy(5))], texts_of_others(tiny_llm.model))
    (error,) = found.errors.values()
    assert isinstance(error, ServerError) and "poison" in str(error)
    assert engine.stats.num_steps < 200
    assert engine.stats.num_failed == 1
    check_others(engine, [], texts_of_others(tiny_llm.model))


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
def test_short_memory_makes_passes_smaller(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    engine = engine_of(tiny_llm.model, overlap=overlap)
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    failing_forward(engine, monkeypatch, lambda s: out_of_memory if len(s.tokens) > 100 else None)
    prompts = draw_prompts((150, 160, 90), tiny_llm.model.config.vocab_size)
    requests = [request_of(ids, greedy(8)) for ids in prompts]
    results = run(engine, requests)
    assert [results.tokens[r][0] for r in requests] == [plain(tiny_llm.model, ids, greedy(8)) for ids in prompts]
    assert engine.scheduler.chunk >= SMALLEST_CHUNK


def test_one_that_does_not_fit_into_memory_at_all_fails_with_the_counts(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llm.model)
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    failing_forward(engine, monkeypatch, lambda s: out_of_memory if POISON in s.tokens else None)
    found = check_others(engine, [request_of([POISON, 8], greedy(5))], texts_of_others(tiny_llm.model))
    (error,) = found.errors.values()
    assert isinstance(error, InsufficientMemoryError) and "2 tokens" in str(error)


def test_readers_pause_and_go_on_while_a_pass_is_recovered(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that begins or ends between the suspects' passes holds afterwards."""
    engine = engine_of(tiny_llm.model)
    requests = [request_of([*SHARED[:20], i], greedy(12)) for i in range(4)]
    failed = []

    def fails(step: Any) -> Exception | None:
        if not failed and engine.stats.num_steps == 4:
            failed.append(engine.stats.num_steps)
            return RuntimeError("once")
        return None

    failing_forward(engine, monkeypatch, fails)
    results = Results()
    for request in requests:
        engine.add(request)
    for step in range(40):
        if step == 3:
            engine.pause(requests[0], True)
        if step == 6:  # the suspects run one by one now
            assert engine._suspects
            engine.pause(requests[0], False)
            engine.pause(requests[1], True)
        for output in engine.step():
            results.take(output)
    assert requests[1] not in results.ended and len(results.ended) == 3
    assert not engine.has_work
    engine.pause(requests[1], False)
    assert engine.has_work
    finish(engine, results)
    expected = [[plain(tiny_llm.model, r.prompt, greedy(12))] for r in requests]
    assert [results.tokens[r] for r in requests] == expected
    check_idle(engine)


# anything at any time


def random_request(rng: random.Random) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
    start = rng.choice([0, 0, 16, 33, 40])
    prompt = (*SHARED[:start], *(rng.randrange(5, 50) for _ in range(rng.randint(1, 30))))
    params: dict[str, Any] = {
        "max_tokens": rng.randint(1, 24),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "seed": rng.randrange(4),
    }
    params["temperature"] = rng.choice([0.0, 1.0, 1.5])
    if rng.random() < 0.3:
        params |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
    if rng.random() < 0.3:
        params["stop_token_ids"] = tuple(range(8))
    if rng.random() < 0.2:
        params["logits_processors"] = (odd_then_even,)
    return prompt, params, {"priority": rng.choice([0, 0, 0, -1, 3]), "cache_salt": rng.choice([None, None, "a"])}


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize(("window", "drafts"), [(0, False), (20, False), (0, True)], ids=["full", "windows", "drafts"])
def test_random_requests_with_cancels_and_pauses_are_as_alone_and_leak_nothing(
    window: int, drafts: bool, overlap: bool
) -> None:
    rng = random.Random(f"{window}{drafts}{overlap}")
    changes = {"sliding_window": window, "layer_types": ("sliding", "full", "sliding")} if window else {}
    model = model_of(config_of(**changes))
    engine = engine_of(model, overlap=overlap, num_pages=13, max_model_len=100, max_num_batched_tokens=24)
    if drafts:
        ngram(engine)
    results, live, gone = Results(), [], set()
    waiting = [random_request(rng) for _ in range(60)]

    def meddle(step: int) -> None:
        if waiting and (rng.random() < 0.3 or not live):
            prompt, params, options = waiting.pop()
            request = request_of(prompt, SamplingParams(**params), arrival=float(step), **options)
            engine.add(request)
            live.append(request)
        if live and rng.random() < 0.1:
            victim = live.pop(rng.randrange(len(live)))
            gone.add(victim)
            engine.abort(victim)
        for request in live:
            if rng.random() < 0.1:
                engine.pause(request, rng.random() < 0.4)
        if step % 10 == 0:
            engine.scheduler.check_integrity()

    step = 0
    while waiting or engine.has_work or any(r not in results.ended and r not in gone for r in live):
        meddle(step)
        if not waiting and not engine.has_work:
            for request in live:
                engine.pause(request, False)
        for output in engine.step():
            assert output.request not in gone
            results.take(output)
        live = [r for r in live if r not in results.ended]
        step += 1
        assert step < 20_000
    check_idle(engine)
    assert len(results.ended) + len(gone - set(results.ended)) == 60 and len(results.ended) > 20
    for request in results.ended:
        params = request.params
        assert results.tokens[request] == [plain(model, request.prompt, params, i) for i in range(params.n)], request
    assert engine.stats.num_preemptions > 0


def test_plans_are_never_empty_while_something_could_run(tiny_llm: LLM) -> None:
    engine = engine_of(tiny_llm.model, **FEW_PAGES)
    plans: list[Plan] = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]  # type: ignore[method-assign,func-returns-value]
    run(engine, [request_of(ids, params) for ids, params in MIX])
    assert all(plan.items or plan.preempted for plan in plans)
