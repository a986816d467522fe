"""FSDP2 on two GPUs beside one GPU: tokens per second of both, and their ratio. One JSON line for each workload.

    python bench/gpu_parallel.py [qwen3] [lora-8b] [--kind ddp]

Workloads are those of bench/gpu_train.py; every GPU reads as many tokens as one does alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from gpu_train import batch, load, works
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.model import Placed, Trainee
from llmasos.train.optim import OptimizerOptions, Optimizers
from llmasos.train.parallel import Ranks, Spreader
from llmasos.train.parallel.gradients import Reducer


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    ranks = Ranks()
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        ranks = Ranks.of_group(args.kind, 1, args.device, local_rank=rank, local_size=size)
    work = next(w for w in reversed(works()) if w.name == name)
    torch.manual_seed(0)
    model = load(work, tiny=args.tiny, device=f"cuda:{rank}" if on_gpu else "cpu")
    if work.lora:
        add_lora(model, LoraOptions(r=16, alpha=32))
    else:
        model.module.requires_grad_()
    device = model.module.device
    dtype = torch.bfloat16 if on_gpu else torch.float32
    spreader = Spreader(ranks, dtype)
    spreader.whole(model.module)
    trainee = Trainee(model.module, dtype=dtype, recompute=args.recompute, compiled=on_gpu and not args.eager)
    spreader.prepare(trainee)
    optimizers = Optimizers(model.module, OptimizerOptions(lr=1e-4, max_norm=0.0))
    reducer = Reducer(optimizers.parameters, ranks.group("replica")) if size > 1 and args.kind == "ddp" else None
    batches = [Placed.of(batch(work, model.config.vocab_size, 2 * rank + i), device) for i in range(2)]
    started = 0.0
    for step in range(args.warm + args.steps):
        if step == args.warm:
            wait(ranks, device)
            started = time.perf_counter()
        if reducer:
            reducer.last()
        each = batches[step % 2]
        (trainee.loss(each) / len(each)).backward()
        if reducer:
            reducer.finish()
        optimizers.step(1.0, torch.zeros((), device=device))
    wait(ranks, device)
    seconds = (time.perf_counter() - started) / args.steps
    if size > 1:
        dist.destroy_process_group()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"tok_s": round(size * work.sequences * work.length / seconds), "peak_gib": round(peak, 1)}


def wait(ranks: Ranks, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.most(0)


def run(size: int, name: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "BENCH_WORK": name}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **{k: str(v) for k, v in own.items()}, "RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(size)
    ]
    said, _ = processes[0].communicate()
    if any(process.wait() for process in processes):
        raise SystemExit(f"{name} failed on {size} GPUs.")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["qwen3", "lora-8b"])
    parser.add_argument("--kind", default="fsdp", choices=["ddp", "fsdp", "hsdp"])
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    if "BENCH_WORK" in os.environ:
        print(json.dumps(measure(args, os.environ["BENCH_WORK"])), flush=True)
        return
    for name in args.names:
        one, two = run(1, name), run(2, name)
        facts = {"bench": "gpu_parallel", "work": name, "kind": args.kind, "one": one, "two": two}
        print(json.dumps({**facts, "ratio": round(two["tok_s"] / one["tok_s"], 3)}), flush=True)


if __name__ == "__main__":
    main()
