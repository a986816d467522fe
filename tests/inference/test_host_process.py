"""A model in a process of its own: the texts and numbers of LLM, and readers that are slow, leave, or never come."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from hosting import hosted, spec_of, until, until_async
from transformers import BertConfig, BertForSequenceClassification

from llmasos.errors import (
    BusyError,
    ContextOverflowError,
    InvalidInputError,
    NotFoundError,
    UnsupportedError,
)
from llmasos.inference.answer import UNREAD_TOKENS
from llmasos.inference.host.hosted import HostedLLM
from llmasos.inference.host.process import ModelProcess
from llmasos.inference.llm import LLM
from llmasos.inference.request import Chunk, RequestOutput, SamplingParams, StructuredOutput
from llmasos.models.load import load_model
from tiny import write_tiny_adapter, write_tiny_model, write_tokenizer

PROMPTS = ["The quick brown fox", "What is the capital", "是巴黎。", "a"]
LONG = {"max_tokens": 200, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def process(tiny_model: Path) -> Iterator[ModelProcess]:
    with hosted(spec_of(tiny_model)) as process:
        yield process


@pytest.fixture
def there(process: ModelProcess) -> Iterator[HostedLLM]:
    """Nothing runs before or after a test."""
    yield process.llm
    until(lambda: process.llm.stats.num_running == process.llm.stats.num_waiting == process.link.num_busy == 0)


@pytest.fixture(scope="module")
def here(tiny_model: Path) -> Iterator[LLM]:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        yield llm


def timeless(outputs: list[RequestOutput]) -> list[Any]:
    """What two engines agree on: no times, and log-probabilities as far as they don't depend on the batch."""

    def rounded(logprobs: Any) -> Any:
        return logprobs and [p and (p.token_id, p.token, round(p.logprob, 3), len(p.top)) for p in logprobs]

    return [
        (
            out.prompt,
            out.prompt_token_ids,
            [replace(c, logprobs=None, score=c.score and round(c.score, 4)) for c in out.outputs],
            [rounded(c.logprobs) for c in out.outputs],
            rounded(out.prompt_logprobs),
            out.metrics.num_output_tokens,
        )
        for out in outputs
    ]


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "a seed": {"seed": 7, "temperature": 0.9, "top_p": 0.9, "top_k": 40},
    "a seed of 70 bits": {"seed": 1 << 70},
    "several": {"n": 3, "seed": 1},
    "a stop string": {"temperature": 0.0, "stop": ("e", "zz"), "ignore_eos": True},
    "a stop string of each": {"n": 3, "seed": 3, "stop": ("a", "the"), "include_stop": True},
    "a stop token": {"seed": 5, "stop_token_ids": tuple(range(60, 120))},
    "logprobs": {"seed": 2, "logprobs": 3},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "only the prompt": {"temperature": 0.0, "prompt_logprobs": 0, "max_tokens": 0},
    "nothing": {"max_tokens": 0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "a bias": {"temperature": 0.0, "logit_bias": {65: float("-inf"), 70: 4.0}},
    "a schema": {"seed": 4, "structured": StructuredOutput(json=SCHEMA)},
    "a choice": {"seed": 4, "structured": StructuredOutput(choice=("yes", "no"))},
    "an expression": {"temperature": 0.0, "structured": StructuredOutput(regex="[a-c]{3,9}")},
    "beams": {"temperature": 0.0, "num_beams": 4, "n": 2, "length_penalty": 0.7},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_it_answers_as_an_engine_in_this_process(here: LLM, there: HostedLLM, options: dict[str, Any]) -> None:
    params = SamplingParams.of(**{"max_tokens": 24} | options)
    expected, found = here.complete(PROMPTS, params), there.complete(PROMPTS, params)
    assert timeless(found) == timeless(expected)
    if params.max_tokens:
        assert all(0 < out.metrics.queue_seconds <= out.metrics.time_to_first_token < 20 for out in found)


def test_it_says_that_it_lives_though_nobody_asks_for_anything(process: ModelProcess) -> None:
    heard = process.link.num_heard
    until(lambda: process.link.num_heard > heard and process.step_seconds == 0.0)


async def test_all_doors_are_open(here: LLM, there: HostedLLM) -> None:
    messages = [{"role": "user", "content": "What is the capital?"}]
    assert there.generate(PROMPTS, max_tokens=9, echo=True) == here.generate(PROMPTS, max_tokens=9, echo=True)
    assert await there.agenerate("a", max_length=12) == here.generate("a", max_length=12)
    assert await there.achat(messages, max_tokens=9) == there.chat(messages, max_tokens=9)
    assert there.chat(messages, max_tokens=9) == here.chat(messages, max_tokens=9)
    assert there.chat_prompt(messages) == here.chat_prompt(messages) and there.chat_template == here.chat_template
    assert (await there.acomplete_chat(messages)).text == here.complete_chat(messages).text
    assert there.context_length == here.context_length == 256 and there.has_chat_template
    assert there.score(PROMPTS[:2]) == here.score(PROMPTS[:2])
    assert await there.ascore("fox", prompt="The quick") == here.score("fox", prompt="The quick")
    for options in ({"n": 2, "seed": 1, "logprobs": 2}, {"stop": ("e",)}):
        expected = list(here.stream(messages, max_tokens=20, **options))
        assert shown(list(there.stream(messages, max_tokens=20, **options))) == shown(expected)
        assert shown([c async for c in there.astream(messages, max_tokens=20, **options)]) == shown(expected)
    ids = here.tokenizer.encode("The")
    *_, last = [c async for c in there.astream_complete(ids, SamplingParams(max_tokens=5, seed=1))]
    assert last.metrics is not None and last.metrics.num_output_tokens == 5


def shown(chunks: list[Chunk]) -> list[list[Any]]:
    """What each completion's chunks say together."""
    by_index: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    return [
        [
            "".join(c.text for c in own),
            [i for c in own for i in c.token_ids],
            [(p.token, round(p.logprob, 3)) for c in own for p in c.logprobs],
            own[-1].finish_reason,
            own[-1].stop_reason,
        ]
        for _, own in sorted(by_index.items())
    ]


async def test_embeddings_of_texts_and_ids_are_the_same(here: LLM, there: HostedLLM) -> None:
    assert there.embed(PROMPTS) == here.embed(PROMPTS)
    ids = here.tokenizer.encode("What")
    assert await there.aembed([ids, ids]) == here.embed(["What"] * 2)  # type: ignore[list-item]
    assert there.embed(ids) == there.embed("What") == await there.aembed(ids)
    assert there.embed("What", pooling="mean", normalize=False) == here.embed("What", pooling="mean", normalize=False)
    with pytest.raises(UnsupportedError, match="pooling='middle'") as caught:
        there.embed("What", pooling="middle")
    assert caught.value.param == "pooling"
    with pytest.raises(UnsupportedError, match="classification head"):
        there.classify("What")


def test_adapters_are_loaded_mixed_and_unloaded(here: LLM, there: HostedLLM, tmp_path: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "a")
    there.load_adapter("a", folder)
    here.load_adapter("a", folder)
    try:
        assert [info.name for info in there.adapters] == ["a"] and there.adapters[0].path == folder
        for adapter in ("a", None):
            assert there.generate("The", max_tokens=9, adapter=adapter) == here.generate(
                "The", max_tokens=9, adapter=adapter
            )
        stream = there.stream("The", adapter="a", **LONG)
        next(stream)
        with pytest.raises(BusyError):
            there.unload_adapter("a")
        stream.close()
        until(lambda: not there.stats.num_running)
    finally:
        here.unload_adapter("a")
        there.unload_adapter("a")
    assert there.adapters == []
    with pytest.raises(NotFoundError, match="nowhere"):
        there.load_adapter("b", tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="No adapter 'a'"):
        there.generate("The", adapter="a")


def test_errors_keep_their_type_and_their_fields(there: HostedLLM) -> None:
    with pytest.raises(ContextOverflowError) as overflow:
        there.generate("a", max_tokens=1000)
    assert overflow.value.context_length == 256
    with pytest.raises(InvalidInputError) as grammar:
        there.generate("a", structured=StructuredOutput(regex="(a"))
    assert grammar.value.param == "structured" and type(grammar.value) is InvalidInputError
    with pytest.raises(UnsupportedError, match="another process"):
        there.generate("a", logits_processors=(lambda ids, logits: logits,))
    with pytest.raises(InvalidInputError, match="cache_salt"):
        there.generate("a", cache_salt=("a", 1))
    assert there.generate("a", cache_salt="mine", priority=-1, max_tokens=3) == there.generate("a", max_tokens=3)


def test_sleeping_gives_memory_back_and_the_next_request_wakes(here: LLM, there: HostedLLM) -> None:
    assert there.sleep() > 0
    assert there.generate("a", max_tokens=5) == here.generate("a", max_tokens=5)
    there.sleep()
    there.wake_up()


# readers


async def test_leaving_a_stream_or_cancelling_a_task_stops_the_model(there: HostedLLM) -> None:
    stream = there.astream("The quick", **LONG)
    await anext(stream)
    task = asyncio.create_task(there.acomplete(PROMPTS[:2], SamplingParams(temperature=0, **LONG)))
    await until_async(lambda: there.stats.num_running == 3)
    await stream.aclose()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_async(lambda: there.stats.num_running == 0)
    assert there.stats.kv_cache_usage == 0.0


def test_asking_to_stop_gives_what_there_is(there: HostedLLM) -> None:
    begun = time.monotonic()
    [output] = there.complete("The", SamplingParams(**LONG), cancelled=lambda: time.monotonic() > begun + 0.05)
    assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) < 200


async def test_a_task_can_be_cancelled_at_any_moment(there: HostedLLM) -> None:
    expected = await there.agenerate("What is", max_tokens=10)
    for turns in range(8):
        tasks = [asyncio.create_task(there.agenerate("The quick", **LONG)) for _ in range(2)]
        other = asyncio.create_task(there.agenerate("What is", max_tokens=10))
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, other, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for e in found[:2]) and found[2] == expected


async def test_readers_of_several_event_loops_and_of_none_share_the_model(there: HostedLLM) -> None:
    expected = there.generate("What is", max_tokens=30)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(there.agenerate("What is", max_tokens=30)))),
        threading.Thread(target=lambda: found.append(there.generate("What is", max_tokens=30))),
        threading.Thread(target=lambda: found.append("".join(c.text for c in there.stream("What is", max_tokens=30)))),
    ]
    for thread in threads:
        thread.start()
    found.append(await there.agenerate("What is", max_tokens=30))
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert found == [expected] * 4


def test_an_event_loop_that_ends_takes_its_readers_along(there: HostedLLM) -> None:
    loop = asyncio.new_event_loop()
    stream = there.astream("The quick", **LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    until(lambda: there.stats.num_running == 0)
    with suppress(StopIteration):
        stream.aclose().send(None)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelProcess]:
    """Contexts that no test comes to the end of, and room for two of them."""
    folder = write_tiny_model(tmp_path_factory.mktemp("endless") / "m", max_position_embeddings=1024)
    with hosted(spec_of(folder, "endless", engine={"max_num_seqs": 4, "kv_cache_memory": 2 * 1040 * 256})) as process:
        yield process


def test_a_slow_reader_pauses_its_request_and_nobody_elses(endless: ModelProcess) -> None:
    llm = endless.llm
    stream = llm.stream("a", max_tokens=900, ignore_eos=True)
    first = next(stream)
    until(lambda: llm.stats.num_generated_tokens > UNREAD_TOKENS)
    time.sleep(0.3)
    made = llm.stats.num_generated_tokens
    assert made < 500
    assert len(llm.complete("b", SamplingParams(max_tokens=50, ignore_eos=True))[0].outputs[0].token_ids) == 50
    assert llm.stats.num_generated_tokens - made == 50
    assert sum(len(chunk.token_ids) for chunk in (first, *stream)) == 900


def test_two_models_run_at_once(endless: ModelProcess, there: HostedLLM, here: LLM) -> None:
    other = endless.llm.stream("a", max_tokens=200, ignore_eos=True)
    first = next(other)
    assert there.generate("a", max_tokens=20) == here.generate("a", max_tokens=20)
    assert len([first, *other]) > 1 and endless.pid != there._link.addresses


def test_what_only_the_engine_can_refuse_is_refused(endless: ModelProcess) -> None:
    with pytest.raises(InvalidInputError, match="num_beams=5") as caught:
        endless.llm.generate("a", max_tokens=5, num_beams=5)
    assert caught.value.param == "num_beams"


def test_stop_lets_requests_end_first(tiny_model: Path) -> None:
    async def stop_while_running() -> tuple[int, Any]:
        process = await ModelProcess.start(spec_of(tiny_model))
        task = asyncio.create_task(process.llm.acomplete("The", SamplingParams(temperature=0, **LONG)))
        await until_async(lambda: process.llm.stats.num_running == 1)
        await process.stop(30)
        return await process.wait(), (await task)[0].outputs[0]

    code, completion = asyncio.run(stop_while_running())
    assert code == 0 and completion.finish_reason == "length" and len(completion.token_ids) == 200


# other kinds of models


def test_a_cross_encoder_scores_pairs_and_classifies(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(**sizes, num_labels=1, vocab_size=write_tokenizer(folder), pad_token_id=0)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    query, texts = "What is the capital?", ["It is Paris.", "The fox jumps over", "是巴黎"]
    with hosted(spec_of(folder)) as process:
        llm = process.llm
        assert llm.is_encoder and llm.embed(texts)
        found = llm.score_pairs(query, texts)
        assert asyncio.run(llm.ascore_pairs(query, texts)) == found
        for text, share in zip(texts, found, strict=True):
            ids, types = llm.tokenizer.encode_pair(query, text)
            with torch.inference_mode():
                [[logit]] = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.tolist()
            assert share == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-5)
        assert llm.classify(texts[0]).keys() == {"LABEL_0"}
        with pytest.raises(UnsupportedError, match="encoder"):
            llm.generate("a")


def test_a_decoder_scores_no_pairs(there: HostedLLM) -> None:
    with pytest.raises(UnsupportedError, match="no head that scores pairs"):
        there.score_pairs("a", ["b"])


def test_the_parent_needs_no_torch(tiny_model: Path) -> None:
    code = f"""
import asyncio, sys
from llmasos.inference.host.process import ModelProcess, ModelSpec

async def main():
    process = await ModelProcess.start(ModelSpec("m", {str(tiny_model)!r}, device="cpu"))
    llm = process.llm
    assert [c async for c in llm.astream([dict(role="user", content="hi")], max_tokens=5, logprobs=1, stop=["zz"])]
    await llm.acomplete("a", llm.params(num_beams=2, max_tokens=4))
    await llm.aembed(["a"])
    await process.stop(1)

asyncio.run(main())
import llmasos.serve.models, llmasos.inference.host.host
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_where_there_are_no_local_sockets_tcp_is_encrypted(
    tiny_model: Path, here: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.inference.host.link.zmq.has", lambda what: what != "ipc")
    with hosted(spec_of(tiny_model)) as process:
        addresses = process.link.addresses
        assert all(address.startswith("tcp://127.0.0.1:") for address in addresses) and process.link.server_key
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(addresses[1])
            stranger.send(b"nonsense")  # never arrives: it does not know the key
            assert process.llm.generate("The", max_tokens=30) == here.generate("The", max_tokens=30)


def test_models_start_with_adapters_and_engine_options(tiny_model: Path, here: LLM, tmp_path: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "a")
    engine = {"max_model_len": 64, "max_num_seqs": 2, "speculative": {"method": "ngram", "num_speculative_tokens": 3}}
    with hosted(spec_of(tiny_model, engine=engine, adapters={"a": str(folder)})) as process:
        assert process.llm.context_length == 64 and [info.name for info in process.llm.adapters] == ["a"]
        assert process.llm.generate("The", max_tokens=30) == here.generate("The", max_tokens=30)
        assert process.device == "cpu" and process.dtype == "float32"
        assert process.memory.rss_bytes > 50e6 and process.load_seconds > 0
