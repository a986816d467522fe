"""What hostile or broken clients do to a server, and what is left of it afterwards. One JSON line; loopback only.

    python bench/server_abuse.py [--streams 1000] [--slow 200]

A real `llmasos serve --require-key` with a random tiny model in a process of its own, in a home of its own: slow
connections beside ordinary requests, bodies that are too long, endless, deep, broken or lying about their length,
floods of headers, garbage, and streams that are closed after their first token. Nothing may hang or answer 5xx, the
ordinary requests must go on, and memory, open files, threads, requests in flight and pages must be where they began
(the tolerances are below and in the line). The key is used throughout; no log and no table may hold it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PATIENCE = 60.0
"""Seconds; an answer that takes longer hangs."""
MIB = 2**20
RSS_TOLERANCE = 40 * MIB
"""Each process may have grown by so much: the allocator keeps now and then the space of one body, at most 32 MiB."""
FILES_TOLERANCE, THREADS_TOLERANCE = 4, 4
"""A pool of the database or of asyncio may still be growing."""
HERE = b"\r\nHost: 127.0.0.1\r\n"
WARM_UP = 5
"""Rounds of streams before we look: torch and oneDNN keep something for every new shape of a batch, up to a bound."""
SLOWDOWN = 5.0
"""Ordinary requests beside slow connections may take so many times as long (at the median), or 0.25 s."""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    key: str
    log: Path
    home: Path
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def head(self, method: str = "POST", path: str = "/v1/completions", *more: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self.key}"]
        return "\r\n".join([*lines, "Content-Type: application/json", *more]).encode() + b"\r\n"

    def request(self, body: bytes, path: str = "/v1/completions", method: str = "POST") -> bytes:
        return self.head(method, path, "Connection: close", f"Content-Length: {len(body)}") + b"\r\n" + body

    async def say(self, what: str, data: bytes | list[bytes], expect: tuple[int, ...]) -> None:
        """Send `data` and note the first status that comes. 0: the connection is closed without one."""
        began = time.perf_counter()
        status = await self.status_of(data)
        if (seconds := time.perf_counter() - began) > 2:
            print(f"{what}: {status} after {seconds:.1f} s", file=sys.stderr)
        self.statuses[status] += 1
        if status not in expect:
            self.wrong.append(f"{what}: {status}, not {' or '.join(map(str, expect))}")

    async def status_of(self, data: bytes | list[bytes]) -> int:
        """-1: it hangs."""
        try:
            async with asyncio.timeout(PATIENCE), self.connection() as (reader, writer):
                return await _status(reader, writer, [data] if isinstance(data, bytes) else data)
        except TimeoutError:
            return -1
        except OSError:
            return 0

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MIB)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def get(self, path: str) -> bytes:
        async with asyncio.timeout(PATIENCE), self.connection() as (reader, writer):
            writer.write(self.head("GET", path, "Connection: close") + b"\r\n")
            answer = await reader.read(-1)
        head, _, body = answer.partition(b"\r\n\r\n")
        if b"chunked" in head:
            body = b"".join(re.split(rb"(?:\r\n)?[0-9a-f]+\r\n", body))
        return body

    async def complete(self) -> float:
        """Seconds that an ordinary request takes."""
        began = time.perf_counter()
        body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 4, "temperature": 0}).encode()
        await self.say("an ordinary request", self.request(body), (200,))
        return time.perf_counter() - began


async def _status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pieces: list[bytes]) -> int:
    async def send() -> None:
        with contextlib.suppress(OSError):  # it may answer and close before it has all
            for piece in pieces:
                writer.write(piece)
                await writer.drain()

    sending = asyncio.ensure_future(send())
    try:
        line = await reader.readline()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", line)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Ends the processes that it started, however its block ends."""
    from llmasos.serve.access import registry
    from llmasos.store.database import Database
    from llmasos.store.library import import_model
    from tiny import write_tiny_model

    home = folder / "home"
    os.environ |= {"LLMASOS_HOME": str(home), "LLMASOS_OFFLINE": "1", "LLMASOS_THREADS": "1", "LLMASOS_LANG": "en"}
    os.environ.pop("LLMASOS_DATABASE", None)
    import_model(write_tiny_model(folder / "tiny", max_position_embeddings=2048), name="tiny", mode="copy")
    with Database.open() as database, database.session() as session:
        asked = {"name": "abuser", "scopes": ["inference", "manage"]}
        key = registry.create(session, asked, actor="local:bench")[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "llmasos", "serve", "tiny", "--port", str(port), "--require-key"]
    command += ["--kv-cache-memory", str(4 * MIB)]  # few pages: all have been written to before we look
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--log-level", "debug"], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield Server(process, port, key, log, home)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def ready(server: Server) -> None:
    for _ in range(240):
        if server.process.poll() is not None:
            raise SystemExit(f"the server ended: {server.log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            if b'"ready"' in await server.get("/readyz"):
                return
        await asyncio.sleep(0.5)
    raise SystemExit("the server is not ready after two minutes")


@dataclass(frozen=True)
class State:
    """What must be the same before and after. Bytes; by process: the server's, the model's."""

    rss: tuple[int, ...]
    files: tuple[int, ...]
    threads: tuple[int, ...]
    in_flight: int
    metrics: dict[str, float]


async def state(server: Server) -> State:
    metrics: dict[str, float] = {}
    for line in (await server.get("/metrics")).decode().splitlines():
        name = line.partition("{")[0].removeprefix("llmasos:")
        if name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "model_busy"):
            metrics[name] = float(line.rpartition(" ")[2])
    in_flight = len(json.loads(await server.get("/llmasos/v1/requests"))["data"])
    own = psutil.Process(server.process.pid)
    processes = [own, *sorted(own.children(), key=lambda p: p.pid)]
    return State(
        tuple(p.memory_info().rss for p in processes),
        tuple(p.num_fds() for p in processes),
        tuple(p.num_threads() for p in processes),
        in_flight,
        metrics,
    )


async def settled(server: Server, start: State) -> State:
    """The state when it is like `start`, or after 20 seconds."""
    for _ in range(20):
        await asyncio.sleep(1)
        found = await state(server)
        if not differences(start, found):
            break
    return found


def differences(start: State, end: State) -> list[str]:
    found = []
    for name, tolerance in (("rss", RSS_TOLERANCE), ("files", FILES_TOLERANCE), ("threads", THREADS_TOLERANCE)):
        before, after = getattr(start, name), getattr(end, name)
        if len(before) != len(after) or any(b - a > tolerance for a, b in zip(before, after, strict=True)):
            found.append(f"{name}: {before} -> {after}")
    if end.in_flight or any(end.metrics.values()):
        found.append(f"in flight: {end.in_flight}, {end.metrics}")
    return found


# what clients do


async def slow(server: Server, num: int, quiet: float) -> dict[str, Any]:
    """Half of `num` connections send their head byte by byte, half their body; ordinary requests go on beside them."""
    head, began = server.head(), time.perf_counter()
    closed: list[float] = []

    async def trickle(start: bytes, rest: bytes) -> None:
        with contextlib.suppress(OSError):
            async with server.connection() as (reader, writer):
                writer.write(start)
                gone = asyncio.ensure_future(reader.read(1))
                for i in range(len(rest)):
                    await asyncio.wait({gone}, timeout=1.0)
                    if gone.done() or time.perf_counter() - began > 2 * PATIENCE:
                        break
                    writer.write(rest[i : i + 1])
                gone.cancel()
        closed.append(time.perf_counter() - began)

    body = head + b"Content-Length: 5000\r\n\r\n"
    tasks = [asyncio.ensure_future(trickle(b"", head * 5)) for _ in range(num // 2)]
    tasks += [asyncio.ensure_future(trickle(body, b" " * 5000)) for _ in range(num - num // 2)]
    await asyncio.sleep(1)
    beside = [await server.complete() for _ in range(20)]
    median = statistics.median(beside)
    if median > max(SLOWDOWN * quiet, 0.25):
        server.wrong.append(f"ordinary requests beside slow ones: {median:.3f} s, {quiet:.3f} s without")
    await asyncio.gather(*tasks)
    if max(closed) > 1.5 * PATIENCE:
        server.wrong.append(f"a slow connection was held for {max(closed):.0f} s")
    return {"connections": num, "median_s": round(median, 4), "worst_s": round(max(beside), 4),
            "all_let_go_after_s": round(max(closed), 1)}  # fmt: skip


async def aborted(server: Server, num: int, at_once: int = 40) -> dict[str, Any]:
    """Streams that are closed when their first token is there."""
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 1000, "ignore_eos": True, "stream": True})
    turns, began = asyncio.Semaphore(at_once), time.perf_counter()
    got: Counter[str] = Counter()

    async def one(i: int) -> None:
        async with turns:
            try:
                async with asyncio.timeout(PATIENCE), server.connection() as (reader, writer):
                    writer.write(server.request(body.encode()))
                    await reader.readuntil(b"data: ")
                    got["tokens"] += 1
                    if i % 2:
                        writer.transport.abort()  # a reset, not an orderly end
            except (TimeoutError, OSError, asyncio.IncompleteReadError) as e:
                got[type(e).__name__] += 1

    await asyncio.gather(*(one(i) for i in range(num)))
    if got["tokens"] != num:
        server.wrong.append(f"aborted streams: {dict(got)}")
    return {"streams": num, "seconds": round(time.perf_counter() - began, 1)}


async def long_bodies(server: Server) -> None:
    def asked(size: int) -> bytes:
        return json.dumps({"model": "tiny", "prompt": "hello wor" * (size // 9)}).encode()

    ten, chunk = asked(10 * MIB), b"10000\r\n" + b" " * 65536 + b"\r\n"
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a" * (10 * MIB)}]}
    await server.say("10 MiB", server.request(ten), (400,))
    await server.say(
        "10 MiB without a space", server.request(json.dumps(chat).encode(), "/v1/chat/completions"), (400,)
    )
    await server.say("10 MiB of garbage", server.request(b"\xff\x00{" * (10 * MIB // 3)), (400,))
    await server.say(
        "a token list of 10 MiB", server.request(b'{"model":"tiny","prompt":[%s1]}' % (b"1," * 5 * MIB)), (400,)
    )
    await server.say("40 MiB", server.request(asked(40 * MIB)), (413, 0))
    await server.say(
        "a declared terabyte",
        server.head("POST", "/v1/completions", "Content-Length: 1099511627776") + b"\r\n{",
        (413,),
    )
    endless = [server.head("POST", "/v1/completions", "Transfer-Encoding: chunked") + b"\r\n", *([chunk] * 800)]
    await server.say("chunks without end", endless, (413, 0))
    tiny_chunks = b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"
    chunked = server.head("POST", "/v1/completions", "Transfer-Encoding: chunked") + b"\r\n"
    await server.say("20,000 chunks of one byte", chunked + tiny_chunks, (400,))


async def broken_bodies(server: Server) -> None:
    deep = 10_000
    bodies = {
        "invalid UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe\xc3("}',
        "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
        "a NUL": b'{"model": "tiny\\u0000", "prompt": "a\\u0000b"}',
        "10,000 lists": b'{"model": "tiny", "prompt": ' + b"[" * deep + b"]" * deep + b"}",
        "10,000 objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "10,000 lists that never end": b"[" * deep,
        "1,000 lists in a field of any kind": b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "metadata": '
        + b"[" * 1000 + b"]" * 1000 + b"}",
        "a number of 5,000 digits": b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        "a seed of 5,000 digits": b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "seed": ' + b"9" * 5000 + b"}",
        "1e400": b'{"model": "tiny", "prompt": "a", "temperature": 1e400}',
        "NaN": b'{"model": "tiny", "prompt": "a", "top_p": NaN}',
        "2**70 tokens": b'{"model": "tiny", "prompt": "a", "max_tokens": 1180591620717411303424}',
        "token ids of 2**70": b'{"model": "tiny", "prompt": [1180591620717411303424]}',
        "negative token ids": b'{"model": "tiny", "prompt": [-1]}',
        "a million completions": b'{"model": "tiny", "prompt": "a", "n": 1000000}',
        "10,000 prompts": b'{"model": "tiny", "max_tokens": 1000000, "prompt": [' + b'"a",' * 9999 + b'"a"]}',
        "nothing": b"",
        "a byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
        "no object": b"[]",
    }  # fmt: skip
    fine = ("half a surrogate pair", "a seed of 5,000 digits")
    for what, body in bodies.items():
        await server.say(what, server.request(body), (200, 400, 404) if what in fine else (400, 404))
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    await server.say(
        "a schema of 300 levels", server.request(json.dumps(chat).encode(), "/v1/chat/completions"), (200, 400)
    )
    chat["response_format"]["json_schema"]["schema"] = {"type": "string", "pattern": "(a|a)*" * 50 + "{1000}{1000}"}
    await server.say(
        "a pattern that explodes", server.request(json.dumps(chat).encode(), "/v1/chat/completions"), (200, 400)
    )
    for path in ("/v1/messages", "/api/chat", "/v1/responses", "/v1/embeddings", "/llmasos/v1/plan", "/v1/batches"):
        await server.say(f"10,000 lists to {path}", server.request(b"[" * deep + b"]" * deep, path), (400,))
        await server.say(f"a long number to {path}", server.request(b'{"model": ' + b"9" * 5000 + b"}", path), (400,))


async def broken_heads(server: Server) -> None:
    post, get = server.head(), server.head("GET", "/healthz")
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    cases: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "garbage": (os.urandom(4096), (400, 431, 0)),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200), (400, 0)),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 404, 405, 0)),
        "a length below zero": (post + b"Content-Length: -5\r\n\r\n" + body, (400, 0)),
        "a length that is no number": (post + b"Content-Length: 5x\r\n\r\n" + body, (400, 0)),
        "two lengths": (post + b"Content-Length: 5\r\nContent-Length: 49\r\n\r\n" + body, (400, 0)),
        "a length and chunks": (post + b"Content-Length: 49\r\nTransfer-Encoding: chunked\r\n\r\n" + body, (400, 0)),
        "a length of 30 digits": (post + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + body, (400, 413, 0)),
        "a length that is too short": (post + b"Content-Length: 10\r\n\r\n" + body, (400,)),
        "chunks of no size": (post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body, (400, 0)),
        "an unknown coding": (post + b"Transfer-Encoding: gzip\r\n\r\n" + body, (400, 501, 0)),
        "100,000 headers": (get + b"".join(b"X-%d: a\r\n" % i for i in range(100_000)) + b"\r\n", (431, 0)),
        "a header of 1 MiB": (get + b"X: " + b"a" * MIB + b"\r\n\r\n", (431, 0)),
        "a path of 100 kB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 431, 0)),
        "a path that leads up": (server.head("GET", "/v1/files/..%2f..%2f..%2fetc%2fpasswd/content") + b"\r\n", (404,)),
        "a NUL in a path": (server.head("GET", "/v1/models/%00") + b"\r\n", (404,)),
        "half a character in a path": (server.head("GET", "/v1/models/%ff%fe") + b"\r\n", (400, 404)),
        "an absolute address": (b"GET http://evil.example/healthz HTTP/1.1" + HERE + b"\r\n", (200, 400, 403, 404)),
        "another host": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,)),
        "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", (403, 400)),
        "two hosts": (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", (400, 401, 403)),
        "a line break in an id": (get + b"X-Request-ID: a%0d%0aset-cookie: b\r\n\r\n", (200,)),
        "folded headers": (get + b"X-A: a\r\n b\r\n\r\n", (200, 400, 0)),
        "CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n", (400, 403, 404, 405, 0)),
        "an upgrade to WebSocket": (
            get + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", (200, 400, 403, 404)),
        "garbage behind a request": (get + b"\r\n" + os.urandom(4096), (200, 400)),
        "1,000 requests at once": ((get + b"\r\n") * 1000, (200,)),
        "a key of 60 kB": (b"GET / HTTP/1.1" + HERE + b"X-Api-Key: %s\r\n\r\n" % (b"a" * 60_000), (200, 401, 431)),
        "the key in an address": (server.head("GET", f"/v1/models/{server.key}?key={server.key}") + b"\r\n", (404,)),
        "the key as a model": (server.request(json.dumps({"model": server.key, "prompt": "a"}).encode()), (404,)),
        "the key in a wrong header": (get + f"X-Api-Key: {server.key}x\r\n\r\n".encode(), (200, 401)),
    }  # fmt: skip
    for what, (data, expect) in cases.items():
        await server.say(what, data, expect)


def secrets_left(server: Server) -> list[str]:
    """Where the key's secret part can be read: it may be nowhere."""
    secret = server.key.rpartition("-")[2].encode()
    assert len(secret) > 20
    kept = [server.log, *(path for path in server.home.rglob("*") if path.is_file())]
    return [str(path.name) for path in kept if secret in path.read_bytes()]


async def abuse(server: Server, num_streams: int, num_slow: int) -> dict[str, Any]:
    await ready(server)
    rounds: list[Callable[[], Awaitable[Any]]] = [
        lambda: long_bodies(server), lambda: broken_bodies(server), lambda: broken_heads(server),
    ]  # fmt: skip
    for one in rounds * 2:  # before we look: buffers, pools and caches have their size then
        await one()
    for _ in range(WARM_UP):
        await aborted(server, num_streams)
    quiet = statistics.median([await server.complete() for _ in range(20)])
    await asyncio.sleep(2)
    start = await state(server)
    facts: dict[str, Any] = {"quiet_median_s": round(quiet, 4)}
    facts["slow"] = await slow(server, num_slow, quiet)
    facts["aborted"] = await aborted(server, num_streams)
    for one in rounds:
        await one()
    after = statistics.median([await server.complete() for _ in range(20)])
    facts["after_median_s"] = round(after, 4)
    end = await settled(server, start)
    num_5xx = sum(n for status, n in server.statuses.items() if status >= 500)
    return {
        **facts,
        "rss_mib": [[round(n / MIB, 1) for n in s.rss] for s in (start, end)],
        "files": [start.files, end.files],
        "threads": [start.threads, end.threads],
        "in_flight": [start.in_flight, end.in_flight],
        "metrics": [start.metrics, end.metrics],
        "tolerances": {"rss_mib": RSS_TOLERANCE / MIB, "files": FILES_TOLERANCE, "threads": THREADS_TOLERANCE},
        "left_over": differences(start, end),
        "statuses": {str(k): n for k, n in sorted(server.statuses.items())},
        "hangs": server.statuses[-1],
        "5xx": num_5xx,
        "wrong": sorted(set(server.wrong)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="streams that are closed after their first token")
    parser.add_argument("--slow", type=int, default=200, help="slow connections at once")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmasos-abuse-", ignore_cleanup_errors=True) as folder:
        with serving(Path(folder)) as server:
            facts = asyncio.run(abuse(server, options.streams, options.slow))
            lived = server.process.poll() is None
        exit_code = server.process.returncode
        log = server.log.read_text(errors="replace")
        facts |= {
            "alive": lived,
            "exit_code": exit_code,
            "key_found_in": secrets_left(server),
            "tracebacks": log.count("Traceback"),
        }
        if facts["tracebacks"] or facts["5xx"]:
            print(log[-6000:], file=sys.stderr)
    print(json.dumps({**facts, "seconds": round(time.monotonic() - began, 1)}))
    bad = facts["wrong"] or facts["left_over"] or facts["5xx"] or facts["key_found_in"] or facts["tracebacks"]
    if bad or exit_code:
        sys.exit(1)


if __name__ == "__main__":
    main()
