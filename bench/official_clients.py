"""The clients that people have, against our server with SmolLM2: each feature of each, with what it must bring about.

    python bench/official_clients.py                      # every client that is installed
    python bench/official_clients.py openai ollama        # some of them
    python bench/official_clients.py --threads 1          # on a machine that is busy

It starts `llmasos serve` with two models on a free loopback port, a database of its own and the home's models, which
are pulled when they are missing. JavaScript clients (official/packages.mjs) are installed by npm into a temporary
folder. What can't be run here is named as skipped. It ends with a line of JSON, and with 1 when a feature failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import MODEL, report
from official.world import EMBEDDER, FEATURES, SIMILAR, WEATHER, Server, example

LLMASOS = str(Path(sys.executable).with_name("llmasos"))
ROOT = Path(__file__).resolve().parent.parent
NPM_PACKAGES = {"openai-js": "openai", "anthropic-js": "@anthropic-ai/sdk"}
PYTHON_PACKAGES = {"openai": "openai", "anthropic": "anthropic", "ollama": "ollama", "lm-eval": "lm_eval"}


@contextlib.contextmanager
def serving(scratch: Path, threads: int) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = scratch / "server.log"
    options = ["--port", str(port), "--database", f"sqlite:///{scratch}/clients.db"]
    environment = os.environ | {"LLMASOS_THREADS": str(threads)}
    start = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [LLMASOS, "serve", MODEL, EMBEDDER, *options],
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        for path in ("healthz", "readyz"):
            while not _answers(f"{server.url}/{path}"):
                if process.poll() is not None or time.perf_counter() > start + 600:
                    raise SystemExit(f"The server did not start:\n{log.read_text()}")
                time.sleep(0.05)
            server.facts[f"{path}_s"] = round(time.perf_counter() - start, 2)
        yield server
    finally:
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        server.facts |= {"stop_s": round(time.perf_counter() - start, 2), "exit_code": code}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass
class Outcome:
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, client: str, name: str, ok: bool, seconds: float, error: str = "") -> None:
        self.results.setdefault(client, {})[name] = {"ok": ok, "s": round(seconds, 2)} | (
            {} if ok else {"error": error[-600:]}
        )
        print(f"{'ok' if ok else 'FAILED':7}{client:14}{name:28}{seconds:7.2f} s", file=sys.stderr, flush=True)
        if not ok:
            print(error, file=sys.stderr, flush=True)

    def skip(self, client: str, reason: str) -> None:
        self.skipped[client] = reason
        print(f"skipped {client}: {reason}", file=sys.stderr, flush=True)

    @property
    def num_failed(self) -> int:
        return sum(not one["ok"] for features in self.results.values() for one in features.values())


def run_python(client: str, server: Server, outcome: Outcome) -> None:
    if (package := PYTHON_PACKAGES.get(client)) is not None:
        if importlib.util.find_spec(package) is None:
            outcome.skip(client, f"the Python package {package} is not installed")
            return
        outcome.versions[client] = importlib.metadata.version(package)
    for name, work in FEATURES[client].items():
        start, error = time.perf_counter(), ""
        try:
            work(server)
        except Exception:
            error = traceback.format_exc()
        outcome.add(client, name, not error, time.perf_counter() - start, error)


def run_javascript(client: str, server: Server, outcome: Outcome, scratch: Path) -> None:
    """Each line that the module writes is what became of a feature."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        outcome.skip(client, "there is no node")
        return
    folder = scratch / client
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("official") / "packages.mjs", folder)
    if (package := NPM_PACKAGES.get(client)) is not None:
        if npm is None:
            outcome.skip(client, "there is no npm")
            return
        install = [npm, "install", "--no-audit", "--no-fund", "--silent", package]
        made = subprocess.run(install, cwd=folder, capture_output=True, text=True)
        if made.returncode:
            outcome.skip(client, f"npm could not install {package}: {made.stderr.strip()[-200:]}")
            return
        manifest = folder / "node_modules" / package / "package.json"
        outcome.versions[client] = json.loads(manifest.read_text())["version"]
    facts = {
        "url": server.url,
        "model": MODEL,
        "embedder": EMBEDDER,
        "weather": WEATHER,
        "example": example(),
        "similar": SIMILAR,
        "own": (ROOT / "js" / "llmasos.js").as_uri(),
    }
    process = subprocess.Popen(
        [node, folder / "packages.mjs", client, json.dumps(facts)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    num = 0
    for line in process.stdout:
        done = json.loads(line)
        outcome.add(client, done["name"], done["ok"], done["s"], done.get("error", ""))
        num += 1
    if process.wait() or not num:
        outcome.add(client, "ends well", False, 0, f"node ended with {process.returncode} after {num} features")


def first_answer(server: Server) -> None:
    """Seconds of the very first request and of one like it: what readiness left to be done."""
    for name in ("first", "second"):
        body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": f"Say {name}."}]}
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        start = time.perf_counter()
        request = urllib.request.Request(f"{server.v1}/chat/completions", data, headers)
        urllib.request.urlopen(request, timeout=300).read()
        server.facts[f"{name}_request_s"] = round(time.perf_counter() - start, 3)


JAVASCRIPT = ("openai-js", "anthropic-js", "llmasos-js")


def main() -> None:
    for package in ("openai", "anthropic", "ollama", "own", "lm_eval"):
        importlib.import_module(f"official.{package}_package")  # which registers its features
    names = [*FEATURES, *JAVASCRIPT]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="client", help=f"some of {', '.join(names)}; default: all")
    parser.add_argument("--threads", type=int, default=0, help="of each model; 0: one per core")
    args = parser.parse_args()
    if unknown := set(args.clients) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with serving(scratch, args.threads) as server:
            first_answer(server)
            for client in args.clients or names:
                if client in JAVASCRIPT:
                    run_javascript(client, server, outcome, scratch)
                else:
                    run_python(client, server, outcome)
            server.facts |= server.memory()
        log = server.log.read_text()
    facts = server.facts
    healthy = "Traceback" not in log and facts["exit_code"] == 0 and not facts["server_has_torch"]
    if outcome.num_failed or not healthy:
        print(log[-8000:], file=sys.stderr)
    report(
        bench="official_clients",
        features=sum(map(len, outcome.results.values())),
        failed=outcome.num_failed,
        clients=outcome.results,
        skipped=outcome.skipped,
        versions=outcome.versions,
        server={**facts, "healthy": healthy},
    )
    sys.exit(1 if outcome.num_failed or not healthy else 0)


if __name__ == "__main__":
    main()
