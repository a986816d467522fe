"""On a GPU the same models give the same numbers: run with `pytest -m gpu` where there is one."""

from pathlib import Path

import pytest
import torch

from llmasos.inference.embed import hidden_states
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.models.load import load_model
from tiny import write_tiny_model

pytestmark = pytest.mark.gpu
VARIANTS = {
    "llama": {},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9},
}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gpu") / request.param, **VARIANTS[request.param])


def test_logits_and_greedy_tokens_equal_the_cpus(folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = [list(range(5, 35)), [9, 8, 7, 6, 50, 51, 52]]
    logits, tokens = {}, {}
    for device in ("cpu", "cuda"):
        with LLM(load_model(folder, device=device, dtype="float32"), name=device) as llm:
            assert llm.model.module.device.type == device
            with torch.inference_mode():
                logits[device] = llm.model.module.logits(hidden_states(llm.model, prompts)).cpu()
            outputs = llm.complete(prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
            tokens[device] = [o.outputs[0].token_ids for o in outputs]
    torch.testing.assert_close(logits["cuda"], logits["cpu"], atol=1e-4, rtol=0)
    assert tokens["cuda"] == tokens["cpu"]


def test_auto_takes_the_gpu_in_bfloat16_and_everything_runs_there(folder: Path) -> None:
    with LLM(load_model(folder), name="gpu") as llm:
        assert (llm.model.module.device.type, llm.model.module.dtype) == ("cuda", torch.bfloat16)
        params = SamplingParams(n=2, seed=3, max_tokens=12, logprobs=2, repetition_penalty=1.1, presence_penalty=0.1)
        sampled = llm.complete(["The quick", "What is the capital"], params)
        assert [len(o.outputs) for o in sampled] == [2, 2]
        assert isinstance(llm.generate("The", max_tokens=8, num_beams=4), str)
        assert len(llm.embed(["a", "The quick brown fox"])) == 2
        assert llm.score("The quick brown fox").logprob < 0


def test_draws_are_the_cpus_for_the_same_seed(folder: Path) -> None:
    params = SamplingParams(seed=9, max_tokens=16, temperature=1.0)
    texts = [
        LLM(load_model(folder, device=device, dtype="float32"), name=device).complete("The quick", params)[0].text
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]
