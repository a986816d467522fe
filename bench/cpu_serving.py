"""What the engine gives on a CPU: throughput, prefix reuse, a soak, structured output, speculation. One JSON line each.

    python bench/cpu_serving.py                        # all, with SmolLM2; the soak with a tiny random model
    python bench/cpu_serving.py batch prefix           # some
    python bench/cpu_serving.py soak --model smollm2-135m-instruct --requests 100

Every figure is a ratio of two runs on the same threads, in turns, and the median over `--rounds`, because absolute ones
hold for one machine and one hour. The goal stands in the line, and whether it was met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import MODEL, model_file, report
from llmasos.inference.build import build_engine
from llmasos.inference.config import EngineConfig
from llmasos.inference.engine import Engine
from llmasos.inference.llm import LLM
from llmasos.inference.pages import Pages
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.inference.speculate import SpeculativeConfig
from llmasos.inference.state import Request
from llmasos.models.load import LoadedModel, load_model

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path += [str(TESTS), str(TESTS / "inference")]
COPIED = """def read_table(path, separator=",", header=True):
    rows = []
    names = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            parts = [part.strip() for part in line.rstrip().split(separator)]
            if header and number == 0:
                names = parts
                continue
            if names is not None and len(parts) != len(names):
                raise ValueError(f"line {number + 1} has {len(parts)} parts instead of {len(names)}")
            rows.append(dict(zip(names, parts)) if names else parts)
    return rows


def write_table(path, rows, separator=","):
    names = list(rows[0]) if rows else []
    with open(path, "w", encoding="utf-8") as file:
        file.write(separator.join(names) + "\\n")
        for row in rows:
            file.write(separator.join(str(row[name]) for name in names) + "\\n")
"""


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rounds = args, args.rounds

    @cached_property
    def model(self) -> LoadedModel:
        model = load_model(model_file(self.args.model or MODEL))
        if self.args.threads:  # loading sets what the machine has
            torch.set_num_threads(self.args.threads)
        return model

    def engine(self, **options: Any) -> Engine:
        memory = {"kv_cache_memory": 1 << 29, "max_model_len": 2048}
        return build_engine(self.model, EngineConfig.of(**{**memory, **options}))

    def ids(self, name: str, num: int) -> tuple[int, ...]:
        draw = random.Random(name)
        return tuple(draw.randrange(100, self.model.config.vocab_size) for _ in range(num))

    def chat(self, text: str) -> tuple[int, ...]:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        message = {"role": "user", "content": text}
        return tuple(tokenizer.encode(tokenizer.apply_chat_template([message]), add_special_tokens=False))

    def report(self, name: str, value: float, goal: float, *, most: bool = False, **facts: Any) -> None:
        met = value <= goal if most else value >= goal
        report(bench=f"cpu_serving/{name}", value=round(value, 3), goal=goal, met=met, **facts)

    # workloads

    def batch(self) -> None:
        """Tokens/s of 16 requests at once over those of one, 32 tokens in and 64 out, greedy."""
        engine, rates = self.engine(), dict[int, list[float]]()
        for turn in range(self.rounds + 1):
            for size in (1, 16):
                prompts = [self.ids(f"batch/{turn}/{size}/{i}", 32) for i in range(size)]
                params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
                start = time.perf_counter()
                outputs = run(engine, [Request(p, params, 64) for p in prompts])
                if turn:  # the first warms up
                    rates.setdefault(size, []).append(sum(map(len, outputs)) / (time.perf_counter() - start))
        one, many = statistics.median(rates[1]), statistics.median(rates[16])
        ratio = statistics.median(b / a for a, b in zip(rates[1], rates[16], strict=True))
        self.report("batch", ratio, 3.0, one=round(one, 1), sixteen=round(many, 1), unit="tok/s")

    def prefix(self) -> None:
        """Time to the first token of a request over that of one before it with the same 1,000-token system prompt."""
        with LLM(self.model, name="bench", kv_cache_memory=1 << 29, max_model_len=2048) as llm:
            params = SamplingParams(temperature=0, max_tokens=4)
            firsts, seconds = [], []
            for turn in range(self.rounds + 1):
                shared = self.ids(f"prefix/{turn}", 1000)
                for number, times in enumerate((firsts, seconds)):
                    question = self.ids(f"question/{turn}/{number}", 24)
                    output = llm.complete([[*shared, *question]], params)[0]
                    if turn:
                        times.append(output.metrics.time_to_first_token)
        ratio = statistics.median(b / a for a, b in zip(firsts, seconds, strict=True))
        ms = {name: round(1e3 * statistics.median(t), 1) for name, t in (("first", firsts), ("second", seconds))}
        self.report("prefix", ratio, 0.15, most=True, **ms, unit="ms")

    def soak(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            if self.args.model is None:
                from tiny import write_tiny_model

                folder = write_tiny_model(Path(scratch, "tiny"), max_position_embeddings=Soak.CONTEXT)
                model = load_model(folder, device="cpu", dtype="float32")
                torch.set_num_threads(1)  # a model this small only waits for other threads
            else:
                model = self.model
            result = Soak(model, self.args.requests, self.args.seed).run()
        equal = result["compared"] and not result["different"] and not result["leaked"]
        report(bench="cpu_serving/soak", model=self.args.model or "tiny", **result, met=bool(equal))

    def structured(self) -> None:
        """Outputs on twenty JSON Schemas that are valid, and what a grammar adds to the time of a step."""
        import jsonschema
        from json_schemas import SCHEMAS

        engine, params, prompts, schemas = self.engine(max_num_seqs=8), [], [], []
        for number in range(200):
            name, schema = list(SCHEMAS.items())[number % len(SCHEMAS)]
            prompts.append(self.chat(f"Write JSON, example {number // len(SCHEMAS)}: {name.replace('_', ' ')}."))
            schemas.append(schema)
            form = StructuredOutput(json=schema)
            params.append(SamplingParams(temperature=0.8, seed=number, max_tokens=512, structured=form))
        steps = Steps(engine, 8)
        outputs = run(engine, [Request(p, q, 512) for p, q in zip(prompts, params, strict=True)], steps)
        valid = cut = 0
        for ids, schema in zip(outputs, schemas, strict=True):
            text = self.model.tokenizer.decode(ids) if self.model.tokenizer else ""
            cut += len(ids) >= 512
            try:
                # exactly: 0.07 is a multiple of 0.01, and no float knows
                value, exact = (json.loads(t, parse_float=Decimal) for t in (text, json.dumps(schema)))
                checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
                jsonschema.Draft202012Validator(exact, format_checker=checker).validate(value)
                valid += 1
            except (ValueError, jsonschema.ValidationError) as e:
                print(f"{text!r}: {e}", file=sys.stderr)
        tokens = sum(map(len, outputs))
        jumped = tokens - steps.num_sampled
        self.report("structured-valid", valid, len(outputs), cut_by_length=cut, tokens=tokens, jumped_tokens=jumped)
        self.grammar_overhead(prompts, params)

    def grammar_overhead(self, prompts: list[tuple[int, ...]], params: list[SamplingParams]) -> None:
        """Steps that decode exactly 8 tokens of 8 sequences, with grammars and without, in turns. Log-probabilities are
        asked for in both, because then forced tokens are sampled one by one as well."""
        engine, ratios = self.engine(max_num_seqs=8, enable_prefix_caching=False), []
        times: dict[bool, float] = {}
        for turn in range(self.rounds + 1):
            for grammar in (True, False):
                some = [(24 * turn + i) % len(prompts) for i in range(24)]
                chosen = [replace(params[i], logprobs=0) for i in some]
                chosen = chosen if grammar else [replace(p, structured=None) for p in chosen]
                steps = Steps(engine, 8)
                run(engine, [Request(prompts[i], p, 40) for i, p in zip(some, chosen, strict=True)], steps)
                times[grammar] = statistics.median(steps.seconds)
            if turn:
                ratios.append(times[True] / times[False])
        ms = round(1e3 * times[False], 2)
        self.report("structured-overhead", statistics.median(ratios) - 1, 0.10, most=True, step_ms=ms)

    def speculation(self) -> None:
        """Greedy decoding with prompt lookup over decoding without: a text that is copied word for word, one that the
        model edits as it copies, and one that is new."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        copied = tuple(tokenizer.encode(3 * COPIED, add_special_tokens=False))
        edited = self.chat(f"Repeat this code exactly, change nothing:\n```python\n{COPIED}```")
        new = self.chat("Write a story about a lighthouse keeper who finds an old letter.")
        for name, prompt, goal in (("copied", copied, 1.5), ("edited", edited, 1.0), ("new", new, 0.97)):
            self.speculate(name, prompt, goal)

    def speculate(self, name: str, prompt: tuple[int, ...], goal: float) -> None:
        engines = [self.engine(), self.engine(speculative=SpeculativeConfig())]
        params, ratios, same = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), [], True
        for turn in range(self.rounds + 1):
            seconds, texts = [], []
            for engine in engines:
                request = Request(prompt, params, 200)
                steps = Steps(engine, 1)
                texts.append(run(engine, [request], steps)[0])
                seconds.append(steps.decode_seconds)
            same &= texts[0] == texts[1]
            if turn:
                ratios.append(seconds[0] / seconds[1])
        stats = engines[1].stats
        self.report(
            f"speculation ({name})",
            statistics.median(ratios),
            goal,
            identical=same,
            drafted=stats.num_draft_tokens,
            accepted=stats.num_accepted_tokens,
        )

    def all(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for name in ("batch", "prefix", "soak", "structured", "speculation"):
            yield name, getattr(self, name)


class Steps:
    """Watches an engine: seconds of the steps that decoded exactly `size` tokens."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size
        self.seconds: list[float] = []
        self.num_sampled = 0
        self.decode_seconds = 0.0
        """Of all steps after the first that gave a token."""

    def __call__(self, num_outputs: int) -> None:
        stats = self.engine.stats
        if self.num_sampled:
            self.decode_seconds += stats.last_step_seconds
        self.num_sampled += num_outputs
        if stats.last_step_tokens == num_outputs == self.size:
            self.seconds.append(stats.last_step_seconds)


def run(engine: Engine, requests: list[Request], steps: Steps | None = None) -> list[list[int]]:
    """Step the engine until all are done; their token ids."""
    tokens: dict[Request, list[int]] = {r: [] for r in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
            tokens[output.request] += output.token_ids
        if steps is not None:
            steps(len(outputs))
    return [tokens[r] for r in requests]


# the soak


@dataclass
class Asked:
    """A random request, and what became of it: token ids and text by completion."""

    prompt: list[int]
    params: SamplingParams
    options: dict[str, Any]
    cancel_after: int | None
    """Chunks after which its reader goes away."""
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ended: bool = False


class Soak:
    """Random requests, many at once, in few pages, some cancelled; then each alone. All texts must be equal."""

    AT_ONCE = 48
    CONTEXT = 384

    def __init__(self, model: LoadedModel, num_requests: int, seed: int) -> None:
        self.model, self.draw = model, random.Random(seed)
        self.heads = [self.tokens(self.draw.randrange(120, 260)) for _ in range(4)]
        self.asked = [self.request(i) for i in range(num_requests)]

    def tokens(self, num: int) -> list[int]:
        return [self.draw.randrange(5, self.model.config.vocab_size) for _ in range(num)]

    def request(self, number: int) -> Asked:
        draw = self.draw
        structured = StructuredOutput(regex="(yes|no), [a-z ]{3,20}(because [0-9]+)?") if number % 16 == 0 else None
        head = draw.choice(self.heads)[: draw.randrange(100, 260)] if draw.random() < 0.4 else []
        prompt = head + self.tokens(draw.randrange(1, 40))
        params = SamplingParams(
            n=draw.choice([1, 1, 1, 1, 2, 3]),
            max_tokens=draw.choice([1, 4, 8, 16, 64, 120]),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_k=draw.choice([0, 0, 20]),
            top_p=draw.choice([1.0, 0.9]),
            min_p=draw.choice([0.0, 0.0, 0.02]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.4]),
            logit_bias={draw.randrange(5, 200): 3.0} if draw.random() < 0.2 else {},
            seed=number,
            stop=(draw.choice("aeiouxyz"),) if draw.random() < 0.2 else (),
            stop_token_ids=(draw.randrange(5, 200),) if draw.random() < 0.2 else (),
            ignore_eos=draw.random() < 0.5 and structured is None,
            structured=structured,
        )
        options = {"priority": draw.randrange(-2, 3), "cache_salt": draw.choice([None, None, "a", "b"])}
        return Asked(prompt, params, options, draw.randrange(1, 20) if draw.random() < 0.2 else None)

    def run(self) -> dict[str, Any]:
        sizes = {"max_model_len": self.CONTEXT, "batch_invariant": True}
        page = Pages.bytes_per_page(self.model.config, 0, 16, "auto", self.model.module.dtype)
        few = 2 * self.CONTEXT // 16 * page
        started = time.perf_counter()
        with LLM(self.model, name="soak", max_num_seqs=self.AT_ONCE, kv_cache_memory=few, **sizes) as llm:
            asyncio.run(self.together(llm))
            leaked, preemptions = llm._loop.run(lambda: leaks(llm)).result(), llm.stats.num_preemptions
            cached = llm.stats.num_cached_tokens
        seconds = time.perf_counter() - started
        with LLM(self.model, name="alone", max_num_seqs=4, enable_prefix_caching=False, **sizes) as llm:
            compared, different = self.alone(llm)
        return {
            "requests": len(self.asked),
            "compared": compared,
            "different": different,
            "cancelled": sum(not asked.ended for asked in self.asked),
            "preemptions": preemptions,
            "cached_tokens": cached,
            "leaked": leaked,
            "seconds": round(seconds, 1),
        }

    async def together(self, llm: LLM) -> None:
        gate = asyncio.Semaphore(2 * self.AT_ONCE)

        async def one(asked: Asked) -> None:
            async with gate:
                asked.ids, asked.texts = ([[] for _ in range(asked.params.n)], [""] * asked.params.n)
                chunks = llm.astream_complete(asked.prompt, asked.params, **asked.options)
                left = asked.cancel_after
                async for chunk in chunks:
                    asked.ids[chunk.index] += chunk.token_ids
                    asked.texts[chunk.index] += chunk.text
                    left = None if left is None else left - 1
                    if left == 0:
                        break
                else:
                    asked.ended = True
                await chunks.aclose()

        await asyncio.gather(*map(one, self.asked))

    def alone(self, llm: LLM) -> tuple[int, int]:
        """How many completions were compared, and how many differ."""
        compared = different = 0
        for asked in self.asked:
            expected = llm.complete([asked.prompt], asked.params)[0].outputs
            for found, text, own in zip(asked.ids, asked.texts, expected, strict=True):
                ids = list(own.token_ids)
                same = (found, text) == (ids, own.text) if asked.ended else ids[: len(found)] == found
                compared += 1
                different += not (same and (asked.ended or own.text.startswith(text)))
        return compared, different


def leaks(llm: LLM) -> int:
    """Pages that are neither free nor cached after the last request; raises where the book-keeping contradicts itself.
    In the engine's thread."""
    scheduler = llm._loop.engine().scheduler
    scheduler.check_integrity()
    assert not scheduler.has_work
    return sum(pool.num_used for pool in scheduler.cache.pools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workloads; none: all")
    parser.add_argument("--model", help="a name or file (default: SmolLM2, and a tiny random model for the soak)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    args = parser.parse_args()
    bench = Bench(args)
    for name, measure in bench.all():
        if name in args.names or not args.names:
            measure()


if __name__ == "__main__":
    main()
