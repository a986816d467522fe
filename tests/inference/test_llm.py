"""The Python front door: what each method returns, its asynchronous twin, and its errors."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import llmasos
from llmasos.errors import InvalidInputError, LLMasOSError, NoChatTemplateError, NotFoundError, UnsupportedError
from llmasos.inference import embed, generate_text
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.model_zoo import get_model
from llmasos.models.load import load_model
from tiny import write_tiny_model, write_tokenizer

MESSAGES = [{"role": "user", "content": "What is the capital?"}]


def test_generate_returns_new_text_and_echo_adds_the_prompt(tiny_llm: LLM) -> None:
    text = tiny_llm.generate("The quick", max_tokens=8)
    assert isinstance(text, str)
    assert tiny_llm.generate("The quick", max_tokens=8, echo=True) == "The quick" + text
    assert tiny_llm.generate(["The quick", "What"], max_tokens=8)[0] == text
    assert generate_text(tiny_llm, "The quick", max_tokens=8) == text


def test_max_length_counts_prompt_and_new_tokens(tiny_llm: LLM) -> None:
    num_prompt = len(tiny_llm.tokenizer.encode("The quick brown fox"))
    output = tiny_llm.complete(
        "The quick brown fox", tiny_llm.params(num_prompt, max_length=num_prompt + 3, ignore_eos=True)
    )
    assert output[0].num_output_tokens == 3
    with pytest.raises(InvalidInputError, match="the prompt alone has"):
        tiny_llm.generate("The quick brown fox", max_length=num_prompt)
    with pytest.raises(InvalidInputError, match="both given"):
        tiny_llm.generate("The", max_length=30, max_tokens=3)


def test_without_options_it_is_greedy_and_with_one_it_samples(tiny_llm: LLM) -> None:
    assert tiny_llm.params().temperature == 0
    assert tiny_llm.params(top_p=0.9).temperature == 1
    assert tiny_llm.params(temperature=None).temperature == 0
    assert tiny_llm.generate("The", max_tokens=12) == tiny_llm.generate("The", max_tokens=12)


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95}'
    )
    with LLM(load_model(folder, device="cpu"), name="m") as llm:
        params = llm.params(top_k=5)
        assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 0.95)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    with LLM(load_model(folder, device="cpu"), name="m") as llm:
        for params in (llm.params(), llm.params(num_beams=2)):
            assert (params.temperature, params.repetition_penalty) == (0, 1.3)
        assert llm.params(repetition_penalty=1.0).repetition_penalty == 1


def test_chat_uses_the_template(tiny_llm: LLM) -> None:
    assert tiny_llm.chat_prompt(MESSAGES) == "<|user|>What is the capital?<|end|><|assistant|>"
    answer = tiny_llm.chat("What is the capital?", max_tokens=10)
    assert answer == tiny_llm.chat(MESSAGES, max_tokens=10)
    assert answer == "".join(c.text for c in tiny_llm.stream(MESSAGES, max_tokens=10))
    prompt = tiny_llm.tokenizer.encode(tiny_llm.chat_prompt(MESSAGES), add_special_tokens=False)
    assert tiny_llm.complete(prompt, SamplingParams(temperature=0, max_tokens=10))[0].text == answer


def test_max_length_of_a_chat_counts_the_conversation(tiny_llm: LLM) -> None:
    num_prompt = len(tiny_llm.tokenizer.encode(tiny_llm.chat_prompt(MESSAGES), add_special_tokens=False))
    assert tiny_llm.chat(MESSAGES, max_length=num_prompt + 4) == tiny_llm.chat(MESSAGES, max_tokens=4)
    with pytest.raises(InvalidInputError, match=f"the prompt alone has {num_prompt}"):
        tiny_llm.chat(MESSAGES, max_length=num_prompt)


def test_tools_that_the_template_ignores_are_refused(tiny_llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(UnsupportedError, match="no place for tools"):
        tiny_llm.chat(MESSAGES, tools=[tool])


def test_nothing_is_made_for_who_has_left(tiny_llm: LLM) -> None:
    from llmasos.client.leaving import CallCancelledError, Token

    token = Token()
    with token.active():
        assert tiny_llm.generate("a", max_tokens=2) == tiny_llm.generate("a", max_tokens=2)
        stream = tiny_llm.stream("a", max_tokens=9, ignore_eos=True)
        next(stream)
        token.cancel()
        for call in (lambda: tiny_llm.generate("a", max_tokens=9), lambda: next(stream)):
            with pytest.raises(CallCancelledError):
                call()
    assert tiny_llm.generate("a", max_tokens=2) != ""


def test_several_completions_are_sampled(tiny_llm: LLM) -> None:
    assert tiny_llm.params(n=3).temperature == 1
    assert tiny_llm.params(n=3, num_beams=4).temperature == 0
    assert len({c.text for c in tiny_llm.complete("The", tiny_llm.params(n=3, max_tokens=20, seed=1))[0].outputs}) == 3


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    with LLM(load_model(write_tiny_model(tmp_path / "m", chat=False), device="cpu"), name="m") as llm:
        assert not llm.has_chat_template
        with pytest.raises(NoChatTemplateError):
            llm.chat("hi")


async def test_asynchronous_twins_give_the_same(tiny_llm: LLM) -> None:
    text, chat, many = await asyncio.gather(
        tiny_llm.agenerate("The quick", max_tokens=8),
        tiny_llm.achat(MESSAGES, max_tokens=8),
        tiny_llm.acomplete(["a", "b"], SamplingParams(temperature=0, max_tokens=8)),
    )
    assert text == tiny_llm.generate("The quick", max_tokens=8)
    assert chat == tiny_llm.chat(MESSAGES, max_tokens=8)
    assert [o.outputs for o in many] == [
        o.outputs for o in tiny_llm.complete(["a", "b"], SamplingParams(temperature=0, max_tokens=8))
    ]
    assert "".join([c.text async for c in tiny_llm.astream("The quick", max_tokens=8)]) == text
    assert await tiny_llm.aembed("hello") == tiny_llm.embed("hello")
    assert await tiny_llm.ascore("hello you") == tiny_llm.score("hello you")


@pytest.mark.parametrize("is_built", [False, True])
def test_embeddings_are_made_in_passes_no_larger_than_the_engines(tiny_llm: LLM, monkeypatch, is_built) -> None:
    sizes, texts = [], [[5, 6, 7], [8] * 4, [9], [10] * 2, [11] * 12]
    run = embed.hidden_states

    def noting(model, ids, *more):
        sizes.append(sum(map(len, ids)))
        return run(model, ids, *more)

    expected = tiny_llm.embed(texts)
    monkeypatch.setattr(embed, "hidden_states", noting)
    with LLM(tiny_llm.model, name="narrow", max_num_seqs=2, max_num_batched_tokens=8) as llm:
        if is_built:
            llm.start()
        torch.testing.assert_close(torch.tensor(llm.embed(texts)), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert sizes == [8, 2, 12]


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(tiny_llm: LLM) -> None:
    texts = ["The quick brown fox", "a", "What is the capital of France?"]
    vectors = torch.tensor(tiny_llm.embed(texts))
    assert vectors.shape == (3, tiny_llm.model.config.hidden_size)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(torch.tensor(tiny_llm.embed(texts[2])), vectors[2], atol=1e-5, rtol=1e-5)
    raw = torch.tensor(tiny_llm.embed(texts[0], normalize=False, pooling="mean"))
    assert not torch.allclose(raw / raw.norm(), vectors[0], atol=1e-3)
    with pytest.raises(UnsupportedError, match="pooling='median'"):
        tiny_llm.embed("x", pooling="median")


def test_an_overlong_text_is_refused_or_cut_on_request(tiny_llm: LLM) -> None:
    text = "fox dog " * 300
    with pytest.raises(LLMasOSError, match="context holds 256"):
        tiny_llm.embed(text)
    ids = tiny_llm.tokenizer.encode(text)
    first = tiny_llm.tokenizer.decode(ids[: tiny_llm.context_length])
    assert tiny_llm.embed(text + " the end", truncate=True) == tiny_llm.embed(first)


def test_truncation_cuts_where_the_makers_do(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llm.model, "pooling", {"max_tokens": 6})
    ids = tiny_llm.tokenizer.encode("The quick brown fox jumps over the lazy dog")
    cut = tiny_llm.embed(tiny_llm.tokenizer.decode(ids[:6]))
    assert tiny_llm.embed(tiny_llm.tokenizer.decode(ids), truncate=True) == pytest.approx(cut)
    assert tiny_llm.embed(tiny_llm.tokenizer.decode(ids)) != pytest.approx(cut)


def test_logprobs_name_tokens_by_their_text(tiny_llm: LLM) -> None:
    output = tiny_llm.complete("The quick", SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True))[
        0
    ]
    assert "Ġ" not in "".join(p.token for p in output.outputs[0].logprobs or ())
    whole = [p for p in output.outputs[0].logprobs or () if "\ufffd" not in p.token]
    assert all(p.token == tiny_llm.tokenizer.decode([p.token_id], skip_special_tokens=False) for p in whole)


def test_score_of_a_continuation_adds_up(tiny_llm: LLM) -> None:
    score = tiny_llm.score(" fox", prompt="The quick brown")
    ids = tiny_llm.tokenizer.encode("The quick brown fox")
    assert score.token_ids == tuple(ids[len(ids) - len(score.token_ids) :])
    assert score.logprob == pytest.approx(sum(score.logprobs))
    whole = tiny_llm.score("The quick brown fox")
    assert whole.logprobs[-len(score.logprobs) :] == pytest.approx(score.logprobs)
    # " fox" is one token, which begins in this prompt
    assert tiny_llm.score("fox", prompt="The quick brown ") == score
    assert whole.perplexity > 1


def test_doors_of_the_design_open(tiny_model: Path) -> None:
    with llmasos.LLM.from_pretrained(tiny_model) as model:
        assert isinstance(model.generate(prompt="The quick brown fox", max_length=30, num_beams=5), str)
    with get_model(str(tiny_model)) as model:
        assert isinstance(generate_text(model, "The quick", max_length=20), str)


def test_a_saved_model_answers_the_same(tiny_llm: LLM, tmp_path: Path) -> None:
    tiny_llm.save_pretrained(tmp_path / "saved")
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1
    with LLM(load_model(tmp_path / "saved", device="cpu", dtype="float32"), name="again") as again:
        assert again.generate("The quick", max_tokens=10) == tiny_llm.generate("The quick", max_tokens=10)
        assert again.chat(MESSAGES, max_tokens=10) == tiny_llm.chat(MESSAGES, max_tokens=10)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_stay_close(tiny_llm: LLM, tiny_model: Path, quantization: str) -> None:
    model = load_model(tiny_model, device="cpu", dtype="bfloat16", quantization=quantization)
    with LLM(model, name="small") as small:
        texts = ["The quick brown fox jumps", "What is the capital of France?"]
        full, rounded = torch.tensor(tiny_llm.embed(texts)), torch.tensor(small.embed(texts))
        assert torch.cosine_similarity(full, rounded).min() > (0.99 if quantization == "int8" else 0.9)
        with pytest.raises(UnsupportedError, match="low-bit"):
            small.save_pretrained(tiny_model.parent / "never")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu9"}, "gpu9"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"dtype": "int3"}, "int3"),
        ({"quantization": "q9"}, "q9"),
        ({"quantization": "int8", "dtype": "float16"}, "bfloat16 or float32"),
    ],
)
def test_wrong_options_are_named(tiny_model: Path, options: dict, words: str) -> None:
    with pytest.raises(LLMasOSError, match=words):
        load_model(tiny_model, **options)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_an_empty_prompt_begins_with_bos_or_is_refused(tiny_llm: LLM) -> None:
    assert isinstance(tiny_llm.generate("", max_tokens=3), str)
    with pytest.raises(InvalidInputError, match="not a text"):
        tiny_llm.generate(5, max_tokens=3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, lambda scores: scores.softmax(-1)),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda scores: scores),
        ({"num_labels": 1}, torch.sigmoid),
    ],
    ids=["one label of several", "any labels", "regression", "one score"],
)
def test_classification_reads_scores_as_the_config_says(tmp_path: Path, changes: dict, wanted: Callable) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(**sizes | {"num_labels": 3} | changes, vocab_size=write_tokenizer(folder), pad_token_id=0)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    with LLM(load_model(folder, device="cpu", dtype="float32"), name="m") as llm:
        found = llm.classify("The quick brown fox")
        ids = torch.tensor([llm.tokenizer.encode("The quick brown fox")])
        with torch.inference_mode():
            expected = wanted(model(ids).logits[0])
        with pytest.raises(UnsupportedError, match=r"does not write text: it is an encoder .* and can't chat\."):
            llm.chat("hello")
        with pytest.raises(UnsupportedError, match="does not write text"):
            llm.chat_prompt("hello")
        assert isinstance(found, dict)
        assert list(found) == list(config.id2label.values())
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)
