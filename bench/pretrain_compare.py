"""A model from scratch by `llmasos train pretrain`, and by a plain GPT-2 with AdamW, in the same time. One JSON line.

    python bench/pretrain_compare.py FOLDER [--minutes 2.5] [--depth 12]

FOLDER: texts (*.txt, *.txt.zst, documents between lines of <|doc|>). Of each file every `1 / --held-out`-th document is
held out; both read the rest, in tokens of the same tokenizer, and are then measured in bits per byte of each part's
held-out text. The baseline is nanoGPT's recipe as published: GPT-2's shape of 124 million weights, sequences of 1,024
cut from one stream, half a million tokens a step, AdamW (0.9, 0.95), weight decay 0.1, 6e-4 with 5 % warm-up and a
cosine to a tenth over the steps that fit the time, bfloat16, compiled. It runs once as that, and once with steps of
131,072 tokens, which suit a run this short. Time is that of steps; compiling is not counted. --tokenizer: one that was
trained before on the same folder; else it is trained first.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import report
from llmasos.data import train_tokenizer
from llmasos.models.load import load_model
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.train import pretrain
from llmasos.train.events import Listener, StepReport
from llmasos.train.model import Placed, Trainee

MARK = "<|doc|>"
LENGTH = 1024


def documents(file: Path) -> Iterator[str]:
    raw: Any = file.open("rb")
    if file.suffix == ".zst":
        import zstandard

        raw = zstandard.ZstdDecompressor().stream_reader(raw)
    lines: list[str] = []
    with io.TextIOWrapper(raw, encoding="utf-8") as text:
        for line in text:
            if line.strip() == MARK:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def split(folder: Path, into: Path, every: int, most_bytes: int) -> dict[str, list[str]]:
    """Writes what is read to into/train, a file of rows for each part; returns what is held out, some MB of each."""
    held: dict[str, list[str]] = {}
    (into / "train").mkdir(parents=True)
    for file in sorted(p for p in folder.iterdir() if ".txt" in p.suffixes):
        name = file.name.split(".")[0]
        held[name] = []
        with (into / "train" / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            found = [text for text in documents(file) if text.strip()]
            pieces = [text[at : at + 20_000] for text in found for at in range(0, len(text), 20_000)]
            for number, piece in enumerate(pieces):
                if number % every == every // 2 and sum(map(len, held[name])) < most_bytes:
                    held[name].append(piece)
                else:
                    out.write(json.dumps({"text": piece}) + "\n")
    return held


class Baseline(nn.Module):
    """nanoGPT's GPT-2: pre-norm, learned positions, GELU, tied head, no biases."""

    def __init__(self, vocab_size: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, bias=False),
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "norm2": nn.LayerNorm(width, bias=False),
                    "up": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                small = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if small else 0.02)

    def forward(self, ids: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            parts: Any = block
            q, k, v = parts["qkv"](parts["norm1"](x)).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + parts["out"](seen.transpose(1, 2).flatten(2))
            x = x + parts["down"](F.gelu(parts["up"](parts["norm2"](x))))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction=reduction)


def stream(folder: Path, tokenizer: Tokenizer) -> Tensor:
    """All documents behind each other, shuffled once."""
    texts = [json.loads(line)["text"] for file in sorted(folder.iterdir()) for line in file.open()]
    np.random.default_rng(0).shuffle(texts)
    end = tokenizer.eos_token_id
    found = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.array([*one.ids, end], np.int32) for one in found]))


def run_baseline(
    args: argparse.Namespace, tokens: Tensor, vocab_size: int, step_tokens: int
) -> tuple[Baseline, dict[str, Any]]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = Baseline(-(-vocab_size // 64) * 64, args.base_layers, 64 * args.base_layers, args.base_layers).to(device)
    micro = args.base_micro
    fused = {"fused": True} if device.type == "cuda" else {}
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), **fused)
    loss_of: Any = torch.compile(model) if device.type == "cuda" else model
    tokens = tokens.to(device)
    draw = torch.Generator().manual_seed(0)
    limit = 60 * args.minutes

    def step(rate: float, *, apply: bool = True) -> None:
        for _ in range(step_tokens // (micro * LENGTH)):
            at = torch.randint(len(tokens) - LENGTH - 1, (micro,), generator=draw).to(device)
            part = tokens[at[:, None] + torch.arange(LENGTH + 1, device=device)].long()
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(part[:, :-1], part[:, 1:].contiguous())
            (loss / (step_tokens // (micro * LENGTH))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if apply:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step(0.0, apply=False)  # compiles
    clock(device)
    started = clock(device)
    step(0.0, apply=False)
    num_steps = max(4, int(limit / (clock(device) - started)))
    warm, started, done = max(1, num_steps // 20), clock(device), 0
    while done < num_steps and clock(device) - started < limit:
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, done - warm) / max(1, num_steps - warm)))
        step(6e-4 * ((done + 1) / warm if done < warm else cosine))
        done += 1
    seconds = clock(device) - started
    return model, {"steps": done, "planned": num_steps, "seconds": round(seconds, 1), "tokens": done * step_tokens}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


WARM = 5
"""Steps in which blocks are compiled; each counts as long as the others take."""


class Spent(Listener):
    """The wall's time from step to step: losses, updates, and whatever a step waits for."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.tokens = 0

    def stepped(self, report: StepReport) -> None:
        self.at.append(time.perf_counter())
        self.tokens += report.num_tokens

    @property
    def step(self) -> float:
        """Seconds of the median step."""
        after = self.at[WARM - 1 :]
        return statistics.median(end - begin for begin, end in pairwise(after))

    @property
    def seconds(self) -> float:
        return self.at[-1] - self.at[WARM - 1] + WARM * self.step


@torch.no_grad()
def bits_per_byte(held: dict[str, list[str]], tokenizer: Tokenizer, loss: Any) -> dict[str, float]:
    """loss(ids [1, T], labels [1, T]) -> summed nats. A document is read in windows, each from its own beginning; its
    first token has nothing before it but what begins every text."""
    found = {}
    for name, texts in held.items():
        nats = num_bytes = 0.0
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
            num_bytes += len(text.encode())
            for at in range(0, len(ids) - 1, LENGTH):
                part = torch.tensor(ids[at : at + LENGTH + 1])
                nats += float(loss(part[None, :-1], part[None, 1:]))
        if num_bytes:
            found[name] = round(nats / math.log(2) / num_bytes, 4)
    return found


def loss_of_baseline(baseline: Baseline, device: str) -> Any:
    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out: Tensor = baseline(ids.to(device), labels.to(device), reduction="sum")
        return out

    return loss


def run_ours(
    args: argparse.Namespace, folder: Path, held: dict[str, list[str]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """A few steps tell how many fit the time, then the run."""
    options: dict[str, Any] = {
        "data": str(folder / "train"),
        "depth": args.depth,
        "tokenizer": str(args.tokenizer),
        "max_length": LENGTH,
        "lr": args.rate,
        "batch_tokens": args.batch_tokens,
        "device": args.device,
        "validation": 0,
        "save_every": 0,
        "install": False,
        "progress": True,
    }
    probe, spent = Spent(), Spent()
    pretrain(**options, steps=20, name="probe", output=folder / "probe", export=False, listeners=[probe])
    steps = args.steps or max(4, int(60 * args.minutes / probe.step))
    result = pretrain(**options, steps=steps, name="ours", output=folder / "ours", listeners=[spent])
    assert result.exported and result.exported.model
    model = load_model(result.exported.model, device=args.device)
    trainee = Trainee(model.module, dtype=model.module.dtype)
    device = torch.device(args.device)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        size = ids.shape[1]
        rows = torch.arange(size, device=device)
        return trainee.loss(Placed(ids[0].to(device), rows, rows, labels[0].to(device), [size]))

    return {
        "steps": len(spent.at),
        "seconds": round(spent.seconds, 1),
        "tokens": spent.tokens,
        "bits_per_byte": bits_per_byte(held, tokenizer, loss),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, help="of ours; default: those that fit the time")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--held-bytes", type=int, default=400_000)
    parser.add_argument("--base-layers", type=int, default=12)
    parser.add_argument("--base-batch", type=int, nargs="+", default=[491_520, 131_072])
    parser.add_argument("--base-micro", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output or scratch)
        held = split(Path(args.folder), folder, args.held_out, args.held_bytes)
        if args.tokenizer is None:
            args.tokenizer = folder / "tokenizer"
            train_tokenizer(folder / "train", vocab_size=args.vocab_size).save_pretrained(args.tokenizer)
        tokenizer = load_tokenizer(args.tokenizer)
        tokens = stream(folder / "train", tokenizer)
        baselines = [measured_baseline(args, tokens, tokenizer, batch, held) for batch in args.base_batch]
        del tokens
        ours = run_ours(args, folder, held, tokenizer)
    rivals = [ours, *baselines]
    for run in rivals:
        run["mean"] = round(statistics.mean(run["bits_per_byte"].values()), 4)
    report(
        bench="pretrain_compare",
        depth=args.depth,
        minutes=args.minutes,
        ours=ours,
        baselines=baselines,
        met=all(ours["bits_per_byte"][part] < one["bits_per_byte"][part] for one in baselines for part in held),
    )


def measured_baseline(
    args: argparse.Namespace, tokens: Tensor, tokenizer: Tokenizer, batch: int, held: dict[str, list[str]]
) -> dict[str, Any]:
    model, found = run_baseline(args, tokens, tokenizer.vocab_size, batch)
    return {
        "batch": batch,
        **found,
        "bits_per_byte": bits_per_byte(held, tokenizer, loss_of_baseline(model, args.device)),
    }


if __name__ == "__main__":
    main()
