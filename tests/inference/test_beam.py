"""Beam search agrees with transformers' generate(num_beams=…) token for token, on three families."""

from pathlib import Path

import pytest
import torch
from family_equality import load_ours, quiet, random_prompts, save_hf, tiny_model
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from llmasos.errors import UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams

SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": LlamaConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
}
EOS = (7, 11)


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    reference = tiny_model(CONFIGS[request.param], seed=3)
    folder: Path = save_hf(reference, tmp_path_factory.mktemp(request.param))
    with LLM(load_ours(folder), name=request.param) as llm:
        yield reference, llm


def theirs(model, prompt: torch.Tensor, eos: tuple[int, ...], **options) -> list[list[int]]:  # type: ignore[no-untyped-def]
    with quiet(), torch.inference_mode():
        out = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            **options,
        )
    rows = []
    for row in out[:, len(prompt) :].tolist():
        ends = [i + 1 for i, token in enumerate(row) if token in eos]
        rows.append(row[: ends[0]] if ends else row)
    return rows


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("eos", [(), EOS], ids=["no-eos", "eos"])
def test_beams_equal_transformers(pair, length_penalty: float, early_stopping: bool, eos: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    reference, llm = pair
    for prompt in random_prompts(61, (5, 9)):
        options = {"num_beams": 5, "length_penalty": length_penalty, "early_stopping": early_stopping}
        expected = theirs(reference, prompt, eos, max_new_tokens=24, num_return_sequences=3, **options)
        params = SamplingParams(n=3, max_tokens=24, stop_token_ids=eos, **options)
        output = llm.complete(prompt.tolist(), params)[0]
        assert [list(c.token_ids) for c in output.outputs] == expected
        scores = [c.score for c in output.outputs]
        assert scores == sorted(scores, reverse=True)


def test_one_beam_is_greedy(pair) -> None:  # type: ignore[no-untyped-def]
    _, llm = pair
    prompt = random_prompts(61, (6,))[0].tolist()
    one = llm.complete(prompt, SamplingParams(temperature=0, max_tokens=16))[0]
    assert one.outputs[0].token_ids == tuple(theirs(pair[0], torch.tensor(prompt), (), max_new_tokens=16)[0])


def test_a_repetition_penalty_reaches_the_beams(pair) -> None:  # type: ignore[no-untyped-def]
    reference, llm = pair
    prompt = random_prompts(61, (6,))[0]
    expected = theirs(reference, prompt, (), max_new_tokens=20, num_beams=4, repetition_penalty=1.5)
    params = SamplingParams(num_beams=4, max_tokens=20, repetition_penalty=1.5)
    assert list(llm.complete(prompt.tolist(), params)[0].outputs[0].token_ids) == expected[0]


@pytest.mark.parametrize("options", [{"stop": ("x",)}, {"logprobs": 1}, {"temperature": 0.5}, {"top_k": 5}])
def test_what_beams_cannot_do_is_refused(pair, options: dict) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError):
        pair[1].complete([1, 2, 3], SamplingParams(num_beams=2, max_tokens=4, **options))
