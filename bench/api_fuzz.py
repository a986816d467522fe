"""Every operation of the HTTP API, asked with what its own OpenAPI document allows and with what it does not.

    python bench/api_fuzz.py [--requests 10000] [--seed 0]

The application runs in this process, in a home of its own, offline, with a stand-in for models, one that ranks, and a
random tiny model that really runs. Nothing may answer 5xx (but 501 and 503 that say why), raise, hang, or answer what
the document does not describe. Needs schemathesis.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
PROCESSES = 30
"""Plans and pulls that run in processes of their own, as they do; each takes seconds, and more of them show no more."""
sys.path[:0] = [str(TESTS), str(TESTS / "serve")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edges", type=int, default=40, help="systematic cases per operation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmasos-fuzz-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "LLMASOS_HOME": f"{folder}/home",
            "LLMASOS_OFFLINE": "1",
            "LLMASOS_THREADS": "1",
            "LLMASOS_LANG": "en",
        }
        os.environ.pop("LLMASOS_DATABASE", None)
        facts = fuzz(Path(folder), options.requests, options.seed, options.edges)
    print(json.dumps(facts))
    if facts["num_failures"]:
        sys.exit(1)


def fuzz(folder: Path, num_requests: int, seed: int, edges: int) -> dict[str, Any]:
    from access_world import LOOPBACK
    from api_fuzzer import Fuzzer, Running
    from fake_llm import ObedientLLM

    from llmasos.errors import OfflineError
    from llmasos.inference.llm import LLM
    from llmasos.serve.access.access import Access
    from llmasos.serve.native import Pulls, worker
    from llmasos.serve.server import create_app
    from llmasos.store.database import Database
    from llmasos.store.library import import_model
    from tiny import write_tiny_model

    began = time.monotonic()
    run, left = worker.run, iter(range(PROCESSES))

    async def run_some(task: str, options: dict[str, Any], on_progress: Any = lambda _: None) -> dict[str, Any]:
        if next(left, None) is None:
            raise OfflineError("Offline mode is on, and there were processes enough.")
        return await run(task, options, on_progress)

    worker.run = run_some
    Pulls.__init__.__kwdefaults__["run"] = run_some  # type: ignore[index]  # it has one
    tiny = write_tiny_model(folder / "tiny")
    for name in ("tiny", "shelved"):
        import_model(tiny, name=name, mode="copy")
    fake, ranker, model = ObedientLLM(), ObedientLLM("ranker"), LLM.from_pretrained("tiny")
    ranker.scores_pairs = True
    with Database.open() as database:
        app = create_app(
            {"fake": fake, "ranker": ranker, "tiny": model},
            access=Access(database, LOOPBACK),
            enable_lora_loading=True,
        )
        with Running(app) as running:
            fuzzer = Fuzzer(running, ["fake", "ranker", "tiny", "shelved"], number=seed)
            fuzzer.furnish()
            num_tasks = running.num_tasks()
            fuzzer.edges(edges)
            print(f"{fuzzer.tally.num_requests} requests, {time.monotonic() - began:.0f} s", file=sys.stderr)
            tally, round_ = fuzzer.tally, 0
            while (missing := num_requests - tally.num_requests) > 0:
                fuzzer.random_cases(max(4, min(60, missing // len(tally.operations) + 1)), round_)
                round_ += 1
                print(f"{tally.num_requests} requests, {time.monotonic() - began:.0f} s", file=sys.stderr)
            time.sleep(2)
            tasks_after = running.num_tasks()
    model.close()
    for name, example in tally.failures.items():
        print(f"{tally.num_failures[name]} x {name}\n    {example}", file=sys.stderr)
    by_class = Counter(f"{status // 100}xx" for status in tally.statuses.elements())
    return {
        "requests": tally.num_requests,
        "operations": len(tally.operations),
        "operations_answered_2xx": len(tally.succeeded),
        "never_2xx": sorted(tally.operations - tally.succeeded),
        "by_class": dict(sorted(by_class.items())),
        "by_status": {str(k): v for k, v in sorted(tally.statuses.items())},
        "streams_left": tally.num_cut,
        "unsendable": tally.num_unsendable,
        "hangs": sum(n for name, n in tally.num_failures.items() if name.startswith("hangs")),
        "slowest_s": tally.slowest,
        "slowest": tally.slowest_operation,
        "tasks": [num_tasks, tasks_after],
        "running_after": [fake.num_running, ranker.num_running, model.stats.num_running],
        "num_failures": sum(tally.num_failures.values()),
        "failures": dict(tally.num_failures),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main()
