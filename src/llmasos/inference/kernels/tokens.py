"""The input of a pass whose last tokens are not known on the CPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _resolve(tokens, pool, out, num_tokens, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    token = tl.load(tokens + at, mask=inside, other=0).to(tl.int32)
    held = tl.load(pool + tl.maximum(-1 - token, 0), mask=inside & (token < 0), other=0).to(tl.int32)
    tl.store(out + at, tl.where(token < 0, held, token), mask=inside)


def resolve_tokens(tokens: Tensor, pool: Tensor, out: Tensor) -> None:
    """out [T] gets tokens [T], but where a token is -1 - row what pool [rows] holds there."""
    num_tokens = tokens.shape[0]
    _resolve[(triton.cdiv(num_tokens, 256),)](tokens, pool, out, num_tokens, BLOCK=256)
