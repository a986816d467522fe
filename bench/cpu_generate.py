"""Prefill and decode of one GGUF model on the CPU against llama.cpp, in turns on the same threads.

    python bench/cpu_generate.py [--model NAME_OR_FILE] [--threads 2] [--rounds 5]

Prefill: tokens/s of one prompt; decode: tokens/s after it, greedy, end token ignored. Medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

from common import MODEL, llama_cpp, model_file, report
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.models.load import load_model


def ours(llm: LLM, num_prompt: int, num_new: int) -> tuple[float, float]:
    """One round: (prefill tokens/s, decode tokens/s), through the same loop that users run."""
    prompt = torch.randint(100, llm.model.config.vocab_size, (num_prompt,)).tolist()
    start = time.perf_counter()
    llm.complete([prompt], SamplingParams(temperature=0, max_tokens=1))
    prefill = num_prompt / (time.perf_counter() - start)
    output = llm.complete([prompt[:1]], SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True))[0]
    return prefill, output.metrics.tokens_per_second


def theirs(binary: Path, file: Path, threads: int, num_prompt: int, num_new: int) -> tuple[float, float]:
    command = [binary, "-m", file, "-t", threads, "-p", num_prompt, "-n", num_new, "-r", 1, "-o", "json"]
    out = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout
    rates = {bool(run["n_prompt"]): run["avg_ts"] for run in json.loads(out)}
    return rates[True], rates[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    file, binary = model_file(args.model), llama_cpp("llama-bench")
    model = load_model(file)
    if args.threads:
        torch.set_num_threads(args.threads)
    llm = LLM(model, name=args.model)
    ours(llm, args.prompt, args.new)  # warm-up
    rounds = []
    for _ in range(args.rounds):
        mine = ours(llm, args.prompt, args.new)
        rounds.append((*mine, *theirs(binary, file, torch.get_num_threads(), args.prompt, args.new)))
    prefill, decode, peer_prefill, peer_decode = (statistics.median(column) for column in zip(*rounds, strict=True))
    report(
        bench="cpu_generate",
        model=args.model,
        prefill=round(prefill, 1),
        decode=round(decode, 1),
        llama_cpp_prefill=round(peer_prefill, 1),
        llama_cpp_decode=round(peer_decode, 1),
        prefill_ratio=round(statistics.median(r[0] / r[2] for r in rounds), 2),
        decode_ratio=round(statistics.median(r[1] / r[3] for r in rounds), 2),
        rounds=args.rounds,
    )


if __name__ == "__main__":
    main()
