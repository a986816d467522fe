"""Three models in memory for two, and 2,000 random requests: does the host ever evict, load or answer wrongly?

    python bench/residency.py                    # three tiny random models, then the memory of real ones, if installed
    python bench/residency.py --requests 500 --seed 7 --models smollm2-135m-instruct

Real processes, a real host, 8 requests at once: some streamed, some whole, some cancelled. One in a hundred asks for a
random model, the others for the one that is in fashion; in turns one model is pinned. Watched from outside the host:

- a process is never stopped while a request runs on it, nor while its model is pinned;
- a model of one replica never has two processes that load or serve;
- held memory never exceeds the budget, and every request ends within its deadline;
- every text is the one that the model gives alone.

Then: how far predictions of memory were off, at the first load (told from headers) and later (what was measured).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from common import report
from llmasos.inference.host.host import Host
from llmasos.inference.host.memory import Budgets, Memory
from llmasos.inference.host.process import ModelProcess, ModelSpec
from llmasos.inference.request import SamplingParams
from llmasos.store.library import Library
from tiny import write_tiny_model

AT_ONCE = 8
DEADLINE = 90.0
"""Seconds that a request may take, loads and waiting included."""
LONGEST = 32
PROMPTS = 12
FASHION = 80, 240
"""Requests for which one model is asked for most."""
STRAY = 0.01
PINNED = 250
"""Every so many requests another model is pinned, or none."""
ENGINE = {"max_num_seqs": 16, "kv_cache_memory": 8 << 20}


@dataclass
class Seen:
    """What is watched, and what was wrong."""

    living: Counter[str] = field(default_factory=Counter)
    most_living: int = 0
    most_serving: int = 0
    serving: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    pinned: dict[str, bool] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Of each load, in turn: (predicted - measured) / measured."""
    slowest: float = 0.0


class Counted:
    """A model's `llm` that knows how many requests run on it."""

    def __init__(self, llm: Any) -> None:
        self._llm, self.num_running = llm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def acomplete(self, *args: Any, **options: Any) -> Any:
        self.num_running += 1
        try:
            return await self._llm.acomplete(*args, **options)
        finally:
            self.num_running -= 1

    async def astream_complete(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        self.num_running += 1
        try:
            async with aclosing(self._llm.astream_complete(*args, **options)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.num_running -= 1


class Watched:
    """A ModelProcess that tells of its beginning and its end."""

    def __init__(self, process: ModelProcess, seen: Seen) -> None:
        self._process, self._seen, self.llm = process, seen, Counted(process.llm)
        self._serves = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)

    async def wait(self) -> int:
        code = await self._process.wait()
        self._over()
        self._seen.living[self._process.spec.name] -= 1
        return code

    async def stop(self, grace: float) -> None:
        name, seen = self._process.spec.name, self._seen
        if self.llm.num_running:
            seen.wrong.append(f"{name} was stopped while {self.llm.num_running} requests ran on it")
        if seen.pinned.get(name):
            seen.wrong.append(f"{name} was stopped though it is pinned")
        self._over()
        await self._process.stop(grace)

    def _over(self) -> None:
        self._seen.serving[self._process.spec.name] -= self._serves
        self._serves = False


def starter(seen: Seen) -> Any:
    async def start(spec: ModelSpec, **options: Any) -> Watched:
        name = spec.name
        for counter in (seen.living, seen.serving, seen.starts):
            counter[name] += 1
        seen.most_living = max(seen.most_living, seen.living[name])
        seen.most_serving = max(seen.most_serving, seen.serving[name])
        try:
            return Watched(await ModelProcess.start(spec, **options), seen)
        except BaseException:
            seen.living[name] -= 1
            seen.serving[name] -= 1
            raise

    return start


@dataclass(frozen=True)
class Ask:
    model: str
    prompt: int
    tokens: int
    kind: str
    """whole, stream, or cancel: a stream that is left after half its tokens."""


def asks(names: list[str], num: int, draw: random.Random) -> list[Ask]:
    found: list[Ask] = []
    while len(found) < num:
        fashion = draw.choice(names)
        for _ in range(draw.randint(*FASHION)):
            model = draw.choice(names) if draw.random() < STRAY else fashion
            kind = draw.choices(("whole", "stream", "cancel"), (4, 4, 2))[0]
            found.append(Ask(model, draw.randrange(PROMPTS), draw.randint(1, LONGEST), kind))
    return found[:num]


def prompt_of(number: int) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(5, 300) for _ in range(draw.randint(3, 60))]


def params_of(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


async def alone(spec: ModelSpec) -> list[list[int]]:
    """What the model gives to each prompt when nothing runs beside it."""
    process = await ModelProcess.start(spec)
    try:
        texts = []
        for number in range(PROMPTS):
            [output] = await process.llm.acomplete([prompt_of(number)], params_of(LONGEST))
            texts.append(list(output.outputs[0].token_ids))
        return texts
    finally:
        await process.stop(1.0)


async def answer(host: Host, ask: Ask) -> list[int]:
    params, prompt = params_of(ask.tokens), prompt_of(ask.prompt)
    async with host.lease(ask.model) as llm:
        if ask.kind == "whole":
            [output] = await llm.acomplete([prompt], params)
            return list(output.outputs[0].token_ids)
        ids: list[int] = []
        async with aclosing(llm.astream_complete(prompt, params)) as chunks:
            async for chunk in chunks:
                ids += chunk.token_ids
                if ask.kind == "cancel" and len(ids) >= max(1, ask.tokens // 2):
                    break
        return ids


async def client(host: Host, todo: list[Ask], right: dict[str, list[list[int]]], seen: Seen) -> None:
    while todo:
        ask, begun = todo.pop(), time.monotonic()
        try:
            ids = await asyncio.wait_for(answer(host, ask), DEADLINE)
        except Exception as e:
            seen.wrong.append(f"{ask}: {type(e).__name__}: {e}")
            continue
        seen.slowest = max(seen.slowest, time.monotonic() - begun)
        expected = right[ask.model][ask.prompt][: ask.tokens]
        if ids != (expected[: len(ids)] if ask.kind == "cancel" else expected) or not ids:
            seen.wrong.append(f"{ask}: {ids} instead of {expected}")
        seen.done[ask.kind] += 1


async def watch(host: Host, budget: int, todo: list[Ask], seen: Seen) -> None:
    """Look at the host all the time: budget, errors of predictions; and pin in turns."""
    loads: Counter[str] = Counter()
    names = [*host.names, None]
    last, kept = len(todo), None
    while True:
        status = host.status()
        held = sum(sum(replica.memory.values()) for one in status for replica in one.replicas)
        if held > budget:
            seen.wrong.append(f"{held} bytes are held of {budget}")
        for one in status:
            if one.loads > loads[one.name] and one.plan_error is not None:
                loads[one.name] = one.loads
                seen.errors.setdefault(one.name, []).append(round(one.plan_error, 4))
        if last - len(todo) >= PINNED:
            last = len(todo)
            print(f"{last} requests are left, {sum(seen.starts.values())} loads", file=sys.stderr)
            if kept is not None:
                seen.pinned[kept] = False
                host.pin(kept, False)
            kept = names[(names.index(kept) + 1) % len(names)]
            if kept is not None:
                host.pin(kept)
                ready = any(one.name == kept and one.state == "ready" for one in host.status())
                seen.pinned[kept] = ready  # one that is being stopped already may still be
        elif kept is not None and not seen.pinned.get(kept):
            ready = any(one.name == kept and one.state == "ready" for one in status)
            seen.pinned[kept] = ready
        await asyncio.sleep(0.05)


async def turns(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    specs = {
        name: ModelSpec(
            name, str(write_tiny_model(folder / name, seed=i)), device="cpu", dtype="float32", engine=ENGINE
        )
        for i, name in enumerate(("one", "two", "three"))
    }
    right = {name: await alone(spec) for name, spec in specs.items()}
    ask_memory = Memory(Budgets.detect(), path=folder / "first.json")
    size = max([(await ask_memory.predict(spec)).places[0].least["cpu"] for spec in specs.values()])
    budget = int(2.5 * size)
    seen = Seen()
    host = Host(memory=Memory(Budgets.detect(limits={"cpu": budget}), path=folder / "memory.json"), start=starter(seen))
    for spec in specs.values():
        host.add(spec)
    todo = asks(list(specs), args.requests, random.Random(args.seed))
    todo.reverse()
    begun = time.monotonic()
    watcher = asyncio.create_task(watch(host, budget, todo, seen))
    try:
        async with asyncio.timeout(args.limit):
            await asyncio.gather(*(client(host, todo, right, seen) for _ in range(AT_ONCE)))
    except TimeoutError:
        seen.wrong.append(f"{len(todo)} requests were left after {args.limit} seconds")
    finally:
        watcher.cancel()
        seconds = time.monotonic() - begun
        status = host.status()
        seen.pinned.clear()
        await host.close()
    if watcher.done() and not watcher.cancelled() and (e := watcher.exception()) is not None:
        seen.wrong.append(f"the watcher failed: {e!r}")
    if seen.most_serving > 1:
        seen.wrong.append(f"{seen.most_serving} processes of one model loaded or served")
    if any(seen.living.values()):
        seen.wrong.append(f"processes are left: {dict(seen.living)}")
    evictions = sum((Counter(one.evictions) for one in status), Counter[str]())
    for name, errors in seen.errors.items():
        if any(abs(e) > 0.1 for e in errors[1:]):
            seen.wrong.append(f"{name}: predictions were off by {errors[1:]}")
    return {
        "requests": args.requests,
        "answered": dict(seen.done),
        "seconds": round(seconds, 1),
        "loads": sum(seen.starts.values()),
        "evictions": dict(evictions),
        "most_processes_of_a_model": seen.most_living,
        "slowest_request_s": round(seen.slowest, 1),
        "first_prediction_off": {name: errors[0] for name, errors in seen.errors.items()},
        "later_predictions_off_at_most": max((abs(e) for es in seen.errors.values() for e in es[1:]), default=math.nan),
        "wrong": len(seen.wrong),
        "first_wrong": seen.wrong[:3],
    }


async def memory(name: str, path: Path, folder: Path, loads: int = 3) -> dict[str, Any]:
    """How far predictions of a real model's memory are off, load after load; and what use adds."""
    host = Host(memory=Memory(Budgets.detect(), path=folder / f"{path.name}.json"))
    host.add(ModelSpec(name, str(path)))
    off, held, most = [], [], 0
    try:
        for _ in range(loads):
            await host.load(name)
            [one] = host.status()
            off.append(round(one.plan_error or 0.0, 4))
            held.append(round(sum(one.predicted_bytes.values()) / 1e6))
            async with host.lease(name) as llm:
                if llm.is_encoder:
                    await llm.aembed(["Which model stays? " * 40] * 64, truncate=True)
                else:
                    await llm.acomplete([[7 + i] * 200 for i in range(8)], params_of(4))
                await asyncio.sleep(0.6)  # the process is looked at every quarter of a second
            most = max(most, *(sum(one.measured_bytes.values()) for one in host.status()))
            await host.unload(name)
    finally:
        await host.close()
    return {"off": off, "held_MB": held, "most_MB": round(most / 1e6)}


async def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        result = await turns(args, Path(scratch)) if args.requests else {"wrong": 0}
        library, real = Library(), {}
        for name in args.models:
            if library.has(name):
                real[name] = await memory(name, library.path(name), Path(scratch))
                print(name, real[name], file=sys.stderr)
        return {**result, "real_models": real}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="0: only the memory of real models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which the requests are given up")
    parser.add_argument("--models", nargs="*", default=["smollm2-135m-instruct", "all-minilm-l6-v2"])
    args = parser.parse_args()
    logging.getLogger("llmasos").setLevel(logging.ERROR)
    result = asyncio.run(run(args))
    met = not result["wrong"] and all(abs(e) <= 0.1 for one in result["real_models"].values() for e in one["off"][1:])
    report(bench="residency", met=met, **result)
    sys.exit(not met)


if __name__ == "__main__":
    main()
