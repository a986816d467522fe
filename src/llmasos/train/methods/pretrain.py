"""Pretraining: a model of one's own from a corpus, or one that goes on with more text.

From scratch there is one dial, the depth (as nanochat has it): the width is 64 times that, heads have 128 dimensions
(64 where the width is no multiple of 128), and batch, rate and the number of tokens follow. The architecture is
Qwen3's (RMSNorm, rotary positions, normed queries and keys, gated MLP), so that every engine runs the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from llmasos.data import parse_sources, train_tokenizer
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.families import config_from_hf
from llmasos.models.layers import Norm
from llmasos.models.load import LoadedModel
from llmasos.store import ensure
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.train.config import TrainConfig
from llmasos.train.marks import mark, written
from llmasos.train.methods.base import Method, NextToken
from llmasos.train.parallel.shard import Spreader

WIDTH = 64
"""Of each layer of depth."""
DEPTH = 12
"""Where nothing is said."""
TOKENS_PER_WEIGHT = 20
"""What is worth reading (arXiv:2203.15556)."""
CONTEXT = 2048
TOKENIZER = "tokenizer"
"""Folder of a run; marked as the run's until that has begun."""


class Pretrain(Method):
    @classmethod
    def defaults(cls, config: TrainConfig) -> Mapping[str, Any]:
        if config.model is not None:
            return {"tuning": "full", "lr": 1e-4, "optimizer": "adamw", "weight_decay": 0.1, "batch_tokens": 131_072}
        depth = config.depth or DEPTH
        return {
            "tuning": "full",
            "depth": depth,
            "lr": 3e-3 * math.sqrt(DEPTH / depth),
            "optimizer": "muon",
            "weight_decay": 0.1,
            # the noise of gradients falls with the loss, and larger models have a lower one (arXiv:1812.06162)
            "batch_tokens": 1 << round(17 + math.log2(max(depth, 4) / DEPTH)),
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.config.model is not None:
            return super().tokenizer
        if self.config.tokenizer is not None:
            return load_tokenizer(ensure(self.config.tokenizer))
        return self._own_tokenizer()

    def _own_tokenizer(self) -> Tokenizer:
        """Learnt from the data, once for each run."""
        config = self.config
        assert config.output is not None
        folder = config.output / TOKENIZER
        if not (folder / "tokenizer.json").exists():
            refs = [source.ref for source in parse_sources(config.data)]
            made = train_tokenizer(refs, vocab_size=config.vocab_size, schema=config.schema_, columns=config.columns)
            with written(folder):
                folder.mkdir(parents=True, exist_ok=True)
                mark(folder, config.name or config.output.resolve().name)
                made.save_pretrained(folder)
        return load_tokenizer(folder)

    @cached_property
    def shape(self) -> ModelConfig:
        if self.config.model is not None:
            return super().shape
        return config_from_hf(
            shape_of(self.config.depth or DEPTH, self.tokenizer.vocab_size, self.config.max_length or CONTEXT)
        )

    def build(self, device: torch.device, spreader: Spreader) -> NextToken:
        if self.config.model is not None:
            model = self.weights(device, spreader.dtype, spreader)
        else:
            model = self._begun(device, spreader)
        return NextToken(model, self.trainee(model, spreader))

    def _begun(self, device: torch.device, spreader: Spreader) -> LoadedModel:
        """Drawn block by block, so that any number of processes begins with the same numbers."""
        with torch.device("meta"):
            module = Decoder(self.shape)
        draw = torch.Generator(device).manual_seed(self.config.seed)
        assert self.config.output is not None
        model = LoadedModel(module, self.shape, self.tokenizer, self.config.output / "model")
        for name, child in module.named_children():
            if child is not module.layers:
                begin(child, draw, is_head=name == "head")
                continue
            for number, block in enumerate(module.layers):
                begin(block, draw)
                self.made_to_learn(model, f"layers.{number}", spreader)
        self.made_to_learn(model, "", spreader)
        return model


def shape_of(depth: int, vocab_size: int, context: int) -> dict[str, Any]:
    """The config.json of a model from scratch."""
    width = WIDTH * depth
    head_dim = 128 if width % 128 == 0 and width >= 512 else 64
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 64) * 64,
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_dim,
        "num_key_value_heads": width // head_dim,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def begin(module: nn.Module, draw: torch.Generator, *, is_head: bool = False) -> None:
    """Give a part of a decoder weights, on the device of `draw`: matrices at a scale that keeps the size of what
    passes, those that write to the stream at zero, so that every block begins as the identity; the head near zero, so
    that the first loss is log V. Norms multiply by one."""
    module.to_empty(device=draw.device)
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding):
            child.weight.data.normal_(0.0, 1.0, generator=draw)
        elif isinstance(child, nn.Linear):
            rows, columns = child.weight.shape
            writes = name.endswith(("attn.out", "mlp.down"))
            std = 0.0 if writes else min(1.0, math.sqrt(rows / columns)) / math.sqrt(columns)
            child.weight.data.normal_(0.0, 1e-3 if is_head else std, generator=draw)
        elif isinstance(child, Norm) and child.weight is not None:
            child.weight.data.fill_(1.0)
