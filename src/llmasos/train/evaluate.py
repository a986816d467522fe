"""What a model in training is worth: loss and bits per byte of held-out text, and what it says to prompts. A run that
is evaluated after every step is, bit for bit, the one that never is.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.data import IGNORED, Batch, Batches
from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.models.attention import ContiguousCache
from llmasos.text import Tokenizer
from llmasos.train.events import Evaluation, Generated
from llmasos.train.model import Placed, Trainee

NEW_TOKENS = 48
"""Of an answer to a prompt."""
NUM_PROMPTS = 2
"""That are taken from the held-out part where nobody gives any."""
PROMPT_TOKENS = 512
"""The longest of those; and what is read of a text that is all trained: TEXT_TOKENS."""
TEXT_TOKENS = 16
_LOOKED_AT = 64
"""Batches in which they are sought."""
SHARE = 0.1
"""Of a run's time that evaluations may take."""

Sum = Callable[[Tensor], Tensor]
"""Adds up over all ranks."""


class Evaluator:
    """Call it with the number of steps done. On several ranks all call it, and all get the same.

    held_out: its batches, of this rank; None measures nothing (the loss is NaN) and only asks the prompts. max_tokens:
    about as many are read, evenly spread over them; None: all. prompts: texts, which a chat template turns into a
    user's message if `chat`. num_prompts: how many are taken from `held_out` where there are none. total: adds up over
    the ranks.

    Raises InvalidInputError for a prompt that is empty or longer than the context."""

    def __init__(
        self,
        trainee: Trainee,
        held_out: Batches | None,
        tokenizer: Tokenizer,
        *,
        prompts: Sequence[str] = (),
        chat: bool = True,
        template: str | None = None,
        num_prompts: int = NUM_PROMPTS,
        max_tokens: int | None = None,
        new_tokens: int = NEW_TOKENS,
        total: Sum = lambda sums: sums,
    ) -> None:
        self.trainee, self.held_out, self.tokenizer = trainee, held_out, tokenizer
        self.new_tokens, self._total = new_tokens, total
        self._bytes = ByteCounts(tokenizer)
        self._stride = 1
        if held_out is not None and max_tokens is not None:
            num = held_out.count()
            self._stride = max(1, math.ceil(num * held_out.batch_tokens * held_out.world_size / max_tokens))
            self._stride = min(self._stride, num)
        room = trainee.decoder.config.context_length - 1
        if prompts:
            self.prompts = [_prompt(text, tokenizer, chat, template, room) for text in prompts]
        else:
            self.prompts = prompts_of(held_out, tokenizer, num_prompts, min(room, PROMPT_TOKENS)) if held_out else []

    def __call__(self, step: int) -> Evaluation:
        started = time.perf_counter()
        with undisturbed(self.trainee.decoder):
            nats, num_tokens, num_bytes = self._measure()
            texts = self._generate()
        return Evaluation(
            step=step,
            loss=nats / num_tokens if num_tokens else math.nan,
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
            num_tokens=num_tokens,
            seconds=time.perf_counter() - started,
            samples=tuple(Generated(shown, text) for (shown, _), text in zip(self.prompts, texts, strict=True)),
        )

    def _measure(self) -> tuple[float, int, int]:
        """Nats, trained tokens and their bytes, of all ranks."""
        device = self.trainee.decoder.device
        losses: list[Tensor] = []
        num_tokens = num_bytes = 0
        if self.held_out is not None:
            self.held_out.reset()
            for batch in islice(self.held_out, 0, None, self._stride):
                losses.append(self.trainee.loss(Placed.of(batch, device)))
                labels = batch.labels[batch.labels != IGNORED]
                num_tokens += len(labels)
                num_bytes += self._bytes(labels)
        nats = float(torch.stack(losses).cpu().double().sum()) if losses else 0.0
        sums = torch.tensor([nats, num_tokens, num_bytes], dtype=torch.float64)
        nats, tokens, count = self._total(sums.to(device) if device.type == "cuda" else sums).tolist()
        return nats, int(tokens), int(count)

    def _generate(self) -> list[str]:
        """Greedy. Prompts are read one by one and go on together, each until its end token."""
        if not self.prompts:
            return []
        trainee, config = self.trainee, self.trainee.decoder.config
        casts = trainee.casts()
        longest = max(len(ids) for _, ids in self.prompts)
        attn: Any = trainee.decoder.layers[0].attn  # of this rank, which may have some of the heads
        cache = ContiguousCache(
            replace(config, num_heads=attn.num_heads, num_kv_heads=attn.num_kv_heads),
            len(self.prompts),
            device=trainee.decoder.device,
            dtype=trainee.dtype,
            capacity=min(longest + self.new_tokens, config.context_length),
        )

        def following(rows: list[int], tokens: list[list[int]]) -> list[int]:
            """The likeliest token behind the last one of each row."""
            num_new = [len(ids) for ids in tokens]
            positions = cache.plan(rows, num_new)
            packed = torch.tensor([id for ids in tokens for id in ids], device=trainee.decoder.device)
            hidden = trainee.forward(packed, positions, cache, casts)
            cache.advance()
            ends = torch.tensor(num_new).cumsum(0) - 1
            scored, weight = trainee.scored(hidden[ends.to(hidden.device)], casts)
            return F.linear(scored, weight, trainee.head(casts)["bias"]).argmax(-1).tolist()

        said = [following([row], [ids]) for row, (_, ids) in enumerate(self.prompts)]
        while going := [row for row, ids in enumerate(said) if self._goes_on(row, ids)]:
            for row, token in zip(going, following(going, [said[row][-1:] for row in going]), strict=True):
                said[row].append(token)
        return [self.tokenizer.decode(id for id in ids if id not in self.tokenizer.eos_token_ids) for ids in said]

    def _goes_on(self, row: int, ids: list[int]) -> bool:
        is_full = len(self.prompts[row][1]) + len(ids) >= self.trainee.decoder.config.context_length
        return len(ids) < self.new_tokens and ids[-1] not in self.tokenizer.eos_token_ids and not is_full


class ByteCounts:
    """Bytes in UTF-8 that tokens stand for, as the tokenizer's decoder writes them; special tokens for none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = np.full(tokenizer.vocab_size, -1, np.int64)
        self._is_known = True
        """False where the decoder is of a kind whose tokens have no bytes of their own."""

    def __call__(self, tokens: Tensor) -> int:
        """Of them all; 0 where bytes are not known."""
        if not self._is_known or not len(tokens):
            return 0
        ids, counts = np.unique(tokens.numpy(), return_counts=True)
        if ids[-1] >= len(self._known):  # a vocabulary with room behind its last token
            self._known = np.append(self._known, np.full(ids[-1] + 1 - len(self._known), -1, np.int64))
        for id in ids[self._known[ids] < 0]:
            self._known[id] = self._count(int(id))
        return int((self._known[ids] * counts).sum()) if self._is_known else 0

    def _count(self, id: int) -> int:
        if id in self._tokenizer.special_ids or id >= self._tokenizer.vocab_size:
            return 0
        try:
            return len(self._tokenizer.token_bytes(id))
        except LLMasOSError:
            self._is_known = False
            return 0


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Training does not notice what is done here: random numbers, the modes of modules and compiled blocks are as they
    were, and no gradient is made."""
    modes = {one: one.training for one in module.modules()}
    devices = sorted({p.get_device() for p in module.parameters() if p.is_cuda})
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), _as_written():
            module.eval()
            yield
    finally:
        for one, mode in modes.items():
            one.training = mode
            if reshard := getattr(one, "reshard", None):
                reshard()  # FSDP keeps weights together that a backward pass would spread again
        random.setstate(python)
        np.random.set_state(array)


def _as_written() -> AbstractContextManager[object]:
    """Compiled blocks are not compiled once more, for passes without gradients, but run as they are written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def evaluation_tokens(steps: int, batch_tokens: int, evaluate_every: int) -> int:
    """How many held-out tokens an evaluation may read so that it takes SHARE of the time since the last one: reading
    one costs a third of training on it. evaluate_every 0: there are two, before and after."""
    return max(1, int(3 * SHARE * (evaluate_every or steps / 2) * batch_tokens))


def prompts_of(batches: Batches, tokenizer: Tokenizer, num: int, room: int) -> list[tuple[str, list[int]]]:
    """The first samples' tokens before what is trained, or the first of those where all is; as text and ids. The same
    on all ranks."""
    batches.reset()
    rank, batches.rank = batches.rank, 0
    try:
        return list(islice(_prompts_in(islice(batches, _LOOKED_AT), tokenizer, room), num))
    finally:
        batches.rank = rank


def _prompts_in(batches: Iterable[Batch], tokenizer: Tokenizer, room: int) -> Iterator[tuple[str, list[int]]]:
    for batch in batches:
        for tokens, labels in zip(batch.tokens.split(batch.lengths), batch.labels.split(batch.lengths), strict=True):
            trained = (labels != IGNORED).nonzero()[:, 0]
            if not len(trained):
                continue
            first = int(trained[0]) + 1
            ids = tokens[: first if first > 1 else min(TEXT_TOKENS, len(trained))].tolist()
            if len(ids) <= room:
                yield tokenizer.decode(ids), ids


def _prompt(text: str, tokenizer: Tokenizer, chat: bool, template: str | None, room: int) -> tuple[str, list[int]]:
    if not text.strip():
        raise InvalidInputError("A prompt is empty.", hint="Leave it out, or write something.", param="prompts")
    if chat and (template or tokenizer.chat_template):
        messages = [{"role": "user", "content": text}]
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, template=template)
        ids = tokenizer.encode(written, add_special_tokens=False)
    else:
        ids = tokenizer.encode(text)
    if len(ids) > room:
        raise InvalidInputError(
            f"A prompt has {len(ids):,} tokens, and the model's context holds {room:,} and an answer.",
            hint="Shorten it.",
            param="prompts",
        )
    return text, ids
