"""What the plan predicts against what a run takes. JSON lines, one per case; each case is a process of its own.

    python bench/plan_check.py [--steps 4] [--threads 1] [--tokens 512] [NAME ...]    on a CPU: SmolLM2-135M and small
                                                                                      models made here
    python bench/plan_check.py --gpu [NAME ...]                                       on a GPU: gpu_train.py's workloads

On a CPU the measure is the most resident memory of the process, on a GPU what tensors had at most. `error` is
(predicted - measured) / measured; `grown_error`, on a CPU, that of what the run adds to the process alone. Runs are
real: the data are tokenised, packed and read, the optimizer steps, and the result is a checkpoint. `seconds_ratio` is
predicted / measured for the fastest step (on a CPU in the process's own time, on a GPU the last of five).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import MODEL, model_file
from llmasos.train.events import Listener, StepReport

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
GEMMA = SMALL | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 64,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 64,
    "sliding_window": 128,
    "tie_word_embeddings": True,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 384,
    "n_layer": 8,
    "n_head": 6,
    "n_positions": 1024,
}
SHAPES = {"small": SMALL, "gemma": GEMMA, "gpt2": GPT2}
"""Made here with SmolLM2's tokenizer and random weights."""
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"tuning": "lora"},
    "lora-recompute": {"tuning": "lora", "recompute": True},
    "dora": {"tuning": "lora", "lora": {"dora": True}},
    "qlora": {"tuning": "qlora"},
    "full": {"tuning": "full"},
    "full-8bit-recompute": {"tuning": "full", "optimizer": "adamw8bit", "recompute": True},
    "full-muon": {"tuning": "full", "optimizer": "muon"},
    "full-float32": {"tuning": "full", "dtype": "float32"},
}
KEPT = {"teacher": "small", "keep_layers": 4}
ON_POLICY = {"on_policy": 1.0, "max_new_tokens": 64}
CASES: dict[str, dict[str, Any]] = {
    **TUNINGS,
    **{f"{name}-full": {"model": name, "tuning": "full"} for name in ("gemma", "gpt2")},
    **{f"small-{name}": {"model": "small", **options} for name, options in TUNINGS.items()},
    "small-distill": {"model": None, "method": "distill", "distillation": KEPT},
    "small-on-policy": {"model": None, "method": "distill", "distillation": KEPT | ON_POLICY},
    **{f"{name}-lora-float32": {"model": name, "tuning": "lora", "dtype": "float32"} for name in SHAPES},
}


def texts(path: Path, count: int = 400) -> Path:
    """Rows of many lengths."""
    draw = random.Random(0)
    words = Path(__file__).read_text().split()
    rows = [{"text": " ".join(draw.choices(words, k=draw.randrange(20, 160)))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_model(shape: dict[str, Any], folder: Path) -> Path:
    import torch

    from llmasos.formats import save_safetensors
    from llmasos.models.decoder import Decoder
    from llmasos.models.families import config_from_hf, family_of
    from llmasos.models.families.mapping import to_hf
    from llmasos.text import load_tokenizer

    folder.mkdir()
    tokenizer = load_tokenizer(model_file(MODEL))
    tokenizer.save_pretrained(folder)
    hf = {**shape, "vocab_size": tokenizer.vocab_size}
    (folder / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf)
    state = {name: torch.randn(p.shape) * 0.02 for name, p in Decoder(config).state_dict().items()}
    save_safetensors(dict(to_hf(family_of(config), config, state)), folder, metadata={"format": "pt"})
    return folder


class Clock(Listener):
    """This process's time for a token, of the fastest step: what else the machine does makes steps slower only."""

    def __init__(self) -> None:
        self.seconds = math.inf

    def began(self, step: int, steps: int) -> None:
        self.last = time.process_time()

    def stepped(self, report: StepReport) -> None:
        self.seconds = min(self.seconds, (time.process_time() - self.last) / report.num_tokens)
        self.last = time.process_time()

    def saved(self, step: int, path: Path) -> None:
        self.last = time.process_time()


def case(name: str, steps: int, threads: int, tokens: int) -> dict[str, Any]:
    """One run in this process, with two micro-batches of `tokens` a step."""
    import torch

    from llmasos.train import pace
    from llmasos.train.config import TrainConfig
    from llmasos.train.memory import Peak
    from llmasos.train.parallel.ranks import Ranks
    from llmasos.train.run import _carry_out, named, prepare

    torch.set_num_threads(threads)
    pace.time = SimpleNamespace(perf_counter=lambda: time.process_time() / threads)  # as Clock measures
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": str(model_file(MODEL)), "device": "cpu", **CASES[name]}
        made = options["model"] or "small"
        if made in SHAPES:
            subprocess.run([sys.executable, __file__, "--make", made, folder], check=True)
            path = str(Path(folder) / made)
            if options["model"] is None:
                options["distillation"] = options["distillation"] | {"teacher": path}
            else:
                options["model"] = path
        config = TrainConfig(
            data=(str(texts(Path(folder) / "data.jsonl")),),
            output=Path(folder) / "run",
            steps=steps,
            max_length=tokens,
            batch_tokens=2 * tokens,
            micro_batch_tokens=tokens,
            validation=0.0,
            schema="text",
            install=False,
            **options,
        )
        began = time.perf_counter()
        prepared = prepare(named(config))
        planned = time.perf_counter() - began
        peak = Peak(torch.device("cpu"))
        clock = Clock()
        _carry_out(prepared, Ranks(), [clock], progress=False)
    seconds = clock.seconds / threads * prepared.plan.num_tokens
    base = prepared.plan.parts["process"]
    grown = peak.num_bytes - base
    return row(name, prepared.plan.memory, peak.num_bytes) | {
        "grown_mib": round(grown / 2**20),
        "grown_error": round((prepared.plan.memory - base) / grown - 1, 3),
        "prepared_s": round(planned, 1),
        "seconds": round(seconds, 1),
        "predicted_s": round(prepared.plan.seconds or 0, 1),
        "seconds_ratio": round((prepared.plan.seconds or 0) / seconds, 2),
        "parts_mib": {k: round(v / 2**20) for k, v in prepared.plan.parts.items()},
    }


def row(name: str, predicted: int, measured: int) -> dict[str, Any]:
    return {
        "bench": "plan_check",
        "case": name,
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(measured / 2**20),
        "error": round(predicted / measured - 1, 3),
    }


def on_gpu(names: list[str]) -> None:
    """The workloads of gpu_train.py, and variants of them."""
    import torch

    from gpu_train import batch, works

    for work in works():
        for variant in ("", "recompute", "eager", *(("nf4", "dora") if work.lora else ("adamw8bit", "muon"))):
            name = f"{work.name}-{work.sequences}" + (f"-{variant}" if variant else "")
            if names and name not in names and work.name not in names:
                continue
            try:
                print(json.dumps(gpu_case(name, work, batch, variant)), flush=True)
            except torch.OutOfMemoryError:
                print(json.dumps({"bench": "plan_check", "case": name, "out_of_memory": True}), flush=True)
            torch.compiler.reset()
            gc.collect()  # else the next case ends with less than it began with
            torch.cuda.empty_cache()


def gpu_case(name: str, work: Any, batch: Any, variant: str) -> dict[str, Any]:
    from functools import partial

    import torch

    from llmasos.models.families import config_from_hf
    from llmasos.models.load import load_model
    from llmasos.train.lora import LoraOptions, add_lora
    from llmasos.train.lowbit import FrozenLinear
    from llmasos.train.memory import Load, Peak, Setup, footprint
    from llmasos.train.model import Placed, Trainee
    from llmasos.train.optim import OptimizerOptions, Optimizers
    from llmasos.train.plan import WORKSPACE

    lora = LoraOptions(r=16, alpha=32, dora=variant == "dora") if work.lora else None
    options = OptimizerOptions(name=variant if variant in ("adamw8bit", "muon") else "adamw")  # type: ignore[arg-type]
    setup = Setup(
        dtype=torch.bfloat16,
        optimizer=options,
        lora=lora,
        quantization="nf4" if variant == "nf4" else None,
        recompute=variant == "recompute",
        on_gpu=True,
        compiled=variant != "eager",
    )
    data = batch(work, work.config["vocab_size"], 0)
    began = time.perf_counter()
    load = Load(tuple(data.lengths), int((data.labels != -100).sum()))
    predicted = footprint(config_from_hf(work.config), setup, load).peak + WORKSPACE
    planned = time.perf_counter() - began
    device = torch.device("cuda", 0)
    began = time.perf_counter()
    seconds_predicted = probed(work, data, setup, device)
    probe = time.perf_counter() - began
    peak = Peak(device)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(work.config))
        linear = partial(FrozenLinear, kind="nf4") if variant == "nf4" else None
        dtype = torch.bfloat16 if work.lora else torch.float32
        model = load_model(Path(folder), device=device, dtype=dtype, load_format="dummy", linear=linear)
    torch.cuda.reset_peak_memory_stats(device)  # random weights are made whole before they are coded
    if lora is not None:
        add_lora(model, lora)
    else:
        model.module.requires_grad_()
    trainee = Trainee(model.module, dtype=torch.bfloat16, recompute=setup.recompute, compiled=setup.compiled)
    model.module.train()
    optimizers = Optimizers(model.module, options)
    placed = Placed.of(data, device)
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        (trainee.loss(placed) / len(placed)).backward()
        optimizers.step(1.0)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return row(name, predicted, peak.num_bytes - peak.before) | {
        "plan_s": round(planned, 1),
        "probe_s": round(probe, 1),
        "ms": round(1e3 * seconds, 1),
        "seconds_ratio": round(seconds_predicted / seconds, 2),
    }


def probed(work: Any, data: Any, setup: Any, device: Any) -> float:
    """Seconds of a step, as the plan predicts them."""
    from llmasos.models.families import config_from_hf
    from llmasos.train.memory import Load
    from llmasos.train.pace import measured

    load = Load(tuple(data.lengths), int((data.labels != -100).sum()))
    pace = measured(config_from_hf(work.config), setup, load, device)
    return pace.token * len(data.tokens) + pace.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; none: all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch, on a CPU")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        small_model(SHAPES[args.make], Path(args.names[0]) / args.make)
    elif args.case:
        print(json.dumps(case(args.case, args.steps, args.threads, args.tokens)))
    elif args.gpu:
        on_gpu(args.names)
    else:
        for name in args.names or CASES:
            extra = ["--steps", str(args.steps), "--threads", str(args.threads), "--tokens", str(args.tokens)]
            subprocess.run([sys.executable, __file__, "--case", name, *extra], check=True)


if __name__ == "__main__":
    main()
