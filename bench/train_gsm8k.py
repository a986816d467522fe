"""What fine-tuning teaches: exact match on grade-school problems before, after all weights, after LoRA. One JSON line.

    python bench/train_gsm8k.py TRAIN.jsonl TEST.jsonl [--model smollm2-135m-instruct] [--epochs 4]

TRAIN: chats (GSM8K's 7,473, as `messages`), TEST: lines of `question` and `answer` whose last line is `#### NUMBER`.
Answers are greedy, in the model's own chat format; an answer is right if its last number is the test's. Both runs have
the same data, steps and batches. The loss is that of the test's answers. Curves: log.jsonl and report.html of the runs
in the folder that --output names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(name: str, problems: list[dict[str, str]], adapter: Path | None = None) -> float:
    with LLM.from_pretrained(name, kv_cache_memory=KV_BYTES) as llm:
        assert isinstance(llm, LLM)
        request: dict[str, Any] = {}
        if adapter is not None:
            llm.load_adapter("trained", adapter)
            request["adapter"] = "trained"
        texts = [llm.chat_prompt([{"role": "user", "content": one["question"]}]) for one in problems]
        ids = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        outputs = llm.complete(ids, SamplingParams(temperature=0, max_tokens=256), **request)
    right = [last_number(o.text) == last_number(p["answer"]) for o, p in zip(outputs, problems, strict=True)]
    return sum(right) / len(right)


def held_out(problems: list[dict[str, str]], folder: Path) -> Path:
    """The test as chats, without the marks of its calculator."""
    file = folder / "test.jsonl"
    rows = [(one["question"], re.sub(r"<<.*?>>", "", one["answer"])) for one in problems]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def losses(result: Result) -> list[float]:
    lines = (result.folder / "evaluations.jsonl").read_text().splitlines()
    return [round(json.loads(line)["loss"], 4) for line in lines]


def tuned(args: argparse.Namespace, tuning: str, folder: Path, problems: list[dict[str, str]]) -> dict[str, Any]:
    """One run, and what its result answers."""
    started = time.perf_counter()
    result = sft(
        model=args.model,
        data=args.train,
        validation_data=str(folder / "test.jsonl"),
        name=f"gsm8k-{tuning}",
        output=folder / tuning,
        tuning=tuning,
        **({} if tuning == "full" else {"lora": {"r": args.rank, "alpha": 2.0 * args.rank}}),
        lr=args.rate_full if tuning == "full" else args.rate_lora,
        epochs=args.epochs if args.steps is None else None,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        max_length=args.max_length,
        device=args.device,
        install=False,
        progress=True,
    )
    seconds = time.perf_counter() - started
    made = result.exported
    assert made is not None
    match = exact_match(str(made.model or args.model), problems, adapter=made.adapter)
    return {"match": match, "loss": losses(result), "seconds": round(seconds, 1)}


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
    parser.add_argument("--rate-full", type=float, default=2e-4)
    parser.add_argument("--rate-lora", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--at-once", type=int, default=1, help="of the three measurements, on one device")
    parser.add_argument("--output")
    args = parser.parse_args()
    problems = [json.loads(line) for line in Path(args.test).read_text().splitlines()][: args.problems]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        held_out(problems, folder)
        if args.at_once > 1:  # else each takes a team of threads as large as the machine
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.at_once)))
        with ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn")) as pool:
            before = pool.submit(exact_match, args.model, problems)
            runs = {name: pool.submit(tuned, args, name, folder, problems) for name in ("full", "lora")}
            found = {name: run.result() for name, run in runs.items()}
            matches = {"before": before.result(), **{name: run["match"] for name, run in found.items()}}
    gains = {name: matches[name] - matches["before"] for name in found}
    loss_gains = {name: run["loss"][0] - run["loss"][-1] for name, run in found.items()}
    report(
        bench="train_gsm8k",
        model=args.model,
        problems=len(problems),
        rates={"full": args.rate_full, "lora": args.rate_lora},
        exact_match={name: round(value, 4) for name, value in matches.items()},
        loss={name: run["loss"] for name, run in found.items()},
        lora_share_of_gain=round(gains["lora"] / gains["full"], 3) if gains["full"] else None,
        lora_share_of_loss_gain=round(loss_gains["lora"] / loss_gains["full"], 3) if loss_gains["full"] else None,
        seconds={name: run["seconds"] for name, run in found.items()},
    )


if __name__ == "__main__":
    main()
