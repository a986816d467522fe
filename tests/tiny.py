"""Tiny random models for tests, written as Hugging Face folders in milliseconds and without transformers."""

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.",
    "Models are found, run, trained and measured; an application answers questions about them.",
    "敏捷的棕色狐狸跳过懒狗。法国的首都是哪里？是巴黎。",
]
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_tokenizer(folder: Path, *, chat: bool = True) -> int:
    """A small byte-level BPE with ChatML-like special tokens; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_tiny_model(folder: Path, *, chat: bool = True, seed: int = 0, **changes: object) -> Path:
    """A random two-layer LLaMA with a tokenizer, as a Hugging Face folder."""
    import torch

    from llmasos.formats import save_safetensors
    from llmasos.models.decoder import Decoder
    from llmasos.models.families import config_from_hf, family_of
    from llmasos.models.families.mapping import to_hf

    folder.mkdir(parents=True, exist_ok=True)
    hf = {**TINY_LLAMA, "vocab_size": write_tokenizer(folder, chat=chat), **changes}
    (folder / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(p.shape, generator=generator) * 0.2 if p.dim() > 1 else torch.ones(p.shape)
        for name, p in Decoder(config).state_dict().items()
    }
    save_safetensors(dict(to_hf(family_of(config), config, state)), folder, metadata={"format": "pt"})
    return folder


ADAPTED = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.gate_proj": (64, 32)}
"""Outputs and inputs of the tiny model's layers that a tiny adapter changes."""


def write_tiny_adapter(
    folder: Path, *, seed: int = 0, rank: int = 4, shapes: dict[str, tuple[int, int]] = ADAPTED
) -> Path:
    """A random LoRA adapter of the tiny model, as PEFT writes it; strong enough to change every text."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(TINY_LLAMA["num_hidden_layers"]):
        for part, (rows, width) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
