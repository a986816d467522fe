"""Logits -> tokens for a whole batch, every row by parameters of its own.

R = rows of a batch, V = vocabulary. Order, as in Hugging Face's `generate`: bias, penalties, the caller's own
processors and the grammar's mask on the raw logits, then temperature, top-k, top-p, min-p, typical. A removed token has
the logit -inf.

The draw is the inverse of the distribution function in vocabulary order at one uniform number per row, which depends on
the row's seed and the position of the token in its output alone. With arithmetic that never mixes rows, a row's token
does not depend on what else is in the batch, bit for bit.

On a CPU, rows that draw are taken one by one. On a GPU, Triton kernels (kernels/sample.py) take them all, and nothing
waits for the device. Both keep the same sets of tokens, up to the rounding of sums, and but for this: tokens that tie
with the least likely one of a nucleus (top-p) all stay on a GPU, whereas a CPU keeps as many as the nucleus needs.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmasos.inference.request import LogitsProcessor, SamplingParams, TokenLogprob

REMOVED = float("-inf")
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


# one row, on the CPU


def penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Bias and penalties for logits [V]. `prompt` and `output` are the tokens seen so far. Ids of the bias are in the
    vocabulary."""
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(0, ids, bias)
    if params.repetition_penalty != 1.0 and (prompt or output):
        ids = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        seen = logits[ids]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    if (params.presence_penalty or params.frequency_penalty) and output:
        ids, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        cost = params.presence_penalty + params.frequency_penalty * counts
        logits = logits.index_add(0, ids, -cost.to(logits.dtype))
    return logits


class Truncation(NamedTuple):
    """The parameters that choose among the tokens of a row. Temperature 0 takes the likeliest."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> Truncation:
        p = params
        return cls(0.0 if p.greedy else p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p)


def truncate(logits: Tensor, params: Truncation | SamplingParams) -> Tensor:
    """Logits [V] over the temperature, removed tokens at -inf; at least one token stays."""
    ids, values = survivors(logits, params)
    if ids is None:
        return values
    return torch.full_like(logits, REMOVED).index_copy_(0, ids, values)


def survivors(logits: Tensor, params: Truncation | SamplingParams) -> tuple[Tensor | None, Tensor]:
    """The tokens of a row [V] that may be drawn, ascending (None: all), and their logits over the temperature. Later
    steps look only at what earlier ones have kept."""
    p = params
    values = logits if p.temperature == 1.0 else logits / p.temperature
    steps: list[Callable[[Tensor], Tensor]] = []
    if 0 < p.top_k < len(logits):
        steps.append(lambda x: top_k(x, p.top_k))
    if p.top_p < 1.0:
        steps.append(lambda x: top_p(x, p.top_p))
    if p.min_p > 0.0:
        steps.append(lambda x: min_p(x, p.min_p))
    if p.typical_p < 1.0:
        steps.append(lambda x: typical_p(x, p.typical_p))
    ids: Tensor | None = None
    for step in steps:
        kept = step(values)
        ids, values = kept if ids is None else ids[kept], values[kept]
    return ids, values


def top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest of [n], ascending ids; ties with the k-th stay."""
    if k >= len(logits):
        return torch.arange(len(logits))
    highs = logits[: len(logits) // 64 * 64].view(-1, 64).amax(1)
    if k >= len(highs):
        return _where(logits.numpy() >= float(logits.topk(k).values[-1]))
    # the k-th largest of the maxima of runs is no larger than the k-th of all
    some = _where(logits.numpy() >= float(highs.topk(k).values[-1]))
    values = logits[some]
    return some[values >= values.topk(k).values[-1]]


def top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens of [n] whose probability reaches p (nucleus, arXiv:1904.09751), ascending
    ids; of tied tokens the last ones stay. Only the tokens about as likely as the last one kept are sorted: bins by the
    leading bits of the probability tell which those are."""
    probabilities, limit = logits.softmax(-1).numpy(), np.float32(1 - p)
    # tokens that weigh less than 1 - p together fall whatever their order
    likely = np.flatnonzero(probabilities >= limit / (2 * len(logits)))
    found = probabilities[likely]
    mass, bins = found.astype(np.float64), found.view(np.int32) >> 20
    rest = min(probabilities.sum(dtype=np.float64) - mass.sum(), limit / 2)  # above that it is rounding
    below = np.append(rest, rest + np.bincount(bins, mass).cumsum())
    edge = min(int((below[1:].astype(np.float32) <= limit).sum()), len(below) - 2)
    at = np.flatnonzero(bins == edge)
    at = at[logits.numpy()[likely[at]].argsort(kind="stable")]
    removed = (below[edge] + mass[at].cumsum()).astype(np.float32) <= limit
    removed[-1] = False
    kept = bins > edge
    kept[at[~removed]] = True
    return torch.from_numpy(likely[kept])


def min_p(logits: Tensor, p: float) -> Tensor:
    """The tokens of [n] at least p times as likely as the most likely one (arXiv:2407.01082), ascending ids."""
    probabilities = logits.softmax(-1).numpy()
    best = probabilities.max()
    return _where(probabilities >= min(np.float32(p) * best, best))


def typical_p(logits: Tensor, p: float) -> Tensor:
    """The tokens of [n] whose surprise is closest to the entropy until their mass reaches p (arXiv:2202.00666),
    ascending ids."""
    return _where(typical(logits, p).numpy())


def typical(logits: Tensor, p: float) -> Tensor:
    """What `typical_p` keeps, as a mask; ties with the last stay. On a GPU nothing waits for it."""
    normal = logits.log_softmax(-1)
    entropy = -(normal * normal.exp()).nansum(-1)
    distance = (-normal - entropy).abs()
    ordered, order = distance.sort()
    short = (logits[order].softmax(-1).cumsum(-1) < p).sum().clamp(max=len(logits) - 1)
    return distance <= ordered.gather(0, short[None])


def _where(kept: npt.NDArray[np.bool_]) -> Tensor:
    """Ids of the true entries; numpy finds them ten times as fast as torch."""
    return torch.from_numpy(np.flatnonzero(kept))


def draw(weights: Tensor, uniform: float) -> int:
    """The first of [n] whose cumulated weight exceeds that share of the total; never one of weight zero."""
    below = weights.cumsum(-1)
    at = torch.searchsorted(below, below[-1:] * uniform, right=True)
    return min(int(at), len(weights) - 1)


# random numbers

_STRIDE, _MIX = np.uint64(0x9E3779B97F4A7C15), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> Floats:
    """Number `index` of the stream of `seed`, for each pair: uniform on the multiples of 2^-24 in [0, 1)."""
    return (_splitmix(seeds + (indices + np.uint64(1)) * _STRIDE) >> np.uint64(40)).astype(np.float32) * np.float32(
        2.0**-24
    )


def uniform(seed: int, index: int) -> float:
    return float(uniforms(np.array([seed % 2**64], np.uint64), np.array([index], np.uint64))[0])


def _splitmix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    return z ^ (z >> np.uint64(31))


def _stream(seed: int, completion: int) -> int:
    """The seed of one completion's numbers: completion 1 of seed 7 is not completion 0 of seed 8."""
    mixed = _splitmix(np.array([seed % 2**64], np.uint64)) + np.uint64(completion)
    return int(_splitmix(mixed)[0])


# rows and batches

DRAWS, TRUNCATES, TYPICAL, BIASED, PENALISED, PROCESSED, LOGPROBS = (1 << i for i in range(7))


class SamplingRow:
    """How one completion chooses its tokens. Made once; `add` is told every token that has become known."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params, self.prompt = params, prompt
        self.truncation = t = Truncation.of(params)
        self.stream = _stream(secrets.randbits(62) if params.seed is None else params.seed, index)
        counted = params.presence_penalty or params.frequency_penalty
        self.kind = (
            DRAWS * (t.temperature > 0)
            | TRUNCATES * (t.temperature > 0 and (t.top_k > 0 or t.top_p < 1 or t.min_p > 0))
            | TYPICAL * (t.temperature > 0 and t.typical_p < 1)
            | BIASED * bool(params.logit_bias)
            | PENALISED * bool(counted or params.repetition_penalty != 1.0)
            | PROCESSED * bool(params.logits_processors)
            | LOGPROBS * (params.logprobs is not None)
        )
        self.output: list[int] = []
        """The output so far; kept for the caller's own processors only."""
        prompted = dict.fromkeys(prompt) if params.repetition_penalty != 1.0 else {}
        self._slots = {token: slot for slot, token in enumerate(prompted)}
        self._tokens, self._counts = np.array([*prompted], np.int32), np.zeros(len(prompted), np.int32)

    @property
    def needs_tokens(self) -> bool:
        """Every earlier token must have been added. Penalties need not: `Sampler` counts the one in flight."""
        return bool(self.kind & PROCESSED)

    def add(self, token: int) -> None:
        """`token` is now part of the output."""
        if self.kind & PENALISED:
            self._count(token)
        if self.kind & PROCESSED:
            self.output.append(token)

    def fork(self) -> SamplingRow:
        """A row with the same past: another beam, or tokens that may be taken back."""
        other: SamplingRow = object.__new__(SamplingRow)
        other.__dict__.update(self.__dict__)
        other.output, other._slots = self.output.copy(), self._slots.copy()
        other._tokens, other._counts = self._tokens.copy(), self._counts.copy()
        return other

    def seen(self) -> tuple[Ints, Ints]:
        """The distinct tokens that penalties touch, and how often each is in the output."""
        return self._tokens[: len(self._slots)], self._counts[: len(self._slots)]

    def _count(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            more = np.zeros(slot + 16, np.int32)
            self._tokens, self._counts = np.append(self._tokens, more), np.append(self._counts, more)
        self._tokens[slot] = token
        self._counts[slot] += 1


@dataclass(slots=True)
class SamplingBatch:
    """What R rows want, ready to travel: one copy to a device, or a pickle to another process (if `processors` are)."""

    truncations: list[Truncation]
    arrays: dict[str, npt.NDArray[Any]]
    """Everything that a device needs, 4 bytes an entry; a key is there only if some row uses it.
    temperature, uniform [R]; top_k, top_p, min_p [R]; bias_rows, bias_tokens, bias (ragged); penalised, repetition,
    presence, frequency [Q] for the Q rows with penalties, seen_by (0 .. Q - 1), seen, counts (ragged);
    masked [C], masks [C, ceil(V / 32)]: bit i % 32 of word i // 32 allows token i; logprobs: rows that want them."""
    typical: list[int]
    """Rows with typical_p."""
    processors: list[tuple[int, tuple[LogitsProcessor, ...], list[int]]]
    """(row, callables, its output so far)."""
    num_top: int = 0
    """The most alternatives that a row wants the log-probabilities of."""
    pending_rows: npt.NDArray[Any] | None = None
    """The caller's note of where the token in flight of each row is found; not read here."""

    @property
    def size(self) -> int:
        return len(self.truncations)

    @property
    def greedy(self) -> bool:
        """No row draws."""
        return "uniform" not in self.arrays


def make_batch(
    rows: Sequence[SamplingRow],
    indices: Sequence[int],
    masks: npt.NDArray[np.int32] | Tensor | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
) -> SamplingBatch:
    """`indices`: the position of each row's next token in its output. `masks` [R, words]: tokens that a grammar allows,
    all ones for a row without. `drafts`: tokens after the known ones that each row takes for granted; a sequence may
    have several rows, one for each token to verify."""
    kinds = 0
    for row in rows:
        kinds |= row.kind
    truncations = [row.truncation for row in rows]
    batch = SamplingBatch(truncations, {}, [], [])
    if masks is not None:
        words = np.asarray(masks, np.int32)
        masked = np.flatnonzero((words != -1).any(1)).astype(np.int32)
        if len(masked):
            batch.arrays.update(masked=masked, masks=words[masked])
    if not kinds:
        return batch
    if kinds & DRAWS:
        streams = np.fromiter((row.stream for row in rows), np.uint64, len(rows))
        batch.arrays["uniform"] = uniforms(streams, np.asarray(indices).astype(np.uint64))
        numbers = np.array(truncations, np.float64)
        batch.arrays["temperature"] = numbers[:, 0].astype(np.float32)
        if kinds & TRUNCATES:
            batch.arrays["top_k"] = np.minimum(numbers[:, 1], 2**31 - 1).astype(np.int32)
            batch.arrays["top_p"], batch.arrays["min_p"] = numbers[:, 2:4].astype(np.float32).T.copy()
    if kinds & TYPICAL:
        batch.typical = [i for i, row in enumerate(rows) if row.kind & TYPICAL]
    if kinds & BIASED:
        batch.arrays |= _bias(rows)
    if kinds & PENALISED:
        batch.arrays |= _penalties(rows, drafts)
    if kinds & PROCESSED:
        batch.processors = [
            (i, row.params.logits_processors, [*row.output, *(drafts[i] if drafts else ())])
            for i, row in enumerate(rows)
            if row.kind & PROCESSED
        ]
    if kinds & LOGPROBS:
        wanted = [i for i, row in enumerate(rows) if row.kind & LOGPROBS]
        batch.arrays["logprobs"] = np.array(wanted, np.int32)
        batch.num_top = max(rows[i].params.logprobs or 0 for i in wanted)
    return batch


def _bias(rows: Sequence[SamplingRow]) -> dict[str, npt.NDArray[Any]]:
    entries = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias.items()]
    numbers, tokens, values = zip(*entries, strict=True)
    return {
        "bias_rows": np.array(numbers, np.int32),
        "bias_tokens": np.array(tokens, np.int32),
        "bias": np.array(values, np.float32),
    }


def _penalties(rows: Sequence[SamplingRow], drafts: Sequence[Sequence[int]] | None) -> dict[str, npt.NDArray[Any]]:
    penalised = [i for i, row in enumerate(rows) if row.kind & PENALISED]
    params = [rows[i].params for i in penalised]
    seen = []
    for i in penalised:
        row = rows[i]
        if drafts and drafts[i]:
            row = row.fork()
            for token in drafts[i]:
                row.add(token)
        seen.append(row.seen())
    return {
        "penalised": np.array(penalised, np.int32),
        "repetition": np.array([p.repetition_penalty for p in params], np.float32),
        "presence": np.array([p.presence_penalty for p in params], np.float32),
        "frequency": np.array([p.frequency_penalty for p in params], np.float32),
        "seen_by": np.repeat(np.arange(len(seen), dtype=np.int32), [len(tokens) for tokens, _ in seen]),
        "seen": np.concatenate([tokens for tokens, _ in seen]),
        "counts": np.concatenate([counts for _, counts in seen]),
    }


# the batched sampler


@dataclass(slots=True)
class Sampled:
    """What a batch has chosen, on the device. Log-probabilities are of the raw logits; rows that did not ask for them
    hold zeros."""

    tokens: Tensor
    """[R], int64."""
    logprobs: Tensor | None = None
    """[R]: of the chosen tokens."""
    top_ids: Tensor | None = None
    """[R, num_top]: the likeliest tokens, best first."""
    top_logprobs: Tensor | None = None
    errors: dict[int, Exception] = field(default_factory=dict)
    """By row: what a processor of the caller's has raised. Its row went on without it; the others are not touched."""


class Sampler:
    """Chooses the tokens of batches. `kernels`: by the Triton kernels; None: on a GPU."""

    def __init__(self, device: torch.device, *, kernels: bool | None = None) -> None:
        self.kernels = device.type == "cuda" if kernels is None else kernels

    def sample(self, logits: Tensor, batch: SamplingBatch, pending: Tensor | None = None) -> Sampled:
        """A token for each row of logits [R, V], any float type, which are left as they are. `pending` [R]: a token of
        each row that was sampled by a pass in flight and is not known on the CPU yet, -1 for none; penalties count it.
        On a GPU nothing here waits for the device."""
        moved = _to_device(batch.arrays, logits.device)
        errors: dict[int, Exception] = {}
        tokens = self._choose(_adjust(logits, batch, moved, pending, errors), batch, moved)
        if "logprobs" not in moved:
            return Sampled(tokens, errors=errors)
        rows = moved["logprobs"].long()
        found = token_logprobs(logits[rows], tokens[rows], batch.num_top)
        logprobs, ids, values = (f if f is None else _spread(f, rows, len(tokens)) for f in found)
        return Sampled(tokens, logprobs, ids, values, errors)

    def probabilities(self, logits: Tensor, batch: SamplingBatch, pending: Tensor | None = None) -> Tensor:
        """[R, V]: what `sample` draws from; all on one token in a greedy row."""
        moved = _to_device(batch.arrays, logits.device)
        work = _adjust(logits, batch, moved, pending, {}).float()
        if batch.greedy:
            return torch.zeros_like(work).scatter_(1, work.argmax(-1, keepdim=True), 1.0)
        if not self.kernels:
            rows = zip(work.cpu(), batch.truncations, strict=True)
            return torch.stack([_weights(row, truncation) for row, truncation in rows]).to(work.device)
        work, floor = self._truncate(work, batch, moved)
        temperature = moved["temperature"][:, None]
        if floor is not None:
            work = work.masked_fill(work < floor[:, None], REMOVED)
        drawn = (work / temperature.clamp_min(1e-5)).softmax(-1)
        return torch.where(
            temperature > 0, drawn, torch.zeros_like(work).scatter_(1, work.argmax(-1, keepdim=True), 1.0)
        )

    def _choose(self, work: Tensor, batch: SamplingBatch, moved: dict[str, Tensor]) -> Tensor:
        if not self.kernels:
            return _choose_by_row(work, batch).to(work.device)
        from llmasos.inference.kernels.sample import fused_sample

        work, floor = self._truncate(work, batch, moved)
        tokens = torch.empty(batch.size, dtype=torch.int64, device=work.device)
        fused_sample(work, moved.get("temperature"), moved.get("uniform"), tokens, floor)
        return tokens

    def _truncate(self, work: Tensor, batch: SamplingBatch, moved: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """By the kernels: the smallest logit [R] that stays in each row; typical_p removes tokens in place."""
        from llmasos.inference.kernels.sample import find_floor

        floor = None
        if "top_k" in moved:
            floor = find_floor(work, moved["temperature"], moved["top_k"], moved["top_p"], moved["min_p"])
        if batch.typical:
            work = work.to(torch.float32, copy=True)
        for i in batch.typical:
            row = work[i] if floor is None else work[i].masked_fill(work[i] < floor[i], REMOVED)
            kept = typical(row / batch.truncations[i].temperature, batch.truncations[i].typical_p)
            work[i] = row.masked_fill(~kept, REMOVED)
        return work, floor


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities of tokens [N] by raw logits [N, V], and the ids and log-probabilities [N, num_top] of the
    likeliest, best first (None if num_top is 0). Nothing waits for the device."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    if not num_top:
        return chosen, None, None
    best = logprobs.topk(min(num_top, logits.shape[1]))
    return chosen, best.indices, best.values


def _spread(found: Tensor, rows: Tensor, num: int) -> Tensor:
    return found.new_zeros(num, *found.shape[1:]).index_copy_(0, rows, found)


def _choose_by_row(work: Tensor, batch: SamplingBatch) -> Tensor:
    work = work.float().cpu()
    if batch.greedy:
        return _argmax(work)
    tokens = []
    for row, truncation, u in zip(work, batch.truncations, batch.arrays["uniform"].tolist(), strict=True):
        if not _draws(row, truncation):
            tokens.append(int(_argmax(row)))
            continue
        ids, values = survivors(row, truncation)
        at = draw(values.softmax(-1), u)
        tokens.append(at if ids is None else int(ids[at]))
    return torch.tensor(tokens)


def _weights(row: Tensor, truncation: Truncation) -> Tensor:
    if _draws(row, truncation):
        return truncate(row, truncation).softmax(-1)
    return torch.zeros_like(row).index_fill_(0, _argmax(row), 1.0)


def _draws(row: Tensor, truncation: Truncation) -> bool:
    """Nothing can be drawn where nothing is allowed, or where the model has failed."""
    return truncation.temperature > 0 and math.isfinite(row.max())


def _argmax(logits: Tensor) -> Tensor:
    """The lowest of the best; numpy is ten times as fast as torch."""
    return torch.from_numpy(np.asarray(logits.numpy().argmax(-1)))


def _adjust(
    logits: Tensor,
    batch: SamplingBatch,
    moved: dict[str, Tensor],
    pending: Tensor | None,
    errors: dict[int, Exception],
) -> Tensor:
    """Bias, penalties, processors, masks: a float32 copy of the logits, or the logits themselves if there is none."""
    if not (batch.processors or moved.keys() & {"bias", "penalised", "masked"}):
        return logits
    work = logits.to(torch.float32, copy=True)
    if "bias" in moved:
        at = moved["bias_rows"].long(), moved["bias_tokens"].long()
        work[at] += moved["bias"]
    if "penalised" in moved:
        _penalise(work, moved, pending)
    for row, processors, output in batch.processors:
        try:
            for process in processors:
                work[row] = process(output, work[row].clone())
        except Exception as error:  # the caller's code may raise anything
            errors[row] = error
    if "masked" in moved:
        _mask(work, moved["masked"], moved["masks"])
    return work


def _penalise(work: Tensor, p: dict[str, Tensor], pending: Tensor | None) -> None:
    owner, tokens, rows = p["seen_by"].long(), p["seen"].long(), p["penalised"].long()
    counts = p["counts"]
    if pending is not None:
        pending = pending[rows]
        again = tokens == pending[owner]
        counts = counts + again
        first = (pending >= 0) & (torch.zeros_like(rows).index_add_(0, owner, again.long()) == 0)
    values = work[rows[owner], tokens]
    work[rows[owner], tokens] = _penalised(values, counts, *(p[k][owner] for k in _PENALTIES))
    if pending is not None:
        at = rows, pending.clamp_min(0)
        values = work[at]
        once = _penalised(values, torch.ones_like(rows), *(p[k] for k in _PENALTIES))
        work[at] = torch.where(first, once, values)


_PENALTIES = ("repetition", "presence", "frequency")


def _penalised(logits: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    logits = torch.where(logits < 0, logits * repetition, logits / repetition)
    return torch.where(counts > 0, logits - (presence + frequency * counts), logits)


def _mask(work: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Remove what the bits do not allow, and what lies behind the last bit."""
    if work.is_cuda:
        from llmasos.inference.kernels.sample import apply_bitmask

        apply_bitmask(work, rows, masks)
    else:
        bits = np.unpackbits(masks.numpy().view(np.uint8), axis=1, count=work.shape[1], bitorder="little")
        bits ^= 1
        for row, removed in zip(rows.tolist(), torch.from_numpy(bits.view(np.bool_)), strict=True):
            work[row].masked_fill_(removed, REMOVED)


def _to_device(arrays: dict[str, npt.NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """All arrays by one copy that nothing waits for. torch keeps the pinned memory until the copy is done."""
    if device.type == "cpu" or not arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    # 16-byte steps: kernels are compiled once, for aligned pointers
    starts = np.cumsum([0, *((array.size + 3) // 4 * 4 for array in arrays.values())])
    staged = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    words = staged.numpy()
    for start, array in zip(starts, arrays.values(), strict=False):
        words[start : start + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    there = staged.to(device, non_blocking=True)
    moved = {}
    for start, (name, array) in zip(starts, arrays.items(), strict=False):
        part = there[start : start + array.size].view(torch.float32 if array.dtype == np.float32 else torch.int32)
        moved[name] = part.view(array.shape)
    return moved


# log-probabilities with names


def token_logprob(logits: Tensor, token: int, num_top: int, name: Callable[[int], str]) -> TokenLogprob:
    """Log-probabilities of one position from its raw logits [V]; `name` gives a token's text."""
    chosen, ids, values = token_logprobs(logits[None], torch.tensor([token], device=logits.device), num_top)
    top: tuple[tuple[int, str, float], ...] = ()
    if ids is not None and values is not None:
        top = tuple((i, name(i), value) for i, value in zip(ids[0].tolist(), values[0].tolist(), strict=True))
    return TokenLogprob(token, name(token), float(chosen), top)
