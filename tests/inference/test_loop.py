"""The engine's thread and its readers: any number of them, in any order, slow, impatient, gone; what they leave."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.errors import ContextOverflowError, InvalidInputError, ServerError
from llmasos.inference.answer import UNREAD_TOKENS
from llmasos.inference.engine import Engine
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams, StructuredOutput
from tiny import write_tiny_model

LONG = {"max_tokens": 240, "ignore_eos": True}
PROMPTS = ["The quick brown fox", "What is", "是巴黎。", "a", "Models are found, run, trained"]


def engine_of(llm: LLM) -> Engine:
    llm.generate("a", max_tokens=1)
    engine = llm._loop.current_engine
    assert engine is not None
    return engine


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def check_nothing_runs(llm: LLM) -> None:
    engine = engine_of(llm)
    until(lambda: not engine.has_work and not engine.scheduler.num_running and not engine.scheduler.num_waiting)
    llm._loop.run(engine.scheduler.check_integrity).result()
    assert all(pool.num_used == 0 for pool in engine.scheduler.cache.pools)
    assert not llm._loop._listeners


# readers that stop early


async def test_cancelling_a_task_stops_the_model(tiny_llm: LLM, slow_passes: list[int]) -> None:
    task = asyncio.create_task(tiny_llm.acomplete(["The quick", "What"], SamplingParams(temperature=0, **LONG)))
    while len(slow_passes) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    check_nothing_runs(tiny_llm)
    assert len(slow_passes) < 150


async def test_a_task_can_be_cancelled_at_any_moment(tiny_llm: LLM) -> None:
    expected = tiny_llm.generate("What is", max_tokens=10)
    for turns in range(12):
        tasks = [asyncio.create_task(tiny_llm.agenerate("The quick", **LONG)) for _ in range(2)]
        other = asyncio.create_task(tiny_llm.agenerate("What is", max_tokens=10))
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, other, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) for e in found[:2]) and found[2] == expected
    check_nothing_runs(tiny_llm)


async def test_leaving_a_stream_early_frees_the_request(tiny_llm: LLM, slow_passes: list[int]) -> None:
    stream = tiny_llm.astream("The quick", **LONG)
    async for _ in stream:
        break
    await stream.aclose()
    for chunk in tiny_llm.stream("The quick", **LONG):
        assert chunk.token_ids
        break
    check_nothing_runs(tiny_llm)
    assert len(slow_passes) < 150


async def test_a_stream_cancelled_before_its_first_chunk_leaves_nothing(tiny_llm: LLM) -> None:
    async def read() -> None:
        async for _ in tiny_llm.astream("The quick", **LONG):
            pass

    for turns in range(6):
        task = asyncio.create_task(read())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    check_nothing_runs(tiny_llm)


def test_a_stream_that_nobody_reads_asks_nothing_of_the_model(tiny_llm: LLM, slow_passes: list[int]) -> None:
    del slow_passes[:]
    tiny_llm.stream("The quick", **LONG)
    check_nothing_runs(tiny_llm)
    assert len(slow_passes) == 1  # of the check itself


def test_a_closed_event_loop_takes_its_requests_with_it(tiny_llm: LLM, slow_passes: list[int]) -> None:
    loop = asyncio.new_event_loop()
    stream = tiny_llm.astream("The quick", **LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    check_nothing_runs(tiny_llm)
    assert len(slow_passes) < 150
    assert tiny_llm.generate("a", max_tokens=2)


# slow readers


def test_a_slow_reader_pauses_its_request_and_loses_nothing(tmp_path: Any) -> None:
    from llmasos.models.load import load_model

    model = load_model(write_tiny_model(tmp_path / "m", max_position_embeddings=1024), device="cpu", dtype="float32")
    with LLM(model, name="slow reader") as llm:
        engine = engine_of(llm)
        num_tokens = 2 * UNREAD_TOKENS
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        stream = llm.stream_complete([5, 6, 7], params)
        chunks = [next(stream)]
        until(lambda: not engine.has_work)  # it waits, and nobody turns in circles meanwhile
        made = engine.stats.num_generated_tokens
        assert UNREAD_TOKENS <= made <= UNREAD_TOKENS + 10
        steps = engine.stats.num_steps
        other = llm.generate("What is", max_tokens=9)  # others go on
        assert engine.stats.num_generated_tokens <= made + 9 and engine.stats.num_steps <= steps + 12
        chunks += stream
        (whole,) = llm.complete([5, 6, 7], params)
        assert tuple(i for c in chunks for i in c.token_ids) == whole.outputs[0].token_ids
        assert len(whole.outputs[0].token_ids) == num_tokens
        assert "".join(c.text for c in chunks) == whole.text
        assert other == llm.generate("What is", max_tokens=9)
        # answers that are wanted whole are no slow readers: none waits until the one before has been read
        many = llm.complete([[5, 6, 7]] * 2, params)
        assert [o.outputs for o in many] == [whole.outputs] * 2
        assert engine.stats.num_steps < steps + 4 * num_tokens
        check_nothing_runs(llm)


# many at once


def test_many_threads_and_tasks_share_one_model(tiny_llm: LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=16)
    expected = [tiny_llm.complete(p, params)[0].outputs for p in PROMPTS]
    found: list[Any] = []

    def thread(i: int) -> None:
        if i % 2:
            found.append((i, tiny_llm.complete(PROMPTS[i % 5], params)[0].outputs))
            return

        async def tasks() -> list[Any]:
            return await asyncio.gather(*(tiny_llm.acomplete(p, params) for p in PROMPTS))

        found.extend((k, out[0].outputs) for k, out in enumerate(asyncio.run(tasks())))

    threads = [threading.Thread(target=thread, args=(i,)) for i in range(10)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(found) == 5 + 5 * 5
    assert all(outputs == expected[i % 5] for i, outputs in found)
    check_nothing_runs(tiny_llm)


def test_embeddings_and_texts_take_turns(tiny_llm: LLM) -> None:
    vectors, text = tiny_llm.embed(PROMPTS), tiny_llm.generate("The quick", max_tokens=60)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(tiny_llm.generate("The quick", max_tokens=60)))
    thread.start()
    assert tiny_llm.embed(PROMPTS) == vectors
    thread.join(60)
    assert found == [text]


def test_stop_strings_end_only_their_own_completion(tiny_llm: LLM) -> None:
    """Also where a step brings several tokens at once, and the stop string ends amid them."""
    params = SamplingParams(n=3, seed=4, max_tokens=40, ignore_eos=True)
    whole = tiny_llm.complete("The quick", params)[0].outputs
    stop = whole[1].text[5:7]
    output = tiny_llm.complete("The quick", SamplingParams(n=3, seed=4, max_tokens=40, ignore_eos=True, stop=(stop,)))[
        0
    ]
    for cut, full in zip(output.outputs, whole, strict=True):
        at = full.text.find(stop)
        assert cut.text == (full.text if at < 0 else full.text[:at])
        assert cut.stop_reason == (None if at < 0 else stop)
        assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    words = StructuredOutput(regex="(the quick brown fox ){4}end")
    forced = SamplingParams(temperature=0, max_tokens=120, structured=words)
    text = tiny_llm.complete("a", forced)[0].text
    assert text == "the quick brown fox " * 4 + "end"
    stopped = SamplingParams(temperature=0, max_tokens=120, structured=words, stop=("k bro",))
    (cut,) = tiny_llm.complete("a", stopped)[0].outputs
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("the quic", "stop", "k bro")
    check_nothing_runs(tiny_llm)


# errors


def failing(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("by zero")


async def test_errors_of_one_request_harm_no_other(tiny_llm: LLM) -> None:
    good = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = tiny_llm.complete("The quick", good)[0].outputs
    bad: list[tuple[Any, SamplingParams, type[Exception]]] = [
        ("The", SamplingParams(max_tokens=9, logits_processors=(failing,)), InvalidInputError),
        ("The", SamplingParams(max_tokens=9, structured=StructuredOutput(regex="(")), InvalidInputError),
        ([5] * 250, SamplingParams(max_tokens=10), ContextOverflowError),
        ("The", SamplingParams(max_tokens=9, logit_bias={9999: 1.0}), InvalidInputError),
    ]
    jobs = [tiny_llm.acomplete("The quick", good) for _ in range(3)]
    jobs += [tiny_llm.acomplete(prompt, params) for prompt, params, _ in bad]
    found = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(out[0].outputs == expected for out in found[:3])
    for error, (_, _, kind) in zip(found[3:], bad, strict=True):
        assert isinstance(error, kind), error
    check_nothing_runs(tiny_llm)


def test_an_engine_that_breaks_fails_its_requests_and_is_replaced(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_llm.model, name="brittle") as llm:
        engine = engine_of(llm)

        def broken() -> None:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(engine, "_prepare", broken)
        with pytest.raises(ServerError, match="the device is lost"):
            llm.generate("The quick", max_tokens=3)
        assert llm.generate("The quick", max_tokens=3) == tiny_llm.generate("The quick", max_tokens=3)
        assert llm._loop.current_engine is not engine


# the end


def test_closing_fails_what_is_on_its_way(tiny_llm: LLM, slow_passes: list[int]) -> None:
    llm = LLM(tiny_llm.model, name="closing")
    found: list[Exception] = []

    def work(call: Callable[[], Any]) -> None:
        try:
            call()
        except ServerError as e:
            found.append(e)

    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("The quick", **LONG),
        lambda: list(llm.stream("The", **LONG)),
        lambda: asyncio.run(llm.agenerate("What", **LONG)),
    ]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    engine = engine_of(llm)
    until(lambda: engine.scheduler.num_running == 3)
    llm.close()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3 and all("closed" in str(e) for e in found)
    with pytest.raises(ServerError, match="closed"):
        llm.generate("a")
    llm.close()


def test_closing_fails_passes_that_wait(tiny_llm: LLM) -> None:
    llm = LLM(tiny_llm.model, name="closing")
    held, go = threading.Event(), threading.Event()
    found: list[Exception] = []

    def hold() -> None:
        held.set()
        go.wait(20)

    def embed() -> None:
        try:
            llm.embed("a")
        except ServerError as e:
            found.append(e)

    llm._loop.run(hold)
    held.wait(20)
    thread = threading.Thread(target=embed)
    thread.start()
    until(lambda: llm._loop._inbox.qsize() == 1)
    closing = threading.Thread(target=llm.close)
    closing.start()
    until(lambda: llm._loop._inbox.qsize() == 2)
    go.set()
    thread.join(20)
    closing.join(20)
    assert len(found) == 1


def test_the_thread_of_a_model_that_nobody_holds_ends(tiny_llm: LLM) -> None:
    llm = LLM(tiny_llm.model, name="dropped")
    llm.generate("a", max_tokens=1)
    thread = llm._loop._thread
    assert thread is not None and thread.is_alive()
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_program_that_ends_while_it_answers_ends_after_a_step(tiny_model: Path) -> None:
    code = """
import atexit, sys
atexit.register(lambda: print(llm._loop._thread.is_alive(), flush=True))  # the first one is called last
from llmasos.inference.llm import LLM
llm = LLM.from_pretrained(sys.argv[1])
pieces = llm.stream("a", max_tokens=240, ignore_eos=True)
next(pieces)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (3, "False\n", "")
