"""The head and the loss of a large vocabulary, forward and backward: ours against plain torch, compiled, in one run.

    python bench/gpu_loss.py                 # 16,384 tokens x 248,320 words x 2,048 wide, bfloat16, on a GPU
    python bench/gpu_loss.py --tokens 64 --words 3000 --width 64 --device cpu

One JSON line: milliseconds and GiB of each (medians; weights, their gradient and the inputs are counted).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmasos.train.losses import linear_cross_entropy


def measure(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], args: argparse.Namespace, *, frozen: bool
) -> dict[str, float]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(args.words, args.width, device=device, dtype=dtype) * 0.02).requires_grad_(not frozen)
    labels = torch.randint(args.words, (args.tokens,), device=device)
    times = []
    for turn in range(args.repeat + 3):
        hidden.grad = weight.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            if turn == 2:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        value = loss(hidden, weight, labels)
        value.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    result = {"ms": round(statistics.median(times[3:]), 1), "gib": round(peak, 2), "loss": round(float(value), 4)}
    del hidden, weight, value
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels) / len(labels)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--words", type=int, default=248320)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    row = {
        "bench": "gpu_loss",
        "shape": [args.tokens, args.words, args.width],
        "ours": measure(ours, args, frozen=False),
        "ours_frozen_head": measure(ours, args, frozen=True),
        "compiled": measure(torch.compile(plain), args, frozen=False),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
