"""Labels for texts: classify, sentiment. By a classification head where the model is one; by how likely each label
makes the text, where the model tells; else by an answer that can be nothing but a label.

The second way asks "write a text with this label" and looks at how likely the text is as the answer ("Noisy Channel
Language Model Prompting", arXiv:2108.04106): small models that choose labels hardly better than by chance get most
right so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.tasks.base import Inputs, Run, object_schema, shots, task, user
from llmasos.tasks.model import Messages, as_json
from llmasos.tasks.writing import Text

Label = Annotated[str, Field(min_length=1, max_length=100)]


class Example(BaseModel):
    text: str
    label: str | list[str]


class ClassifyInput(Inputs):
    text: Text
    labels: list[Label] = Field([], max_length=100, description="what may be answered; none: those of the model's head")
    examples: list[Example] = Field([], max_length=50, description="texts with their label (several: a list)")
    multi: bool = Field(False, description="any number of labels may hold")


class Classification(BaseModel):
    labels: list[str] = Field(description="those that hold, the surest first; exactly one unless several may")
    scores: dict[str, float] | None = Field(None, description="probability by label, where the model tells")

    @property
    def label(self) -> str | None:
        return self.labels[0] if self.labels else None

    def __str__(self) -> str:
        return ", ".join(self.labels)


@task("classify", "Which label fits a text: zero-shot or by examples, one or several")
async def classify(run: Run, given: ClassifyInput) -> Classification:
    """A text beyond the context is looked at in pieces, whose scores are averaged."""
    _check_text(given.text)
    if run.model.labels:
        return await _by_head(run, given)
    labels = list(dict.fromkeys(given.labels or _labels_of(given.examples)))
    if len(labels) < 2 and not (given.multi and labels):
        raise InvalidInputError("classify needs two labels at least.", hint="Give labels or examples.", param="labels")
    for example in given.examples:
        if wrong := sorted(set(_listed(example.label)) - set(labels)):
            raise InvalidInputError(f"{wrong[0]!r} of an example is none of the labels.", param="examples")
    return await (_several(run, given, labels) if given.multi else _one(run, given, labels))


def _labels_of(examples: Sequence[Example]) -> list[str]:
    return [label for example in examples for label in _listed(example.label)]


def _listed(label: str | list[str]) -> list[str]:
    return [label] if isinstance(label, str) else label


def _check_text(text: str) -> None:
    if not text.strip():
        raise InvalidInputError("The text is empty.", param="text")


async def _by_head(run: Run, given: ClassifyInput) -> Classification:
    known = run.model.labels
    if wrong := [label for label in given.labels if label not in known]:
        raise UnsupportedError(
            f"{run.model.name} knows the labels {', '.join(known)}; {wrong[0]!r} is none of them.",
            hint="Leave labels out, or take a chat model.",
            param="labels",
        )
    scores = await run.counted(run.model.classify(given.text))
    wanted = {label: scores[label] for label in given.labels or known}
    ranked = sorted(wanted, key=lambda label: -wanted[label])
    return Classification(
        labels=[one for one in ranked if wanted[one] >= 0.5] if given.multi else ranked[:1], scores=wanted
    )


async def _one(run: Run, given: ClassifyInput, labels: list[str]) -> Classification:
    if (found := await _likely(run, given, labels)) is not None:
        shares = [_shares(one) for one in found]
        scores = {label: sum(one[i] for one in shares) / len(shares) for i, label in enumerate(labels)}
        return Classification(labels=[max(scores, key=scores.__getitem__)], scores=scores)
    schema = object_schema({"label": {"type": "string", "enum": labels}})
    max_tokens = _tokens_for(run, labels)

    def build(text: str) -> Messages:
        return _asking(text, given.examples, labels)

    async def ask(piece: str) -> _OneLabel:
        return await run.ask(build(piece), _OneLabel, max_tokens=max_tokens, schema=schema)

    replies = await run.each(await run.pieces(given.text, build, max_tokens=max_tokens), ask)
    names = [reply.label for reply in replies]
    return Classification(labels=[max(names, key=names.count)], scores=None)


async def _likely(run: Run, given: ClassifyInput, labels: Sequence[str]) -> list[list[float]] | None:
    """By piece of the text: how likely each label makes it (natural logarithms). None: the model does not tell."""

    def build(text: str) -> Messages:
        return [*_writing(labels[0], given.examples), {"role": "assistant", "content": text}]

    pieces = await run.pieces(given.text.strip(), build, max_tokens=_tokens_for(run, labels))
    found = []
    with run.expecting(len(pieces) * len(labels)):
        for piece in pieces:
            for label in labels:
                told = await run.counted(run.model.likelihood(_writing(label, given.examples), piece))
                if told is None:
                    return None
                found.append(told)
    return [found[i : i + len(labels)] for i in range(0, len(found), len(labels))]


def _writing(label: str, examples: Sequence[Example]) -> list[dict[str, str]]:
    turns = []
    for one in examples:
        for own in _listed(one.label):
            turns += [user(_wish(own)), {"role": "assistant", "content": one.text}]
    return [*turns, user(_wish(label))]


def _wish(label: str) -> str:
    return f"Write a text with the label: {label}." if label else "Write a text."


def _shares(logarithms: Sequence[float]) -> list[float]:
    most = max(logarithms)
    weights = [math.exp(one - most) for one in logarithms]
    return [one / sum(weights) for one in weights]


async def _several(run: Run, given: ClassifyInput, labels: list[str]) -> Classification:
    """Those that make the text likelier than none does; else a yes or no for each, so that nothing can come twice."""
    if (found := await _likely(run, given, ["", *labels])) is not None:
        gains = {label: sum(one[i] - one[0] for one in found) for i, label in enumerate(labels, 1)}
        scores = {label: 1 / (1 + math.exp(-max(-700.0, gain))) for label, gain in gains.items()}
        ranked = sorted(labels, key=lambda label: -gains[label])
        return Classification(labels=[label for label in ranked if gains[label] > 0], scores=scores)
    schema = object_schema({label: {"type": "boolean"} for label in labels})
    max_tokens = min(_tokens_for(run, labels) + 8 * len(labels), run.model.context_length // 2)

    def build(text: str) -> Messages:
        return _asking_several(text, given.examples, labels)

    async def ask(piece: str) -> _Holds:
        return await run.ask(build(piece), _Holds, max_tokens=max_tokens, schema=schema)

    replies = await run.each(await run.pieces(given.text, build, max_tokens=max_tokens), ask)
    return Classification(labels=[one for one in labels if any(reply.root.get(one) for reply in replies)], scores=None)


class _OneLabel(BaseModel):
    label: str


class _Holds(RootModel[dict[str, bool]]):
    pass


def _asking(text: str, examples: Sequence[Example], labels: Sequence[str]) -> Messages:
    def question(about: str) -> str:
        return f"{about}\n\nWhich of these labels fits the text best: {', '.join(labels)}?"

    turns = [(question(one.text), _OneLabel(label=own)) for one in examples for own in _listed(one.label)[:1]]
    return [*shots(*turns), user(question(text))]


def _asking_several(text: str, examples: Sequence[Example], labels: Sequence[str]) -> Messages:
    def question(about: str) -> str:
        return f"{about}\n\nWhich of these labels fit the text: {', '.join(labels)}? Say true or false for each."

    turns = [(question(one.text), _Holds({label: label in _listed(one.label) for label in labels})) for one in examples]
    return [*shots(*turns), user(question(text))]


def _tokens_for(run: Run, labels: Sequence[str]) -> int:
    """Enough for JSON that has all of them."""
    return run.model.count_text(as_json(list(labels))) * 2 + 16


# sentiment


class SentimentInput(Inputs):
    text: Text


class Sentiment(BaseModel):
    label: Literal["positive", "neutral", "negative"]
    scores: dict[str, float] | None = Field(None, description="probability by label, where the model tells")

    def __str__(self) -> str:
        return self.label


_MOODS = ("positive", "neutral", "negative")
_EXAMPLES = (
    Example(text="The food was wonderful and the staff very kind.", label="positive"),
    Example(text="The parcel arrived on Tuesday.", label="neutral"),
    Example(text="It broke after a day and nobody answered my mails.", label="negative"),
)


@task("sentiment", "Whether a text is positive, neutral or negative")
async def sentiment(run: Run, given: SentimentInput) -> Sentiment:
    """A classification head counts where its labels are those words, in any case."""
    _check_text(given.text)
    if run.model.labels:
        moods = {label: label.lower() for label in run.model.labels}
        if not set(moods.values()) <= set(_MOODS):
            raise UnsupportedError(
                f"{run.model.name} knows the labels {', '.join(moods)}, which are no moods.", param="model"
            )
        scores = {moods[label]: share for label, share in (await run.counted(run.model.classify(given.text))).items()}
        return Sentiment(label=_mood(max(scores, key=scores.__getitem__)), scores=scores)
    asked = ClassifyInput(text=given.text, labels=list(_MOODS), examples=list(_EXAMPLES), multi=False)
    found = await _one(run, asked, asked.labels)
    return Sentiment(label=_mood(found.labels[0]), scores=found.scores)


def _mood(label: str) -> Literal["positive", "neutral", "negative"]:
    return "positive" if label == "positive" else "negative" if label == "negative" else "neutral"
