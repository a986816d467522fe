"""Training on one GPU with random weights: tokens per second, the share of the GPU's arithmetic, memory. JSON lines.

    python bench/gpu_train.py [lora-8b] [gpt2] [qwen3]

The workloads of the anchors: an 8B Llama with LoRA of rank 16 on all projections, 2 x 4,096 tokens; GPT-2 124M,
sequences of 1,024; Qwen3-0.6B, all weights, sequences of 4,096. Model FLOPs per token: 6 N and 6 L T D of causal
attention; 4 N for LoRA. MFU is against 989 TFLOP/s, the dense bfloat16 rate of an H100 or H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmasos.models.load import LoadedModel, load_model
from llmasos.train.lora import LoraOptions, add_lora
from llmasos.train.model import Placed, Trainee

PEAK = 989e12
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 500,
}


@dataclass(frozen=True)
class Work:
    name: str
    config: dict[str, Any]
    sequences: int
    length: int
    flops_per_token: float
    lora: bool = False


def works() -> list[Work]:
    gpt2 = 6 * 124e6 + 12 * 12 * 768 * 1024 / 2
    qwen3 = 6 * 596e6 + 12 * 28 * 2048 * 4096 / 2
    return [
        Work("lora-8b", LLAMA_8B, 2, 4096, 4 * 8.03e9, lora=True),
        *(Work("gpt2", GPT2, num, 1024, gpt2) for num in (32, 64, 128)),
        *(Work("qwen3", QWEN3, num, 4096, qwen3) for num in (4, 8)),
    ]


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]


def batch(work: Work, vocab_size: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (work.sequences * work.length,), generator=draw)
    labels = tokens.roll(-1)
    labels[work.length - 1 :: work.length] = -100
    return Batch(tokens, labels, torch.arange(work.length).repeat(work.sequences), [work.length] * work.sequences)


def load(work: Work, *, tiny: bool, device: str) -> LoadedModel:
    with tempfile.TemporaryDirectory() as folder:
        config = work.config | ({k: v for k, v in TINY.items() if k in work.config} if tiny else {})
        Path(folder, "config.json").write_text(json.dumps(config))
        dtype = "bfloat16" if work.lora and not tiny else "float32"
        return load_model(Path(folder), device=device, dtype=dtype, load_format="dummy")


def measure(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    model = load(work, tiny=args.tiny, device=args.device)
    device = model.module.device
    on_gpu = device.type == "cuda"
    if work.lora:
        add_lora(model, LoraOptions(r=16, alpha=32))
    else:
        model.module.requires_grad_()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainee = Trainee(model.module, dtype=dtype, recompute=args.recompute, compiled=not args.eager and on_gpu)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = [Placed.of(batch(work, model.config.vocab_size, i), device) for i in range(2)]
    times, loss = [], 0.0
    started = time.perf_counter()
    for step in range(args.warm + args.steps):
        if step == args.warm:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())
        each = batches[step % 2]
        value = trainee.loss(each) / len(each)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss = float(value.detach())
    times.append(time.perf_counter())
    seconds = (times[1] - times[0]) / args.steps
    rate = work.sequences * work.length / seconds
    return {
        "bench": "gpu_train",
        "work": work.name,
        "sequences": work.sequences,
        "tok_s": round(rate),
        "ms": round(1e3 * seconds, 1),
        "mfu": round(rate * work.flops_per_token / PEAK, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
        "first_steps_s": round(times[0] - started, 1),
        "loss": round(loss, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workloads; none: all")
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    for work in works():
        if args.names and work.name not in args.names:
            continue
        try:
            row = measure(work, args)
        except torch.OutOfMemoryError:
            row = {"bench": "gpu_train", "work": work.name, "sequences": work.sequences, "out_of_memory": True}
        print(json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.compiler.reset()


if __name__ == "__main__":
    main()
