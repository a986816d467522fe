"""The fused step on one GPU: skinny products against cuBLAS, whole decode steps, a layer of prefill by kernel.

    python bench/gpu_linear.py                 # about two minutes; a table, and one JSON line at the end
    python bench/gpu_linear.py --only step     # products, step or prefill
    TRITON_INTERPRET=1 python bench/gpu_linear.py --tiny      # the same code on small shapes on a CPU

Shapes: A = Qwen3-0.6B, B = Llama-3.1-8B, bfloat16, random. Products run in CUDA graphs over more copies of the weights
than L2 holds. What a variant gives is compared with cuBLAS before it is timed; those that fail are named and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmasos.inference.batch import Batch
from llmasos.inference.fused import FusedDecoder
from llmasos.inference.kernels import linear
from llmasos.inference.kernels.fused import KVTarget, add_rms_norm, gated_activation, rope_write
from llmasos.inference.kernels.linear import Tiling, skinny_linear
from llmasos.inference.pages import Pages
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.layers import Norm

TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu" if TINY else "cuda")
DTYPE = torch.float32 if TINY else torch.bfloat16
QWEN = ModelConfig(
    "", "", 151936, 1024, 3072, 28, 16, 8, 128, 40960,
    rope_theta=1e6, norm_eps=1e-6, qk_norm="head", tie_embeddings=True,
)  # fmt: skip
LLAMA = ModelConfig("", "", 128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=5e5)
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "head_dim": 16}
SMALL |= {"num_heads": 2, "num_kv_heads": 1, "context_length": 2048}
MODELS = {"A": QWEN, "B": LLAMA}
if TINY:
    MODELS = {name: replace(config, **SMALL) for name, config in MODELS.items()}
PAGE = 16 if TINY else 64
CONTEXT = 20 if TINY else 640
"""Tokens of each sequence in a decode step: batch 1 of the serving benchmark at its end."""
PREFILL = 24 if TINY else 8192
COUNTS = (1, 2) if TINY else (1, 2, 4, 8, 16)
COPIES_BYTES = 1 << 16 if TINY else 400 << 20
PDL = not TINY


@dataclass(frozen=True)
class Matrix:
    name: str
    rows: int
    width: int
    normed: bool = False
    gated: bool = False
    added: bool = False


def matrices(model: str) -> list[Matrix]:
    c = MODELS[model]
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [
        Matrix(f"{model}.qkv", heads + 2 * kv, c.hidden_size, normed=True),
        Matrix(f"{model}.out", c.hidden_size, heads, added=True),
        Matrix(f"{model}.gate-up", 2 * c.intermediate_size, c.hidden_size, normed=True, gated=True),
        Matrix(f"{model}.down", c.hidden_size, c.intermediate_size, added=True),
        Matrix(f"{model}.head", c.vocab_size, c.hidden_size),
    ]


def variants(matrix: Matrix, num_tokens: int) -> Iterator[Tiling]:
    """Tilings worth a try. Rows are those of the weights: of both halves where gate and up are computed together."""
    if TINY:
        yield from (Tiling(8, 64), Tiling(16, 32, stages=2, dot=True))
        return
    half = 2 if matrix.gated else 1
    if num_tokens == 1:
        for rows, (block, warps) in itertools.product((4, 8, 16), ((1024, 4), (512, 2))):
            yield Tiling(rows // half, block, warps)
        for rows, block, warps, stages in ((8, 2048, 8, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (8, 512, 2, 4)):
            yield Tiling(rows // half, block, warps, stages, prefetch=True)
    elif num_tokens <= 8:
        for rows, (block, warps) in itertools.product((4, 8), ((1024, 4), (512, 2))):
            if rows * num_tokens <= 32:
                yield Tiling(rows // half, block, warps, prefetch=rows == 4 and warps == 4)
    if num_tokens >= 4:
        for rows, block, stages in ((16, 256, 4), (16, 512, 3), (32, 128, 5), (32, 256, 4), (64, 128, 4)):
            yield Tiling(rows // half, block, 4, stages, dot=True, prefetch=stages != 3)
        yield Tiling(16 // half, 256, 2, 4, dot=True, prefetch=True)


def norm(width: int) -> Norm:
    return Norm(QWEN, width).to(DEVICE, DTYPE).requires_grad_(False)


def operands(matrix: Matrix, num_tokens: int) -> tuple[Tensor, Norm | None, Tensor | None]:
    x = torch.randn(num_tokens, matrix.width, device=DEVICE, dtype=DTYPE)
    residual = torch.randn(num_tokens, matrix.rows, device=DEVICE, dtype=DTYPE) if matrix.added else None
    return x, norm(matrix.width) if matrix.normed else None, residual


def product(matrix: Matrix, given: tuple[Tensor, Norm | None, Tensor | None], weight: Tensor, **options: Any) -> Tensor:
    x, by, residual = given
    activation = "silu" if matrix.gated else None
    return skinny_linear(x, weight, norm=by, activation=activation, residual=residual, **options)


def expected(matrix: Matrix, given: tuple[Tensor, Norm | None, Tensor | None], weight: Tensor) -> Tensor:
    x, by, residual = given
    out = F.linear(x if by is None else by(x), weight)
    if matrix.gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out if residual is None else residual + out


def compile_one(case: tuple[Matrix, int, Tiling]) -> str:
    """Leave the variant in Triton's cache; run in processes of their own, since a compilation takes a second."""
    matrix, num_tokens, tiling = case
    try:
        weight = torch.zeros(matrix.rows, matrix.width, device=DEVICE, dtype=DTYPE)
        product(matrix, operands(matrix, num_tokens), weight, tiling=tiling, pdl=PDL)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return ""


def seconds(run: Callable[[int], object], calls: int) -> float:
    """Median seconds of a call, run(0) .. run(calls - 1) being one CUDA graph."""
    if TINY:
        started = time.perf_counter()
        run(0)
        return time.perf_counter() - started
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    return replays(graph.replay, 5) / calls


def replays(run: Callable[[], object], times: int) -> float:
    """Median seconds of run() on the device, after one to warm up."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    run()
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def label(t: Tiling) -> str:
    return f"{'dot' if t.dot else 'fma'} {t.rows}x{t.block} w{t.warps} s{t.stages}{' pf' if t.prefetch else ''}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def bench_products(models: list[str]) -> dict[str, Any]:
    cases = [(m, n, t) for name in models for m in matrices(name) for n in COUNTS for t in variants(m, n)]
    started, failures = time.time(), {}
    if not TINY:
        workers = min(16, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for case, why in zip(cases, pool.map(compile_one, cases, chunksize=4), strict=True):
                if why:
                    failures[case] = why
                    print(f"fails: {case[0].name} M={case[1]} {label(case[2])}: {why}", flush=True)
        print(f"{len(cases)} variants compiled in {time.time() - started:.0f} s", flush=True)
    best: dict[str, Any] = {}
    print(f"{'matrix':10} {'M':>2} {'cuBLAS us':>9} {'TB/s':>5} {'ours us':>8} {'TB/s':>5}  tiling; others in us")
    for matrix in (m for name in models for m in matrices(name)):
        num_bytes = matrix.rows * matrix.width * DTYPE.itemsize
        copies = max(2, min(96, COPIES_BYTES // num_bytes))
        weights = torch.randn(copies, matrix.rows, matrix.width, device=DEVICE, dtype=DTYPE).mul_(0.03)
        for count in COUNTS:
            tried = [c[2] for c in cases if c[:2] == (matrix, count) and c not in failures]
            best[f"{matrix.name}/{count}"] = time_variants(matrix, count, weights, tried, num_bytes)
    return best


def time_variants(
    matrix: Matrix, count: int, weights: Tensor, tilings: list[Tiling], num_bytes: int
) -> dict[str, Any] | None:
    copies = weights.shape[0]
    given = operands(matrix, count)
    cublas = seconds(lambda i: F.linear(given[0], weights[i]), copies)
    reference = expected(matrix, given, weights[1]).double()
    x, by, residual = given
    clean = None if residual is None else residual.clone()
    results = []

    def run_once(tiling: Tiling, i: int) -> Tensor:
        return product(matrix, given, weights[i], tiling=tiling, pdl=PDL)

    for tiling in tilings:
        try:
            fresh = (x, by, None if clean is None else clean.clone())
            out = product(matrix, fresh, weights[1], tiling=tiling, pdl=PDL).double()
            error = ((out - reference).norm() / reference.norm()).item()
            if not error < 0.02:
                print(f"wrong: {matrix.name} M={count} {label(tiling)}: relative error {error:.3g}", flush=True)
                continue
            results.append((seconds(partial(run_once, tiling), copies), tiling))
        except Exception as error:
            print(f"fails: {matrix.name} M={count} {label(tiling)}: {first_line(error)}", flush=True)
    if not results:
        return None
    results.sort(key=lambda pair: pair[0])
    ours, tiling = results[0]
    rest = ", ".join(f"{label(t)} {s * 1e6:.1f}" for s, t in results[1:6])
    speeds = [num_bytes / s / 1e12 for s in (cublas, ours)]
    print(
        f"{matrix.name:10} {count:2} {cublas * 1e6:9.2f} {speeds[0]:5.2f} {ours * 1e6:8.2f} {speeds[1]:5.2f}"
        f"  {label(tiling)}; {rest}",
        flush=True,
    )
    return {"cublas_us": round(cublas * 1e6, 2), "us": round(ours * 1e6, 2), "tiling": asdict(tiling)}


def tuned(best: dict[str, Any]) -> Callable[..., Tiling]:
    """tiling_for, with what was measured above where it was."""
    default, found = linear.tiling_for, {}
    for matrix in (m for name in MODELS for m in matrices(name)):
        for count in COUNTS:
            if row := best.get(f"{matrix.name}/{count}"):
                found[count, matrix.rows, matrix.width, matrix.gated] = Tiling(**row["tiling"])

    def choose(num_tokens: int, num_rows: int, width: int, *, gated: bool) -> Tiling:
        key = num_tokens, num_rows, width, gated
        return found[key] if key in found else default(num_tokens, num_rows, width, gated=gated)

    return choose


def random_decoder(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(DTYPE).to_empty(device=DEVICE).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)
    if config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    for rope in decoder.ropes.values():
        rope.prepare(max(PREFILL, CONTEXT) + 1, DEVICE, DTYPE)
    return decoder


def make_batch(num_sequences: int, new: int, length: int) -> Batch:
    """Sequences of `length` tokens, the last `new` of which are computed."""
    columns = -(-length // PAGE)
    total = num_sequences * new
    whole = {"device": DEVICE, "dtype": torch.int32}
    return Batch(
        tokens=torch.randint(0, 90, (total,), device=DEVICE),
        positions=torch.arange(length - new, length, device=DEVICE).repeat(num_sequences),
        sequences=torch.arange(num_sequences, **whole).repeat_interleave(new),
        query_start=torch.arange(num_sequences + 1, **whole) * new,
        seq_lens=torch.full((num_sequences,), length, **whole),
        tables=[1 + torch.arange(num_sequences * columns, **whole).view(num_sequences, columns)],
        page_size=PAGE,
        max_query=new,
        max_seq_len=length,
    )


def make_pages(config: ModelConfig, num_tokens: int) -> Pages:
    pages = Pages(config, [num_tokens // PAGE + 64], PAGE, device=DEVICE, dtype=DTYPE)
    for memory in (*pages.keys, *pages.values):
        memory.normal_()
    return pages


class NoAttention:
    """Pages whose attention takes no time."""

    def __init__(self, pages: Pages) -> None:
        self.keys, self.values, self.layer_group = pages.keys, pages.values, pages.layer_group
        self.key_scales, self.value_scales = pages.key_scales, pages.value_scales

    def plan(self, batch: Batch) -> None: ...

    def read(self, layer: int, q: Tensor) -> Tensor:
        return q


def step_time(decoder: Decoder, pages: Any, count: int, *, pdl: bool) -> float:
    """Milliseconds of a decode step of `count` sequences, logits included, as a CUDA graph."""
    fused, batch = FusedDecoder(decoder, pages, pdl=pdl), make_batch(count, 1, CONTEXT)

    def step(_: int) -> Tensor:
        pages.plan(batch)
        return fused.logits(fused.forward(batch))

    return seconds(step, 1) * 1000


def bench_steps(models: list[str], best: dict[str, Any]) -> dict[str, Any]:
    ways: dict[str, tuple[bool, bool, int, bool]] = {  # tuned, pdl, most tokens of a skinny product, attention
        "tuned": (True, PDL, 16, True),
        "tuned, no pdl": (True, False, 16, True),
        "default": (False, PDL, 16, True),
        "cuBLAS": (False, PDL, 0, True),
        "tuned, no attention": (True, PDL, 16, False),
    }
    out: dict[str, Any] = {}
    choose, default = tuned(best), linear.tiling_for
    for name in models:
        decoder = random_decoder(MODELS[name])
        pages = make_pages(MODELS[name], 64 * CONTEXT)
        for count in (1, 2) if TINY else (1, 2, 4, 8, 16, 64):
            row = {}
            for way, (is_tuned, pdl, most, attention) in ways.items():
                if count > 16 and way not in ("cuBLAS", "tuned, no attention"):
                    continue
                linear.tiling_for, linear.MAX_TOKENS = choose if is_tuned else default, most
                try:
                    row[way] = round(step_time(decoder, pages if attention else NoAttention(pages), count, pdl=pdl), 4)
                except Exception as error:
                    print(f"fails: step {name} M={count} {way}: {first_line(error)}", flush=True)
            linear.tiling_for, linear.MAX_TOKENS = default, 16
            out[f"{name}/{count}"] = row
            shown = ", ".join(f"{way} {ms:.3f}" for way, ms in row.items())
            real = [ms for way, ms in row.items() if "no attention" not in way]
            rate = f"{count / min(real) * 1000:.0f} tok/s" if real else "-"
            print(f"step {name} M={count:2}  ms: {shown}  (best {rate})", flush=True)
        del decoder, pages
    return out


def bench_prefill(name: str = "B") -> dict[str, Any]:
    """Milliseconds of each part of one layer, PREFILL new tokens of one sequence."""
    config = replace(MODELS[name], num_layers=1)
    decoder, pages = random_decoder(config), make_pages(config, PREFILL)
    block, batch = decoder.layers[0], make_batch(1, PREFILL, PREFILL)
    attn, mlp = block.attn, block.mlp
    x = torch.randn(PREFILL, config.hidden_size, device=DEVICE, dtype=DTYPE)
    pages.plan(batch)
    qkv, wide = attn.qkv(x), mlp.up(x)
    narrow = gated_activation(wide, "silu")
    target = KVTarget(pages.keys[0], pages.values[0], None, None, batch.tables[0], PAGE)
    tables = decoder.ropes[False].whole(DEVICE, DTYPE)
    where = batch.positions, batch.sequences, batch.seq_lens
    q = rope_write(qkv, target, tables, *where, num_heads=attn.num_heads)
    seen = q.view(PREFILL, -1)
    residual = x.clone()
    parts: dict[str, Callable[[], object]] = {
        "norm 1": lambda: add_rms_norm(x, residual, block.attn_norm),
        "qkv": lambda: attn.qkv(x),
        "rope, write": lambda: rope_write(qkv, target, tables, *where, num_heads=attn.num_heads),
        "attention": lambda: pages.read(0, q),
        "out": lambda: attn.out(seen),
        "norm 2": lambda: add_rms_norm(x, residual, block.mlp_norm),
        "gate-up": lambda: mlp.up(x),
        "silu·up": lambda: gated_activation(wide, "silu"),
        "down": lambda: mlp.down(narrow),
    }
    out = {}
    for part, run in parts.items():
        try:
            out[part] = round(seconds(lambda _, run=run: run(), 4) * 1000, 4)
        except Exception as error:
            print(f"fails: prefill {part}: {first_line(error)}", flush=True)
    total = sum(out.values())
    layers = MODELS[name].num_layers
    print(f"prefill {name} T={PREFILL}  ms: {', '.join(f'{k} {v:.3f}' for k, v in out.items())}")
    print(
        f"  a layer {total:.3f}; {layers} layers {total * layers:.1f} ms, {PREFILL / total / layers * 1000:.0f} tok/s"
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--only", choices=("products", "step", "prefill"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    report: dict[str, Any] = {"bench": "gpu_linear"}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "products": lambda: bench_products(given.models),
        "step": lambda: bench_steps(given.models, report.get("products", {})),
        "prefill": bench_prefill,
    }
    started = time.time()
    for part, run in parts.items():
        if given.only in (None, part):
            try:
                report[part] = run()
            except Exception as error:
                print(f"fails: {part}: {first_line(error)}", flush=True)
            print(f"{part}: done after {time.time() - started:.0f} s", flush=True)
    print(json.dumps({**report, "gpu": None if TINY else torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
