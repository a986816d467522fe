"""A server under load whose models, memory and own process are killed: what do its clients notice?

    python bench/server_faults.py                       # about five minutes
    python bench/server_faults.py --kills 3 --seed 7 --keep

`llmasos serve` with three tiny random models in processes of their own, on loopback, with a home of its own. Streams,
whole requests and embeddings run on all three all the time, and batches one after the other. Meanwhile one model's
process is killed (SIGKILL) `--kills` times, another one is asked for more memory than it may take, and half-way the
server itself is killed and started again. Then it is shown that

- the model that nobody touched never misses a request, but for the seconds in which there is no server;
- a request of a model that is killed is answered, gets 503 with Retry-After, or the event `model_crashed` in its
  stream; those after it are answered again, with the same text as before;
- every request ends within its deadline;
- batches lose no line and double none, and every line has the right text;
- the database is intact, and no process is left, neither after SIGKILL nor after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import secrets
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from common import report
from tiny import write_tiny_model

LLMASOS = str(Path(sys.executable).with_name("llmasos"))
MARK = "LLMASOS_BENCH_MARK"
"""In the environment of the server, and so of everything that it starts."""
STEADY, KILLED, FILLED = MODELS = ("steady", "killed", "filled")
WORKERS = 3
"""Requests at once, for each model."""
DEADLINE = 150.0
PROMPTS = ["The quick", "What is the capital of", "敏捷的棕色狐狸"]
SHORT, LONG = 8, 60
BATCH_LINES = 150
MEMORY = 950_000_000
"""For all three: what they need is about 850 MB."""
WIDE = {"intermediate_size": 1 << 15, "max_position_embeddings": 4096}
"""The model that is asked for too much memory: a pass over 4,096 tokens takes more than a gigabyte."""
Window = list[float]
"""From a fault to the first request that began after it and was answered."""


@dataclass
class Outcome:
    model: str
    begun: float
    ended: float
    verdict: str
    """answered; retry: 503 with Retry-After; cut: a stream ended by `model_crashed`; down: the connection was lost."""
    detail: str = ""


@dataclass
class Facts:
    outcomes: list[Outcome] = field(default_factory=list)
    windows: dict[str, list[Window]] = field(default_factory=lambda: {name: [] for name in MODELS})
    down: list[Window] = field(default_factory=list)
    texts: dict[Any, Any] = field(default_factory=dict)
    """The answer to each request before the first fault."""
    wrong: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def fault(self, model: str) -> Window:
        window = [time.monotonic(), math.inf]
        self.windows[model].append(window)
        return window

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.verdict == "answered":
            for window in self.windows[outcome.model]:
                if window[1] == math.inf and outcome.begun > window[0]:
                    window[1] = outcome.ended


class Server:
    """`llmasos serve` as a process of its own, with its own home and its own folder for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.temporary = folder, folder / "home", folder / "tmp"
        self.log = folder / "server.log"
        for one in (self.home, self.temporary):
            one.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = secrets.token_hex(8)
        self.process: subprocess.Popen[bytes] | None = None
        lines = [
            f"models = {json.dumps(MODELS)}",
            f"memory = {{ cpu = {MEMORY} }}",
            'device = "cpu"',
            'dtype = "float32"',
            "[engine]",
            "max_num_seqs = 16",
            "max_num_batched_tokens = 128",
            f"kv_cache_memory = {8 << 20}",
        ]
        for seed, name in enumerate(MODELS):
            path = write_tiny_model(folder / name, seed=seed, **(WIDE if name == FILLED else {}))
            lines += [f"[model.{name}]", f"reference = {json.dumps(str(path))}"]
        (self.home / "serve.toml").write_text("\n".join(lines) + "\n")

    async def start(self) -> float:
        """Seconds until it is ready."""
        begun = time.monotonic()
        own = {
            MARK: self.mark,
            "LLMASOS_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [LLMASOS, "serve", "--port", str(self.port)], env=os.environ | own, stdout=log, stderr=log
            )
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            while True:
                if self.process.poll() is not None or time.monotonic() - begun > DEADLINE:
                    raise SystemExit(f"the server did not start:\n{self.last_words()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/readyz")).status_code == 200:
                        return time.monotonic() - begun
                await asyncio.sleep(0.1)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def processes(self) -> list[psutil.Process]:
        """All that carry the mark: the server and whatever it has started, whoever is their parent now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    async def all_gone(self, seconds: float) -> float | None:
        """After how long no process was left; None: one still is."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if not self.processes():
                return time.monotonic() - begun
            await asyncio.sleep(0.05)
        return None

    def end(self) -> None:
        """Whatever is left, at the end of a run that failed."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def check_database(self) -> str:
        with contextlib.closing(sqlite3.connect(self.home / "llmasos.db")) as database:
            return str(database.execute("PRAGMA integrity_check").fetchone()[0])

    def num_left_files(self) -> int:
        return sum(1 for _ in self.temporary.iterdir())


# requests


def request_of(kind: str, model: str, prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
    if kind == "embed":
        return "/v1/embeddings", {"model": model, "input": prompt}
    common = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if kind == "whole":
        return "/v1/completions", {**common, "prompt": prompt}
    return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": prompt}], "stream": True}


async def ask(client: httpx.AsyncClient, kind: str, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    """Verdict, and the text or what was wrong."""
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code == 503 and answer.headers.get("retry-after", "").isdigit():
                return "retry", int(answer.headers["retry-after"])
            if answer.status_code != 200:
                return "wrong", f"{answer.status_code} {(await answer.aread())[:300]!r}"
            if kind == "stream":
                return await read_stream(answer)
            found = json.loads(await answer.aread())
            return "answered", found["data"][0]["embedding"] if kind == "embed" else found["choices"][0]["text"]
    except httpx.TransportError as e:
        return "down", repr(e)


async def read_stream(answer: httpx.Response) -> tuple[str, Any]:
    text = ""
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return "answered", text
        event = json.loads(line[6:])
        if "error" in event:
            return ("cut" if event["error"]["code"] == "model_crashed" else "wrong"), line
        text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return "down", "the stream has no end"


def agree(kind: str, one: Any, other: Any) -> bool:
    if kind == "embed":
        return len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))
    return bool(one == other)


async def work(client: httpx.AsyncClient, model: str, draw: random.Random, facts: Facts, stop: asyncio.Event) -> None:
    while not stop.is_set():
        kind = draw.choice(("whole", "stream", "stream", "embed"))
        prompt, tokens = draw.choice(PROMPTS), draw.choice((SHORT, LONG))
        begun = time.monotonic()
        try:
            verdict, got = await asyncio.wait_for(ask(client, kind, *request_of(kind, model, prompt, tokens)), DEADLINE)
        except TimeoutError:
            verdict, got = "wrong", f"no answer within {DEADLINE} s"
        except Exception as e:
            verdict, got = "wrong", repr(e)
        if verdict == "answered" and not agree(kind, got, facts.texts[kind, model, prompt, tokens]):
            verdict, got = "wrong", f"{got!r} instead of {facts.texts[kind, model, prompt, tokens]!r}"
        facts.note(
            Outcome(model, begun, time.monotonic(), verdict, f"{kind}: {got}" if verdict != "answered" else kind)
        )
        await asyncio.sleep(min(1.0, got) if verdict == "retry" else draw.uniform(0.02, 0.1))


async def learn(client: httpx.AsyncClient, facts: Facts) -> None:
    """Every answer, of each model one after the other, before anything goes wrong."""

    async def of(model: str) -> None:
        for kind, prompt, tokens in product(("whole", "stream", "embed"), PROMPTS, (SHORT, LONG)):
            verdict, got = await ask(client, kind, *request_of(kind, model, prompt, tokens))
            if verdict != "answered":
                raise SystemExit(f"{model}, {kind}: {verdict}, {got}")
            facts.texts[kind, model, prompt, tokens] = got

    await asyncio.gather(*map(of, MODELS))


# batches


@dataclass
class Batch:
    id: str
    lines: dict[str, tuple[str, str]]
    """Model and prompt by custom id."""
    body: dict[str, Any]


class Batches:
    """One after the other until told to stop; the last one is waited for."""

    def __init__(self, client: httpx.AsyncClient, facts: Facts) -> None:
        self._client, self._facts = client, facts
        self.batches: list[Batch] = []

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            batch = await self._create()
            self.batches.append(batch)
            begun = time.monotonic()
            while batch.body["status"] in ("validating", "in_progress", "finalizing"):
                await asyncio.sleep(0.5)
                batch.body = (await self._send("GET", f"/v1/batches/{batch.id}")).json()
                if time.monotonic() - begun > 4 * DEADLINE:
                    self._facts.wrong.append(f"a batch never ended: {batch.body}")
                    return

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Again and again while there is no server."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                answer = await self._client.request(method, path, **options)
                if answer.status_code != 200:
                    raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text}")
                return answer
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.5)

    async def _create(self) -> Batch:
        lines, texts = {}, []
        for number in range(BATCH_LINES):
            model, prompt = MODELS[number % 3], PROMPTS[number % len(PROMPTS)]
            lines[f"line-{number}"] = (model, prompt)
            url, body = request_of("whole", model, prompt, SHORT)
            texts.append(json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}))
        files = {"file": ("lines.jsonl", "\n".join(texts).encode())}
        file = (await self._send("POST", "/v1/files", data={"purpose": "batch"}, files=files)).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        body = (await self._send("POST", "/v1/batches", json=asked)).json()
        return Batch(body["id"], lines, body)

    async def check(self) -> dict[str, int]:
        counts: Counter[str] = Counter(lost=0, doubled=0, failed=0, wrong_text=0)
        for batch in self.batches:
            counts["batches"] += 1
            counts["lines"] += len(batch.lines)
            if batch.body["status"] != "completed":
                self._facts.wrong.append(f"a batch ended as {batch.body}")
            if (id := batch.body.get("error_file_id")) is not None:
                failed = (await self._send("GET", f"/v1/files/{id}/content")).text.splitlines()
                counts["failed"] += len(failed)
                self._facts.wrong.append(f"lines of a batch failed: {failed[0]}")
            text = (await self._send("GET", f"/v1/files/{batch.body['output_file_id']}/content")).text
            answers = [json.loads(line) for line in text.splitlines()]
            ids = Counter(answer["custom_id"] for answer in answers)
            counts["doubled"] += sum(ids.values()) - len(ids)
            counts["lost"] += len(set(batch.lines) - set(ids))
            for answer in answers:
                model, prompt = batch.lines[answer["custom_id"]]
                got = answer["response"]["body"]["choices"][0]["text"]
                counts["wrong_text"] += got != self._facts.texts["whole", model, prompt, SHORT]
        if bad := {name: counts[name] for name in ("lost", "doubled", "failed", "wrong_text") if counts[name]}:
            self._facts.wrong.append(f"batches: {bad}")
        return dict(counts)


# faults


async def pid_of(client: httpx.AsyncClient, model: str) -> int:
    """Of the model's process, as soon as there is one that is ready."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        for one in (await client.get("/llmasos/v1/status")).json()["data"]:
            for replica in one["replicas"]:
                if one["name"] == model and replica["state"] == "ready" and replica["pid"]:
                    return int(replica["pid"])
        await asyncio.sleep(0.1)
    raise SystemExit(f"{model} did not come back")


async def over(window: Window) -> None:
    end = time.monotonic() + DEADLINE
    while window[1] == math.inf:
        if time.monotonic() > end:
            raise SystemExit("no request was answered after a fault")
        await asyncio.sleep(0.05)


async def kill_model(client: httpx.AsyncClient, server: Server, facts: Facts) -> None:
    pid = await pid_of(client, KILLED)
    if pid not in [process.pid for process in server.processes()]:
        raise SystemExit(f"{pid} is none of the server's processes")
    window = facts.fault(KILLED)
    os.kill(pid, signal.SIGKILL)
    await over(window)


async def fill_memory(client: httpx.AsyncClient, facts: Facts) -> None:
    """The embedding of a text so long that its pass takes more than the model's share."""
    tokens = [10 + i % 200 for i in range(4000)]
    begun = time.monotonic()
    verdict, got = await asyncio.wait_for(
        ask(client, "embed", "/v1/embeddings", {"model": FILLED, "input": tokens}),
        DEADLINE,
    )
    facts.found["filled"] = f"{verdict}: {str(got)[:80]}"
    if verdict != "retry":
        facts.wrong.append(f"the request for too much memory: {verdict}, {str(got)[:200]}")
    status = (await client.get("/llmasos/v1/status")).json()["data"]
    facts.found["filled_last_error"] = next(one["last_error"] for one in status if one["name"] == FILLED)
    facts.windows[FILLED].append([begun, time.monotonic()])
    await over(facts.fault(FILLED))


async def kill_server(server: Server, facts: Facts) -> None:
    assert server.process is not None
    window: Window = [time.monotonic(), math.inf]
    facts.down.append(window)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    gone = await server.all_gone(10)
    if gone is None:
        facts.wrong.append(f"{len(server.processes())} processes outlived the server's SIGKILL")
    database = server.check_database()
    if database != "ok":
        facts.wrong.append(f"the database after SIGKILL: {database}")
    facts.found["after_sigkill"] = {"gone_s": gone and round(gone, 2), "files_left": server.num_left_files()}
    facts.found["restart_s"] = round(await server.start(), 1)
    window[1] = time.monotonic()


async def stop_server(server: Server, facts: Facts) -> None:
    assert server.process is not None
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        code = await asyncio.to_thread(server.process.wait, 60)
    except subprocess.TimeoutExpired:
        facts.wrong.append("the server did not stop after SIGTERM")
        return
    seconds, gone = time.monotonic() - begun, await server.all_gone(5)
    if code != 0 or gone is None:
        facts.wrong.append(f"SIGTERM: exit code {code}, {len(server.processes())} processes left")
    if (database := server.check_database()) != "ok":
        facts.wrong.append(f"the database at the end: {database}")
    facts.found["sigterm_s"] = round(seconds, 1)
    facts.found["files_left"] = server.num_left_files()
    facts.found["integrity_check"] = database


# judging


def judge(facts: Facts) -> dict[str, Any]:
    def within(outcome: Outcome, windows: list[Window]) -> bool:
        return any(outcome.begun <= end and outcome.ended >= start for start, end in windows)

    counts: dict[str, Counter[str]] = {name: Counter() for name in MODELS}
    in_flight: Counter[str] = Counter()
    for one in facts.outcomes:
        counts[one.model][one.verdict] += 1
        excused = {"retry": facts.windows[one.model], "cut": facts.windows[one.model], "down": facts.down}
        if one.verdict != "answered" and not within(one, excused.get(one.verdict, [])):
            facts.wrong.append(f"{one.model}, {one.verdict}: {one.detail}")
        if one.model == KILLED and any(one.begun <= at <= one.ended for at, _ in facts.windows[KILLED]):
            in_flight[one.verdict] += 1
    back = [end - start for start, end in facts.windows[KILLED]]
    return {
        "requests": {name: dict(found) for name, found in counts.items()},
        "kills": len(back),
        "in_flight_at_a_kill": dict(in_flight),
        "back_s": {"median": round(statistics.median(back), 1), "most": round(max(back), 1)},
        "slowest_s": {
            name: round(max(one.ended - one.begun for one in facts.outcomes if one.model == name), 1) for name in MODELS
        },
    }


@contextlib.asynccontextmanager
async def loaded(client: httpx.AsyncClient, facts: Facts, seed: int) -> AsyncIterator[Batches]:
    """Steady load; at the end everything that was begun is waited for."""
    stop, batches = asyncio.Event(), Batches(client, facts)
    tasks = [
        asyncio.create_task(work(client, model, random.Random(f"{seed}/{model}/{i}"), facts, stop))
        for model in MODELS
        for i in range(WORKERS)
    ]
    tasks.append(asyncio.create_task(batches.run(stop)))
    try:
        yield batches
        stop.set()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    server, facts, draw = Server(folder), Facts(), random.Random(args.seed)
    try:
        facts.found["start_s"] = round(await server.start(), 1)
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
            await learn(client, facts)
            async with loaded(client, facts, args.seed) as batches:
                for number in range(args.kills):
                    await asyncio.sleep(draw.uniform(0.1, 3.0))
                    if number == args.kills // 4:
                        await fill_memory(client, facts)
                    if number == args.kills // 2:
                        while not batches.batches or not _is_half_done(batches.batches[-1]):
                            await asyncio.sleep(0.1)
                        await kill_server(server, facts)
                    await kill_model(client, server, facts)
                    print(f"kill {number + 1}: back after {_last(facts):.1f} s", file=sys.stderr)
            result = judge(facts)
            result["batches"] = await batches.check()
        await stop_server(server, facts)
        if num := server.log.read_text(errors="replace").count("Traceback"):
            facts.wrong.append(f"{num} tracebacks in the server's log")
    finally:
        server.end()
    return {**result, **facts.found}, facts.wrong


def _is_half_done(batch: Batch) -> bool:
    done = batch.body["request_counts"]["completed"] if batch.body.get("request_counts") else 0
    return batch.body["status"] == "in_progress" and 0 < done < BATCH_LINES


def _last(facts: Facts) -> float:
    start, end = facts.windows[KILLED][-1]
    return end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the server's home and log")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmasos-faults-"))
    begun = time.monotonic()
    try:
        result, wrong = asyncio.run(run(args, folder))
    finally:
        if args.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    facts = {"seconds": round(time.monotonic() - begun), "wrong": len(wrong), "first_wrong": wrong[:5]}
    report(bench="server_faults", met=not wrong, **result, **facts)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
