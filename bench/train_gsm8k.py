"""What fine-tuning teaches: exact match on grade-school problems before, after all weights, after LoRA. One JSON line.

    python bench/train_gsm8k.py TRAIN.jsonl TEST.jsonl [--model smollm2-135m-instruct] [--epochs 4]

TRAIN: chats (GSM8K's 7,473, as `messages`), TEST: lines of `question` and `answer` whose last line is `#### NUMBER`.
Both ways of tuning have the same data, steps and batches, and each takes the best of its rates by the loss of rows of
TRAIN that are held out; the test only judges. Answers are in the model's own chat format; an answer is right if its
last number is the test's. Exact match: `greedy`, and `sampled`, the mean of --samples answers to each problem, whose
error is smaller. Curves: log.jsonl and report.html of the runs in the folder that --output names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import MODEL, report
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.train import Result, sft

KV_BYTES = 2 << 30
"""Of the engine that answers: training has its share of the same GPU."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MOST = 256
"""Tokens of an answer."""
TEMPERATURE = 0.7
HELD_OUT = 0.03
"""Of the training rows: what chooses among rates."""

Match = dict[str, float]


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(name: str, problems: list[dict[str, str]], samples: int, adapter: Path | None = None) -> Match:
    with LLM.from_pretrained(name, kv_cache_memory=KV_BYTES) as llm:
        assert isinstance(llm, LLM)
        request: dict[str, Any] = {}
        if adapter is not None:
            llm.load_adapter("trained", adapter)
            request["adapter"] = "trained"
        texts = [llm.chat_prompt([{"role": "user", "content": one["question"]}]) for one in problems]
        ids = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]

        def share(prompts: list[list[int]], sampling: SamplingParams) -> float:
            outputs = llm.complete(prompts, sampling, **request)
            answers = [problems[number % len(problems)]["answer"] for number in range(len(prompts))]
            return statistics.mean(last_number(o.text) == last_number(a) for o, a in zip(outputs, answers, strict=True))

        greedy = share(ids, SamplingParams(temperature=0, max_tokens=MOST))
        sampled = share(ids * samples, SamplingParams(temperature=TEMPERATURE, max_tokens=MOST))
    return {"greedy": round(greedy, 4), "sampled": round(sampled, 4)}


def losses(result: Result) -> list[float]:
    lines = (result.folder / "evaluations.jsonl").read_text().splitlines()
    return [round(json.loads(line)["loss"], 4) for line in lines]


def tuned(args: argparse.Namespace, tuning: str, rate: float, folder: Path) -> dict[str, Any]:
    """One run: its losses on the rows held out, and what it made."""
    started = time.perf_counter()
    name = f"{tuning}-{rate:g}"
    result = sft(
        model=args.model,
        data=args.train,
        validation=HELD_OUT,
        name=f"gsm8k-{name}",
        output=folder / name,
        tuning=tuning,
        **({} if tuning == "full" else {"lora": {"r": args.rank, "alpha": 2.0 * args.rank}}),
        lr=rate,
        epochs=args.epochs if args.steps is None else None,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        max_length=args.max_length,
        overlong="drop",
        device=args.device,
        install=False,
        progress=True,
    )
    seconds = time.perf_counter() - started
    made = result.exported
    assert made is not None
    model, adapter = str(made.model or args.model), made.adapter
    return {"rate": rate, "loss": losses(result), "seconds": round(seconds, 1), "model": model, "adapter": adapter}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: float(run["loss"][-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rates-full", type=float, nargs="+", default=[2e-4, 5e-4])
    parser.add_argument("--rates-lora", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=16, help="answers to each problem")
    parser.add_argument("--at-once", type=int, default=1, help="runs, on one device")
    parser.add_argument("--output")
    args = parser.parse_args()
    problems = [json.loads(line) for line in Path(args.test).read_text().splitlines()][: args.problems]
    rates = {"full": args.rates_full, "lora": args.rates_lora}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.at_once > 1:  # else each takes a team of threads as large as the machine
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
        with ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn")) as pool:
            before = pool.submit(exact_match, args.model, problems, args.samples)
            jobs = {way: [pool.submit(tuned, args, way, rate, folder) for rate in rates[way]] for way in rates}
            runs = {way: [job.result() for job in jobs[way]] for way in rates}
            chosen = {way: best(runs[way]) for way in rates}
            after = {
                way: pool.submit(exact_match, run["model"], problems, args.samples, run["adapter"])
                for way, run in chosen.items()
            }
            matches = {"before": before.result(), **{way: job.result() for way, job in after.items()}}
    report(
        bench="train_gsm8k",
        model=args.model,
        problems=len(problems),
        samples=args.samples,
        rates={way: run["rate"] for way, run in chosen.items()},
        exact_match=matches,
        lora_share_of_gain={kind: share_of_gain(matches, kind) for kind in ("greedy", "sampled")},
        loss={way: {f"{run['rate']:g}": run["loss"] for run in runs[way]} for way in rates},
        seconds={way: run["seconds"] for way, run in chosen.items()},
    )


def share_of_gain(matches: dict[str, Match], kind: str) -> float | None:
    full, lora = (matches[way][kind] - matches["before"][kind] for way in ("full", "lora"))
    return round(lora / full, 3) if full else None


if __name__ == "__main__":
    main()
