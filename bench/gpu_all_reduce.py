"""What the sum over GPUs costs inside a CUDA graph: peers' memory read directly (one-shot) against NCCL.

    python bench/gpu_all_reduce.py [--gpus 2]

Each graph holds 64 sums, as a decode step of 32 layers does. The table gives microseconds a sum, the median of 20
replays on rank 0; "linear" is a row-parallel layer [T, 2048] -> [T, 4096] whose product lands where peers read it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# multicast stays off for the whole measurement
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from common import report
from llmasos.models import parallel
from llmasos.models.parallel import Group, RowParallel

SIZES = [1 << n for n in range(13, 24)]
SUMS = 64


def microseconds(body: Callable[[], Any]) -> float:
    """A run of `body` inside a graph of SUMS runs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(SUMS):
                body()
        times = []
        for _ in range(23):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / SUMS)
    return statistics.median(times[3:])


def check(group: Group, x: Tensor) -> None:
    """One-shot sums are NCCL's, and the same bits everywhere. Many runs: a race would show as a rare wrong value."""
    expected = x.float()
    dist.all_reduce(expected)
    for _ in range(200):
        total = group.all_reduce(x.clone())
        torch.testing.assert_close(total.float(), expected, rtol=2e-2, atol=2e-2)
    everywhere = group.all_gather(total)
    assert (everywhere == everywhere[0]).all(), "ranks hold different sums"


@torch.inference_mode()
def run(rank: int, size: int, folder: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel.WINDOW_BYTES = SIZES[-1]
    group = Group(rank, size, device, folder / "meeting")
    layer = RowParallel(nn.Linear(2048, 4096, bias=False, device=device, dtype=torch.bfloat16), group)
    rows = []
    for num_bytes in SIZES:
        x = torch.randn(num_bytes // 2, device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"bytes": num_bytes}
        if group.window(x.shape, x.dtype) is not None:
            check(group, x)
            row["one_shot"] = microseconds(lambda x=x: group.all_reduce(x))
            tokens = torch.randn(num_bytes // 8192, 2048, device=device, dtype=torch.bfloat16)
            row["linear"] = microseconds(lambda tokens=tokens: layer(tokens))
            row["product"] = microseconds(lambda tokens=tokens: layer.base(tokens))
        row["nccl"] = microseconds(lambda x=x: dist.all_reduce(x))
        rows.append({key: round(value, 2) for key, value in row.items()})
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpus", type=int, default=2)
    gpus = parser.parse_args().gpus
    if torch.cuda.device_count() < gpus:
        raise SystemExit(f"needs {gpus} GPUs; this machine has {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run, (gpus, Path(folder)), nprocs=gpus)
        found = json.loads((Path(folder) / "rows.json").read_text())
    print(f"{'bytes':>9} {'one-shot':>9} {'NCCL':>9} {'linear':>9} {'product':>9}   microseconds")
    for row in found:
        print(
            f"{row['bytes']:>9}",
            *(f"{row.get(k, float('nan')):>9.2f}" for k in ("one_shot", "nccl", "linear", "product")),
        )
    report(bench="gpu_all_reduce", gpus=gpus, rows=found)


if __name__ == "__main__":
    main()
