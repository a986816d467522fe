"""Serving speed on one GPU against vLLM 0.24 on the same workloads (H200, random weights, bfloat16, engine in-process).

    python bench/gpu_serving.py                        # all, one JSON line each
    python bench/gpu_serving.py latency-A prefix       # some
    python bench/gpu_serving.py --tiny                 # the same code on small shapes, also on a CPU
    python bench/gpu_serving.py tp-B; python bench/gpu_serving.py tp-equal   # two GPUs against one

Models: A = Qwen3-0.6B's shape, B = Llama-3.1-8B's. vLLM's figures were measured once with these workloads, lengths
and seeds, at its defaults (torch 2.11, CUDA graphs, FlashAttention 3, asynchronous scheduling); it can't be installed
beside us on that machine, so they are constants here. Every figure is the median of `--repeat` runs after one to warm
up.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.time()
SHAPES: dict[str, dict[str, Any]] = {
    "A": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "small": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    },
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 12000,
}
MAX_MODEL_LEN = {"A": 4096, "B": 8448, "small": 1024}
VLLM = {
    "latency-A": 608, "latency-B": 203.5, "list-A": 22925, "throughput-B": 10142, "prefill-8192": 37984,
    "prefill-16x2048": 42109, "prefix": 15240, "sweep-1": 203, "sweep-8": 1469, "sweep-32": 5090, "sweep-64": 8524,
    "sweep-128": 12435, "sweep-256": 15109, "start-A": 51, "start-B": 79,
}  # fmt: skip
SWEEP = (1, 8, 32, 64, 128, 256)


@dataclass
class Workload:
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float = 0.0


class Bench:
    def __init__(self, *, tiny: bool, repeat: int, device: str, options: dict[str, Any]) -> None:
        self.tiny, self.repeat, self.device, self.options = tiny, repeat, device, options
        self.vocab = 10000 if tiny else 100000
        self._built: dict[str, Any] = {}
        self._workers: Any = None

    def engine(self, model: str, **changes: Any) -> Any:
        """With the options, and `changes` of them. One engine at a time: the other's memory is needed."""
        from llmasos.inference.config import EngineConfig

        options = {"max_model_len": MAX_MODEL_LEN[model], **self.options, **changes}
        key = f"{model} {sorted(options.items())}"
        if key not in self._built:
            self.close()
            with tempfile.TemporaryDirectory() as folder:
                config = {**SHAPES[model], **(TINY if self.tiny else {})}
                Path(folder, "config.json").write_text(json.dumps(config))
                dtype = "float32" if model == "small" else "bfloat16"
                self._built[key] = self._build(Path(folder), dtype, EngineConfig.of(**options))
        return self._built[key]

    def _build(self, folder: Path, dtype: str, config: Any) -> Any:
        from llmasos.devices import pick_device
        from llmasos.inference.build import build_engine
        from llmasos.inference.parallel import ParallelRanks, RankFactory, start_workers
        from llmasos.models.load import load_model

        if config.tensor_parallel_size == 1:
            return build_engine(load_model(folder, device=self.device, dtype=dtype, load_format="dummy"), config)
        factory = RankFactory(folder, config, dtype, load_format="dummy")
        self._workers, model = start_workers(factory, pick_device(self.device))
        return build_engine(model, config, ParallelRanks(self._workers))

    def close(self) -> None:
        """Give the engine's memory back and end its processes."""
        self._built.clear()
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        gc.collect()

    def run(self, model: str, work: Workload, **changes: Any) -> tuple[float, float]:
        """Seconds in all, and seconds from the first token of the last request to get one to the end."""
        engine = self.engine(model, **changes)
        started = time.perf_counter()
        texts, first = self.texts(engine, work)
        end = time.perf_counter()
        done = sum(map(len, texts))
        assert done == sum(work.max_tokens), f"{done} tokens instead of {sum(work.max_tokens)}"
        return end - started, end - first

    def texts(self, engine: Any, work: Workload) -> tuple[list[list[int]], float]:
        """New tokens of each request, and when the last one to begin began."""
        from llmasos.inference.request import SamplingParams
        from llmasos.inference.state import Request

        tokens: dict[Any, list[int]] = {}
        first = 0.0
        for prompt, count in zip(work.prompts, work.max_tokens, strict=True):
            params = SamplingParams(temperature=work.temperature, max_tokens=count, ignore_eos=True)
            request = Request(tuple(prompt), params, count)
            tokens[request] = []
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                tokens[output.request] += output.token_ids
                if output.error is not None:
                    raise output.error
                if output.last:
                    first = max(first, output.state.first_token)
        return list(tokens.values()), first

    def report(self, name: str, model: str, unit: str, measure: Callable[[int], float], **more: Any) -> None:
        """Warm up with repetition 0, then the median of the others."""
        measure(0)
        values = [measure(rep) for rep in range(1, self.repeat + 1)]
        value = statistics.median(values)
        row = {
            "workload": name,
            "model": model,
            "unit": unit,
            "ours": round(value, 1),
            "runs": [round(v, 1) for v in values],
        }
        if not self.tiny and name in VLLM:
            row |= {"vllm": VLLM[name], "ratio": round(value / VLLM[name], 3)}
        stats = next(iter(self._built.values())).stats
        print(json.dumps({**row, **more, "preemptions": stats.num_preemptions}), flush=True)

    # workloads: token ids depend on `rep`, so that no repetition is answered from the cache, the shared prefix excepted

    def tokens(self, name: str, rep: Any, num: int) -> list[int]:
        draw = random.Random(f"{name}/{rep}")
        return [draw.randrange(self.vocab) for _ in range(num)]

    def uniform(self, name: str, num: int, num_in: int, num_out: int, rep: int) -> Workload:
        if self.tiny:
            num, num_in, num_out = min(num, 8), min(num_in, 64), min(num_out, 8)
        return Workload([self.tokens(f"{name}{i}", rep, num_in) for i in range(num)], [num_out] * num)

    def latency(self, model: str) -> None:
        """One request, 128 in, 512 out, greedy: decode tokens per second."""

        def measure(rep: int) -> float:
            work = self.uniform("latency", 1, 128, 512, rep)
            return (work.max_tokens[0] - 1) / self.run(model, work)[1]

        self.report(f"latency-{model}", model, "decode tok/s", measure)

    def list_(self) -> None:
        """nano-vllm's benchmark: 256 requests, 100-1024 in, 100-1024 out, temperature 0.6."""
        num = 8 if self.tiny else 256

        def measure(rep: int) -> float:
            draw = random.Random(0)
            prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(num)]
            counts = [draw.randint(100, 1024) for _ in range(num)]
            if rep:
                prompts = [[(t + 37 * rep * (1 + i % 7)) % 10001 for t in p] for i, p in enumerate(prompts)]
            if self.tiny:
                prompts, counts = [p[:50] for p in prompts], [c % 10 + 1 for c in counts]
            return sum(counts) / self.run("A", Workload(prompts, counts, 0.6))[0]

        self.report("list-A", "A", "out tok/s", measure)

    def throughput(self) -> None:
        def measure(rep: int) -> float:
            work = self.uniform("throughput", 512, 512, 256, rep)
            return sum(work.max_tokens) / self.run("B", work)[0]

        self.report("throughput-B", "B", "out tok/s", measure)

    def prefill(self, num: int, num_in: int, name: str) -> None:
        def measure(rep: int) -> float:
            work = self.uniform(name, num, num_in, 1, rep)
            return sum(map(len, work.prompts)) / self.run("B", work)[0]

        self.report(name, "B", "in tok/s", measure)

    def prefix(self) -> None:
        """256 requests that share 2,048 tokens, 64 of their own, 64 out; the prefix is cached before."""
        num, shared, own, out = (8, 512, 8, 8) if self.tiny else (256, 2048, 64, 64)

        def measure(rep: int) -> float:
            head = self.tokens("prefix", 0, shared)
            prompts = [head + self.tokens(f"own{i}", rep, own) for i in range(num)]
            return num * out / self.run("A", Workload(prompts, [out] * num))[0]

        self.report("prefix", "A", "out tok/s", measure)

    def sweep(self) -> None:
        for num in SWEEP:

            def measure(rep: int, num: int = num) -> float:
                work = self.uniform(f"sweep{num}", num, 128, 128, rep)
                return sum(work.max_tokens) / self.run("B", work)[0]

            self.report(f"sweep-{num}", "B", "out tok/s", measure)

    def start(self, model: str) -> None:
        """Seconds from the start of this process to the first token."""
        self.run(model, self.uniform("start", 1, 128, 1, 0))
        seconds = time.time() - STARTED
        row = {"workload": f"start-{model}", "model": model, "unit": "s to the first token", "ours": round(seconds, 1)}
        print(json.dumps(row | ({} if self.tiny else {"vllm": VLLM[f"start-{model}"]})), flush=True)

    def parallel(self) -> None:
        """One request on two GPUs against one: decode tokens per second."""
        rates = {}
        for size in (1, 2):
            runs = []
            for rep in range(self.repeat + 1):
                work = self.uniform("latency", 1, 128, 512, rep)
                runs.append((work.max_tokens[0] - 1) / self.run("B", work, tensor_parallel_size=size)[1])
            rates[size] = [round(r, 1) for r in runs[1:]]
        one, two = (statistics.median(r) for r in rates.values())
        row = {"workload": "tp-B", "model": "B", "unit": "decode tok/s", "tp1": one, "tp2": two}
        print(json.dumps({**row, "ratio": round(two / one, 3), "runs": list(rates.values())}), flush=True)

    def equal(self) -> None:
        """Greedy text on two GPUs and on one, of a small model in float32, where the order of a sum hardly matters."""
        small = self.uniform("equal", 8, 200, 64, 0)
        work = Workload([[t % 10000 for t in p] for p in small.prompts], small.max_tokens)
        tokens = [
            self.texts(self.engine("small", tensor_parallel_size=size, max_num_seqs=8, kv_cache_memory=1 << 28), work)[
                0
            ]
            for size in (1, 2)
        ]
        row = {"workload": "tp-equal", "model": "small, float32", "greedy_tokens": sum(map(len, tokens[0]))}
        print(json.dumps({**row, "equal": tokens[0] == tokens[1]}), flush=True)

    def all(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "start-A", lambda: self.start("A")
        yield "latency-A", lambda: self.latency("A")
        yield "list-A", self.list_
        yield "prefix", self.prefix
        yield "start-B", lambda: self.start("B")
        yield "latency-B", lambda: self.latency("B")
        yield "prefill-8192", lambda: self.prefill(1, 8192, "prefill-8192")
        yield "prefill-16x2048", lambda: self.prefill(16, 2048, "prefill-16x2048")
        yield "sweep", self.sweep
        yield "throughput-B", self.throughput
        yield "tp-B", self.parallel
        yield "tp-equal", self.equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="workloads; none: all but start-B (a process of its own), tp-B and tp-equal (two GPUs)"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--option", action="append", default=[], help="an engine option, name=value (JSON)")
    args = parser.parse_args()
    options = {name: json.loads(value) for name, value in (o.split("=", 1) for o in args.option)}
    bench = Bench(tiny=args.tiny, repeat=args.repeat, device=args.device, options=options)
    for name, measure in bench.all():
        if name in args.names or (not args.names and name not in ("start-B", "tp-B", "tp-equal")):
            measure()
    bench.close()


if __name__ == "__main__":
    main()
