"""Losses over the vocabulary that never hold all logits at once.

N = rows (tokens that are trained), D = model width, V = vocabulary. A piece of rows at a time is multiplied with the
head, turned into its own gradient in place, and multiplied back (the idea of Liger's fused linear cross-entropy,
arXiv:2410.10989): memory for PIECE logits instead of N · V, and no second product with the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 2**29
"""Logits that exist at once: a gibibyte in bfloat16."""
COLUMNS = 64
"""A vocabulary is filled up to a multiple of this: matrix kernels need aligned rows (GPT-2 has 50,257 words)."""
ROWS = 64
"""On CPUs rows of bfloat16 are filled up to a multiple of this. oneDNN compiles a kernel for every shape of a product,
which takes half a mebibyte and a millisecond and is never let go of: batches of all lengths would fill the memory with
kernels."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """The sum over rows of -log softmax(bent(hidden weightᵀ + bias))[label], a float32 scalar.

    hidden [N, D], weight [V, D], labels [N] int64 (all of them trained: choose rows before), bias [V].
    bent(x) = softcap · tanh(scale · x / softcap), or scale · x without a cap. Products are in `hidden`'s dtype, what is
    summed over the vocabulary is in float32. Gradients are computed in the forward pass: call it once per backward.
    """
    if not len(labels):
        return (hidden.sum() + weight[:1].sum()).float() * 0.0  # a rank without a trained token still takes part
    needing = wanted(hidden, weight, bias)
    # torch gives `apply` no types
    loss: Tensor = _LinearCrossEntropy.apply(*needing, labels, scale, softcap)  # type: ignore[no-untyped-call]
    return loss


def wanted(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For a Function that makes gradients in its forward pass: it is told of weights that require them also where
    autograd is off."""
    return tensors if torch.is_grad_enabled() else tuple(None if t is None else t.detach() for t in tensors)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradient = of_hidden or of_weight or of_bias
        size, filled = len(weight), -len(weight) % COLUMNS
        head = F.pad(weight, (0, 0, 0, filled)) if filled else weight
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden = whole_rows(hidden)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(head) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None
        for part in pieces(len(hidden), len(head)):
            x = hidden[part]
            logits = F.linear(x, head)
            words = logits[: len(labels[part]), :size]
            if bias is not None:
                words += bias
            loss += cross_entropy_(words, labels[part], scale=scale, softcap=softcap, gradient=gradient).sum()
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), x)
            if grad_bias is not None:
                grad_bias += words.sum(0, dtype=torch.float32)
        grad_hidden = None if grad_hidden is None else grad_hidden[: len(labels)]
        grad_weight = None if grad_weight is None else grad_weight[:size]
        ctx.gradients = grad_hidden, grad_weight, None if grad_bias is None or bias is None else grad_bias.to(bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "linear_cross_entropy keeps its gradients for one backward pass"
        return (*(None if g is None else g.mul_(outer[0].to(g.dtype)) for g in gradients), None, None, None)


def missing_rows(num: int, device: torch.device, dtype: torch.dtype) -> int:
    """Of `num` rows, see ROWS."""
    return -num % ROWS if dtype == torch.bfloat16 and device.type == "cpu" else 0


def whole_rows(x: Tensor) -> Tensor:
    """[N, ...] with the rows that are missing: zeros, whose logits and gradients are 0."""
    missing = missing_rows(len(x), x.device, x.dtype)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def pieces(num_rows: int, vocab_size: int) -> list[slice]:
    """Rows whose logits over `vocab_size` words exist at once."""
    rows = max(1, PIECE // vocab_size)
    rows = rows if rows < 256 else rows // 256 * 256  # matrix kernels want whole tiles
    return [slice(at, min(at + rows, num_rows)) for at in range(0, num_rows, rows)]


def cross_entropy_(logits: Tensor, labels: Tensor, *, scale: float, softcap: float, gradient: bool) -> Tensor:
    """Losses [N] float32 of logits [N, V], whose place takes d loss / d logits where `gradient`."""
    if logits.is_cuda:
        from llmasos.train.kernels.cross_entropy import cross_entropy_ as on_gpu

        return on_gpu(logits, labels, scale=scale, softcap=softcap, gradient=gradient)
    x = logits.float() * scale
    slope = None
    if softcap:
        x = torch.tanh(x / softcap) * softcap
        slope = 1 - (x / softcap).square()
    losses = torch.logsumexp(x, -1) - x.gather(1, labels[:, None])[:, 0]
    if gradient:
        x = x.softmax(-1)
        x[torch.arange(len(labels)), labels] -= 1
        if slope is not None:
            x *= slope
        logits.copy_(x * scale)
    return losses
