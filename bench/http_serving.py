"""What the server adds to the engine, and what it gives beside llama.cpp's. One JSON line each; loopback only.

    python bench/http_serving.py                     # all, with SmolLM2
    python bench/http_serving.py streams --streams 64
    python bench/http_serving.py llama --threads 2   # builds llama.cpp's server once, or LLAMA_SERVER names one

Every figure compares two runs in turns with the same threads for the model and is the median over `--rounds`. The load
comes from this process: it shares the cores with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import MODEL, llama_cpp, model_file, report

LLMASOS = str(Path(sys.executable).with_name("llmasos"))
PAGES = 1 << 30
CONTEXT = 2048


@dataclass(frozen=True)
class Load:
    """`streams` requests at once, each of `tokens` new tokens after a random prompt of `prompt` tokens."""

    streams: int
    tokens: int
    prompt: int
    seed: str

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        return [[draw.randrange(1000, 40_000) for _ in range(self.prompt)] for _ in range(self.streams)]


@dataclass(frozen=True)
class Result:
    """Seconds; `firsts`: of each request from its sending to its first piece of text."""

    seconds: float
    num_tokens: int
    firsts: list[float]

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


async def over_http(url: str, load: Load, model: str, **fields: Any) -> Result:
    start = time.perf_counter()
    done = await asyncio.gather(*(_stream(url, model, ids, load.tokens, fields) for ids in load.prompts()))
    return Result(time.perf_counter() - start, sum(n for n, _ in done), [first for _, first in done])


async def _stream(url: str, model: str, ids: list[int], tokens: int, fields: dict[str, Any]) -> tuple[int, float]:
    """Raw sockets: an HTTP library would take more of the cores than the server does."""
    asked = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}} | fields).encode()
    host, port = url.removeprefix("http://").split(":")
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    first, tail = 0.0, b""
    while piece := await reader.read(1 << 16):
        if not first and b"data:" in piece:
            first = time.perf_counter() - start
        tail = (tail + piece)[-4096:]
    writer.close()
    usage = tail.rpartition(b'"completion_tokens":')[2].split(b",")[0].split(b"}")[0]
    if not usage.strip().isdigit():
        raise SystemExit(f"{url} answered: {tail.decode('utf-8', 'replace')}")
    return int(usage), first


async def in_process(llm: Any, load: Load) -> Result:
    from llmasos.inference.request import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=load.tokens, ignore_eos=True)

    async def stream(ids: list[int]) -> tuple[int, float]:
        count, first, began = 0, 0.0, time.perf_counter()
        async for chunk in llm.astream_complete(ids, params):
            count += len(chunk.token_ids)
            first = first or time.perf_counter() - began
        return count, first

    start = time.perf_counter()
    done = await asyncio.gather(*map(stream, load.prompts()))
    return Result(time.perf_counter() - start, sum(n for n, _ in done), [first for _, first in done])


def serve_in_process(args: argparse.Namespace) -> None:
    """The other side of the comparison, in a process of its own: lines of JSON in, lines of JSON out."""
    import torch

    from llmasos import LLM

    llm = LLM.from_pretrained(args.model, kv_cache_memory=PAGES, max_model_len=CONTEXT)
    torch.set_num_threads(args.threads)
    print("ready", flush=True)
    for line in sys.stdin:
        result = asyncio.run(in_process(llm, Load(**json.loads(line))))
        print(json.dumps(result.__dict__), flush=True)


class Engine:
    """The engine without a server."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--model", args.model, "--threads", str(args.threads), "in-process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def run(self, load: Load) -> Result:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(load.__dict__), file=self._process.stdin, flush=True)
        return Result(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextlib.contextmanager
def running(command: list[str], health: str, **environment: str) -> Iterator[str]:
    """A server as a process of its own; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    try:
        deadline = time.monotonic() + 120
        while not _answers(url + health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def ours(args: argparse.Namespace) -> Iterator[str]:
    flags = ["--kv-cache-memory", str(PAGES), "--max-model-len", str(CONTEXT), "--max-waiting", "1024"]
    with running([LLMASOS, "serve", args.model, *flags], "/readyz", LLMASOS_THREADS=str(args.threads)) as url:
        yield url


def streams(args: argparse.Namespace) -> None:
    """Tokens/s of many streams through HTTP over those of the engine alone."""
    engine = Engine(args)
    try:
        with ours(args) as url:
            ratios, rates = [], []
            for turn in range(args.rounds + 1):
                load = Load(args.streams, args.tokens, 32, f"streams/{turn}")
                alone, served = engine.run(load), asyncio.run(over_http(url, load, args.model))
                if turn:  # the first warms up
                    ratios.append(served.rate / alone.rate)
                    rates.append((round(alone.rate, 1), round(served.rate, 1)))
    finally:
        engine.close()
    ratio = statistics.median(ratios)
    facts = {"streams": args.streams, "tokens": args.tokens, "engine_and_http": rates, "unit": "tok/s"}
    report(bench="http_serving/streams", value=round(ratio, 3), goal=0.95, met=ratio >= 0.95, **facts)


def ttft(args: argparse.Namespace) -> None:
    """Milliseconds that the server adds to the time to the first token, requests one after the other."""
    engine = Engine(args)
    alone: list[float] = []
    served: list[float] = []
    try:
        with ours(args) as url:
            for turn in range(10 * args.rounds + 1):
                load = Load(1, 4, 64, f"ttft/{turn}")
                found = engine.run(load), asyncio.run(over_http(url, load, args.model))
                if turn:
                    alone += found[0].firsts
                    served += found[1].firsts
    finally:
        engine.close()
    added = 1e3 * statistics.median(b - a for a, b in zip(alone, served, strict=True))
    ms = {name: round(1e3 * statistics.median(t), 2) for name, t in (("engine", alone), ("http", served))}
    report(bench="http_serving/ttft", value=round(added, 2), goal=5.0, met=added <= 5, unit="ms", **ms)


def llama(args: argparse.Namespace) -> None:
    """Tokens/s of our server over llama.cpp's with the same file, at 1 and 16 requests at once."""
    file, binary = str(model_file(args.model)), str(llama_cpp("llama-server"))
    threads = str(args.threads)
    theirs = [binary, "-m", file, "-t", threads, "-tb", threads, "-np", "16", "-c", str(16 * 256), "--no-webui"]
    with ours(args) as mine, running(theirs, "/health") as peer:
        for size in (1, 16):
            rates = []
            for turn in range(args.rounds + 1):
                load = Load(size, args.tokens, 32, f"llama/{size}/{turn}")
                found = [
                    asyncio.run(over_http(url, load, args.model, **fields))
                    for url, fields in ((mine, {}), (peer, {"cache_prompt": False}))
                ]
                if turn:
                    rates.append([round(one.rate, 1) for one in found])
            ratio = statistics.median(a / b for a, b in rates)
            facts = {"requests": size, "ours_and_llama_cpp": rates, "unit": "tok/s"}
            report(bench="http_serving/llama", value=round(ratio, 3), **facts)


WORKLOADS = {"streams": streams, "ttft": ttft, "llama": llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, "in-process", []], default=[])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.workloads == ["in-process"]:
        serve_in_process(args)
        return
    for name in args.workloads or WORKLOADS:
        WORKLOADS[name](args)


if __name__ == "__main__":
    main()
