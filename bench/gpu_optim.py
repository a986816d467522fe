"""Steps of our optimizers beside torch's fused AdamW, over the weights of a decoder. One JSON line.

    python bench/gpu_optim.py                                               # 0.6 billion weights, on a GPU
    python bench/gpu_optim.py --layers 2 --width 64 --words 500 --device cpu

Of each: milliseconds of a step (median), those until the host has asked for it, GiB of its states, and, where the limit
is known, the share of the memory's rate (--rate, TB/s) at what a step must read and write. A GPU is given other work
first, as by a backward pass, so that the host is ahead of it. torch.optim.Muon is the peer of ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common import report
from llmasos.train.optim import AdamW8bit, Muon

BYTES = {"adamw": 28, "adamw8bit": 16}
"""A weight's step: float32 weight and states read and written, gradient read; states of a byte each."""


def weights(args: argparse.Namespace) -> list[nn.Parameter]:
    """Matrices of blocks as Qwen3 has them, then the embedding."""
    width = args.width
    shapes = [(4 * width, width), (width, 2 * width), (6 * width, width), (width, 3 * width)] * args.layers
    draw = torch.Generator(args.device).manual_seed(0)
    made = [torch.empty(s, device=args.device).normal_(0, 0.02, generator=draw) for s in (*shapes, (args.words, width))]
    return [nn.Parameter(m) for m in made]


def measure(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], args: argparse.Namespace) -> dict[str, Any]:
    parameters = weights(args)
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    times = [timed(optimizer.step, args.device) for _ in range(args.repeat + 2)][2:]
    device, host = (statistics.median(each) for each in zip(*times, strict=True))
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    num = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    states = sum(t.nbytes for t in tensors)
    return {"ms": round(device, 2), "host_ms": round(host, 2), "states_gib": round(states / 2**30, 3), "weights": num}


def timed(step: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds of the device and of the host."""
    if device != "cuda":
        started = time.perf_counter()
        step()
        taken = 1e3 * (time.perf_counter() - started)
        return taken, taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    busy = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device)
    for _ in range(40):
        busy @ busy  # some 60 ms
    begin.record()
    started = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rate", type=float, default=4.8)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    muon = {"lr": 1e-3, "weight_decay": 0.1}
    peer = {**muon, "adjust_lr_fn": "match_rms_adamw"}
    found = {
        "adamw": measure(lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), args),
        "adamw8bit": measure(lambda p: AdamW8bit(p, lr=1e-4), args),
        "muon": measure(lambda p: Muon(p[:-1], **muon), args),
        "muon_torch": measure(lambda p: torch.optim.Muon(p[:-1], **peer), args),
    }
    for name, size in BYTES.items() if args.device == "cuda" else ():
        found[name]["of_bandwidth"] = round(found[name]["weights"] * size / args.rate / found[name]["ms"] / 1e9, 3)
    report(bench="gpu_optim", width=args.width, layers=args.layers, words=args.words, **found)


if __name__ == "__main__":
    main()
