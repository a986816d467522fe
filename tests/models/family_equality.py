"""Every family equals transformers: one check for any tiny random model, used by the tests of all decoder families.

`check_family(hf_config, tmp_path)` builds the model with random weights, saves it as transformers does, loads it with
`load_model` and compares logits (float32 and bfloat16), packed sequences, greedy decoding with and without a cache, and
the way back: the folder that we write holds the same bits and loads in transformers. V = vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from llmasos.models.attention import ContiguousCache, Varlen, layer_specs
from llmasos.models.families import config_from_hf, config_to_hf
from llmasos.models.load import LoadedModel, hf_state, load_model, read_config

FP32, BF16 = 1e-4, 2e-2
"""Largest absolute difference of logits that counts as equal. The models here have logits up to about one, where
bfloat16's own steps are 4e-3 to 8e-3."""
NEAR_TIE = 2e-5
"""Two best logits closer than this could swap by rounding alone: such a seed proves nothing."""
NEW_TOKENS = 64
PROMPT_LENGTHS = (13, 6)

Prompts = Sequence[Tensor]
EditConfig = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Differences:
    """What was measured, for the reader of `pytest -s`."""

    fp32: float
    bf16: float
    logit_std: float
    closest_tie: float


@contextmanager
def quiet() -> Iterator[None]:
    """transformers talks about its own deprecations and empty generation settings; ours stay errors."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"transformers\..*")
            yield
    finally:
        hf_logging.set_verbosity(level)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in which every weight matters: norms not one, biases not zero, logits up to about one."""
    generator = torch.Generator().manual_seed(seed)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # small biases, or they alone decide which token comes next
                parameter.add_((0.1 if name.endswith("bias") else 0.3) * noise)
            else:
                gain = 0.25 if parameter is head else 1.0
                parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def save_hf(model: PreTrainedModel, folder: Path, edit: EditConfig | None = None) -> Path:
    """What transformers writes; `edit` then rewrites config.json (older spellings of the same model)."""
    with quiet():
        model.save_pretrained(folder)
    if edit is not None:
        file = folder / "config.json"
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the tensors of a saved folder: names without prefix, mask buffers, damage."""
    file = folder / "model.safetensors"
    tensors = edit({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


def load_ours(folder: Path, dtype: str = "float32") -> LoadedModel:
    loaded = load_model(folder, device="cpu", dtype=dtype, quantization="none", with_tokenizer=False)
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    return loaded


def random_prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths]


@torch.inference_mode()
def hf_logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """[T, V] in float32."""
    with quiet():
        return model(prompt[None], use_cache=False).logits[0].float()


@torch.inference_mode()
def our_logits(loaded: LoadedModel, prompts: Prompts) -> list[Tensor]:
    """[T, V] of each prompt, all packed into one pass."""
    lengths = [len(p) for p in prompts]
    attend = Varlen(layer_specs(loaded.config), lengths)
    hidden = loaded.module(torch.cat(list(prompts)), attend.positions(), attend)
    return list(loaded.module.logits(hidden).split(lengths))


@torch.inference_mode()
def hf_greedy(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    with quiet():
        out = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=NEW_TOKENS
        )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def our_greedy(loaded: LoadedModel, prompts: Prompts) -> tuple[list[list[int]], Tensor]:
    """Through the cache, all prompts together. Returns new tokens and the logits they were chosen from, [N, B, V]."""
    cache = ContiguousCache(
        loaded.config, len(prompts), device=loaded.module.device, dtype=loaded.module.dtype, capacity=16
    )
    rows, step = list(range(len(prompts))), [p.tolist() for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    seen = []
    for _ in range(NEW_TOKENS):
        lengths = [len(s) for s in step]
        positions = cache.plan(rows, lengths)
        hidden = loaded.module(torch.tensor([t for s in step for t in s]), positions, cache)
        cache.advance()
        last = torch.tensor(lengths).cumsum(0) - 1
        seen.append(loaded.module.logits(hidden[last]))
        step = [[t] for t in seen[-1].argmax(-1).tolist()]
        for tokens, new in zip(out, step, strict=True):
            tokens += new
    return out, torch.stack(seen)


def greedy_without_cache(loaded: LoadedModel, prompt: Tensor) -> tuple[list[int], Tensor]:
    """Every token from a fresh pass over all before it. Returns new tokens and their logits, [N, V]."""
    tokens, seen = prompt, []
    for _ in range(NEW_TOKENS):
        seen.append(our_logits(loaded, [tokens])[0][-1])
        tokens = torch.cat([tokens, seen[-1].argmax(-1, keepdim=True)])
    return tokens[len(prompt) :].tolist(), torch.stack(seen)


def check_pieces(loaded: LoadedModel, prompts: Prompts) -> None:
    """A prompt in two pieces, the second beside another sequence, then both one token further, in the other order."""
    first, second = prompts
    cut = len(first) // 2
    cache = ContiguousCache(loaded.config, 2, device=loaded.module.device, dtype=loaded.module.dtype, capacity=cut + 1)
    steps = [
        ([0], [first[:cut]]),
        ([0, 1], [first[cut:-1], second[:-1]]),
        ([1, 0], [second[-1:], first[-1:]]),
    ]
    with torch.inference_mode():
        for rows, pieces in steps:
            positions = cache.plan(rows, [len(piece) for piece in pieces])
            hidden = loaded.module(torch.cat(pieces), positions, cache)
            cache.advance()
        last = loaded.module.logits(hidden)
    for row, prompt in ((1, first), (0, second)):
        assert furthest(last[row], our_logits(loaded, [prompt])[0][-1]) <= FP32


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def check_logits(loaded: LoadedModel, model: PreTrainedModel, prompts: Prompts, tolerance: float) -> float:
    """Packed and alone, against transformers. Returns the largest difference."""
    packed = our_logits(loaded, prompts)
    worst = 0.0
    for prompt, together in zip(prompts, packed, strict=True):
        reference = hf_logits(model, prompt)
        alone = our_logits(loaded, [prompt])[0]
        worst = max(worst, furthest(together, reference), furthest(alone, reference))
    assert worst <= tolerance, f"logits differ by {worst:.2e}, allowed {tolerance:.0e}"
    return worst


def check_greedy(loaded: LoadedModel, model: PreTrainedModel, prompts: Prompts) -> float:
    """Greedy tokens: batch through the cache = alone through the cache = without cache = transformers. Returns the
    smallest gap between the two best logits."""
    together, batch_logits = our_greedy(loaded, prompts)
    gap = float("inf")
    for i, prompt in enumerate(prompts):
        slow, logits = greedy_without_cache(loaded, prompt)
        best = logits.topk(2).values
        gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
        assert gap > NEAR_TIE, f"two best logits are {gap:.1e} apart: choose another seed"
        (alone,), alone_logits = our_greedy(loaded, [prompt])
        assert alone == slow, "the cache changes what is decoded"
        assert furthest(alone_logits[:, 0], logits) <= FP32
        assert together[i] == slow, "decoding together changes what is decoded"
        assert furthest(batch_logits[:, i], logits) <= FP32
        assert slow == hf_greedy(model, prompt), "transformers decodes something else"
        whole = torch.cat([prompt, torch.tensor(slow)])
        assert furthest(hf_logits(model, whole)[len(prompt) - 1 : -1], logits) <= FP32
    return gap


def check_way_back(loaded: LoadedModel, model: PreTrainedModel, folder: Path, prompts: Prompts) -> None:
    """Same names and bits under Hugging Face's names; a saved folder that transformers loads without a complaint."""
    assert config_from_hf(json.loads(json.dumps(config_to_hf(loaded.config)))) == loaded.config
    original, ours = load_file(loaded.path / "model.safetensors"), hf_state(loaded)
    assert set(ours) == set(original)
    for name, tensor in ours.items():
        assert torch.equal(tensor, original[name]), name
    loaded.save_pretrained(folder)
    with quiet():
        again, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model)
    for prompt in prompts:
        assert torch.equal(hf_logits(again, prompt), hf_logits(model, prompt))
    assert read_config(folder) == loaded.config


def check_family(
    config: PretrainedConfig,
    folder: Path,
    *,
    seed: int = 0,
    lengths: Sequence[int] = PROMPT_LENGTHS,
    edit: EditConfig | None = None,
    greedy: bool = True,
) -> Differences:
    """All of it for one transformers config. `lengths` of the two prompts must exceed a sliding window; `edit` rewrites
    config.json before we read it; `greedy=False` leaves decoding out (for variants that decode alike)."""
    model = tiny_model(config, seed)
    prompts = random_prompts(config.vocab_size, lengths)
    source = save_hf(model, folder / "hf", edit)
    loaded = load_ours(source)
    if any(loaded.config.is_sliding(i) for i in range(loaded.config.num_layers)):
        assert max(lengths) > loaded.config.sliding_window, "the prompt does not leave the window"
    spread = float(hf_logits(model, prompts[0]).std())
    assert 0.05 < spread < 3, f"logits have a standard deviation of {spread}: no fair measure"
    fp32 = check_logits(loaded, model, prompts, FP32)
    check_way_back(loaded, model, folder / "back", prompts)
    check_pieces(loaded, prompts)
    gap = check_greedy(loaded, model, prompts) if greedy else float("nan")
    with quiet():
        half = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    bf16 = check_logits(load_ours(source, "bfloat16"), half, prompts, BF16)
    found = Differences(fp32, bf16, spread, gap)
    print(f"{loaded.config.architecture}: fp32 {fp32:.1e}, bf16 {bf16:.1e}, std {spread:.2f}, tie {gap:.1e}")
    return found
