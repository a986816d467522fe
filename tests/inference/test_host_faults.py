"""What ends a model's process, and that nobody waits for a dead one: killed, out of bounds, talked nonsense to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq
from hosting import family, hosted, spec_of, until, until_async

from llmasos.errors import (
    FormatError,
    InsufficientMemoryError,
    InvalidInputError,
    ModelCrashedError,
    NotFoundError,
)
from llmasos.inference.host import messages as wire
from llmasos.inference.host.process import ModelProcess, ModelSpec
from llmasos.inference.request import SamplingParams
from llmasos.store.transfer import Progress

LONG = {"max_tokens": 200, "ignore_eos": True}


async def test_a_killed_process_fails_every_request_at_once_and_no_other_model(tiny_model: Path) -> None:
    doomed, other = await asyncio.gather(
        ModelProcess.start(spec_of(tiny_model, "doomed")), ModelProcess.start(spec_of(tiny_model, "other"))
    )
    try:
        stream = doomed.llm.astream("The", **LONG)
        got = [await anext(stream)]
        tasks = [asyncio.create_task(doomed.llm.acomplete("a", SamplingParams(**LONG))) for _ in range(3)]
        threads = [asyncio.create_task(asyncio.to_thread(doomed.llm.generate, "b", **LONG))]
        beside = asyncio.create_task(other.llm.agenerate("The", **LONG))
        await until_async(lambda: doomed.llm.stats.num_running == 5)
        os.kill(doomed.pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(ModelCrashedError) as crash:
            async for chunk in stream:
                got.append(chunk)
        found = await asyncio.gather(*tasks, *threads, return_exceptions=True)
        assert time.monotonic() - killed < 5
        assert all(isinstance(error, ModelCrashedError) for error in found), found
        assert crash.value.http_status == 503 and crash.value.retry_after == 1 and crash.value.code == "model_crashed"
        assert f"The process of doomed (pid {doomed.pid}) has ended: signal SIGKILL" in crash.value.message
        assert await doomed.wait() == -signal.SIGKILL and not doomed.running
        for again in (doomed.llm.agenerate("a"), doomed.llm.aembed("a")):
            with pytest.raises(ModelCrashedError):
                await again
        assert len(await beside) > 10
        await doomed.stop(1)  # again: nothing
    finally:
        await asyncio.gather(doomed.stop(0), other.stop(0))
    assert not family(doomed.pid) and not family(other.pid)


async def test_the_last_words_of_a_process_are_in_the_error(tiny_model: Path) -> None:
    process = await ModelProcess.start(spec_of(tiny_model))
    call = asyncio.create_task(process.llm.aembed(["a"] * 2000))
    await until_async(lambda: process.link.num_busy == 1)
    os.kill(process.pid, signal.SIGSEGV)
    with pytest.raises(ModelCrashedError, match=r"(?s)signal SIGSEGV\. Its last words:.*Segmentation fault"):
        await call
    await process.wait()
    assert process.why.startswith("signal SIGSEGV. Its last line: ")


async def test_bytes_that_are_no_message_end_the_process(tiny_model: Path) -> None:
    process = await ModelProcess.start(spec_of(tiny_model))
    stream = process.llm.astream("The", **LONG)
    await anext(stream)
    _push(process.link.addresses[1], b"\xc1nonsense")
    with pytest.raises(ModelCrashedError, match="no message"):
        async for _ in stream:
            pass
    assert await process.wait() == -signal.SIGKILL


async def test_orders_that_are_no_message_end_the_process(tiny_model: Path) -> None:
    process = await ModelProcess.start(spec_of(tiny_model))
    process.link._send(b"\x93\xa6submit\x01")
    with pytest.raises(ModelCrashedError, match="no message"):
        await process.llm.agenerate("The", max_tokens=250)
    assert await process.wait() == 1


def _push(address: str, frame: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(address)
        socket.send(frame)


async def test_a_process_beyond_its_memory_is_ended_and_the_reason_said(tiny_model: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"took [0-9,]+ MB of main memory; its limit is 100 MB") as caught:
        await ModelProcess.start(spec_of(tiny_model), memory_limit=100_000_000)
    assert "limit" in caught.value.hint


def test_a_long_step_is_worth_a_line_now_and_then(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ModelProcess, "_live", lambda self: None)  # it starts nothing
    process = ModelProcess(spec_of(tiny_model), on_progress=None, memory_limit=None)
    with caplog.at_level(logging.WARNING, "llmasos"):
        for seconds in (1, 59, 60, 61, 119, 120, 121, 0, 61):
            process._hear(wire.Beat(seconds))
    process.link.end(lambda: ModelCrashedError("over"))
    process.link.close()
    assert [record.args[1] for record in caplog.records if record.args] == [60, 120, 61]
    assert process.step_seconds == 61


async def test_errors_of_loading_are_those_of_llm(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: -40 if file.suffix == ".safetensors" else None])
    heard: list[Progress] = []
    found = await asyncio.gather(
        ModelProcess.start(spec_of(tmp_path / "nowhere")),
        ModelProcess.start(spec_of(broken), on_progress=heard.append),
        ModelProcess.start(spec_of(tiny_model, engine={"max_model_len": 4096})),
        return_exceptions=True,
    )
    kinds = [NotFoundError, FormatError, InvalidInputError]
    assert [type(error) for error in found] == kinds, found
    assert all(error.message and error.hint for error in found if isinstance(error, NotFoundError | FormatError))
    assert isinstance(found[2], InvalidInputError) and found[2].param == "max_model_len"
    size = (broken / "model.safetensors").stat().st_size
    assert heard == [Progress("load", total=size)]
    with pytest.raises(InvalidInputError, match="max_seqs"):  # before there is a process
        await ModelProcess.start(spec_of(tiny_model, engine={"max_seqs": 4}))


async def test_a_start_that_is_cancelled_leaves_no_process(tiny_model: Path) -> None:
    mine = psutil.Process()
    before = {child.pid for child in mine.children()}
    task = asyncio.create_task(ModelProcess.start(spec_of(tiny_model)))
    await until_async(lambda: bool({child.pid for child in mine.children()} - before))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {child.pid for child in mine.children()} == before


async def test_stop_without_patience_fails_what_runs(tiny_model: Path) -> None:
    process = await ModelProcess.start(spec_of(tiny_model))
    task = asyncio.create_task(process.llm.acomplete("a", SamplingParams(n=4, **LONG)))
    await until_async(lambda: process.llm.stats.num_running > 0)
    await process.stop(0)
    with pytest.raises(ModelCrashedError, match="was unloaded"):
        await task
    with pytest.raises(ModelCrashedError, match="was unloaded"):
        await process.llm.agenerate("a")
    assert not family(process.pid)


async def test_a_process_that_gives_no_sign_of_life_is_ended_also_without_the_kernels_help(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    process = await ModelProcess.start(spec_of(tiny_model))
    task = asyncio.create_task(process.llm.acomplete("a", SamplingParams(**LONG)))
    await until_async(lambda: process.llm.stats.num_running == 1)
    os.kill(process.pid, signal.SIGSTOP)
    process.most_silence = 0.3
    with pytest.raises(ModelCrashedError, match=r"It gave no sign of life for \d+ s and was ended"):
        await task
    assert await process.wait() == -signal.SIGKILL and "no sign of life" in process.why


async def test_a_process_that_does_not_listen_is_killed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.inference.host.process.TERM_S", 0.2)
    process = await ModelProcess.start(spec_of(tiny_model))
    os.kill(process.pid, signal.SIGSTOP)
    await process.stop(0.1)
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends_with_its_parent(tiny_model: Path, number: signal.Signals) -> None:
    code = f"""
import asyncio, time
from llmasos.inference.host.process import ModelProcess, ModelSpec

async def main():
    process = await ModelProcess.start(ModelSpec("m", {str(tiny_model)!r}, device="cpu"))
    print(process.pid, flush=True)
    time.sleep(60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert family(pid)
        parent.send_signal(number)
        until(lambda: not family(pid), 10)


def test_a_dead_rank_ends_the_model_with_a_reason(tiny_model: Path) -> None:
    with hosted(spec_of(tiny_model, engine={"tensor_parallel_size": 2})) as process:
        assert process.llm.generate("The", max_tokens=5)
        [rank] = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        rank.kill()
        with pytest.raises(ModelCrashedError, match=r"worker of rank 1 .* ended: signal SIGKILL"):
            for _ in range(100):
                process.llm.generate("The", **LONG)
        until(lambda: not process.running)
        assert isinstance(process.spec, ModelSpec) and not family(process.pid)
