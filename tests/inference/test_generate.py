"""Generation by an LLM: a completion does not depend on what runs beside it, and every way out of it is clean."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_equality import load_ours, quiet, random_prompts, save_hf, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi3Config

from llmasos.errors import ContextOverflowError, InvalidInputError, UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.inference.prompts import resolve_max_tokens
from llmasos.inference.request import SamplingParams
from llmasos.models.load import load_model
from tiny import write_tiny_model

PROMPTS = ["The quick brown fox", "What is", "是巴黎。", "a", "Models are found, run, trained"]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=5, max_tokens=20)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gives_what_each_prompt_gives_alone(tiny_llm: LLM, params: SamplingParams) -> None:
    together = tiny_llm.complete(PROMPTS, params)
    alone = [tiny_llm.complete(p, params)[0] for p in PROMPTS]
    assert [o.outputs for o in together] == [o.outputs for o in alone]


@pytest.fixture(scope="module")
def narrow(tiny_llm: LLM) -> Iterator[LLM]:
    """The same model, two sequences and eight tokens at a time."""
    with LLM(tiny_llm.model, name="narrow", max_num_seqs=2, max_num_batched_tokens=8) as llm:
        yield llm


def test_more_prompts_than_rows_wait_their_turn(tiny_llm: LLM, narrow: LLM) -> None:
    expected = [tiny_llm.complete(p, SAMPLED)[0].outputs for p in PROMPTS]
    assert [o.outputs for o in narrow.complete(PROMPTS * 3, SAMPLED)] == expected * 3


def test_a_long_prompt_in_pieces_gives_the_same_tokens(tiny_llm: LLM, narrow: LLM) -> None:
    prompt = list(range(5, 105))
    assert narrow.complete(prompt, GREEDY)[0].outputs == tiny_llm.complete(prompt, GREEDY)[0].outputs


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 399), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    )
)
def test_any_mix_of_requests_equals_running_alone(tiny_llm: LLM, mix: list[tuple[list[int], int, int]]) -> None:
    params = [SamplingParams(n=n, max_tokens=size, seed=i, ignore_eos=i % 2 == 0) for i, (_, size, n) in enumerate(mix)]
    size = tiny_llm.model.config.vocab_size
    prompts = [[t % size for t in ids] for ids, _, _ in mix]
    together = tiny_llm.complete(prompts, params)
    for prompt, p, output in zip(prompts, params, together, strict=True):
        assert len(output.outputs) == p.n
        assert output.outputs == tiny_llm.complete(prompt, p)[0].outputs


def test_the_cache_gives_what_recomputing_gives(tiny_llm: LLM) -> None:
    ids = tiny_llm.tokenizer.encode("The quick brown")
    out = list(
        tiny_llm.complete(ids, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0].outputs[0].token_ids
    )
    for i, token in enumerate(out):
        logits = tiny_llm.complete(ids + out[:i], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        assert logits[0].outputs[0].token_ids == (token,)


def test_streamed_text_is_the_completed_text(tiny_llm: LLM) -> None:
    params = SamplingParams(n=3, seed=2, max_tokens=30, logprobs=1)
    output = tiny_llm.complete("The lazy dog", params)[0]
    chunks = list(tiny_llm.stream_complete("The lazy dog", params))
    for completion in output.outputs:
        mine = [c for c in chunks if c.index == completion.index]
        assert "".join(c.text for c in mine) == completion.text
        assert tuple(i for c in mine for i in c.token_ids) == completion.token_ids
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
        assert all(len(c.logprobs) == len(c.token_ids) for c in mine)


def test_stop_strings_end_the_text_before_them(tiny_llm: LLM) -> None:
    text = tiny_llm.complete("The quick", GREEDY)[0].text
    stop = text[4:7]
    stopped = tiny_llm.complete("The quick", SamplingParams(temperature=0, max_tokens=20, stop=(stop,)))[0].outputs[0]
    assert stopped.text == text[: text.find(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    kept = SamplingParams(temperature=0, max_tokens=20, stop=(stop,), include_stop=True)
    assert tiny_llm.complete("The quick", kept)[0].text == text[: text.find(stop) + len(stop)]


def test_stop_token_ids_and_eos_end_it(tiny_llm: LLM) -> None:
    ids = tiny_llm.complete("The quick", GREEDY)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(ids[3],))
    stopped = tiny_llm.complete("The quick", params)[0].outputs[0]
    assert stopped.token_ids == ids[: ids.index(ids[3]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ids[3])
    end = tiny_llm.tokenizer.eos_token_id
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 1e6})
    ended = tiny_llm.complete("The quick", forced)[0].outputs[0]
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("", (end,), "stop")
    ignoring = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 1e6}, ignore_eos=True)
    assert tiny_llm.complete("The quick", ignoring)[0].outputs[0].finish_reason == "length"


def test_cancelling_returns_what_there_is(tiny_llm: LLM, slow_passes: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    output = tiny_llm.complete(["The", "quick"], params, cancelled=lambda: len(slow_passes) > 4)
    for one in output:
        (found,) = one.outputs
        num = len(found.token_ids)
        assert found.finish_reason == "abort" and 0 < num < 100
        assert found.token_ids == tiny_llm.complete(one.prompt, replace(params, max_tokens=num))[0].outputs[0].token_ids


@pytest.mark.parametrize("beams", [1, 2])
def test_a_long_prompt_can_be_cancelled_between_its_pieces(narrow: LLM, slow_passes: list[int], beams: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, num_beams=beams, n=beams)
    output = narrow.complete([list(range(5, 245))], params, cancelled=lambda: len(slow_passes) > 2)[0]
    assert 2 < len(slow_passes) < 25
    assert {(c.token_ids, c.text, c.finish_reason) for c in output.outputs} == {((), "", "abort")}


def test_two_streams_in_one_thread_interleave(tiny_llm: LLM) -> None:
    prompts = ("The quick", "What is")
    streams = [tiny_llm.stream(prompt, max_tokens=9) for prompt in prompts]
    begun = [next(stream).text for stream in streams]
    whole = [text + "".join(chunk.text for chunk in stream) for text, stream in zip(begun, streams, strict=True)]
    assert whole == [tiny_llm.generate(prompt, max_tokens=9) for prompt in prompts]


def test_many_threads_share_one_model(tiny_llm: LLM) -> None:
    expected = [tiny_llm.generate(p, max_tokens=12) for p in PROMPTS]
    found: dict[int, object] = {}

    def work(i: int) -> None:
        found[i] = tiny_llm.generate(PROMPTS[i], max_tokens=12)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(PROMPTS))] == expected


def test_overflow_is_an_error_with_the_counts(tiny_llm: LLM) -> None:
    with pytest.raises(ContextOverflowError, match=r"250 tokens and 10 .* 260; .* holds 256") as caught:
        tiny_llm.complete([5] * 250, SamplingParams(max_tokens=10))
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.context_length) == (250, 10, 256)
    with pytest.raises(ContextOverflowError):
        tiny_llm.complete([5] * 256)
    assert resolve_max_tokens(250, SamplingParams(), 256) == 6


def test_the_last_position_of_the_context_can_be_used(tiny_llm: LLM) -> None:
    output = tiny_llm.complete([5] * 200, SamplingParams(temperature=0, max_tokens=56, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 56


def test_max_tokens_zero_makes_nothing_but_prompt_logprobs(tiny_llm: LLM) -> None:
    output = tiny_llm.complete("The quick fox", SamplingParams(max_tokens=0, prompt_logprobs=2))[0]
    assert (output.text, output.outputs[0].finish_reason) == ("", "length")
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    assert [p.token_id for p in rest if p] == list(output.prompt_token_ids[1:])
    assert tiny_llm.score("The quick fox").logprobs == pytest.approx([p.logprob for p in rest if p])


def test_logprobs_are_those_of_a_forward_pass(tiny_llm: LLM) -> None:
    output = tiny_llm.complete("The quick", SamplingParams(temperature=0, max_tokens=6, logprobs=0))[0]
    ids = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
    text = tiny_llm.complete(ids, SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    expected = [p.logprob for p in text.prompt_logprobs[len(output.prompt_token_ids) :]]  # type: ignore[index, union-attr]
    assert [p.logprob for p in output.outputs[0].logprobs] == pytest.approx(expected, abs=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("ids", [[400000], [-1], [True], [1.5]])
def test_token_ids_outside_the_vocabulary_are_refused(tiny_llm: LLM, ids: list) -> None:
    with pytest.raises(InvalidInputError, match="not a token id"):
        tiny_llm.complete([ids], SamplingParams(max_tokens=2))


def test_a_sliding_window_model_decodes_as_it_prefills(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "m", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=9
    )
    with LLM(load_model(folder, device="cpu", dtype="float32"), name="window") as llm:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        batch = llm.complete([[5, 6, 7], list(range(5, 40))], params)
        for output in batch:
            ids = list(output.prompt_token_ids)
            for token in output.outputs[0].token_ids:
                step = llm.complete(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))[0]
                assert step.outputs[0].token_ids == (token,)
                ids.append(token)


@pytest.mark.parametrize("beams", [1, 3])
def test_longrope_computes_again_where_its_frequencies_change(tmp_path: Path, beams: int) -> None:
    """Equal to transformers' Phi-3, whose trained context (32) ends amid the answer or amid the prompt."""
    table = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}
    context = {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": table}
    reference = tiny_model(Phi3Config(**sizes, **heads, **context), seed=1)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16}
    with LLM(load_ours(save_hf(reference, tmp_path)), name="phi3", **options) as llm:
        for prompt in random_prompts(64, (20, 40)):
            wanted = {"max_new_tokens": 30, "num_beams": beams, "do_sample": False}
            with quiet(), torch.inference_mode():
                theirs = reference.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **wanted)
            ours = llm.complete(prompt.tolist(), SamplingParams(temperature=0, max_tokens=30, num_beams=beams))[0]
            assert list(ours.outputs[0].token_ids) == theirs[0, len(prompt) :].tolist()


def test_no_gradients_are_kept(tiny_llm: LLM) -> None:
    assert not any(p.requires_grad for p in tiny_llm.model.module.parameters())
    assert torch.is_grad_enabled()


def test_beam_search_cannot_stream(tiny_llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="can't stream"):
        list(tiny_llm.stream("The", num_beams=3))


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5000: 1.0}},
        {"stop_token_ids": (-1,)},
        {"num_beams": 2, "typical_p": 0.5},
        {"num_beams": 2, "top_k": 5},
        {"num_beams": 2, "stop": ("a",)},
    ],
)
def test_what_could_not_have_an_effect_is_refused(tiny_llm: LLM, options: dict) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tiny_llm.complete("The", SamplingParams.of(max_tokens=2, **options))
    assert caught.value.param == list(options)[-1]


def test_a_stream_refuses_prompt_logprobs(tiny_llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="prompt_logprobs"):
        tiny_llm.stream("The", prompt_logprobs=1)


def test_no_tokens_are_no_tokens_with_beams_too(tiny_llm: LLM) -> None:
    output = tiny_llm.complete("The", SamplingParams(temperature=0, num_beams=2, n=2, max_tokens=0))[0]
    assert [(c.text, c.token_ids) for c in output.outputs] == [("", ())] * 2


def test_rows_that_pad_the_vocabulary_have_no_name(tmp_path: Path) -> None:
    with LLM(load_model(write_tiny_model(tmp_path / "m", vocab_size=600), device="cpu"), name="padded") as llm:
        output = llm.complete("The quick", SamplingParams(temperature=0, max_tokens=2, logprobs=100))[0]
        top = output.outputs[0].logprobs[0].top  # type: ignore[index]
        assert {bool(name) for id, name, _ in top if id < llm.tokenizer.vocab_size} == {True}
        assert {name for id, name, _ in top if id >= llm.tokenizer.vocab_size} == {""}
        assert llm.complete("The quick", SamplingParams(max_tokens=0, prompt_logprobs=100))[0].prompt_logprobs


def test_tokens_without_embedding_are_refused(tmp_path: Path) -> None:
    with LLM(load_model(write_tiny_model(tmp_path / "m", vocab_size=270), device="cpu"), name="cut") as llm:
        for call in (llm.generate, llm.embed, llm.chat):
            with pytest.raises(InvalidInputError, match="its ids end at 269"):
                call("The quick brown fox")


def test_special_tokens_that_are_asked_for_are_written_out(tiny_llm: LLM) -> None:
    user, other = (tiny_llm.tokenizer.id(token) for token in ("<|user|>", "<|assistant|>"))
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={user: 100.0})
    for shown, text in (((), ""), ((other,), ""), ((other, user), "<|user|>" * 3)):
        asked = replace(params, shown_token_ids=shown)
        assert tiny_llm.complete("fox", asked)[0].text == text
        assert "".join(chunk.text for chunk in tiny_llm.stream_complete("fox", asked)) == text
