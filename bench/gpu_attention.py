"""Checks the attention kernels on a GPU against float64 and times them and their variants, one JSON line at the end.

    PYTHONPATH=src python bench/gpu_attention.py [--only decode,prefill] [--workers 12] [--out FILE]

Times are of CUDA graphs over enough copies of the cache that it does not stay in L2. Shapes: A has 16 query heads, 8
key heads; B 32 and 8; both width 128, bfloat16. Worker processes compile every variant first, side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmasos.inference.batch import SharedPrefix
from llmasos.inference.kernels import decode, prefill, prefix
from llmasos.inference.kernels.tiles import Tiling
from llmasos.inference.kernels.write import write_kv
from llmasos.models.attention import AttentionSpec, alibi_slopes

SHAPES = {"A": (16, 8, 128), "B": (32, 8, 128)}
QUANTISED = (torch.float8_e4m3fn, torch.int8)
DEVICE = torch.device("cuda")
L2_BYTES = 200 << 20
DECODE_TILINGS = [
    Tiling(16, 64, 4, 2),
    Tiling(16, 64, 4, 3),
    Tiling(16, 64, 4, 4),
    Tiling(16, 64, 8, 3),
    Tiling(16, 64, 2, 3),
    Tiling(16, 32, 4, 4),
    Tiling(16, 32, 2, 4),
    Tiling(16, 128, 4, 2),
    Tiling(16, 128, 8, 2),
    Tiling(16, 128, 8, 3),
    Tiling(16, 64, 4, 2, bulk=True),
    Tiling(16, 64, 4, 3, bulk=True),
]
PREFILL_TILINGS = [
    Tiling(64, 64, 4, 2),
    Tiling(64, 64, 4, 3),
    Tiling(64, 128, 4, 2),
    Tiling(128, 64, 8, 2),
    Tiling(128, 64, 8, 3),
    Tiling(128, 64, 8, 4),
    Tiling(128, 128, 8, 2),
    Tiling(128, 128, 8, 3),
    Tiling(64, 64, 4, 2, bulk=True),
    Tiling(64, 64, 4, 3, bulk=True),
    Tiling(128, 64, 8, 2, bulk=True),
    Tiling(128, 64, 8, 3, bulk=True),
]
PREFIX_TILINGS = [
    Tiling(64, 64, 4, 3),
    Tiling(128, 64, 8, 3),
    Tiling(128, 128, 8, 2),
    Tiling(64, 128, 4, 2),
]


@dataclass
class Cache:
    """Scattered pages of B sequences in one or more layers."""

    keys: list[Tensor]
    values: list[Tensor]
    scales: list[tuple[Tensor, Tensor] | tuple[None, None]]
    table: Tensor
    seq_lens: Tensor
    page_size: int

    def layer(self, i: int) -> dict[str, Any]:
        k_scales, v_scales = self.scales[i]
        return {
            "keys": self.keys[i], "values": self.values[i], "k_scales": k_scales, "v_scales": v_scales,
            "table": self.table, "seq_lens": self.seq_lens, "page_size": self.page_size,
        }  # fmt: skip


def make_cache(
    lengths: list[int], kv_heads: int, width: int, page_size: int, *, layers: int = 1, shared: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Cache:  # fmt: skip
    columns = math.ceil(max(lengths) / page_size)
    common = shared // page_size
    own = [math.ceil(n / page_size) - common for n in lengths]
    order = (torch.randperm(common + sum(own)) + 1).tolist()
    pages, order = order[:common], order[common:]
    table = torch.zeros(len(lengths), columns, dtype=torch.int32)
    for b, count in enumerate(own):
        table[b, : common + count] = torch.tensor(pages + [order.pop() for _ in range(count)])
    num_slots = (1 + common + sum(own)) * page_size
    keys, values, scales = [], [], []
    for _ in range(layers):
        for tensors in (keys, values):
            x = torch.randn(num_slots, kv_heads, width, device=DEVICE, dtype=torch.bfloat16)
            if dtype in QUANTISED:
                x = (x * 30).to(dtype)
            tensors.append(x.to(dtype))
        if dtype in QUANTISED:
            scales.append(tuple(torch.rand(num_slots, kv_heads, device=DEVICE) / 30 for _ in range(2)))
        else:
            scales.append((None, None))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Cache(keys, values, scales, table.to(DEVICE), seq_lens, page_size)


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)


def reference(q: Tensor, cache: Cache, counts: list[int], spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """softmax(scores) v in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    size, first = cache.page_size, 0
    for b, (n, count) in enumerate(zip(cache.seq_lens.tolist(), counts, strict=True)):
        queries, target = q[first : first + count].double(), out[first : first + count]
        first += count
        if not n:
            continue
        at = torch.arange(n, device=DEVICE)
        slots = cache.table[b].long()[at // size] * size + at % size
        kv = []
        for storage, scale in zip((cache.keys[0], cache.values[0]), cache.scales[0], strict=True):
            x = storage[slots].float() * (1 if scale is None else scale[slots][..., None])
            kv.append(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1))
        scores = torch.einsum("qhd,nhd->hqn", queries, kv[0]) * spec.scale
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        distance = torch.arange(n - count, n, device=DEVICE)[:, None] - at
        if spec.slopes:
            scores -= torch.tensor(spec.slopes, dtype=torch.float64, device=DEVICE)[:, None, None] * distance
        hidden = distance < 0
        if spec.window:
            hidden |= distance >= spec.window
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
        target.copy_(torch.einsum("hqn,nhd->qhd", scores.softmax(-1)[..., :n], kv[1]))
    return out


def microseconds(calls: list[Callable[[], Any]], *, rounds: int = 15) -> float:
    """Median time of one of `calls`, which are captured in a graph one behind another."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


@dataclass
class Job:
    """One line of the result: `setup` makes what is called; `work` is its bytes or operations, by `unit`."""

    section: str
    name: str
    setup: Callable[[], list[Callable[[], Any]]]
    work: float = 0.0
    unit: str = ""
    check: Callable[[], float] | None = None
    tolerance: float = 0.0


def prepare_decode(
    shape: str, batch: int, length: int, page_size: int = 64, *, queries: int = 1, dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False, spec_options: dict[str, Any] | None = None, **options: Any,
) -> list[Callable[[], Any]]:  # fmt: skip
    heads, kv_heads, width = SHAPES[shape]
    size = batch * length * kv_heads * width * 2 * (1 if dtype in QUANTISED else 2)
    layers = min(64, max(1, L2_BYTES // size))
    draw = random.Random(0)
    lengths = [max(queries, draw.randrange(1, 2 * length)) for _ in range(batch)] if ragged else [length] * batch
    cache = make_cache(lengths, kv_heads, width, page_size, layers=layers, dtype=dtype)
    q = torch.randn(batch * queries, heads, width, device=DEVICE, dtype=torch.bfloat16)
    splits = options.get("splits") or decode.num_pieces(batch, kv_heads, DEVICE)
    workspace = decode.new_workspace(batch + splits, heads, kv_heads, width, DEVICE, max_query=queries)
    if queries > 1:
        options |= {"query_start": offsets([queries] * batch), "max_query": queries}
    spec = AttentionSpec(scale=width**-0.5, **spec_options or {})

    def call(i: int) -> Callable[[], Any]:
        return lambda: decode.paged_decode(q, workspace=workspace, spec=spec, **cache.layer(i), **options)

    return [call(i) for i in range(layers)]


def decode_jobs() -> list[Job]:
    jobs = []

    def add(section: str, shape: str, batch: int, length: int, page: int = 64, **options: Any) -> None:
        _, kv_heads, width = SHAPES[shape]
        size = batch * length * kv_heads * width * 2 * (1 if options.get("dtype") in QUANTISED else 2)
        if spec := options.get("spec_options"):
            size = size * min(length, spec["window"]) // length
        words = [f"{k}={tuple(vars(v).values()) if isinstance(v, Tiling) else v}" for k, v in options.items()]
        name = " ".join([f"{shape} {batch}x{length} page {page}", *words])
        jobs.append(Job(section, name, lambda: prepare_decode(shape, batch, length, page, **options), size, "TB/s"))

    for shape, batch, length in itertools.product(SHAPES, (1, 8, 64, 256), (300, 800, 2112)):
        add("decode", shape, batch, length)
    for shape, page in itertools.product(SHAPES, (16, 32)):
        for batch, length in ((1, 300), (8, 2112), (256, 800)):
            add("decode", shape, batch, length, page)
    add("decode", "A", 256, 800, ragged=True)
    add("decode", "B", 64, 2112, ragged=True)
    add("decode", "A", 256, 800, dtype=torch.float8_e4m3fn)
    add("decode", "A", 256, 800, dtype=torch.int8)
    add("decode", "A", 256, 2112, spec_options={"window": 512})
    for queries, batch in itertools.product((3, 5, 9), (1, 8, 64)):
        add("decode", "A", batch, 2112, queries=queries)
    points = [("A", 1, 300), ("A", 1, 2112), ("A", 8, 800), ("A", 64, 800), ("A", 256, 800), ("B", 256, 800)]
    for point, tiling in itertools.product(points, DECODE_TILINGS):
        add("tilings", *point, tiling=tiling)
    for tiling in DECODE_TILINGS[:5]:
        add("tilings", "A", 256, 800, 16, tiling=tiling)
    for factor in (1, 2, 4, 8):
        add("splits", "A", 256, 800, splits=256 * factor)
        add("splits", "A", 256, 800, splits=256 * factor, ragged=True)
    for batch, length, splits in itertools.product((1, 8), (300, 2112), (8, 16, 33, 66)):
        for shortest in (64, 128, 256, 512):
            add("splits", "A", batch, length, splits=splits * batch, shortest=shortest)
    return jobs


def prepare_prefill(
    shape: str, batch: int, length: int, page_size: int = 64, *, start: int = 0, **options: Any
) -> list[Callable[[], Any]]:
    heads, kv_heads, width = SHAPES[shape]
    cache = make_cache([start + length] * batch, kv_heads, width, page_size)
    q = torch.randn(batch * length, heads, width, device=DEVICE, dtype=torch.bfloat16)
    query_start, spec = offsets([length] * batch), AttentionSpec(scale=width**-0.5)
    out = torch.empty_like(q)
    return [
        lambda: prefill.paged_prefill(
            q, query_start=query_start, max_query=length, spec=spec, out=out, **cache.layer(0), **options
        )
    ]


def prepare_sdpa(shape: str, batch: int, length: int, backend: SDPBackend) -> list[Callable[[], Any]]:
    heads, kv_heads, width = SHAPES[shape]

    def make(count: int) -> Tensor:
        x = torch.randn(batch, length, count, width, device=DEVICE, dtype=torch.bfloat16)
        return x.transpose(1, 2)

    q, k, v = make(heads), make(kv_heads), make(kv_heads)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != heads)

    try:
        call()
    except RuntimeError:
        # a backend that does not share key heads gets copies of them
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    return [call]


def prefill_jobs() -> list[Job]:
    jobs = []

    def add(name: str, shape: str, batch: int, length: int, setup: Callable[[], Any], start: int = 0) -> None:
        heads, _, width = SHAPES[shape]
        work = 4 * heads * width * batch * (length * (length + 1) / 2 + start * length)
        jobs.append(Job("prefill", f"{shape} {batch}x{length}+{start} {name}", setup, work, "TFLOP/s"))

    cases = [("B", 1, 8192), ("B", 16, 2048), ("A", 16, 2048)]
    for case in cases:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            add(backend.name, *case, lambda case=case, backend=backend: prepare_sdpa(*case, backend))
        add("invariant", *case, lambda case=case: prepare_prefill(*case, batch_invariant=True))
        for page in (16, 64):
            add(f"page {page}", *case, lambda case=case, page=page: prepare_prefill(*case, page))
    for case, tiling in itertools.product(cases[:2], PREFILL_TILINGS):
        name = f"tiling={tuple(vars(tiling).values())}"
        add(name, *case, lambda case=case, tiling=tiling: prepare_prefill(*case, tiling=tiling))
    for length, start in ((16, 2000), (64, 2000), (512, 4096)):
        add("", "B", 8, length, lambda n=length, start=start: prepare_prefill("B", 8, n, start=start), start)
    return jobs


def prepare_cascade(shape: str, batch: int, shared: int, rest: int, cascade: bool, **options: Any) -> list[Any]:
    heads, kv_heads, width = SHAPES[shape]
    cache = make_cache([shared + rest] * batch, kv_heads, width, 64, layers=2, shared=shared)
    q = torch.randn(batch, heads, width, device=DEVICE, dtype=torch.bfloat16)
    workspace = decode.new_workspace(batch, heads, kv_heads, width, DEVICE)
    spec, shared_prefixes = AttentionSpec(scale=width**-0.5), None
    tiling = options.pop("tiling", prefix.TILING)
    if cascade:
        size = prefix.queries_of_a_tile(heads // kv_heads, tiling)
        num_tiles = math.ceil(batch / size) + options.pop("spare", 0)
        shared_prefixes = prefix.new_prefixes(num_tiles, batch, batch, heads, width, kv_heads, DEVICE, tiling=tiling)
        runs, starts = [SharedPrefix(0, batch, shared)], range(batch + 1)
        tiles, skip = prefix.prefix_tiles(runs, starts, group=heads // kv_heads, num_tiles=num_tiles, tiling=tiling)
        shared_prefixes.tiles.copy_(torch.from_numpy(tiles))
        shared_prefixes.skip.copy_(torch.from_numpy(skip))

    def call(i: int) -> Callable[[], Any]:
        return lambda: decode.paged_decode(
            q, workspace=workspace, spec=spec, prefixes=shared_prefixes, **cache.layer(i)
        )

    return [call(0), call(1)]


def cascade_jobs() -> list[Job]:
    jobs = []
    for shape in SHAPES:
        _, kv_heads, width = SHAPES[shape]
        size = (2048 + 256 * 96) * kv_heads * width * 4
        name = f"{shape} 256x(2048 shared + 96)"
        jobs.append(
            Job("cascade", f"{name} plain", lambda s=shape: prepare_cascade(s, 256, 2048, 96, False), size, "TB/s")
        )
        for tiling in PREFIX_TILINGS:
            words = f"{name} tiling={tuple(vars(tiling).values())}"
            setup = partial(prepare_cascade, shape, 256, 2048, 96, True, tiling=tiling)
            jobs.append(Job("cascade", words, setup, size, "TB/s"))
        setup = partial(prepare_cascade, shape, 256, 2048, 96, True, spare=12)
        jobs.append(Job("cascade", f"{name} 12 spare tiles", setup, size, "TB/s"))
    return jobs


def write_jobs() -> list[Job]:
    jobs = []
    for dtype, tokens in itertools.product((torch.bfloat16, torch.float8_e4m3fn), (1, 256, 8192)):

        def setup(dtype: torch.dtype = dtype, tokens: int = tokens) -> list[Callable[[], Any]]:
            cache = make_cache([tokens], 8, 128, 64, dtype=dtype)
            k, v = (torch.randn(tokens, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            positions = torch.arange(tokens, device=DEVICE)
            sequences = torch.zeros(tokens, device=DEVICE, dtype=torch.int32)
            layer = cache.layer(0)
            return [lambda: write_kv(k, v, positions=positions, sequences=sequences, **layer)] * 8

        size = tokens * 8 * 128 * 2 * (4 if dtype == torch.bfloat16 else 3)
        jobs.append(Job("write", f"{tokens} tokens {dtype}", setup, size, "TB/s"))
    return jobs


def check_jobs() -> list[Job]:
    """Random shapes; relative error of the whole result in the Frobenius norm."""
    draw, jobs = random.Random(7), []
    for number in range(28):
        kv_heads = draw.choice([1, 2, 4, 8])
        heads = kv_heads * draw.choice([1, 2, 3, 4, 7, 8])
        width = draw.choice([64, 80, 96, 128, 128, 128, 256])
        page_size = draw.choice([16, 32, 64])
        storage = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, *QUANTISED])
        kind = ("decode", "prefill", "few", "prefix", "invariant", "decode", "prefill")[number % 7]
        options: dict[str, Any] = {}
        if draw.random() < 0.4 and kind != "prefix":
            options["window"] = draw.choice([17, 100, 700])
        if draw.random() < 0.3:
            options["softcap"] = 5.0
        if draw.random() < 0.25 and kind != "prefix":
            options["slopes"] = alibi_slopes(heads)
        sinks = draw.random() < 0.3
        case = (kind, heads, kv_heads, width, page_size, storage, AttentionSpec(scale=width**-0.5, **options), sinks)
        shown = {k: v if k != "slopes" else True for k, v in options.items()}
        name = f"{kind} H{heads} K{kv_heads} D{width} page {page_size} {storage} {shown} sinks={sinks}"
        tolerance = 1e-5 if storage == torch.float32 else 6e-3
        seed = number
        jobs.append(Job("check", name, list, check=lambda c=case, s=seed: error_of(*c, seed=s), tolerance=tolerance))
    return jobs


def error_of(
    kind: str, heads: int, kv_heads: int, width: int, page_size: int, storage: torch.dtype, spec: AttentionSpec,
    with_sinks: bool, *, seed: int,
) -> float:  # fmt: skip
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shared = 256 if kind == "prefix" else 0
    lengths = [shared + draw.choice([1, 40, 300, 1000, 3000]) + draw.randrange(60) for _ in range(9)]
    most = {"decode": 1, "prefix": 1, "few": min(5, 128 * kv_heads // heads)}.get(kind, 700)
    counts = [min(n - shared, draw.randint(1, most)) for n in lengths]
    if not shared:
        lengths[4] = 0
    dtype = storage if storage.is_floating_point and storage.itemsize > 1 else torch.bfloat16
    cache = make_cache([n or 1 for n in lengths], kv_heads, width, page_size, shared=shared, dtype=storage)
    cache.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = torch.randn(sum(counts), heads, width, device=DEVICE, dtype=dtype)
    sinks = torch.randn(heads, device=DEVICE) if with_sinks else None
    slopes = torch.tensor(spec.slopes, device=DEVICE) if spec.slopes else None
    common = cache.layer(0) | {"spec": spec, "sinks": sinks, "slopes": slopes, "out": torch.zeros_like(q)}
    starts = offsets(counts)
    if kind in ("decode", "few", "prefix"):
        workspace = decode.new_workspace(9, heads, kv_heads, width, DEVICE, max_query=most)
        if kind == "few":
            common |= {"query_start": starts, "max_query": most}
        if kind == "prefix":
            made = prefix.new_prefixes(3, 9, 9, heads, width, kv_heads, DEVICE)
            runs = [SharedPrefix(0, 4, 192), SharedPrefix(5, 9, 256)]
            tiles, skip = prefix.prefix_tiles(runs, starts.tolist(), group=heads // kv_heads, num_tiles=3)
            made.tiles.copy_(torch.from_numpy(tiles))
            made.skip.copy_(torch.from_numpy(skip))
            common["prefixes"] = made
        outs = [decode.paged_decode(q, workspace=workspace, **common).clone() for _ in range(3)]
        assert all(torch.equal(out, outs[0]) for out in outs), "three runs, different bits"
        out = outs[0]
    else:
        invariant = kind == "invariant"
        out = prefill.paged_prefill(q, query_start=starts, max_query=max(counts), batch_invariant=invariant, **common)
        if invariant:
            assert_invariant(q, out, counts, lengths, common)
    expected = reference(q, cache, counts, spec, sinks)
    return float((out.double() - expected).norm() / expected.norm())


def assert_invariant(q: Tensor, out: Tensor, counts: list[int], lengths: list[int], common: dict[str, Any]) -> None:
    """The last 3 queries of sequence 0 alone have the bits that they have in the batch."""
    few, end = min(3, counts[0]), counts[0]
    alone = common | {"table": common["table"][:1], "seq_lens": common["seq_lens"][:1]}
    alone["out"] = torch.zeros_like(q[:few])
    mine = q[end - few : end].contiguous()
    got = prefill.paged_prefill(mine, query_start=offsets([few]), max_query=few, batch_invariant=True, **alone)
    assert torch.equal(got, out[end - few : end]), "bits depend on the batch"


SECTIONS = {
    "check": check_jobs,
    "decode": decode_jobs,
    "prefill": prefill_jobs,
    "cascade": cascade_jobs,
    "write": write_jobs,
}


def warm(jobs: list[Job], share: int, of: int) -> None:
    """Compile what every `of`-th job needs; failures show when it is run."""
    # what is cut otherwise is the same kernel
    for job in [job for job in jobs if job.section != "splits"][share::of]:
        torch.cuda.empty_cache()
        try:
            if job.check is not None:
                job.check()
            for call in job.setup()[:1]:
                call()
            torch.cuda.synchronize()
        except Exception:
            continue


def run(job: Job) -> dict[str, Any]:
    line: dict[str, Any] = {"section": job.section, "name": job.name}
    if job.check is not None:
        line["error"] = job.check()
        line["ok"] = line["error"] < job.tolerance
        return line
    line["us"] = round(microseconds(job.setup()), 2)
    line[job.unit] = round(job.work / line["us"] / 1e6, 3 if job.unit == "TB/s" else 1)
    return line


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What failed, the time and rate of each plain line, and of each group of variants the two best."""
    failed = [line["name"] for line in lines if "failed" in line or line.get("ok") is False]
    groups: dict[str, dict[str, list[Any]]] = {}
    for line in lines:
        if "us" in line:
            name, _, variant = (
                line["name"].partition(" tiling=") if "tiling=" in line["name"] else (line["name"], "", "")
            )
            if line["section"] == "splits":
                name, _, variant = name.partition(" splits=")
            groups.setdefault(f"{line['section']}: {name}", {})[variant] = list(line.values())[2:]
    best = {name: dict(sorted(found.items(), key=lambda item: item[1][0])[:2]) for name, found in groups.items()}
    errors = [line["error"] for line in lines if "error" in line]
    shown = {name: found.get("") if len(found) == 1 and "" in found else found for name, found in best.items()}
    return {"failed": failed, "checks": len(errors), "largest error": max(errors, default=None), "results": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated: " + ", ".join(SECTIONS))
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=90.0, help="stop timing after this long")
    parser.add_argument("--out", type=Path, help="file for all lines, JSON")
    parser.add_argument("--warm", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jobs = [job for section in args.only.split(",") for job in SECTIONS[section]()]
    jobs.sort(key=lambda job: job.section == "splits")
    if args.warm >= 0:
        warm(jobs, args.warm, args.workers)
        return
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--only", args.only, "--workers", str(args.workers), "--warm"]
    for process in [subprocess.Popen([*command, str(i)]) for i in range(args.workers)]:
        process.wait()
    print(f"compiled in {time.perf_counter() - begin:.1f} s", flush=True)
    lines = []
    for job in jobs:
        if time.perf_counter() - begin > args.seconds:
            print(f"out of time: {len(jobs) - len(lines)} of {len(jobs)} not run")
            break
        try:
            line = run(job)
        except Exception as error:
            line = {"section": job.section, "name": job.name, "failed": f"{type(error).__name__}: {error}"[:300]}
        lines.append(line)
        print(" | ".join(f"{v:.2e}" if k == "error" else str(v) for k, v in line.items()), flush=True)
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(machine | {"seconds": round(time.perf_counter() - begin, 1)} | summary(lines)))


if __name__ == "__main__":
    main()
