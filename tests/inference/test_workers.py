"""Processes that follow rank 0: together they are the model in one process; orders arrive in order, errors come back,
and nobody waits for the dead."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file

from llmasos.errors import DeviceError, InsufficientMemoryError, UnsupportedError
from llmasos.inference.workers import SLOT_BYTES, SLOTS, Workers
from llmasos.models.load import load_model
from tiny import TINY_LLAMA, write_tiny_model

PROMPT = [5, 17, 3, 9, 60, 21, 8]
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {"num_kv_heads": 2, "ffn_hidden_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},  # two key heads, one for each
    "MistralForCausalLM": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 4},  # one for both
    "Qwen2ForCausalLM": {"model_type": "qwen2", "tie_word_embeddings": False},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 4},
    "StableLmForCausalLM": {"model_type": "stablelm", "qk_layernorm": True, "use_qkv_bias": True},
    "GPT2LMHeadModel": {"model_type": "gpt2", **GPT2},
    "FalconForCausalLM": {"model_type": "falcon", "multi_query": True, **FALCON},
    "GPTJForCausalLM": {"model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False, **GPT2},
}


@pytest.fixture(scope="module")
def living() -> Iterator[list[Workers]]:
    """The workers that tests share; one that ends them leaves the list empty."""
    alive: list[Workers] = []
    threads = torch.get_num_threads()
    yield alive
    torch.set_num_threads(threads)
    for workers in alive:
        workers.close()


@pytest.fixture
def workers(living: list[Workers]) -> Workers:
    if not living:
        living.append(Workers(2, ranks.Rank, "cpu"))
    return living[0]


def test_every_rank_is_a_process_of_its_own(workers: Workers) -> None:
    (first, here), (second, there) = workers.call("identity")
    assert (first, second) == (0, 1)
    assert here == os.getpid() != there


def test_ranks_compute_together(workers: Workers) -> None:
    assert workers.call("sum", 1.5) == [3.0, 3.0]


def every_weight_matters(folder: Path) -> Path:
    """Biases that differ and do not drown the rest."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensors[name] = noise if name.endswith("bias") else 1 + noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_decode_what_one_does(family: str, workers: Workers, tmp_path: Path) -> None:
    folder = every_weight_matters(write_tiny_model(tmp_path / "m", architectures=[family], **FAMILIES[family]))
    one = load_model(folder, device="cpu", dtype="float32", with_tokenizer=False)
    shapes = workers.call("load", folder)
    whole = {name: p.numel() for name, p in one.module.named_parameters()}
    assert sum(torch.Size(s).numel() for n, s in shapes[0].items() if "layers" in n) < 0.7 * sum(
        size for name, size in whole.items() if "layers" in name
    )
    expected = ranks.logits(one, PROMPT)
    assert len(set(expected.argmax(-1).tolist())) > 1, "a model that always says the same proves little"
    for found in workers.call("logits", PROMPT):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for prompt in (PROMPT, PROMPT[:3], PROMPT[::-1]):
        tokens = ranks.greedy(one, prompt, 8)
        assert workers.call("greedy", prompt, 8) == [tokens, tokens]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_decode_what_one_does(tiny_model: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    one = load_model(tiny_model, device="cuda:0", dtype="float32")
    for _ in range(2):  # the second time with other peers
        with Workers(2, ranks.Rank, "cuda") as both:
            assert both.call("sum", 1.5) == [3.0, 3.0]
            both.call("load", tiny_model)
            for found in both.call("logits", PROMPT):
                torch.testing.assert_close(found, ranks.logits(one, PROMPT), atol=1e-4, rtol=1e-5)
            tokens = ranks.greedy(one, PROMPT, 32)
            assert both.call("greedy", PROMPT, 32) == [tokens, tokens]


def test_dummy_weights_are_one_model_over_any_number_of_processes(workers: Workers, tmp_path: Path) -> None:
    config = {**TINY_LLAMA, "vocab_size": 300, "initializer_range": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one = load_model(tmp_path, device="cpu", dtype="float32", load_format="dummy")
    workers.call("load", tmp_path, "dummy")
    for found in workers.call("logits", PROMPT):
        torch.testing.assert_close(found, ranks.logits(one, PROMPT), atol=1e-4, rtol=1e-5)


def test_a_share_can_not_be_saved_or_rounded(workers: Workers, tiny_model: Path, tmp_path: Path) -> None:
    workers.call("load", tiny_model)
    with pytest.raises(UnsupportedError, match="only a part"):
        workers.local.model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match=r"int8.*one process"):
        load_model(tiny_model, quantization="int8", group=workers.local.group)


def test_orders_arrive_in_order_whatever_their_size(workers: Workers) -> None:
    workers.call("recall")
    sent = [np.full(size, i) for i, size in enumerate([1, 40_000, 0, SLOT_BYTES, 2, 3 * SLOT_BYTES // 8, 7])]
    for array in sent:
        workers.broadcast("remember", array)
    _, found = workers.call("recall")
    assert [f.tolist() for f in found] == [s.tolist() for s in sent]


def test_a_slow_worker_loses_no_order(workers: Workers) -> None:
    """More orders than the queue holds; and one for a worker that has gone to sleep."""
    workers.call("recall")
    workers.broadcast("nap", 0.05)
    for i in range(3 * SLOTS):
        workers.broadcast("remember", i)
    assert workers.call("recall")[1] == list(range(3 * SLOTS))
    time.sleep(0.1)
    workers.broadcast("remember", "woken")
    assert workers.call("recall")[1] == ["woken"]


def test_an_error_elsewhere_is_raised_here_with_its_rank(workers: Workers) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"Rank 1: No room for pages\. Take fewer\."):
        workers.call("fail_elsewhere", "memory")
    with pytest.raises(RuntimeError, match="Rank 1: Unpicklable") as info:
        workers.call("fail_elsewhere", "unpicklable")
    assert any("fail_elsewhere" in note for note in info.value.__notes__)
    assert workers.call("sum", 1.0) == [2.0, 2.0], "the ranks are still in step"


def test_an_error_of_all_ranks_is_this_ones(workers: Workers) -> None:
    with pytest.raises(ValueError, match=r"^no such step$"):
        workers.call("fail")
    assert workers.call("sum", 1.0) == [2.0, 2.0]


def test_a_step_that_failed_elsewhere_ends_the_worker_with_its_reason(workers: Workers, living: list[Workers]) -> None:
    living.clear()
    started = time.monotonic()
    with workers:
        workers.broadcast("fail")
        for order in (lambda: workers.call("sum", 1.0), lambda: workers.broadcast("remember", 1)):
            with pytest.raises(DeviceError, match=r"Rank 1: no such step .*load the model again"):
                order()
    assert time.monotonic() - started < 10


def test_a_killed_worker_is_named_and_not_waited_for(workers: Workers, living: list[Workers]) -> None:
    """Killed while rank 0 waits for its summand."""
    living.clear()
    _, (_, pid) = workers.call("identity")
    with workers:
        workers.broadcast("nap", 30.0)
        os.kill(pid, signal.SIGKILL)
        ended = rf"rank 1 \(process {pid}\) ended: signal SIGKILL.*load the model again"
        with pytest.raises(DeviceError, match=ended), workers.in_step():
            workers.local.sum(1.0)
        with pytest.raises(DeviceError, match=ended):
            workers.check()


def test_this_ranks_failure_between_orders_ends_all(workers: Workers, living: list[Workers]) -> None:
    """The other one waits for a summand that never comes."""
    living.clear()
    [_, (_, pid)] = workers.call("identity")
    workers.broadcast("sum", 1.0)
    with pytest.raises(DeviceError, match=r"Rank 0: no memory\. .*load the model again"), workers.in_step():
        raise InsufficientMemoryError("no memory.")
    with pytest.raises(DeviceError, match="no memory"):
        workers.call("sum", 1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
