"""Tiny models of several families over pages that a small allocator hands out: what tests of paged attention share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from llmasos.inference.batch import Batch
from llmasos.inference.cache import Copy
from llmasos.inference.pages import Pages, page_groups
from llmasos.models.attention import ContiguousCache
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder

VOCAB, PAGE = 50, 16
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "head_dim": 8}
CPU = torch.device("cpu")


def config_of(**changes: object) -> ModelConfig:
    fields = SIZES | {"num_heads": 4, "num_kv_heads": 2, "context_length": 256} | changes
    return ModelConfig(architecture="Tiny", family="tiny", **fields)


FAMILIES = {
    "llama": config_of(),
    "one key head": config_of(num_kv_heads=1, rope_interleaved=True),
    "mistral": config_of(sliding_window=20),
    "gemma": config_of(sliding_window=20, layer_types=("sliding", "full", "sliding"), attention_softcap=3.0),
    "bloom": config_of(num_kv_heads=4, position="alibi"),
    "falcon": config_of(position="alibi", alibi_scale=8**-0.5, alibi_bf16=True, block="parallel"),
    "gpt2": config_of(num_kv_heads=4, position="learned", norm="layernorm", scale_by_layer=True, gated=False),
}


def decoder_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    module = Decoder(config)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.2 * noise
    return module.to(dtype).requires_grad_(False)


@dataclass
class Text:
    """A sequence as the engine would keep it: tokens, and a page table per group."""

    tokens: list[int]
    tables: list[list[int]]
    computed: int = 0


@dataclass
class World:
    """Runs packed passes over pages that it hands out itself, scattered or in order."""

    config: ModelConfig
    module: Decoder
    pages: Pages
    scattered: bool = True
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.free = [list(range(1, n))[::-1] for n in self.pages.num_pages]
        if self.scattered:
            for pages in self.free:
                self.random.shuffle(pages)
        self.copies: list[Copy] = []

    def text(self, tokens: list[int]) -> Text:
        return Text(list(tokens), [[] for _ in self.pages.groups])

    def fork(self, text: Text) -> Text:
        """Whole pages are shared, the last one is copied."""
        child = Text(list(text.tokens), [list(t) for t in text.tables], text.computed)
        if text.computed % PAGE:
            for group, table in enumerate(child.tables):
                target = self.free[group].pop()
                self.copies.append(Copy(group, table[-1], target))
                table[-1] = target
        return child

    def run(self, work: list[tuple[Text, int]]) -> torch.Tensor:
        """Compute the next `num` tokens of each text; returns the packed hidden states."""
        for text, num in work:
            for group, window in enumerate(self.pages.groups):
                table = text.tables[group]
                while len(table) * PAGE < text.computed + num:
                    table.append(self.free[group].pop())
                for i in range(max(0, text.computed - window + 1) // PAGE if window else 0):
                    table[i] = 0
        if self.copies:
            self.pages.copy(self.copies)
            self.copies = []
        batch = self.batch(work)
        self.pages.plan(batch)
        with torch.inference_mode():
            lengths = torch.cat([torch.full((n,), len(text.tokens)) for text, n in work])
            out = self.module(batch.tokens, batch.positions, self.pages, lengths)
        for text, num in work:
            text.computed += num
        return out

    def release(self, text: Text) -> None:
        for free, table in zip(self.free, text.tables, strict=True):
            free += [page for page in table if page]

    def batch(self, work: list[tuple[Text, int]]) -> Batch:
        new = [num for _, num in work]
        lengths = [text.computed + num for text, num in work]
        columns = max(len(t) for text, _ in work for t in text.tables) + 1
        tables = [
            torch.tensor([text.tables[g] + [0] * (columns - len(text.tables[g])) for text, _ in work])
            for g in range(len(self.pages.groups))
        ]
        return Batch(
            tokens=torch.tensor([t for text, num in work for t in text.tokens[text.computed : text.computed + num]]),
            positions=torch.cat([torch.arange(text.computed, text.computed + num) for text, num in work]),
            sequences=torch.repeat_interleave(torch.arange(len(work)), torch.tensor(new)),
            query_start=torch.tensor([0, *new]).cumsum(0),
            seq_lens=torch.tensor(lengths),
            tables=tables,
            page_size=PAGE,
            max_query=max(new),
            max_seq_len=max(lengths),
        )


def world_of(
    config: ModelConfig, *, scattered: bool = True, dtype: torch.dtype = torch.float32, **options: object
) -> World:
    module = decoder_of(config, dtype)
    pages = Pages(config, [80] * len(page_groups(config)[0]), PAGE, device="cpu", dtype=dtype, **options)
    for memory in (*pages.keys, *pages.values, *pages.key_scales, *pages.value_scales):
        if memory is not None and memory.is_floating_point():
            memory.fill_(float("nan"))
    return World(config, module, pages, scattered)


def alone(world: World, tokens: list[int], pieces: list[int]) -> torch.Tensor:
    """The contiguous cache's hidden states of one text, computed in the given pieces."""
    cache = ContiguousCache(world.config, 1, device=CPU, dtype=world.module.dtype)
    parts, at = [], 0
    with torch.inference_mode():
        for n in pieces:
            parts.append(world.module(torch.tensor(tokens[at : at + n]), cache.plan([0], [n]), cache))
            cache.advance()
            at += n
    return torch.cat(parts)


def random_tokens(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(num)]
