"""One row: every processor equals transformers' logits processor; seeds, penalties and bounds hold for any logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llmasos.errors import InvalidInputError
from llmasos.inference import sampler
from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import Sampler, SamplingRow, make_batch, penalise, token_logprob, truncate

VOCABULARY = 97
PROMPT, OUTPUT = [3, 5, 5, 90], [7, 3, 7, 7]


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def reference(processors: list, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return LogitsProcessorList(processors)(torch.tensor([ids]), logits[None].clone())[0]


def choose(row: SamplingRow, logits: torch.Tensor, index: int = 0) -> int:
    return int(Sampler(logits.device).sample(logits[None], make_batch([row], [index])).tokens)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"temperature": 0.3}, TemperatureLogitsWarper(0.3)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 12}, TopKLogitsWarper(12)),
        ({"top_k": 500}, TopKLogitsWarper(500)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"min_p": 0.02}, MinPLogitsWarper(0.02)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
        ({"typical_p": 0.2}, TypicalLogitsWarper(0.2)),
        ({"typical_p": 0.95}, TypicalLogitsWarper(0.95)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_each_truncation_equals_transformers(options: dict, processor: object, seed: int) -> None:
    logits = random_logits(seed)
    ours = truncate(logits, SamplingParams.of(**options))
    torch.testing.assert_close(ours, reference([processor], logits, PROMPT), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_all_together_run_in_transformers_order(seed: int) -> None:
    logits = random_logits(seed)
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.3)
    theirs = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.01),
        TypicalLogitsWarper(0.9),
    ]
    ours = truncate(penalise(logits, params, PROMPT, OUTPUT), params)
    torch.testing.assert_close(ours, reference(theirs, logits, PROMPT + OUTPUT), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_counts_prompt_and_output(penalty: float) -> None:
    logits = random_logits(1)
    ours = penalise(logits, SamplingParams(repetition_penalty=penalty), PROMPT, OUTPUT)
    theirs = reference([RepetitionPenaltyLogitsProcessor(penalty)], logits, PROMPT + OUTPUT)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_presence_and_frequency_follow_openais_formula() -> None:
    logits = random_logits(2)
    ours = penalise(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), PROMPT, OUTPUT)
    expected = logits.clone()
    expected[7] -= 0.5 + 3 * 0.25
    expected[3] -= 0.5 + 0.25
    torch.testing.assert_close(ours, expected)


def test_logit_bias_is_added() -> None:
    logits = random_logits(3)
    biased = penalise(logits, SamplingParams(logit_bias={4: 100.0, 9: -100.0}), [], [])
    assert int(biased.argmax()) == 4
    assert float(biased[9]) == pytest.approx(float(logits[9]) - 100)
    whole = penalise(logits, SamplingParams(logit_bias={4: 100, 9: -100}), [], [])
    torch.testing.assert_close(whole, biased)
    forbidden = SamplingParams(logit_bias={i: -math.inf for i in range(VOCABULARY) if i != 8}, seed=0)
    assert choose(SamplingRow(forbidden, []), logits) == 8


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    logits = random_logits(4, scale=1.0)

    def draw(seed: int, index: int = 0) -> list[int]:
        row = SamplingRow(SamplingParams(seed=seed), PROMPT, index)
        return [choose(row, logits, i) for i in range(20)]

    assert draw(11) == draw(11)
    assert len({tuple(draw(11)), tuple(draw(12)), tuple(draw(11, index=1))}) == 3


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = [SamplingRow(SamplingParams(seed=0), [])] * 20_000
    drawn = Sampler(logits.device).sample(logits.expand(20_000, 4), make_batch(rows, range(20_000))).tokens
    counts = torch.bincount(drawn, minlength=4)
    # four standard deviations of a binomial share
    torch.testing.assert_close(counts / 20_000, logits.softmax(-1), rtol=0, atol=4 * 0.5 / math.sqrt(20_000))


def test_greedy_takes_the_largest_logit_whatever_the_temperature_of_others() -> None:
    logits = random_logits(5)
    assert choose(SamplingRow(SamplingParams(temperature=0), []), logits) == int(logits.argmax())
    assert choose(SamplingRow(SamplingParams(top_k=1, temperature=5.0), []), logits) == int(logits.argmax())
    assert choose(SamplingRow(SamplingParams(temperature=1e-40), []), logits) == int(logits.argmax())
    assert choose(SamplingRow(SamplingParams(temperature=1e-5), []), logits) == int(logits.argmax())


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.integers(0, 50),
)
def test_truncation_always_keeps_a_likeliest_token(
    values: list[float], nucleus: float, typical: float, floor: float, k: int
) -> None:
    logits = torch.tensor(values)
    for kept in (
        logits[sampler.top_p(logits, nucleus)],
        logits[sampler.min_p(logits, floor)],
        truncate(logits, SamplingParams(top_k=k, top_p=nucleus, min_p=floor)),
    ):
        assert kept.max() == logits.max()
    assert len(sampler.typical_p(logits, typical))


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    found = token_logprob(logits, 2, 2, str)
    normal = logits.log_softmax(-1)
    assert (found.token, found.logprob) == ("2", pytest.approx(float(normal[2])))
    assert [i for i, _, _ in found.top] == [1, 2]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"n": 3, "num_beams": 2}, "n"),
        ({"min_p": "x"}, "min_p"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"seed": 1.5}, "seed"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, "logit_bias"),
        ({"logit_bias": {5: math.inf}}, "logit_bias"),
        ({"logits_processors": (5,)}, "logits_processors"),
        ({"logits_processors": len}, "logits_processors"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_wrong_parameters_are_named(options: dict, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SamplingParams.of(**options)
    assert caught.value.param == field
    assert field in str(caught.value)
