"""Speculative decoding: guess the next tokens cheaply, let the model check them all in one pass.

k = drafted tokens of one sequence, V = vocabulary. The model's pass over the last token and k drafts gives k + 1 rows
of logits; row i is what it says after i drafts. A token is chosen from every row as without drafts (the argmax, or the
draw with the row's own uniform number), and the drafts that equal those choices are kept. So the text is what it would
have been, seed by seed, and its distribution the model's. (Rejection sampling, arXiv:2211.17192, keeps the distribution
but not the text of a seed.)
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmasos.errors import UnsupportedError
from llmasos.inference.config import SpeculativeConfig as SpeculativeConfig  # a name that was here first
from llmasos.inference.sampler import uniform
from llmasos.models.attention import ContiguousCache
from llmasos.models.weights import is_asleep, sleep, wake

if TYPE_CHECKING:
    from llmasos.inference.scheduler import Item as Planned
    from llmasos.inference.scheduler import Sequence as Running
    from llmasos.models.load import LoadedModel
    from llmasos.text import Tokenizer


# proposing


@dataclass(frozen=True, slots=True)
class Wanted:
    """Drafts asked for one sequence: `token_ids` are all its tokens, prompt and output. They only grow between two
    questions with the same `id`."""

    id: int
    token_ids: Sequence[int]
    k: int
    temperature: float = 0.0
    """Above 0: a draft model draws, by the inverse distribution function in vocabulary order at `uniforms` [k]."""
    uniforms: Sequence[float] = ()


class Proposer(Protocol):
    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """At most k tokens for each, in order; none where there is nothing to guess."""

    def forget(self, id: int) -> None:
        """The sequence ended. Unknown ids are fine."""

    def sleep(self) -> int:
        """Give back memory until `wake`; returns the bytes. All sequences have ended."""

    def wake(self) -> None: ...


class NGramProposer:
    """Prompt lookup: the last tokens, longest run first, are looked for earlier in the same sequence; the draft is what
    came after their latest occurrence, repeated if that reaches the end."""

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self._indexes: dict[int, _Index] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._draft(w) for w in wanted]

    def forget(self, id: int) -> None:
        self._indexes.pop(id, None)

    def sleep(self) -> int:
        return 0

    def wake(self) -> None:
        pass

    def _draft(self, wanted: Wanted) -> list[int]:
        index = self._indexes.setdefault(wanted.id, _Index({}))
        tokens, end = wanted.token_ids, len(wanted.token_ids)
        index.update(tokens, self.sizes)
        for size in self.sizes:
            if end > size and (start := index.after.get(tuple(tokens[end - size :]))) is not None:
                return [tokens[start + i % (end - start)] for i in range(wanted.k)]
        return []


@dataclass(slots=True)
class _Index:
    """Where a sequence goes on after each run of tokens; grows with it: a token costs the same at any length."""

    after: dict[tuple[int, ...], int]
    num_seen: int = 0

    def update(self, tokens: Sequence[int], sizes: range) -> None:
        # a run is entered once the token behind it is known: the last tokens never find themselves
        for at in range(self.num_seen, len(tokens)):
            for size in sizes:
                if at >= size:
                    self.after[tuple(tokens[at - size : at])] = at
        self.num_seen = len(tokens)


class DraftModel:
    """A smaller model with the same vocabulary. Keeps keys and values of `num_rows` sequences; the one that was asked
    for least recently makes room for a new one.

    Raises UnsupportedError that names both models if their vocabularies differ.
    """

    PIECE = 2048
    """Tokens of one pass over what a sequence has gained."""

    def __init__(
        self,
        model: LoadedModel,
        target: Tokenizer | None,
        *,
        name: str,
        target_name: str,
        vocab_size: int,
        num_rows: int,
    ) -> None:
        if not _same_vocabulary(model.tokenizer, target):
            raise UnsupportedError(
                f"{name} can't draft for {target_name}: their vocabularies differ.",
                hint="Choose a smaller model of the same family.",
                param="model",
            )
        self.module, self.config = model.module, model.config
        self.vocab_size = vocab_size
        """Of the model that checks: drafts stay below it."""
        self._num_rows = num_rows
        self._rows: dict[int, _Row] = {}
        self._renew()

    def _renew(self) -> None:
        device, dtype = self.module.device, self.module.dtype
        self._cache = ContiguousCache(self.config, self._num_rows, device=device, dtype=dtype)
        self._free = list(range(self._num_rows))[::-1]

    def forget(self, id: int) -> None:
        if (row := self._rows.pop(id, None)) is not None:
            self._free.append(row.number)

    def sleep(self) -> int:
        if is_asleep(self.module):
            return 0
        freed = self._cache.num_bytes
        self._rows.clear()
        del self._cache
        return freed + sleep(self.module)

    def wake(self) -> None:
        if is_asleep(self.module):
            wake(self.module)
            self._renew()

    @torch.inference_mode()
    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        limit = self.config.context_length
        todo = [i for i, w in enumerate(wanted) if w.k > 0 and len(w.token_ids) + w.k - 1 <= limit]
        for at in range(0, len(todo), len(self._cache.lengths)):
            some = todo[at : at + len(self._cache.lengths)]
            for i, draft in zip(some, self._propose([wanted[i] for i in some]), strict=True):
                drafts[i] = draft
        return drafts

    def _propose(self, wanted: list[Wanted]) -> list[list[int]]:
        rows = [self._row(w) for w in wanted]
        logits = self._catch_up(rows, wanted)
        tokens: list[list[Tensor]] = [[] for _ in wanted]
        active = list(range(len(wanted)))
        step = 0
        while True:
            for i, row in zip(active, logits, strict=True):
                tokens[i].append(_choose(row[: self.vocab_size], wanted[i], step))
            step += 1
            active = [i for i in active if wanted[i].k > step]
            if not active:
                break
            logits = self._forward([rows[i] for i in active], torch.stack([tokens[i][-1] for i in active]))
        found = torch.stack([t for some in tokens for t in some]).tolist()  # the only wait for the device
        drafts = []
        for w, row in zip(wanted, rows, strict=True):
            ids, found = found[: w.k], found[w.k :]
            row.token_ids += ids[:-1]  # the last one has no keys yet
            drafts.append(ids)
        return drafts

    def _row(self, wanted: Wanted) -> _Row:
        """The sequence's row, cut to what it still has in common with the sequence."""
        row = self._rows.pop(wanted.id, None)
        if row is None:
            if not self._free:
                self.forget(next(iter(self._rows)))
            row = _Row(self._free.pop())
        self._rows[wanted.id] = row
        # rejected drafts differ at the end only: what was settled before need not be compared
        end = min(len(row.token_ids), len(wanted.token_ids) - 1)  # the last token is always computed, for its logits
        differs = (i for i in range(row.num_settled, end) if row.token_ids[i] != wanted.token_ids[i])
        num = next(differs, end)
        del row.token_ids[num:]
        self._cache.lengths[row.number] = num
        return row

    def _catch_up(self, rows: list[_Row], wanted: list[Wanted]) -> Tensor:
        """Compute what the sequences have gained; logits after each one's last token [rows, V]."""
        for row, w in zip(rows, wanted, strict=True):
            while len(w.token_ids) - len(row.token_ids) > self.PIECE:
                piece = list(w.token_ids[len(row.token_ids) : len(row.token_ids) + self.PIECE])
                self._forward([row], torch.tensor(piece, device=self.module.device), [len(piece)])
                row.token_ids += piece
        new = [list(w.token_ids[len(row.token_ids) :]) for row, w in zip(rows, wanted, strict=True)]
        packed = torch.tensor([i for ids in new for i in ids], device=self.module.device)
        logits = self._forward(rows, packed, [len(ids) for ids in new])
        for row, ids, w in zip(rows, new, wanted, strict=True):
            row.token_ids += ids
            row.num_settled = len(w.token_ids)
        return logits

    def _forward(self, rows: list[_Row], tokens: Tensor, num_new: Sequence[int] | None = None) -> Tensor:
        counts = [1] * len(rows) if num_new is None else num_new
        positions = self._cache.plan([row.number for row in rows], counts)
        hidden: Tensor = self.module(tokens, positions, self._cache)
        self._cache.advance()
        if len(hidden) > len(rows):
            hidden = hidden[(torch.tensor(counts).cumsum(0) - 1).to(hidden.device)]
        logits: Tensor = self.module.logits(hidden)
        return logits


@dataclass(slots=True)
class _Row:
    """A row of the draft model's cache and the tokens whose keys are in it; the first `num_settled` are the
    sequence's, the others were drafts."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    num_settled: int = 0


def _same_vocabulary(a: Tokenizer | None, b: Tokenizer | None) -> bool:
    if a is None or b is None:
        return False
    vocabularies = [t.backend.get_vocab(with_added_tokens=True) for t in (a, b)]
    return bool(vocabularies[0] == vocabularies[1])


def _choose(logits: Tensor, wanted: Wanted, step: int) -> Tensor:
    """A token for logits [V]. Nothing waits for the device."""
    if wanted.temperature <= 0:
        return logits.argmax()
    below = (logits / wanted.temperature).softmax(-1).double().cumsum(-1)
    # never one of weight zero
    share = (below[-1] * wanted.uniforms[step]).clamp(max=torch.nextafter(below[-1], below[-1].new_zeros(())))
    return torch.searchsorted(below, share, right=True)


# checking


def verify(chosen: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """The new tokens: `chosen` [k + 1] is what the model chooses after each number of drafts; its choices count up to
    and with the first that differs from the draft. For argmax and for draws with fixed uniform numbers alike."""
    num = next((i for i, (a, b) in enumerate(zip(chosen, drafts, strict=False)) if a != b), len(drafts))
    return list(chosen[: num + 1])


# deciding


@dataclass(slots=True)
class _Record:
    """How one sequence's drafts fared; older checks count less."""

    accepted: float
    tested: float
    pause: int = 0
    """Steps left without drafts."""
    next_pause: int = 4
    probing: bool = False
    """The pause is over: the next drafts are made whatever the rate says."""

    @property
    def rate(self) -> float:
        return self.accepted / self.tested


class SpeculationController:
    """How many tokens to draft, per sequence and step, from how drafts fared and what steps cost.

    If each draft is right with probability a, k of them give 1 + a + ... + a^k tokens in a step that takes c(k) times
    as long as one without: k is chosen for the most tokens per time. Where that gains less than 2 %, the sequence
    pauses, longer each time, and then probes again. c is measured (`record_step`) for batches of about the same size;
    until steps with drafts were, it is 1 + `token_cost` * k. Depends on what it is told alone: no clock, no randomness.
    """

    KEEP = 0.8
    """What an older check still counts at each new one."""
    PLAIN_EVERY = 64
    """Steps after which one without drafts is made, to know what it takes now."""
    FIRST_PLAIN = 3
    """Steps without drafts that a batch size begins with."""
    SAMPLES = 9
    """Latest times of each kind that are kept; their median counts."""
    MAX_PAUSE = 256
    GAIN = 1.02

    def __init__(self, max_drafts: int, *, token_cost: float = 0.05) -> None:
        self.max_drafts, self.token_cost = max_drafts, token_cost
        self._records: dict[int, _Record] = {}
        self._all = _Record(accepted=1.0, tested=2.0)
        self._seconds: dict[int, dict[int, deque[float]]] = {}
        self._since_plain = 0

    def num_drafts(self, id: int, num_sequences: int) -> int:
        """Drafts for sequence `id` in the next step, which decodes `num_sequences`. Ask once per step."""
        if self._since_plain >= self.PLAIN_EVERY or len(self._times(num_sequences).get(0, ())) < self.FIRST_PLAIN:
            return 0
        record = self._record(id)
        if record.pause:
            record.pause -= 1
            record.probing = not record.pause
            return 0
        if record.probing:
            return max(1, self.max_drafts // 2)
        k = max(range(self.max_drafts + 1), key=lambda k: self._gain(k, record.rate, num_sequences))
        if k and self._gain(k, record.rate, num_sequences) >= self.GAIN:
            record.next_pause = 4
            return k
        record.pause, record.next_pause = record.next_pause, min(2 * record.next_pause, self.MAX_PAUSE)
        return 0

    def record(self, id: int, num_drafted: int, num_accepted: int) -> None:
        """A check of a sequence's drafts: the first `num_accepted` were right. An empty draft teaches nothing."""
        tested = min(num_accepted + 1, num_drafted)
        if tested == 0:
            return
        self._record(id).probing = False
        for record in (self._record(id), self._all):
            record.accepted = self.KEEP * record.accepted + num_accepted
            record.tested = self.KEEP * record.tested + tested

    def record_step(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """A step that only decoded: its sequences, the drafts of all of them, its time with that of proposing."""
        self._since_plain = self._since_plain + 1 if num_drafted else 0
        k = math.ceil(num_drafted / num_sequences)
        self._times(num_sequences).setdefault(k, deque(maxlen=self.SAMPLES)).append(seconds)

    def forget(self, id: int) -> None:
        self._records.pop(id, None)

    def _record(self, id: int) -> _Record:
        if id not in self._records:  # expect what was seen of the others, but not firmly
            self._records[id] = _Record(accepted=2 * self._all.rate, tested=2.0)
        return self._records[id]

    def _times(self, num_sequences: int) -> dict[int, deque[float]]:
        """Seconds by drafts per sequence, of batches of about this size."""
        return self._seconds.setdefault(num_sequences.bit_length(), {})

    def _gain(self, k: int, rate: float, num_sequences: int) -> float:
        """Tokens per time with k drafts over those without."""
        tokens = sum(rate**i for i in range(k + 1))
        return tokens / self.cost(k, num_sequences)

    def cost(self, k: int, num_sequences: int) -> float:
        """Time of a step with k drafts per sequence over one without; in line with the nearest k that was measured."""
        times = self._times(num_sequences)
        measured = [n for n in times if n]
        if k == 0:
            return 1.0
        if 0 not in times or not measured:
            return 1.0 + self.token_cost * k
        nearest = min(measured, key=lambda n: (abs(n - k), n))
        ratio = statistics.median(times[nearest]) / statistics.median(times[0])
        return max(1.0, 1.0 + (ratio - 1.0) * k / nearest)


class Speculator:
    """What the engine asks: drafts for its sequences, as many as pay. A sequence that is not asked for any more is
    forgotten."""

    def __init__(self, proposer: Proposer, max_drafts: int) -> None:
        self.proposer, self.controller = proposer, SpeculationController(max_drafts)
        self._known: set[int] = set()

    def draft(self, sequences: Sequence[Running]) -> None:
        """Set `drafts` of the running sequences; none for those that can't have any."""
        for gone in self._known - {seq.id for seq in sequences}:
            self.proposer.forget(gone)
            self.controller.forget(gone)
        self._known = {seq.id for seq in sequences}
        decoding = [seq for seq in sequences if _can_draft(seq)]
        wanted = {seq.id: self._wanted(seq, len(decoding)) for seq in decoding}
        found = self.proposer.propose([w for w in wanted.values() if w.k])
        drafts = dict(zip((w.id for w in wanted.values() if w.k), found, strict=True))
        for seq in sequences:
            seq.drafts = _usable(drafts[seq.id], seq.owner) if seq.id in drafts else []

    def learn(self, seq: Running, num_drafted: int, num_accepted: int) -> None:
        """A pass checked drafts of `seq`; the first `num_accepted` were right."""
        self.controller.record(seq.id, num_drafted, num_accepted)

    def learn_step(self, items: Sequence[Planned], seconds: float) -> None:
        """A pass took so long, with proposing. Passes over prompts teach nothing."""
        if items and all(item.samples and item.num_new == 1 + len(item.drafts) for item in items):
            self.controller.record_step(len(items), sum(len(item.drafts) for item in items), seconds)

    def _wanted(self, seq: Running, num_sequences: int) -> Wanted:
        num_output = len(seq.token_ids) - seq.num_prompt
        # the model adds a token behind the drafts
        k = min(self.controller.num_drafts(seq.id, num_sequences), seq.max_tokens - num_output - 1)
        row = seq.owner.row
        temperature = row.truncation.temperature if k > 0 else 0.0
        numbers = [uniform(int(row.stream), num_output + i) for i in range(k)] if temperature else []
        return Wanted(seq.id, seq.token_ids, max(0, k), temperature, numbers)


def _can_draft(seq: Running) -> bool:
    """It decodes, waits for nothing, and is not a beam."""
    known = not seq.num_pending and not seq.paused and len(seq.token_ids) > seq.num_prompt
    return known and seq.num_computed >= seq.num_prompt and seq.owner.state.beams is None


def _usable(drafts: list[int], owner: Any) -> list[int]:
    """Up to an end token, and as far as the grammar allows."""
    drafts = drafts[: next((i + 1 for i, token in enumerate(drafts) if token in owner.ends), len(drafts))]
    return drafts if owner.matcher is None else drafts[: owner.matcher.num_accepted(drafts)]
