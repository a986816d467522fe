"""How far a student's next words are from a teacher's, in pieces of rows and of the vocabulary.

N = rows (tokens that are trained), E = a model's width before its head, V = vocabulary. p = the teacher's distribution,
q = the student's, both at temperature τ; per row

    forward_kl   Σ p (log p - log q)                         (arXiv:1503.02531)
    reverse_kl   Σ q (log q - log p)                         (arXiv:2306.08543)
    jsd          β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q     (arXiv:2306.13649)

times τ², so that gradients keep their size at any temperature. As in `losses`, logits exist for a piece of rows, in the
dtype of the products, and the student's become their own gradient in the forward pass; what is summed over the
vocabulary is in float32, for BLOCK logits at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmasos.train.losses import COLUMNS, pieces, wanted, whole_rows

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
BLOCK = 2**24
"""Logits that are in float32 at once, a few copies of each."""


@dataclass(frozen=True)
class Scores:
    """What a model's logits are made of: bent(hidden weightᵀ + bias), as in `linear_cross_entropy`."""

    hidden: Tensor
    """[N, E]; E and the number of words differ between models."""
    weight: Tensor
    """[V, E]."""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Divergence:
    """weight: of the divergence; cross-entropy with the labels has the rest."""

    kind: Kind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    weight: float = 1.0


class Distance(NamedTuple):
    """Sums over rows, float32 scalars; only `loss` has a gradient."""

    loss: Tensor
    """(1 - weight) · cross_entropy + weight · divergence."""
    cross_entropy: Tensor
    divergence: Tensor


def linear_divergence(student: Scores, teacher: Scores, labels: Tensor, options: Divergence) -> Distance:
    """Cross-entropy with labels [N] int64 and divergence from the teacher, from one product with each head.

    The teacher gets no gradient. Where the models' heads have different numbers of words (rows of filling behind the
    tokenizer's last token), the divergence is over those that both have. Gradients are computed in the forward pass:
    call it once per backward."""
    if not len(labels):
        none = (student.hidden.sum() + student.weight[:1].sum()).float() * 0.0  # a rank without a trained token
        return Distance(none, none.detach(), none.detach())
    needing = wanted(student.hidden, student.weight, student.bias)
    # torch gives `apply` no types
    found = _LinearDivergence.apply(*needing, student, teacher, labels, options)  # type: ignore[no-untyped-call]
    return Distance(*found)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: Scores,
        teacher: Scores,
        labels: Tensor,
        options: Divergence,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradient = of_hidden or of_weight or of_bias
        size, theirs = len(weight), len(teacher.weight)
        head, their_head = _filled(weight), _filled(teacher.weight)
        hidden, their_hidden = whole_rows(hidden), whole_rows(teacher.hidden)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(head) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None
        for part in pieces(len(hidden), len(head) + len(their_head)):
            x, num = hidden[part], len(labels[part])
            logits, expected = F.linear(x, head), F.linear(their_hidden[part], their_head)
            words, their_words = logits[:num, :size], expected[:num, :theirs]
            if bias is not None:
                words += bias
            if teacher.bias is not None:
                their_words += teacher.bias
            sums += torch.stack(_compared(words, their_words, labels[part], student, teacher, options, gradient))
            if not gradient:
                continue
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), x)
            if grad_bias is not None:
                grad_bias += words.sum(0, dtype=torch.float32)
        grad_hidden = None if grad_hidden is None else grad_hidden[: len(labels)]
        grad_weight = None if grad_weight is None else grad_weight[:size]
        ctx.gradients = grad_hidden, grad_weight, None if grad_bias is None or bias is None else grad_bias.to(bias)
        cross_entropy, divergence = sums.unbind()
        loss = (1 - options.weight) * cross_entropy + options.weight * divergence
        cross_entropy, divergence = cross_entropy.clone(), divergence.clone()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "linear_divergence keeps its gradients for one backward pass"
        return (*(None if g is None else g.mul_(outer[0].to(g.dtype)) for g in gradients), None, None, None, None)


def _filled(weight: Tensor) -> Tensor:
    """With as many rows as matrix kernels like."""
    more = -len(weight) % COLUMNS
    return F.pad(weight, (0, 0, 0, more)) if more else weight


def _compared(
    ours: Tensor,
    theirs: Tensor,
    labels: Tensor,
    student: Scores,
    teacher: Scores,
    options: Divergence,
    gradient: bool,
) -> list[Tensor]:
    """Summed cross-entropy and divergence of a piece of rows; where `gradient`, `ours` becomes it."""
    if ours.is_cuda:
        from llmasos.train.kernels.divergence import divergence_

        found = divergence_(
            ours,
            theirs,
            labels,
            kind=options.kind,
            beta=options.beta,
            temperature=options.temperature,
            weight=options.weight,
            scales=(student.scale, teacher.scale),
            caps=(student.softcap, teacher.softcap),
            gradient=gradient,
        )
        return [each.sum() for each in found]
    pair = _Pair(ours, theirs, labels, student, teacher, options)
    sums = [pair.cross_entropy.sum(), pair.divergence().sum()]
    if gradient:
        pair.turn()
    return sums


class _Pair:
    """The logits of both models for a piece of rows, [n, V] each."""

    def __init__(
        self, ours: Tensor, theirs: Tensor, labels: Tensor, student: Scores, teacher: Scores, options: Divergence
    ) -> None:
        self.ours, self.theirs, self.labels = ours, theirs, labels
        self.student, self.teacher, self.options = student, teacher, options
        self.size, self.shared = ours.shape[1], min(ours.shape[1], theirs.shape[1])
        t = options.temperature
        self.log_sum = self._log_sum(ours, student, 1.0, self.size)
        is_same = t == 1.0 and self.shared == self.size
        self.our_sum = self.log_sum if is_same else self._log_sum(ours, student, t, self.shared)
        self.their_sum = self._log_sum(theirs, teacher, t, self.shared)
        own = _bent(ours.gather(1, labels[:, None]), student)[0][:, 0]
        self.cross_entropy = self.log_sum - own

    def _blocks(self, *ends: int) -> Iterator[slice]:
        """Columns, up to each of `ends`. As even as can be: a heap would keep room for a last one that is small."""
        most = max(COLUMNS, BLOCK // len(self.labels))
        begin = 0
        for end in ends:
            num = math.ceil((end - begin) / most)
            step = math.ceil((end - begin) / max(1, num))
            yield from (slice(at, min(at + step, end)) for at in range(begin, end, step or 1))
            begin = end

    def _log_sum(self, logits: Tensor, scores: Scores, temperature: float, end: int) -> Tensor:
        """log Σ exp(logit / temperature), [n, 1] squeezed to [n]."""
        total = torch.full((len(logits),), -math.inf, dtype=torch.float32, device=logits.device)
        for block in self._blocks(end):
            x = _bent(logits[:, block], scores)[0] / temperature
            total = torch.logaddexp(total, x.logsumexp(-1))
        return total

    def _logs(self, block: slice, ours: Tensor) -> tuple[Tensor, Tensor]:
        """log q and log p of a block; `ours`: the student's bent logits of it."""
        t = self.options.temperature
        log_p = _bent(self.theirs[:, block], self.teacher)[0] / t - self.their_sum[:, None]
        return ours / t - self.our_sum[:, None], log_p

    def divergence(self) -> Tensor:
        """Per row, [n]. Keeps what `turn` needs of it."""
        kind, beta = self.options.kind, self.options.beta
        of_p, of_q = torch.zeros_like(self.log_sum), torch.zeros_like(self.log_sum)
        for block in self._blocks(self.shared):
            log_q, log_p = self._logs(block, _bent(self.ours[:, block], self.student)[0])
            if kind == "forward_kl":
                of_p += (log_p.exp() * (log_p - log_q)).sum(-1)
            elif kind == "reverse_kl":
                of_q += (log_q.exp() * (log_q - log_p)).sum(-1)
            else:
                log_m = _mixed(log_p, log_q, beta)
                of_p += (log_p.exp() * (log_p - log_m)).sum(-1)
                of_q += (log_q.exp() * (log_q - log_m)).sum(-1)
        self.of_q = of_q
        mixed = beta * of_p + (1 - beta) * of_q if kind == "jsd" else of_p + of_q
        return mixed * self.options.temperature**2

    def turn(self) -> None:
        """The student's logits become d loss / d logits. With a = log q up to a constant of the row, d KL(p ‖ q) / da
        is q - p, and d f(q) / da is q (f' - Σ q f')."""
        weight, t = self.options.weight, self.options.temperature
        for block in self._blocks(self.shared, self.size):
            ours, slope = _bent(self.ours[:, block], self.student)
            gradient = torch.zeros_like(ours)
            if weight < 1:
                gradient += (ours - self.log_sum[:, None]).exp()
                at = torch.arange(block.start, block.stop, device=ours.device)
                gradient -= (self.labels[:, None] == at).float()
                gradient *= 1 - weight
            if block.start < self.shared:
                gradient += weight * t * self._slope(*self._logs(block, ours))  # τ² of the loss, 1 / τ of a
            if slope is not None:
                gradient *= slope
            self.ours[:, block] = (gradient * self.student.scale).to(self.ours.dtype)

    def _slope(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        kind, beta = self.options.kind, self.options.beta
        if kind == "forward_kl":
            return log_q.exp() - log_p.exp()
        if kind == "reverse_kl":
            return log_q.exp() * (log_q - log_p - self.of_q[:, None])
        return (1 - beta) * log_q.exp() * (log_q - _mixed(log_p, log_q, beta) - self.of_q[:, None])


def _bent(logits: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits in float32, and the cap's slope."""
    x = logits.float() * scores.scale
    if not scores.softcap:
        return x, None
    x = torch.tanh(x / scores.softcap) * scores.softcap
    return x, 1 - (x / scores.softcap).square()


def _mixed(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log (β p + (1 - β) q)."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """The sum over rows [N, D] of 1 - cosine, a float32 scalar (DistilBERT's, arXiv:1910.01108)."""
    return (1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1)).sum()
