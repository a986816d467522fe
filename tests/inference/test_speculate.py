"""Speculation: proposals, checks that keep the distribution, and turning it off."""

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS
from torch import Tensor

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference.build import build_engine
from llmasos.inference.config import EngineConfig
from llmasos.inference.request import SamplingParams
from llmasos.inference.runner import Step
from llmasos.inference.sampler import SamplingRow, uniform
from llmasos.inference.speculate import (
    DraftModel,
    NGramProposer,
    SpeculationController,
    SpeculativeConfig,
    Speculator,
    Wanted,
    verify,
)
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.layers import FEW_TOKENS
from llmasos.models.load import LoadedModel, load_model
from llmasos.text import Tokenizer
from tiny import write_tiny_model

# n-grams


def looked_up(tokens: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """The definition: scan for every size."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - 1, size - 1, -1):
            if tokens[start - size : start] == tokens[len(tokens) - size :]:
                period = tokens[start:]
                return [period[i % len(period)] for i in range(k)]
    return []


@settings(max_examples=150)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 40), max_size=4),
    longest=st.integers(1, 4),
)
def test_prompt_lookup_finds_what_a_scan_finds_however_the_text_grew(tokens, cuts, longest) -> None:
    proposer = NGramProposer(longest, min(2, longest))
    for end in [*sorted(min(c, len(tokens)) for c in cuts), len(tokens)]:
        part = tokens[:end]
        assert proposer.propose([Wanted(0, part, 5)]) == [looked_up(part, 5, longest, min(2, longest))]


def test_sequences_have_indexes_of_their_own_until_forgotten() -> None:
    proposer = NGramProposer(2, 2)
    wanted = [Wanted(1, [1, 2, 3, 1, 2], 1), Wanted(2, [1, 2, 4, 1, 2], 2), Wanted(3, [5, 6], 2)]
    assert proposer.propose(wanted) == [[3], [4, 1], []]
    proposer.forget(1)
    proposer.forget(9)
    assert proposer.propose([Wanted(1, [7, 8, 9, 7, 8], 1)])[0] == [9]


# checks


def test_choices_count_up_to_the_first_that_differs() -> None:
    assert verify([5, 6, 7], [5, 6]) == [5, 6, 7]
    assert verify([5, 6, 7], [5, 9]) == [5, 6]
    assert verify([5, 6, 7], [9, 6]) == [5]
    assert verify([5], []) == [5]


V = 6


def chain(seed: int, truncated: bool) -> Tensor:
    """Probabilities of the next token by the last one, [V, V]; truncated: some are 0."""
    probs = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)) ** 3
    if truncated:
        probs = probs.where(probs >= probs.median(-1, keepdim=True).values, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def drawn(probs: Tensor, number: float) -> int:
    """The token whose share of [0, 1) holds the number, in the order of the vocabulary."""
    return int((probs.double().cumsum(-1) > number).nonzero()[0])


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["certain", "drawn"])
def test_text_has_the_distribution_of_the_model_and_is_the_same_without_drafts(kind: str, truncated: bool) -> None:
    target, draft, rng = chain(1, truncated), chain(2, False), random.Random(3)
    counts, num, first, several = np.zeros((V, V)), 4000, 0, 0
    for _ in range(num):
        numbers = [rng.random() for _ in range(8)]
        text = [first]
        while len(text) < 3:
            at = len(text) - 1
            if kind == "certain":
                drafts = [(text[-1] + 1) % V, (3 * text[-1] + 2) % V]
            else:
                drafts = [drawn(draft[text[-1]], numbers[at])]
                drafts.append(drawn(draft[drafts[0]], numbers[at + 1]))
            rows = target[[text[-1], *drafts]]
            new = verify([drawn(row, numbers[at + i]) for i, row in enumerate(rows)], drafts)
            assert 1 <= len(new) <= 3 and new[:-1] == drafts[: len(new) - 1]
            several += len(new) > 1
            text += new
        plain = [first]
        while len(plain) < len(text):
            plain.append(drawn(target[plain[-1]], numbers[len(plain) - 1]))
        assert text == plain
        counts[text[1], text[2]] += 1
    expected = (target[first][:, None] * target).numpy() * num
    assert (counts[expected == 0] == 0).all() and several > num / 20
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


# a draft model


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, device="cpu", dtype="float32")


def drafter(model: LoadedModel, num_rows: int = 4) -> DraftModel:
    size = model.config.vocab_size
    return DraftModel(model, model.tokenizer, name="d", target_name="t", vocab_size=size + 3, num_rows=num_rows)


@torch.inference_mode()
def next_logits(model: LoadedModel, tokens: list[int]) -> Tensor:
    attend = Varlen(layer_specs(model.config), [len(tokens)])
    hidden = model.module(torch.tensor(tokens), attend.positions(), attend)
    return model.module.logits(hidden[-1])


def greedy(model: LoadedModel, tokens: list[int], k: int) -> list[int]:
    for _ in range(k):
        tokens = [*tokens, int(next_logits(model, tokens).argmax())]
    return tokens[len(tokens) - k :]


def test_drafts_are_the_draft_models_own_text_whatever_became_of_earlier_ones(tiny, monkeypatch) -> None:
    monkeypatch.setattr(DraftModel, "PIECE", 8)
    draft, rng = drafter(tiny, num_rows=2), random.Random(0)
    texts = {id: [rng.randrange(300) for _ in range(n)] for id, n in enumerate((20, 1, 9))}
    for _ in range(5):
        some = [id for id in texts if rng.random() < 0.8]  # three share two rows: now and then one is evicted
        wanted = [Wanted(id, list(texts[id]), rng.randrange(1, 5)) for id in some]
        found = draft.propose(wanted)
        assert found == [greedy(tiny, texts[w.id], w.k) for w in wanted]
        for w, d in zip(wanted, found, strict=True):
            texts[w.id] += [*d[: rng.randrange(w.k + 1)], rng.randrange(300)]
        draft.forget(rng.randrange(4))


def test_drawn_drafts_use_the_numbers_that_were_given(tiny) -> None:
    numbers = [0.1, 0.9, 0.5]
    (draft,) = drafter(tiny).propose([Wanted(0, [5, 6, 7], 3, temperature=0.7, uniforms=numbers)])
    tokens = [5, 6, 7]
    for token, u in zip(draft, numbers, strict=True):
        probs = (next_logits(tiny, tokens) / 0.7).softmax(-1)
        below = probs.double().cumsum(-1)
        assert token == int((below > u * below[-1]).nonzero()[0])
        tokens.append(token)


def test_nothing_is_drafted_beyond_the_draft_models_context(tiny) -> None:
    long = [1] * (tiny.config.context_length - 2)
    found = drafter(tiny).propose([Wanted(0, long, 3), Wanted(1, long, 4), Wanted(2, long, 0)])
    assert [len(d) for d in found] == [3, 0, 0]


def test_a_draft_model_of_another_vocabulary_is_refused_by_name(tiny) -> None:
    other = Tokenizer(KINDS["byte_level"](), special={"eos": 1})
    with pytest.raises(UnsupportedError, match="small can't draft for large"):
        DraftModel(tiny, other, name="small", target_name="large", vocab_size=400, num_rows=1)


def test_speculated_text_equals_plain_text(tiny, tmp_path: Path) -> None:
    other = load_model(write_tiny_model(tmp_path / "other", seed=1), device="cpu", dtype="float32")
    prompt = [5, 6, 7, 8, 5, 6, 7]
    plain = prompt + greedy(tiny, prompt, 12)
    for proposer in (NGramProposer(), drafter(tiny), drafter(other)):
        text, num_passes = list(prompt), 0
        while len(text) < len(plain):
            (draft,) = proposer.propose([Wanted(0, text, 3)])
            rows = [next_logits(tiny, text + draft[:i]) for i in range(len(draft) + 1)]
            text += verify([int(row.argmax()) for row in rows], draft)
            num_passes += 1
        assert text[: len(plain)] == plain
        if isinstance(proposer, DraftModel) and proposer.module is tiny.module:
            assert num_passes == 3  # its own drafts are all right


@pytest.mark.parametrize("num", [2, 5, 9, FEW_TOKENS])
def test_a_token_and_its_drafts_are_rounded_as_each_of_them_alone(tiny_model: Path, num: int) -> None:
    """Else a draft that is right could still change the text, where two tokens are about as likely."""
    model = load_model(tiny_model, device="cpu", dtype="bfloat16", quantization="int4")
    runner = build_engine(model, EngineConfig.of(kv_cache_memory=1 << 20)).runner
    ids = torch.randint(5, model.config.vocab_size, (70 + num,), generator=torch.Generator().manual_seed(num)).numpy()

    def logits(start: int, end: int) -> torch.Tensor:
        runner.forward(
            Step(
                tokens=ids[start:end],
                positions=np.arange(start, end),
                sequences=np.zeros(end - start, np.int32),
                query_start=np.array([0, end - start], np.int32),
                seq_lens=np.array([end], np.int32),
                tables=[np.arange(1, 9, dtype=np.int32)[None]],
                max_query=end - start,
                max_seq_len=end,
                rows=np.arange(end - start),
            )
        )
        return runner._logits.clone()

    logits(0, 70)
    alone = torch.cat([logits(at, at + 1) for at in range(70, 70 + num)])
    assert torch.equal(logits(70, 70 + num), alone)


# when it pays


def decode(controller: SpeculationController, steps: int, rate: float, cost: float, id: int = 0) -> list[int]:
    """The numbers of drafts of `steps` steps. Each draft behind right ones is right at this rate; a draft costs `cost`
    of a step."""
    rng, asked = random.Random(0), []
    for _ in range(steps):
        k = controller.num_drafts(id, 1)
        good = next((i for i in range(k) if rng.random() >= rate), k)
        controller.record(id, k, good)
        controller.record_step(1, k, 0.01 * (1 + cost * k))
        asked.append(k)
    return asked


def test_right_drafts_are_asked_for_in_full_and_plain_steps_stay_rare() -> None:
    asked = decode(SpeculationController(8), 200, rate=1.0, cost=0.02)
    assert asked[:3] == [0, 0, 0] and set(asked[30:]) == {0, 8} and asked[30:].count(0) <= 4


def test_wrong_drafts_are_paused_longer_and_longer_and_probed_again() -> None:
    asked = decode(SpeculationController(8), 400, rate=0.0, cost=0.05)
    probes = [i for i, k in enumerate(asked) if k]
    gaps = [b - a for a, b in pairwise(probes) if b - a > 1]
    assert 3 <= len(gaps) < 12 and gaps == sorted(gaps) and gaps[-1] > 4 * gaps[0]


def test_right_drafts_do_not_pay_where_they_cost_as_much_as_a_step() -> None:
    asked = decode(SpeculationController(4), 400, rate=0.8, cost=1.0)
    assert sum(k > 0 for k in asked[100:]) < 30


def test_a_probe_finds_a_text_that_has_become_easy() -> None:
    controller = SpeculationController(8)
    decode(controller, 50, rate=0.0, cost=0.05)
    assert decode(controller, 300, rate=1.0, cost=0.05)[-1] == 8


def test_drafts_grow_with_how_often_they_are_right() -> None:
    asked = [max(decode(SpeculationController(8), 80, rate, cost=0.15)[40:]) for rate in (0.5, 0.8, 1.0)]
    assert asked[0] < asked[2] == 8 and asked == sorted(asked)


def test_a_new_sequence_expects_what_the_others_saw() -> None:
    good, bad = SpeculationController(8), SpeculationController(8)
    decode(good, 100, rate=1.0, cost=0.05)
    decode(bad, 100, rate=0.0, cost=0.05)
    assert good.num_drafts(7, 1) >= 4 and bad.num_drafts(7, 1) == 0


def test_an_empty_draft_does_not_use_up_a_probe() -> None:
    controller = SpeculationController(8)
    decode(controller, 40, rate=0.0, cost=0.05)
    asked = []
    for _ in range(60):
        asked.append(controller.num_drafts(0, 1))
        controller.record(0, 0, 0)
        controller.record_step(1, 0, 0.01)
    assert asked[-1] == 4 and asked[asked.index(4) :] == [4] * (60 - asked.index(4))


def test_costs_are_those_of_batches_of_about_the_same_size() -> None:
    controller = SpeculationController(8, token_cost=0.1)
    for size, slow in ((1, 1.2), (16, 3.0)):
        controller.record_step(size, 0, 1.0)
        controller.record_step(size, 4 * size, slow)
    assert controller.cost(4, 1) == pytest.approx(1.2) and controller.cost(8, 1) == pytest.approx(1.4)
    assert controller.cost(4, 20) == pytest.approx(3.0) and controller.cost(2, 20) == pytest.approx(2.0)
    assert controller.cost(5, 200) == pytest.approx(1.5) and controller.cost(0, 200) == 1.0


# the engine's door


def running(id: int, tokens: list[int], num_prompt: int, *, matcher=None, temperature=0.0, **more) -> SimpleNamespace:
    row = SamplingRow(SamplingParams(temperature=temperature, seed=3), tokens[:num_prompt])
    owner = SimpleNamespace(matcher=matcher, ends={99}, row=row, state=SimpleNamespace(beams=None))
    known = {"num_computed": len(tokens) - 1, "num_pending": 0, "paused": False, "max_tokens": 50, "drafts": [7]}
    return SimpleNamespace(id=id, token_ids=tokens, num_prompt=num_prompt, owner=owner, **{**known, **more})


class Parrot:
    """Proposes 1, 2, 3 ... or what it is given."""

    def __init__(self, tokens: list[int] | None = None) -> None:
        self.tokens, self.asked, self.forgotten = tokens or list(range(1, 65)), [], []

    def propose(self, wanted):
        self.asked = list(wanted)
        return [self.tokens[: w.k] for w in wanted]

    def forget(self, id: int) -> None:
        self.forgotten.append(id)


def speculator(proposer: Parrot, most: int = 4) -> Speculator:
    made = Speculator(proposer, most)
    made.controller.num_drafts = lambda id, num: most  # type: ignore[method-assign]  # always on
    return made


def test_only_sequences_that_decode_get_drafts() -> None:
    made = speculator(Parrot())
    beams = running(5, [1, 2, 3], 2)
    beams.owner.state.beams = object()
    others = [
        running(1, [1, 2], 2),
        running(2, [1, 2, 3], 2, num_computed=0),
        running(3, [1, 2, 3], 2, num_pending=1),
        running(4, [1, 2, 3], 2, paused=True),
        beams,
    ]
    decoding = running(0, [1, 2, 3], 2)
    made.draft([decoding, *others])
    assert decoding.drafts == [1, 2, 3, 4] and [seq.drafts for seq in others] == [[]] * 5


def test_drafts_leave_room_for_the_models_own_token_and_stop_at_an_end() -> None:
    made = speculator(Parrot([5, 6, 99, 7]))
    short, long = running(0, [1, 2, 3], 2, max_tokens=3), running(1, [1, 2, 3], 2)
    last = running(2, [1, 2, 3], 2, max_tokens=2)
    made.draft([short, long, last])
    assert short.drafts == [5] and long.drafts == [5, 6, 99] and last.drafts == []


def test_drafts_end_where_the_grammar_does_not_allow_them() -> None:
    made = speculator(Parrot())
    seq = running(0, [1, 2, 3], 2, matcher=SimpleNamespace(num_accepted=lambda drafts: drafts.index(3)))
    made.draft([seq])
    assert seq.drafts == [1, 2]


def test_draws_of_a_draft_model_use_the_numbers_that_the_model_will_draw_with() -> None:
    parrot = Parrot()
    seq = running(0, [1, 2, 3, 4], 2, temperature=0.8)
    speculator(parrot, 2).draft([seq, running(1, [1, 2, 3], 2)])
    stream = int(seq.owner.row.stream)
    assert parrot.asked[0].temperature == 0.8 and parrot.asked[1].uniforms == []
    assert parrot.asked[0].uniforms == [uniform(stream, 2), uniform(stream, 3)]


def test_sequences_that_are_gone_are_forgotten() -> None:
    parrot = Parrot()
    made = speculator(parrot)
    made.draft([running(0, [1, 2, 3], 2), running(1, [1, 2, 3], 2)])
    made.draft([running(1, [1, 2, 3], 2)])
    assert parrot.forgotten == [0]


def test_passes_over_prompts_teach_nothing_about_costs() -> None:
    made = Speculator(Parrot(), 4)
    decode, drafts = (SimpleNamespace(samples=True, num_new=1 + n, drafts=[1] * n) for n in (0, 3))
    prompt = SimpleNamespace(samples=True, num_new=9, drafts=[])
    for items, seconds in (([decode], 1.0), ([drafts], 1.6), ([decode, prompt], 9.0), ([], 0.0)):
        made.learn_step(items, seconds)
    assert made.controller.cost(3, 1) == pytest.approx(1.6)


# options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "medusa"}, "method"),
        ({"method": "draft"}, "model"),
        ({"model": "x"}, "model"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min"),
        ({"prompt_lookup_max": True}, "prompt_lookup_max"),
    ],
)
def test_wrong_options_are_refused_by_name(options, named: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SpeculativeConfig(**options)
    assert caught.value.param == named
