"""The batched sampler on a CPU: each row gets what its parameters say, whatever stands beside it. The reference for
what stays is transformers. (tests/kernels/test_sample_kernel.py: the same by kernels.)"""

import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import (
    Sampler,
    SamplingRow,
    draw,
    make_batch,
    penalise,
    token_logprobs,
    uniform,
    uniforms,
)

CPU = torch.device("cpu")
SIZE = 2500
SAMPLER = Sampler(CPU)


def random_logits(num_rows: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), **options: Any) -> SamplingRow:
    made = SamplingRow(SamplingParams(**options), prompt)
    for token in output:
        made.add(token)
    return made


def kept_by_transformers(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """[V] bool."""
    temperature = options.get("temperature", 1.0)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if options.get("top_k"):
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        warpers.append(MinPLogitsWarper(options["min_p"]))
    if options.get("typical_p", 1.0) < 1:
        warpers.append(TypicalLogitsWarper(options["typical_p"]))
    return LogitsProcessorList(warpers)(torch.tensor([[0]]), logits[None].clone())[0] > -math.inf


MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.5, "top_k": 3000},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.5, "top_k": 50},
    {"min_p": 0.05},
    {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.2, "typical_p": 0.8},
    {"top_k": 200, "top_p": 0.99, "min_p": 0.01, "typical_p": 0.9},
    {"top_p": 0.0},
    {"top_k": 1},
]


def test_every_row_keeps_what_transformers_keeps() -> None:
    logits = random_logits(len(MIXED))
    probabilities = SAMPLER.probabilities(logits, make_batch([row(**o) for o in MIXED], [0] * len(MIXED)))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(MIXED)))
    for found, given, options in zip(probabilities, logits, MIXED, strict=True):
        if options.get("temperature") == 0:
            assert found.argmax() == given.argmax()
            assert int((found > 0).sum()) == 1
            continue
        kept = kept_by_transformers(given, options)
        assert torch.equal(found > 0, kept), options
        expected = (given / options.get("temperature", 1.0)).masked_fill(~kept, -math.inf).softmax(-1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(60))
def test_as_many_tied_tokens_stay_as_in_transformers(seed: int) -> None:
    """Logits on a coarse grid, so that most tokens tie with others. Which of the tied stay is anybody's choice: the
    order of transformers' sort is not defined."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.integers(-6, 7, int(random.integers(1, 600))).astype(np.float32) / 2)
    options = {
        "top_k": int(random.choice([0, 2, 5, 39])),
        "top_p": float(random.choice([1.0, 0.97, 0.713, 0.31, 0.0])),
        "min_p": float(random.choice([0.0, 0.03, 0.4, 1.0])),
        "typical_p": float(random.choice([1.0, 0.913, 0.27])),
    }
    found = SAMPLER.probabilities(logits[None], make_batch([row(**options)], [0]))[0] > 0
    expected = kept_by_transformers(logits, options)
    assert logits[found].sort().values.tolist() == logits[expected].sort().values.tolist()


def test_each_token_is_the_inverse_of_the_distribution_function() -> None:
    logits = random_logits(len(MIXED), seed=3)
    for index in range(3):
        rows = [row(**options, seed=5) for options in MIXED]
        batch = make_batch(rows, [index] * len(rows))
        tokens = SAMPLER.sample(logits, batch).tokens
        assert tokens.dtype == torch.int64
        probabilities = SAMPLER.probabilities(logits, batch).double()
        below = probabilities.cumsum(-1)
        u = torch.tensor([uniform(r.stream, index) for r in rows])
        at = below.gather(1, tokens[:, None])[:, 0]
        weight = probabilities.gather(1, tokens[:, None])[:, 0]
        drawn = torch.tensor([not r.params.greedy for r in rows])
        assert (weight > 0).all()
        assert (~drawn | (at > u - 1e-5)).all()
        assert (~drawn | (at - weight < u + 1e-5)).all()


def test_a_row_alone_gives_the_bits_that_it_gives_in_any_batch() -> None:
    kinds = [*MIXED, {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}]
    logits = random_logits(len(kinds), seed=9)
    rows = [row([1, 2, 3], [4, 5, 4], **options, seed=i) for i, options in enumerate(kinds)]
    alone = [SAMPLER.probabilities(x[None], make_batch([r], [7])) for r, x in zip(rows, logits, strict=True)]
    tokens = [int(SAMPLER.sample(x[None], make_batch([r], [7])).tokens) for r, x in zip(rows, logits, strict=True)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    for some in (order, order[:5], order[::2]):
        batch = make_batch([rows[i] for i in some], [7] * len(some))
        assert torch.equal(SAMPLER.probabilities(logits[some], batch), torch.cat([alone[i] for i in some]))
        assert SAMPLER.sample(logits[some], batch).tokens.tolist() == [tokens[i] for i in some]


def test_penalties_equal_those_of_a_row_alone_with_the_token_in_flight_counted() -> None:
    """Pending: seen in the output, in the prompt only, nowhere before, none."""
    options = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.5, "logit_bias": {4: 3.0, 11: -2.0, 30: -math.inf}},
        {},
    ]
    prompt, output = [3, 5, 5, 30], [7, 4, 7, 30]
    for pending in (7, 3, 11, 30, -1):
        logits = random_logits(len(options), seed=pending + 2)
        rows = [row(prompt, output, temperature=1.0, **o) for o in options]
        batch = make_batch(rows, [4] * len(rows))
        known = [*output, pending] if pending >= 0 else output
        expected = [penalise(x, r.params, prompt, known).softmax(-1) for x, r in zip(logits, rows, strict=True)]
        found = SAMPLER.probabilities(logits, batch, torch.tensor([pending] * len(rows)))
        torch.testing.assert_close(found, torch.stack(expected))


def test_drafts_count_as_output_of_their_own_rows_only() -> None:
    made = row([1], [2], temperature=1.0, frequency_penalty=0.5)
    logits = random_logits(3, seed=4)
    batch = make_batch([made] * 3, [1, 2, 3], drafts=[[], [2], [2, 9]])
    expected = [penalise(x, made.params, [1], out) for x, out in zip(logits, ([2], [2, 2], [2, 2, 9]), strict=True)]
    torch.testing.assert_close(SAMPLER.probabilities(logits, batch), torch.stack(expected).softmax(-1))
    again = SAMPLER.probabilities(logits[:1], make_batch([made], [1]))
    torch.testing.assert_close(again[0], expected[0].softmax(-1))


def test_many_distinct_tokens_are_all_counted() -> None:
    output = [i % 700 for i in range(1000)]
    made = row(range(50), output, presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.1)
    logits = random_logits(1, seed=8)
    found = SAMPLER.probabilities(logits, make_batch([made], [1000]))[0]
    torch.testing.assert_close(found, penalise(logits[0], made.params, range(50), output).softmax(-1))


def test_a_fork_goes_its_own_way() -> None:
    first = row([1], [2], frequency_penalty=1.0)
    second = first.fork()
    second.add(8)
    logits = torch.zeros(2, 10)
    found = SAMPLER.probabilities(logits, make_batch([first, second], [1, 2]))
    assert found[0, 8] == found[0, 1]
    assert found[1, 8] == found[1, 2]


def test_masks_leave_what_their_bits_allow_and_nothing_behind_their_end() -> None:
    words = np.full((3, 70), -1, np.int32)
    words[0] = 0
    words[0, 2] = 1 << 5
    words[2, :69] = 0  # 69 * 32 = 2208: only the last word's tokens stay
    logits = random_logits(3, seed=2)
    rows = [row(temperature=0), row(temperature=0), row(seed=1)]
    found = SAMPLER.probabilities(logits, make_batch(rows, [0] * 3, words))
    assert int(found[0].argmax()) == 2 * 32 + 5
    assert int(found[1].argmax()) == int(logits[1].argmax())
    assert (found[2] > 0).nonzero()[:, 0].tolist() == list(range(69 * 32, 70 * 32))
    torch.testing.assert_close(logits, random_logits(3, seed=2))


def test_a_processor_sees_the_output_and_cannot_harm_other_rows() -> None:
    calls = []

    def only_eight(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append((list(output), float(logits[3])))
        return torch.full_like(logits, -math.inf).index_fill_(0, torch.tensor([8]), 0.0)

    def fails(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    logits = random_logits(4, seed=6)
    rows = [
        row([1], [5, 6], temperature=0, logits_processors=(only_eight,), logit_bias={3: 50.0}),
        row(temperature=0),
        row(temperature=0, logits_processors=(fails,)),
        row(temperature=0, logits_processors=(lambda output, logits: logits[:3],)),
    ]
    sampled = SAMPLER.sample(logits, make_batch(rows, [2, 0, 0, 0]))
    assert sampled.tokens.tolist() == [8, *logits[1:].argmax(-1).tolist()]
    assert [type(sampled.errors[i]) for i in (2, 3)] == [ZeroDivisionError, RuntimeError]
    assert calls == [([5, 6], pytest.approx(float(logits[0, 3]) + 50))]


def test_a_row_without_any_possible_token_still_gives_one() -> None:
    logits = random_logits(3, seed=5)
    logits[0] = -math.inf
    logits[1] = math.nan
    rows = [row(seed=1, top_p=0.9, top_k=5), row(seed=1, top_p=0.9), row(seed=1, top_k=1)]
    tokens = SAMPLER.sample(logits, make_batch(rows, [0] * 3)).tokens
    assert tokens.tolist()[2] == int(logits[2].argmax())
    assert all(0 <= t < SIZE for t in tokens.tolist())


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_a_token_of_probability_zero_is_never_drawn(u: float) -> None:
    random = np.random.default_rng(int(u * 2**24))
    for _ in range(200):
        weights = torch.from_numpy(random.random(int(random.integers(1, 60)), np.float32) ** 8)
        weights[torch.from_numpy(random.random(len(weights)) < 0.6)] = 0.0
        weights[random.integers(len(weights))] = 1e-3
        assert weights[draw(weights, u)] > 0


def test_the_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3, seed=7)
    rows = [row(seed=0, logprobs=2, repetition_penalty=1.5, prompt=[1, 2]), row(temperature=0), row(logprobs=0, seed=3)]
    sampled = SAMPLER.sample(logits, make_batch(rows, [0] * 3))
    normal = logits.log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    for i in (0, 2):
        torch.testing.assert_close(sampled.logprobs[i], normal[i, sampled.tokens[i]])
    best = normal[0].topk(2)
    assert sampled.top_ids[0].tolist() == best.indices.tolist()
    torch.testing.assert_close(sampled.top_logprobs[0], best.values)
    assert SAMPLER.sample(logits, make_batch([row(temperature=0)] * 3, [0] * 3)).logprobs is None


def test_logprobs_of_given_tokens() -> None:
    logits = random_logits(4, seed=1)
    tokens = torch.tensor([3, 0, 17, 5])
    chosen, ids, values = token_logprobs(logits.bfloat16(), tokens, 0)
    torch.testing.assert_close(chosen, logits.bfloat16().float().log_softmax(-1)[range(4), tokens])
    assert (ids, values) == (None, None)


def test_rows_know_what_they_need() -> None:
    assert not row(presence_penalty=1.0).needs_tokens
    assert row(logits_processors=(lambda output, logits: logits,)).needs_tokens


def test_a_batch_travels_as_a_pickle() -> None:
    rows = [row([1], [2], seed=i, top_p=0.9, repetition_penalty=1.1, logprobs=2) for i in range(3)]
    words = np.full((3, 79), -1, np.int32)
    words[1, 0] = 5
    batch = make_batch(rows, [1] * 3, words)
    logits = random_logits(3)
    there = pickle.loads(pickle.dumps(batch))
    assert SAMPLER.sample(logits, there).tokens.tolist() == SAMPLER.sample(logits, batch).tokens.tolist()


def test_seeds_and_completions_have_streams_of_their_own_and_no_seed_a_random_one() -> None:
    streams = {
        int(SamplingRow(SamplingParams(seed=s), [], i).stream) for s in (-3, 0, 1, 7, 2**70 + 5) for i in range(50)
    }
    assert len(streams) == 250
    assert row(seed=4).stream == row(seed=4).stream
    assert row().stream != row().stream


def test_uniform_numbers_are_uniform_and_independent() -> None:
    """Chi-square of 256 bins, over one long stream and over the first numbers of many seeds; correlation of neighbours.
    Bounds of five standard deviations: fixed numbers, so the test gives the same every time."""
    indices = np.arange(200_000, dtype=np.uint64)
    long = uniforms(np.full(200_000, 12345, np.uint64), indices)
    many = np.array([uniform(row(seed=s).stream, 0) for s in range(20_000)])
    for numbers in (long, many):
        assert 0 <= numbers.min() < 0.001
        assert 0.999 < numbers.max() < 1
        expected = len(numbers) / 256
        squares = ((np.histogram(numbers, 256, (0, 1))[0] - expected) ** 2 / expected).sum()
        assert abs(squares - 255) < 5 * math.sqrt(2 * 255)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(len(numbers))
    assert uniform(12345, 77) == long[77]
