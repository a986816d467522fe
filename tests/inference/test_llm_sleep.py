"""A model put to sleep: its memory is given back, every use wakes it, and it writes what it wrote before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.errors import BusyError
from llmasos.formats import save_safetensors
from llmasos.inference.config import SpeculativeConfig
from llmasos.inference.llm import LLM
from llmasos.models.encoder import Encoder
from llmasos.models.families import config_from_hf, family_of
from llmasos.models.families.mapping import to_hf
from llmasos.models.load import load_model
from llmasos.models.weights import is_asleep
from tiny import write_tiny_adapter, write_tokenizer


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    hf = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": write_tokenizer(folder, chat=False),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
    }
    (folder / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf)
    state = {name: torch.randn(p.shape) * 0.2 for name, p in Encoder(config).state_dict().items()}
    save_safetensors(dict(to_hf(family_of(config), config, state)), folder, metadata={"format": "pt"})
    return folder


def test_a_model_that_slept_writes_the_same_and_remembers_no_pages(tiny_llm: LLM) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. What is the capital of France?"
    before = tiny_llm.generate(prompt, max_tokens=20)
    assert tiny_llm.sleep() > sum(p.nbytes for p in load_model(tiny_llm.model.path, device="cpu").module.parameters())
    assert tiny_llm.is_sleeping and is_asleep(tiny_llm.model.module)
    assert tiny_llm.sleep() == 0, "it sleeps already"
    tiny_llm.wake_up()
    assert not tiny_llm.is_sleeping
    tiny_llm.wake_up()
    [output] = tiny_llm.complete(prompt, tiny_llm.params(max_tokens=20))
    assert (output.text, output.metrics.num_cached_tokens) == (before, 0)
    [output] = tiny_llm.complete(prompt, tiny_llm.params(max_tokens=20))
    assert (output.text, output.metrics.num_cached_tokens > 0) == (before, True)


def test_a_draft_model_sleeps_and_wakes_with_its_target(tiny_llm: LLM) -> None:
    prompt = "The quick brown fox"
    expected, folder = tiny_llm.generate(prompt, max_tokens=20), str(tiny_llm.model.path)
    config = SpeculativeConfig(method="draft", model=folder, num_speculative_tokens=3)
    with LLM(load_model(folder, device="cpu", dtype="float32"), name="m", speculative=config) as llm:
        assert llm.generate(prompt, max_tokens=20) == expected
        drafts = llm._loop.current_engine.speculator.proposer
        weights = sum(p.nbytes for p in drafts.module.parameters())
        with LLM(load_model(folder, device="cpu", dtype="float32"), name="alone") as alone:
            alone.generate(prompt, max_tokens=20)
            assert llm.sleep() > alone.sleep() + weights
        assert is_asleep(drafts.module) and drafts.sleep() == 0
        assert llm.generate(prompt, max_tokens=20) == expected
        assert not is_asleep(drafts.module) and llm.stats.num_accepted_tokens > 0


USES: dict[str, Any] = {
    "generate": lambda llm, tmp: llm.generate("The quick", max_tokens=8),
    "stream": lambda llm, tmp: "".join(c.text for c in llm.stream("The quick", max_tokens=8)),
    "score": lambda llm, tmp: llm.score("The quick brown"),
    "embed": lambda llm, tmp: llm.embed("The quick brown"),
    "save": lambda llm, tmp: (llm.save_pretrained(tmp), (tmp / "model.safetensors").read_bytes())[1],
}


@pytest.mark.parametrize("use", USES)
def test_every_use_wakes_a_sleeping_model(tiny_llm: LLM, use: str, tmp_path: Path) -> None:
    awake = USES[use](tiny_llm, tmp_path)
    tiny_llm.sleep()
    assert USES[use](tiny_llm, tmp_path) == awake
    assert not tiny_llm.is_sleeping


def test_adapters_come_and_go_while_a_model_sleeps(tiny_model: Path, tmp_path: Path) -> None:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        plain = llm.generate("The quick", max_tokens=8)
        llm.sleep()
        llm.load_adapter("a", write_tiny_adapter(tmp_path / "a"))
        adapted = llm.generate("The quick", max_tokens=8, adapter="a")
        llm.sleep()
        assert llm.generate("The quick", max_tokens=8, adapter="a") == adapted != plain
        llm.sleep()
        llm.unload_adapter("a")
        assert llm.generate("The quick", max_tokens=8) == plain


def test_a_model_may_sleep_before_its_first_request(tiny_model: Path, tiny_llm: LLM) -> None:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        llm.wake_up()
        assert not llm.is_sleeping
        assert llm.sleep() > 0
        assert llm.generate("The", max_tokens=8) == tiny_llm.generate("The", max_tokens=8)


def test_a_model_at_work_does_not_sleep(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream("The", max_tokens=200, ignore_eos=True)
    next(stream)
    with pytest.raises(BusyError, match="1 requests are on their way"):
        tiny_llm.sleep()
    assert not tiny_llm.is_sleeping
    assert len(list(stream)) > 100
    assert tiny_llm.sleep() > 0
    tiny_llm.wake_up()


def test_an_encoder_sleeps_too(embedder: Path) -> None:
    with LLM(load_model(embedder, device="cpu"), name="encoder") as llm:
        before = llm.embed(["The quick", "What"])
        assert llm.sleep() > 10_000
        assert llm.is_sleeping
        assert llm.embed(["The quick", "What"]) == before
        llm.sleep()
        llm.wake_up()
        assert not llm.is_sleeping
