"""What a process of its own costs a model: tokens per second and time to the first token, in process and not.

    python bench/host_process.py [MODEL] [--streams 1 16 256] [--tokens 64] [--rounds 3]

The same greedy streams from the same event loop, first from an engine in this process, then from one in a process of
its own, in turns. Ratios are medians over the rounds. CPU time per token, which other work on the machine disturbs
less, is given too: of this process (text) and of the model's (engine).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from common import MODEL, report
from llmasos.inference.config import EngineConfig
from llmasos.inference.host.process import ModelProcess, ModelSpec
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.inference.textmodel import TextModel
from llmasos.store import ensure

PAGES = 1 << 30
LEAST = 2000
"""Tokens of one measurement: processor time is counted in hundredths of a second."""


async def read(model: TextModel, start: int, num_tokens: int) -> float:
    """Milliseconds to the first token."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    begun, first = time.perf_counter(), 0.0
    async for _ in model.astream_complete([5 + start % 50, 7, 9, 11], params):
        first = first or time.perf_counter() - begun
    return first * 1e3


async def measure(model: TextModel, num_streams: int, num_tokens: int, cpu: Callable[[], list[float]]) -> list[float]:
    """Tokens per second, milliseconds to the first token (median), microseconds of CPU per token by process."""
    await asyncio.gather(*(read(model, i, 3) for i in range(num_streams)))
    times = -(-LEAST // (num_streams * num_tokens))

    async def several(start: int) -> list[float]:
        return [await read(model, start, num_tokens) for _ in range(times)]

    begun, before = time.perf_counter(), cpu()
    firsts = [first for some in await asyncio.gather(*(several(i) for i in range(num_streams))) for first in some]
    seconds, num = time.perf_counter() - begun, num_streams * num_tokens * times
    spent = [1e6 * (now - then) / num for now, then in zip(cpu(), before, strict=True)]
    return [num / seconds, statistics.median(firsts), *spent]


def cpu_of(*pids: int) -> Callable[[], list[float]]:
    processes = [psutil.Process(pid) for pid in pids]
    return lambda: [process.cpu_times().user + process.cpu_times().system for process in processes]


async def run(args: argparse.Namespace) -> dict[str, Any]:
    path = ensure(args.model)
    here = LLM.load(path, name="here", config=EngineConfig.of(kv_cache_memory=PAGES))
    here.start()
    there = await ModelProcess.start(ModelSpec("there", str(path), engine={"kv_cache_memory": PAGES}))
    results: dict[str, Any] = {"model": Path(path).name, "tokens": args.tokens}
    try:
        for num in args.streams:
            rounds = []
            for _ in range(args.rounds):
                inside = await measure(here, num, args.tokens, cpu_of(psutil.Process().pid))
                outside = await measure(there.llm, num, args.tokens, cpu_of(psutil.Process().pid, there.pid))
                rounds.append((inside, outside))
            middle = [
                [statistics.median(column) for column in zip(*side, strict=True)] for side in zip(*rounds, strict=True)
            ]
            (_, first_in, cpu_in), (_, first_out, cpu_text, cpu_engine) = middle
            results[str(num)] = {
                "speed_ratio": round(statistics.median(o[0] / i[0] for i, o in rounds), 3),
                "speed_ratios": [round(o[0] / i[0], 2) for i, o in rounds],
                "added_ttft_ms": round(first_out - first_in, 2),
                "cpu_us_in_process": round(cpu_in, 1),
                "cpu_us_text": round(cpu_text, 1),
                "cpu_us_engine": round(cpu_engine, 1),
            }
    finally:
        await there.stop(1)
        here.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    report(**asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
