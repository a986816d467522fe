"""Microseconds of one choice for a batch: the sampler against torch's own operations.

    PYTHONPATH=src python bench/gpu_sample.py [--tiny]

R rows of V = 151,936 logits, shaped as a model's: most of the mass on a few hundred tokens. `device`: time on the GPU,
replayed from a CUDA graph where the operations allow it; `call`: `Sampler.sample` as the engine calls it, from rows to
launched kernels, on the CPU's clock. --tiny: small numbers, on whatever there is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import report
from llmasos.inference.request import SamplingParams
from llmasos.inference.sampler import Sampler, SamplingRow, make_batch

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_k_top_p": {"temperature": 0.6, "top_k": 50, "top_p": 0.95},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "penalties": {"temperature": 0.6, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
}


def logits_like_a_models(rows: int, size: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, size, generator=generator, device=device) * 2
    head = torch.linspace(14, 0, 300, device=device)
    places = torch.randint(0, size, (rows, 300), generator=generator, device=device)
    return logits.scatter_add_(1, places, head.expand(rows, 300).contiguous())


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial((logits.float() / 0.6).softmax(-1), 1)


def sorted_nucleus(logits: Tensor) -> Tensor:
    """Top-k, then top-p, by one sort of the whole vocabulary."""
    ordered, order = (logits.float() / 0.6).sort(-1, descending=True)
    ordered[:, 50:] = float("-inf")
    weights = ordered.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= 0.95, 0.0)
    return order.gather(1, torch.multinomial(weights, 1))


TORCH: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "greedy": ("argmax", lambda logits: logits.argmax(-1)),
    "temperature": ("softmax_multinomial", multinomial),
    "top_k_top_p": ("sort", sorted_nucleus),
}


def device_time(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Microseconds of one call, the least of three rounds."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return min(clock(call, repeats) for _ in range(3))
    torch.cuda.synchronize()
    run, calls = call, 1
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        run, calls = graph.replay, repeats
        run()
    except RuntimeError:  # an operation that a graph cannot hold is timed launch by launch
        torch.cuda.synchronize()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(max(1, repeats // calls)):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return min(times)


def clock(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e6 / repeats


def measure(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    logits = logits_like_a_models(rows, size, device).to(dtype)
    sampler = Sampler(device)
    found: dict[str, Any] = {"rows": rows, "dtype": str(dtype).removeprefix("torch.")}
    repeats = 20 if rows < 256 else 8
    for name, options in KINDS.items():
        made = [SamplingRow(SamplingParams(**options, seed=i), range(100)) for i in range(rows)]
        indices = [0] * rows

        def whole(made: list[SamplingRow] = made, indices: list[int] = indices) -> None:
            sampler.sample(logits, make_batch(made, indices))

        batch = make_batch(made, indices)
        found[f"{name}_device"] = round(device_time(kernels_of(sampler, logits, batch), device, repeats), 1)
        whole()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[f"{name}_call"] = round(clock(whole, repeats), 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if name in TORCH:
            other, call = TORCH[name]
            found[other] = round(device_time(partial(call, logits), device, repeats), 1)
    return found


def kernels_of(sampler: Sampler, logits: Tensor, batch: Any) -> Callable[[], Any]:
    """What runs on the device, without the copy of the rows' numbers (pinned memory cannot be made inside a graph)."""
    from llmasos.inference import sampler as room

    moved = room._to_device(batch.arrays, logits.device)

    def run() -> Tensor:
        return sampler._choose(room._adjust(logits, batch, moved, None, {}), batch, moved)

    return run


def agreement(size: int, device: torch.device) -> float:
    """Share of 32 rows, of all kinds, in which the device chooses what the rows on the CPU choose."""
    logits = logits_like_a_models(32, size, device)
    kinds = list(KINDS.values())
    made = [SamplingRow(SamplingParams(**kinds[i % len(kinds)], seed=i), range(100)) for i in range(32)]
    batch = make_batch(made, [3] * 32)
    here = Sampler(torch.device("cpu")).sample(logits.cpu(), batch).tokens
    return float((Sampler(device).sample(logits, batch).tokens.cpu() == here).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, sizes = (5_000, (1, 4)) if tiny else (151_936, (1, 64, 256))
    results = [measure(rows, size, dtype, device) for dtype in (torch.bfloat16, torch.float32) for rows in sizes]
    keys = list(results[0])
    for key in keys:
        print(f"{key:24}" + "".join(f"{r[key]!s:>12}" for r in results))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report(bench="gpu_sample", device=name, vocabulary=size, same_as_cpu=agreement(size, device), microseconds=results)


if __name__ == "__main__":
    main()
