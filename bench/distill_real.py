"""Half a model, with and without its teacher: SmolLM2-135M cut from 30 to 15 layers learns from the same data in the
same steps, once from the text alone and once from what the teacher would say next. One JSON line at the end.

    python bench/distill_real.py --data corpus.jsonl.zst --steps 600                                  # a GPU
    python bench/distill_real.py --data chats.jsonl --steps 2 --evaluations 1 --batch-tokens 512 --max-length 256 \\
        --device cpu                                                                                  # minutes

--data takes what `llmasos train` takes, several times for several. --teacher-steps first fine-tunes the teacher on the
same data, which is worth it where the data are far from what it knows. --output gets the runs, curves.json (losses of
every step and held-out losses of every evaluation, both runs) and curves.html.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from llmasos.models.load import load_model
from llmasos.store import ensure
from llmasos.train.config import TrainConfig
from llmasos.train.evaluate import Evaluator, evaluation_tokens
from llmasos.train.logs.report import write_comparison
from llmasos.train.logs.runs import open_run, read_evaluations
from llmasos.train.methods.base import decoder_config
from llmasos.train.model import Trainee
from llmasos.train.run import named, prepare, train


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--teacher-steps", type=int, default=0)
    parser.add_argument("--keep", type=int, help="layers; default: half of the teacher's")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight", type=float, nargs="+", default=[0.9], help="of the divergence; a run for each")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--hidden-weight", type=float, default=0.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--output", type=Path, default=Path("distill_real"))
    return parser.parse_args()


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": args.data,
        "max_length": args.max_length,
        "batch_tokens": args.batch_tokens,
        "micro_batch_tokens": args.micro_batch_tokens,
        "overlong": "split",
        "validation": 0.05,
        "steps": args.steps,
        "lr": args.lr,
        "tuning": "full",
        "schedule": "cosine",
        "warmup": 0.05,
        "cooldown": 0.0,
        "device": args.device,
        "dtype": args.dtype,
        "compile": args.compile,
        "save_every": 0,
        "evaluate_every": max(1, args.steps // args.evaluations),
        "install": False,
    }


def student(args: argparse.Namespace, name: str, teacher: str, weight: float) -> TrainConfig:
    distillation = {
        "teacher": teacher,
        "keep_layers": args.keep or decoder_config(ensure(teacher)).num_layers // 2,
        "weight": weight,
    }
    if weight:
        distillation |= {name: getattr(args, name) for name in ("divergence", "temperature", "hidden_weight")}
    return TrainConfig.of(method="distill", distillation=distillation, output=args.output / name, **common(args))


def tuned_teacher(args: argparse.Namespace) -> str:
    if not args.teacher_steps:
        return str(args.teacher)
    more = common(args) | {"steps": args.teacher_steps, "lr": 1e-4}
    made = train(
        TrainConfig.of(method="sft", model=args.teacher, output=args.output / "teacher", **more), progress=True
    )
    assert made.exported is not None and made.exported.model is not None
    return str(made.exported.model)


def teachers_loss(config: TrainConfig, teacher: str) -> float:
    """Over the held-out tokens that the runs read."""
    prepared = prepare(named(config))
    settled = prepared.config
    assert settled.batch_tokens is not None and prepared.held_out is not None
    model = load_model(ensure(teacher), device=prepared.device, dtype=prepared.dtype, quantization="none")
    most = evaluation_tokens(prepared.steps, settled.batch_tokens, settled.evaluate_every or 0)
    asked = Trainee(model.module, dtype=prepared.dtype)
    return Evaluator(asked, prepared.held_out, prepared.method.tokenizer, max_tokens=most, num_prompts=0)(0).loss


def main() -> None:
    args = options()
    teacher = tuned_teacher(args)
    found: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    runs = []
    for name, weight in (("plain", 0.0), *((f"distilled-{weight:g}", weight) for weight in args.weight)):
        config = student(args, name, teacher, weight)
        if name == "plain":
            best = teachers_loss(config, teacher)
        started = time.perf_counter()
        made = train(config, progress=True, export=False)
        seconds = time.perf_counter() - started
        steps = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
        held_out = [(one["step"], one["loss"]) for one in read_evaluations(made.folder)]
        curves[name] = {"steps": [(s["step"], s["loss"], s["parts"]) for s in steps], "held_out": held_out}
        found[name] = {
            "before": held_out[0][1],
            "held_out": held_out[-1][1],
            "steps": made.step,
            "trained_tokens": sum(step["num_trained"] for step in steps),
            "seconds": round(seconds, 1),
        }
        runs.append(open_run(made.folder))
    file = args.output / "curves.json"
    file.write_text(json.dumps(curves) + "\n")
    write_comparison(runs, args.output / "curves.html")
    plain = found["plain"]["held_out"]
    gain = {name: round(plain - run["held_out"], 4) for name, run in found.items() if name != "plain"}
    facts = {"data": args.data, "teacher_steps": args.teacher_steps, "divergence": args.divergence}
    result = {"bench": "distill_real", "teacher": best, **found, "gain": gain, **facts, "curves": str(file)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
