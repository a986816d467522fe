"""What a batch looks like: which tokens are trained, which only read, which end a turn, where samples begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llmasos.data.loader import IGNORED, Batch
from llmasos.text import Tokenizer

Look: TypeAlias = Literal["read", "trained", "stop"]
_COLOURS: dict[Look, str] = {"read": "\x1b[2m", "trained": "\x1b[32m", "stop": "\x1b[1;97;41m"}
_MARKS: dict[Look, tuple[str, str]] = {"read": ("", ""), "trained": ("⟦", "⟧"), "stop": ("⟪", "⟫")}


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one look; "stop" are end tokens that are trained."""

    look: Look
    text: str
    num_tokens: int


def runs(batch: Batch, tokenizer: Tokenizer) -> Iterator[list[Run]]:
    """Of each sample of the batch. A token is trained if the label before it is the token itself."""
    tokens, labels = batch.tokens.tolist(), batch.labels.tolist()
    start = 0
    for length in batch.lengths:
        end = start + length
        looks: list[Look] = ["read"]
        for label in labels[start : end - 1]:
            looks.append("read" if label == IGNORED else "stop" if label in tokenizer.eos_token_ids else "trained")
        yield _joined(tokens[start:end], looks, tokenizer)
        start = end


def _joined(tokens: list[int], looks: list[Look], tokenizer: Tokenizer) -> list[Run]:
    found: list[Run] = []
    stream = tokenizer.stream(skip_special_tokens=False)
    for token, look in zip(tokens, looks, strict=True):
        text = stream.push(token)
        if found and found[-1].look == look:
            found[-1] = Run(look, found[-1].text + text, found[-1].num_tokens + 1)
        else:
            found.append(Run(look, text, 1))
    if rest := stream.flush():
        found[-1] = Run(found[-1].look, found[-1].text + rest, found[-1].num_tokens)
    return found


def show_batch(batch: Batch, tokenizer: Tokenizer, *, colour: bool = True) -> str:
    """The batch as text for a terminal; without colours, trained text stands in ⟦⟧ and end tokens in ⟪⟫."""
    lines = []
    for at, (sample, length) in enumerate(zip(runs(batch, tokenizer), batch.lengths, strict=True)):
        num_trained = sum(run.num_tokens for run in sample if run.look != "read")
        where = f"{batch.where[at]}, " if batch.where else ""
        title = f"── {where}{length} tokens, {num_trained} trained "
        lines.append(title + "─" * max(0, 78 - len(title)))
        lines.append("".join(_painted(run, colour) for run in sample))
    share = batch.num_trained / max(1, sum(batch.lengths))
    lines.append(
        f"{sum(batch.lengths)} tokens in {len(batch.lengths)} samples, {batch.num_trained} trained ({share:.0%})"
    )
    return "\n".join(lines)


def _painted(run: Run, colour: bool) -> str:
    # a terminal must not obey what stands in the data
    text = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in run.text)
    if colour:
        return f"{_COLOURS[run.look]}{text}\x1b[0m"
    before, behind = _MARKS[run.look]
    return f"{before}{text}{behind}"
