"""The shares of a model: equal, complete, and refused where there can be none. `tests/inference/test_workers.py` runs
them in processes."""

from dataclasses import replace

import pytest
import torch

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.families import config_from_hf
from llmasos.models.parallel import Shard, head_rows, shard_config
from tiny import TINY_LLAMA


def test_numbers_that_can_not_be_shared_out_are_named() -> None:
    config = config_from_hf({**TINY_LLAMA, "vocab_size": 300})
    with pytest.raises(
        InvalidInputError, match=r"tensor_parallel_size=3 .*4 heads, 2 key-value heads, MLP width 64.*1, 2, 4"
    ):
        shard_config(config, 3)
    assert shard_config(config, 4).num_kv_heads == 1
    with pytest.raises(InvalidInputError, match=r"6 heads, 3 key-value heads"):
        shard_config(replace(config, num_heads=6, num_kv_heads=3), 2)
    for change, reason in (
        ({"position": "alibi"}, "ALiBi"),
        ({"qk_norm": "full"}, "spans all heads"),
        ({"causal": False}, "encoder"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            shard_config(replace(config, **change), 2)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("vocab_size", [50, 300, 512, 50257])
def test_shares_of_the_vocabulary_are_equal_and_cover_it(vocab_size: int, size: int) -> None:
    shares = [head_rows(vocab_size, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted({row for share in shares for row in share}) == list(range(vocab_size))
    if vocab_size % (64 * size) == 0:
        assert len(shares[0]) * size == vocab_size


def test_the_shares_of_a_weight_make_it_up() -> None:
    config = config_from_hf({**TINY_LLAMA, "vocab_size": 300, "num_attention_heads": 8, "num_key_value_heads": 2})
    qkv = torch.arange(float(12 * config.head_dim))
    parts = [Shard(config, rank, 4).take("layers.0.attn.qkv.bias", qkv) for rank in range(4)]
    heads = [part.view(4, -1)[:, 0] / config.head_dim for part in parts if part is not None]
    assert [h.tolist() for h in heads] == [[0, 1, 8, 10], [2, 3, 8, 10], [4, 5, 9, 11], [6, 7, 9, 11]]
    out = torch.randn(32, 64)
    columns = [Shard(config, rank, 4).take("layers.0.mlp.down.weight", out) for rank in range(4)]
    assert torch.equal(torch.cat([c for c in columns if c is not None], 1), out)
    bias = [Shard(config, rank, 4).take("layers.0.mlp.down.bias", out[:, 0]) for rank in range(4)]
    assert bias[0] is not None
    assert bias[1:] == [None] * 3
