"""Random PEFT adapters for tests: written by PEFT itself, or byte by byte where a file must be wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from family_equality import quiet
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

LLAMA_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def silent() -> Iterator[None]:
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\..*")
        yield


def save_random_adapter(hf: PreTrainedModel, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter whose A and B are both random, as PEFT saves it. `hf` is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    with silent():
        adapted = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)
        adapted.unload()
    return folder


@torch.inference_mode()
def peft_logits(hf: PreTrainedModel, folder: Path, prompts: list[Tensor]) -> list[Tensor]:
    """[T, V] of each prompt with the adapter of `folder`."""
    with silent():
        adapted = peft.PeftModel.from_pretrained(hf, folder).eval()
        logits = [adapted(prompt[None], use_cache=False).logits[0] for prompt in prompts]
        adapted.unload()
    return logits


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder with just these tensors, their names without `base_model.model.`, and this config."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
