"""What fine-tuning teaches: exact match on grade-school problems before, after all weights, after LoRA. One JSON line.

    python bench/train_gsm8k.py TRAIN.jsonl TEST.jsonl [--model smollm2-135m-instruct] [--epochs 4]

TRAIN: chats (GSM8K's 7,473, as `messages`), TEST: lines of `question` and `answer` whose last line is `#### NUMBER`.
All runs have the same data, steps and batches. Each way of tuning takes the best of its settings by what it answers to
the last rows of TRAIN, which no run reads; the test only judges. Answers are in the model's own chat format; an answer
is right if its last number is the test's. Exact match: `greedy`, and `sampled`, the mean of --samples answers to each
problem, whose error is smaller. --output gets the runs (log.jsonl and report.html are the curves) and what each result
answers; with a folder that is there already, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
HELD_OUT = 300
"""Rows that choose among settings."""

Match = dict[str, float]
Problem = dict[str, str]


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(
    name: str, sets: dict[str, list[Problem]], samples: int, adapter: Path | None = None, rank: int = 0
) -> Match:
    """Of the test, greedy and sampled; and sampled, of the rows held out. adapter: of `rank`."""
    more = {"max_lora_rank": rank} if rank else {}
    with LLM.from_pretrained(name, kv_cache_memory=KV_BYTES, **more) as llm:
        assert isinstance(llm, LLM)
        request: dict[str, Any] = {}
        if adapter is not None:
            llm.load_adapter("trained", adapter)
            request["adapter"] = "trained"

        def share(problems: list[Problem], sampling: SamplingParams) -> float:
            texts = [llm.chat_prompt([{"role": "user", "content": one["question"]}]) for one in problems]
            ids = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            outputs = llm.complete(ids, sampling, **request)
            right = [last_number(o.text) == last_number(p["answer"]) for o, p in zip(outputs, problems, strict=True)]
            return round(statistics.mean(right), 4)

        sampled = SamplingParams(temperature=TEMPERATURE, max_tokens=MOST)
        return {
            "greedy": share(sets["test"], SamplingParams(temperature=0, max_tokens=MOST)),
            "sampled": share(sets["test"] * samples, sampled),
            "held_out": share(sets["held_out"] * max(1, samples // 4), sampled),
        }


def split(train: Path, into: Path) -> list[Problem]:
    """Writes what is trained and what is held out; returns the latter as problems."""
    rows = train.read_text().strip().split("\n")  # not splitlines: texts hold line separators of Unicode
    last = max(1, min(HELD_OUT, len(rows) // 4))
    (into / "train.jsonl").write_text("\n".join(rows[:-last]) + "\n")
    (into / "held_out.jsonl").write_text("\n".join(rows[-last:]) + "\n")
    chats = [json.loads(row)["messages"] for row in rows[-last:]]
    return [{"question": chat[0]["content"], "answer": chat[1]["content"]} for chat in chats]


def losses(result: Result) -> list[float]:
    lines = (result.folder / "evaluations.jsonl").read_text().strip().split("\n")
    return [round(json.loads(line)["loss"], 4) for line in lines]


@dataclass(frozen=True)
class Setting:
    """rank: of an adapter on all projections; 0: all weights."""

    rate: float
    rank: int = 0

    def __str__(self) -> str:
        return f"lora-r{self.rank}-{self.rate:g}" if self.rank else f"full-{self.rate:g}"


def tuned(args: argparse.Namespace, setting: Setting, folder: Path, sets: dict[str, list[Problem]]) -> dict[str, Any]:
    """One run: its losses on the rows held out, and what its result answers."""
    started = time.perf_counter()
    rank, name = setting.rank, str(setting)
    result = sft(
        model=args.model,
        data=str(folder / "train.jsonl"),
        validation_data=str(folder / "held_out.jsonl"),
        name=f"gsm8k-{name}",
        output=folder / name,
        tuning="lora" if rank else "full",
        **({"lora": {"r": rank, "alpha": 2.0 * rank}} if rank else {}),
        lr=setting.rate,
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
    match = exact_match(str(made.model or args.model), sets, args.samples, made.adapter, rank)
    return {"setting": name, "match": match, "loss": losses(result), "seconds": round(seconds, 1)}


def kept(file: Path, make: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `make` returned before, if it did: another start of this script goes on with what is missing."""
    if not file.exists():
        file.write_text(json.dumps(make(*args)))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return max(runs, key=lambda run: float(run["match"]["held_out"]))


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
    parser.add_argument("--rates-lora", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=16, help="answers to each problem")
    parser.add_argument("--at-once", type=int, default=1, help="runs, on one device")
    parser.add_argument("--output")
    args = parser.parse_args()
    problems = [json.loads(line) for line in Path(args.test).read_text().strip().split("\n")][: args.problems]
    settings = {
        "full": [Setting(rate) for rate in args.rates_full],
        "lora": [Setting(rate, rank) for rank in args.ranks for rate in args.rates_lora],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        sets = {"test": problems, "held_out": split(Path(args.train), folder)}
        if args.at_once > 1:  # else each takes a team of threads as large as the machine
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
        with ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn")) as pool:
            before = pool.submit(kept, folder / "before.json", exact_match, args.model, sets, args.samples)
            jobs = {
                way: [pool.submit(kept, folder / f"{one}.json", tuned, args, one, folder, sets) for one in each]
                for way, each in settings.items()
            }
            runs = {way: [job.result() for job in jobs[way]] for way in settings}
            chosen = {way: best(runs[way]) for way in settings}
            matches = {"before": before.result(), **{way: run["match"] for way, run in chosen.items()}}
    report(
        bench="train_gsm8k",
        model=args.model,
        problems=len(problems),
        samples=args.samples,
        chosen={way: run["setting"] for way, run in chosen.items()},
        exact_match=matches,
        lora_share_of_gain={kind: share_of_gain(matches, kind) for kind in ("greedy", "sampled")},
        runs=[run for way in settings for run in runs[way]],
    )


def share_of_gain(matches: dict[str, Match], kind: str) -> float | None:
    full, lora = (matches[way][kind] - matches["before"][kind] for way in ("full", "lora"))
    return round(lora / full, 3) if full else None


if __name__ == "__main__":
    main()
