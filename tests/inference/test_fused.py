"""The fused step equals `Decoder.forward`: prompts, their later pieces, decodes, padding; for every wiring it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from llmasos.inference.batch import Batch
from llmasos.inference.fused import FusedDecoder
from llmasos.inference.kernels import linear
from llmasos.models.attention import ContiguousCache, attention, layer_specs
from llmasos.models.config import ModelConfig, RopeScaling
from llmasos.models.decoder import Decoder

# numpy says so in the interpreter; 1 / (1 + inf) is the 0 that is meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LLAMA = ModelConfig("", "", 64, 32, 48, 1, 4, 2, 8, 128, tie_embeddings=True)
CONFIGS: dict[str, ModelConfig] = {
    "llama": replace(LLAMA, num_layers=2),
    "qwen2: bias, and a stretched rotation": replace(
        LLAMA, qkv_bias=True, tie_embeddings=False, rope_scaling=RopeScaling("llama3", 8.0, 32)
    ),
    "qwen3: norms of heads": replace(LLAMA, qk_norm="head", head_dim=16),
    "stablelm-like: part of a head turns": replace(LLAMA, rotary_dim=4),
    "neighbours turn": replace(LLAMA, rope_interleaved=True),
    "granite's scales, and a layer without positions": replace(
        LLAMA, num_layers=2, embedding_scale=3.0, residual_scale=0.4, logit_scale=0.5, nope_layers=(1,)
    ),
    "gemma3: sandwich, two rotations": replace(
        LLAMA,
        num_layers=2,
        block="sandwich",
        qk_norm="head",
        norm_unit_offset=True,
        activation="gelu_tanh",
        embedding_scale=32**0.5,
        rope_local_theta=100.0,
        sliding_window=4,
        layer_types=("sliding", "full"),
    ),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs for the interpreter, and both ways of the step within a handful of tokens."""
    monkeypatch.setattr(linear, "MAX_TOKENS", 4)
    monkeypatch.setattr(linear, "tiling_for", lambda *shape, gated: linear.Tiling(32, 64))


class FakePages:
    """Pages without anything clever: keys and values are gathered and attention is the definition."""

    def __init__(self, config: ModelConfig, page_size: int = 4) -> None:
        shape = (8 * page_size, config.num_kv_heads, config.head_dim)
        self.specs, self.page_size = layer_specs(config), page_size
        self.keys = [torch.full(shape, torch.nan, device=DEVICE) for _ in self.specs]
        self.values = [torch.full(shape, torch.nan, device=DEVICE) for _ in self.specs]
        self.key_scales = self.value_scales = [None] * len(self.specs)
        self.layer_group = [0] * len(self.specs)
        self.batch: Batch

    def read(self, layer: int, q: Tensor) -> Tensor:
        batch, out = self.batch, torch.zeros_like(q)
        starts = batch.query_start.tolist()
        for i, length in enumerate(batch.seq_lens.tolist()):
            if length:
                at = torch.arange(length, device=q.device)
                slots = batch.tables[0][i, at // self.page_size] * self.page_size + at % self.page_size
                mine = slice(starts[i], starts[i + 1])
                keys, values = self.keys[layer][slots], self.values[layer][slots]
                out[mine] = attention(q[mine], keys, values, self.specs[layer], batch.positions[mine], at)
        return out


class Pair:
    """The same sequences through the plain decoder and the fused one."""

    def __init__(self, config: ModelConfig, decoder: Decoder | None = None, **options: Any) -> None:
        self.decoder = decoder or random_decoder(config)
        for rope in self.decoder.ropes.values():
            rope.prepare(16, DEVICE, torch.float32)
        self.pages = FakePages(config)
        self.fused = FusedDecoder(self.decoder, self.pages, **options)
        self.cache = ContiguousCache(config, 3, device=DEVICE, dtype=torch.float32)
        self.lengths = [0, 0, 0]

    def step(self, new: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states of the new tokens of the three sequences: plain, fused. A sequence without any is padding."""
        rows = [i for i, ids in enumerate(new) if ids]
        positions = self.cache.plan(rows, [len(new[i]) for i in rows])
        tokens = torch.tensor([t for i in rows for t in new[i]], device=DEVICE)
        plain = self.decoder(tokens, positions, self.cache)
        self.cache.advance()
        for i in rows:
            self.lengths[i] += len(new[i])
        fused = self.fused.forward(self._batch(new))
        starts = [sum(len(ids) or 1 for ids in new[:i]) for i in rows]
        return plain, torch.cat([fused[s : s + len(new[i])] for s, i in zip(starts, rows, strict=True)])

    def _batch(self, new: list[list[int]]) -> Batch:
        padded = [ids or [0] for ids in new]
        counts = [len(ids) for ids in padded]
        starts = [n - len(ids) if ids else 0 for n, ids in zip(self.lengths, new, strict=True)]
        positions = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
        lens = [n if ids else 0 for n, ids in zip(self.lengths, new, strict=True)]
        offsets = [sum(counts[:i]) for i in range(4)]
        tables = torch.tensor([[3, 6], [1, 4], [5, 2]], dtype=torch.int32, device=DEVICE)
        self.pages.batch = Batch(
            tokens=torch.tensor([t for ids in padded for t in ids], device=DEVICE),
            positions=torch.tensor(positions, device=DEVICE),
            sequences=torch.arange(3, dtype=torch.int32, device=DEVICE).repeat_interleave(torch.tensor(counts)),
            query_start=torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
            tables=[tables * torch.tensor(lens, device=DEVICE).bool()[:, None]],
            page_size=self.pages.page_size,
            max_query=max(counts),
            max_seq_len=max(lens),
        )
        return self.pages.batch


def random_decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).to(DEVICE).requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.2)
    return decoder


def ids(num: int) -> list[int]:
    return torch.randint(0, 64, (num,)).tolist()


def assert_same(plain: Tensor, fused: Tensor) -> None:
    torch.testing.assert_close(fused, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prompts_pieces_and_decodes_equal_the_plain_decoder(config: ModelConfig) -> None:
    pair = Pair(config)
    assert FusedDecoder.supports(config)
    for new in ([ids(5), ids(2), []], [ids(2), [], ids(1)]):
        assert_same(*pair.step(new))


def test_greedy_tokens_are_the_same() -> None:
    pair = Pair(CONFIGS["qwen3: norms of heads"])
    new = [ids(3), ids(2), ids(4)]
    for _ in range(3):
        plain, fused = pair.step(new)
        ends = torch.tensor([len(part) for part in new]).cumsum(0) - 1
        expected = pair.decoder.logits(plain[ends]).argmax(-1)
        assert torch.equal(pair.fused.logits(fused[ends]).argmax(-1), expected)
        new = [[t] for t in expected.tolist()]


@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize("changes", [{}, {"head_bias": True, "tie_embeddings": False}, {"final_softcap": 5.0}], ids=str)
def test_logits_equal_the_plain_decoder(num_rows: int, changes: dict[str, Any]) -> None:
    pair = Pair(replace(LLAMA, **changes))
    hidden = torch.randn(num_rows, 32, device=DEVICE)
    torch.testing.assert_close(pair.fused.logits(hidden), pair.decoder.logits(hidden), atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """A layer that is no nn.Linear: it must be called, not read."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("names", [("qkv", "up"), ("out", "down"), ("qkv", "out", "up", "down")], ids=str)
def test_layers_of_other_kinds_are_called(names: tuple[str, ...]) -> None:
    decoder = random_decoder(LLAMA)
    for block in decoder.layers:
        for name in names:
            owner = block.attn if name in ("qkv", "out") else block.mlp
            setattr(owner, name, Doubled(getattr(owner, name)))
    pair = Pair(LLAMA, decoder)
    for new in ([ids(5), [], ids(2)], [ids(1), [], ids(1)]):
        assert_same(*pair.step(new))


@pytest.mark.usefixtures("rows_anywhere")
def test_an_invariant_pass_gives_each_sequence_what_it_gets_alone() -> None:
    together, alone = (Pair(LLAMA, invariant=True) for _ in range(2))
    for new in ([ids(6), ids(2), ids(1)], [ids(1), ids(1), []]):
        plain, fused = together.step(new)
        assert_same(plain, fused)
        assert torch.equal(alone.step([[], new[1], []])[1], fused[len(new[0]) :][: len(new[1])])


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "parallel"},
        {"norm": "layernorm"},
        {"qk_norm": "full"},
        {"position": "alibi"},
        {"gated": False},
        {"clip_qkv": 8.0},
        {"rope_scaling": RopeScaling("dynamic", 2.0)},
    ],
    ids=str,
)
def test_what_it_cannot_do_it_does_not_claim(changes: dict[str, Any]) -> None:
    assert not FusedDecoder.supports(replace(LLAMA, **changes))
