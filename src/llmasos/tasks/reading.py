"""What a text says: answer, extract, keywords, ner."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, Field, RootModel, field_validator

from llmasos.errors import ContextOverflowError, InvalidInputError
from llmasos.tasks import texts
from llmasos.tasks.base import MARGIN, Inputs, Run, json_schema, object_schema, shots, task, user
from llmasos.tasks.model import Messages
from llmasos.tasks.writing import TOKENS_PER_WORD, Text

# answer


class AnswerInput(Inputs):
    question: Text
    context: list[Text] = Field(
        [], max_length=10_000, description="passages to answer from, any number; none: from memory"
    )
    words: int = Field(80, ge=1, le=2000, description="words of the answer, at most")

    @field_validator("context", mode="before")
    @classmethod
    def _one_passage(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Answer(BaseModel):
    text: str
    citations: list[int] = Field([], description="numbers of the passages that it is from, counted from 1")

    def __str__(self) -> str:
        return self.text + "".join(f" [{number}]" for number in self.citations)


class _Plain(BaseModel):
    answer: str = Field(min_length=1)


class _Cited(BaseModel):
    answer: str = Field(min_length=1)
    citations: list[int] = []


class _Numbers(BaseModel):
    citations: list[int]


@task("answer", "The answer to a question, from passages that it cites, or without")
async def answer(run: Run, given: AnswerInput) -> Answer:
    """More passages than the context holds are read in groups; the answer is then made of what the groups say."""
    max_tokens = min(given.words * TOKENS_PER_WORD + 16, run.model.context_length // 4)
    if not given.context:
        messages = [user(f"{given.question}\n\nAnswer in at most {given.words} words.")]
        plain = await run.ask(messages, _Plain, max_tokens=max_tokens)
        return Answer(text=_tidy(plain.answer, given.words), citations=[])
    passages = list(enumerate(given.context, 1))
    while True:
        groups = await _groups(run, given, passages, max_tokens + 16)
        replies = await run.each(groups, lambda group: _from_passages(run, given, group, max_tokens))
        if len(replies) == 1:
            return Answer(text=_tidy(replies[0].answer, given.words), citations=replies[0].citations)
        if len(replies) >= len(passages):
            raise ContextOverflowError(run.model.count_text(given.context[0]), max_tokens, run.model.context_length)
        # what a group says stands for the passages that it names
        passages = [
            (one.citations[0] if one.citations else group[0][0], one.answer)
            for one, group in zip(replies, groups, strict=True)
        ]


Passages = list[tuple[int, str]]


def _about_passages(question: str, passages: Passages) -> Messages:
    """With two answers before it: small models that have seen none write on and on."""
    return [*shots(*_SHOWN), user(_asked(question, passages))]


def _asked(question: str, passages: Passages) -> str:
    listed = "\n".join(f"[{number}] {text.strip()}" for number, text in passages)
    wish = "Answer the question from the passages and cite their numbers."
    return f"Passages:\n{listed}\n\n{wish}\nQuestion: {question}"


_SHOWN = (
    (
        _asked("How long is the bridge?", [(1, "Cats sleep a lot."), (2, "The bridge is 90 m long.")]),
        _Cited(answer="90 m", citations=[2]),
    ),
    (
        _asked(
            "Who wrote the letter?", [(1, "Mr Hill wrote the letter."), (2, "The door is green."), (3, "It rains.")]
        ),
        _Cited(answer="Mr Hill", citations=[1]),
    ),
)


def _about_passage(question: str, number: int, text: str) -> Messages:
    return _about_passages(question, [(number, text)])


async def _groups(run: Run, given: AnswerInput, passages: Passages, max_tokens: int) -> list[Passages]:
    """As many passages in each as there is room for; one that is too long is cut, and its parts keep its number."""
    limit = run.model.context_length - max_tokens - MARGIN
    whole: Passages = []
    for number, text in passages:
        build = partial(_about_passage, given.question, number)
        parts = await run.pieces(text, build, max_tokens=max_tokens)
        whole += [(number, part) for part in parts if part.strip()]
    groups: list[Passages] = []
    for passage in whole:
        longer = [*groups[-1], passage] if groups else [passage]
        if groups and run.model.count(_about_passages(given.question, longer)) <= limit:
            groups[-1] = longer
        else:
            groups.append([passage])
    return groups


async def _from_passages(run: Run, given: AnswerInput, group: Passages, max_tokens: int) -> _Cited:
    numbers = sorted({number for number, _ in group})
    cites = {"type": "array", "items": {"enum": numbers}, "minItems": 1, "maxItems": min(3, len(numbers))}
    schema = object_schema({"answer": {"type": "string", "minLength": 1}, "citations": cites})
    messages = _about_passages(given.question, group)
    reply = await run.ask(messages, _Cited, max_tokens=max_tokens + 16, schema=schema)
    if not (citations := _checked(reply, group)):  # the limit of tokens ended the answer before them
        asked = await run.ask(messages, _Numbers, max_tokens=64, schema=object_schema({"citations": cites}))
        citations = sorted(set(asked.citations))
    return _Cited(answer=reply.answer, citations=citations)


def _checked(reply: _Cited, group: Passages) -> list[int]:
    """The passages that were cited and have a word of the answer that most passages lack. Where none of them has one:
    the passage with most of those words, as small models cite hardly better than by chance. Where no passage has one,
    the answer is in other words, and what was cited counts."""
    words = [texts.words(text) for _, text in group]
    most = max(1, len(group) // 2)
    telling = {word for word in texts.words(reply.answer) if sum(word in one for one in words) <= most}
    shared = {number: 0 for number, _ in group}
    for (number, _), one in zip(group, words, strict=True):
        shared[number] = max(shared[number], len(telling & one))
    if held := sorted({number for number in reply.citations if shared.get(number)}):
        return held
    best = max(shared, key=shared.__getitem__)
    return [best] if shared[best] else sorted(set(reply.citations))


def _tidy(text: str, words: int) -> str:
    return texts.shortened(texts.whole_sentences(text), words)


# extract


class ExtractInput(Inputs):
    text: Text
    into: dict[str, Any] | list[str] = Field(
        description="a JSON Schema, or the names of the fields to find (each a text)"
    )
    instruction: str = Field("", max_length=1000, description="what to look at")
    max_tokens: int = Field(512, ge=16, le=32768, description="tokens of the JSON, at most")

    @field_validator("into", mode="before")
    @classmethod
    def _schema_of_a_class(cls, value: Any) -> Any:
        return json_schema(value) if isinstance(value, type) and issubclass(value, BaseModel) else value

    @field_validator("into")
    @classmethod
    def _not_empty(cls, value: dict[str, Any] | list[str]) -> dict[str, Any] | list[str]:
        if not value or (isinstance(value, list) and (len(set(value)) < len(value) or not all(value))):
            raise ValueError("it names no field, or one twice")
        return value


class Extraction(BaseModel):
    data: Any = Field(description="JSON of the schema")


class _Any(RootModel[Any]):
    pass


@task("extract", "The facts of a text as JSON of a schema")
async def extract(run: Run, given: ExtractInput) -> Extraction:
    """`into` may also be a pydantic model, in Python. What the text does not say is an empty text or null, where the
    schema lets it. Raises ContextOverflowError for a text that is too long."""
    schema = given.into if isinstance(given.into, dict) else _fields_schema(given.into)
    names = ", ".join(_property_names(schema))
    wish = f" {given.instruction.strip()}" if given.instruction.strip() else ""
    what = f": {names}" if names else ""
    example = _extract_example(given.into) if isinstance(given.into, list) else []
    messages = [*example, user(f"{given.text}\n\nWrite the facts of this text as JSON{what}.{wish}")]
    found, is_cut = await run.ask_whole(messages, _Any, max_tokens=given.max_tokens, schema=schema)
    if is_cut:
        raise InvalidInputError(
            f"extract: the JSON was not whole after {given.max_tokens} tokens.",
            hint="Raise max_tokens, or bound the schema with maxLength and maxItems.",
            param="max_tokens",
        )
    return Extraction(data=found.root)


def _fields_schema(names: list[str]) -> dict[str, Any]:
    return object_schema({name: {"type": "string", "maxLength": 200} for name in names})


def _extract_example(names: list[str]) -> list[dict[str, str]]:
    """A text that says each field and what for: only how it looks is to be learned."""
    facts = {name: f"the {name.replace('_', ' ')}" for name in names}
    question = f"{'. '.join(f'{name}: {fact}' for name, fact in facts.items())}."
    return shots((f"{question}\n\nWrite the facts of this text as JSON: {', '.join(names)}.", _Any(facts)))


def _property_names(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("properties", {}))


# keywords


class KeywordsInput(Inputs):
    text: Text = Field(description="any length")
    num: int = Field(5, ge=1, le=50, description="keywords, at most")


class Keywords(BaseModel):
    keywords: list[str]

    def __str__(self) -> str:
        return ", ".join(self.keywords)


@task("keywords", "The words that a text is about")
async def keywords(run: Run, given: KeywordsInput) -> Keywords:
    """As they stand in the text; of several pieces of a long one, those that most of them have. A model behind an API
    may find none."""
    max_tokens = min(given.num * 12 + 16, run.model.context_length // 3)

    def build(text: str) -> Messages:
        question = f"{text}\n\nList the {given.num} most important keywords of this text."
        return [*shots((_KEYWORDS_EXAMPLE, Keywords(keywords=["bees", "honey", "city gardens"]))), user(question)]

    async def ask(piece: str) -> Keywords:
        word: dict[str, Any] = {"type": "string", "minLength": 2, "maxLength": 40}
        num = 1
        if run.model.enforces and (spans := _keyword_spans(piece)):
            word, num = {"enum": spans}, min(given.num, len(spans))
        schema = object_schema({"keywords": {"type": "array", "items": word, "minItems": num, "maxItems": given.num}})
        return await run.ask(build(piece), Keywords, max_tokens=max_tokens, schema=schema)

    short = await run.pieces(given.text, build, max_tokens=max_tokens, most=_READ_TOKENS)
    found: Counter[str] = Counter()
    shown: dict[str, str] = {}
    whole = given.text.casefold()
    for reply in await run.each([one for one in short if one.strip()], ask):
        for word in dict.fromkeys(reply.keywords):
            if (key := word.strip().casefold()) and key in whole:
                shown.setdefault(key, word.strip())
                found[key] += 1
    return Keywords(keywords=[shown[key] for key, _ in found.most_common(given.num)])


def _keyword_spans(piece: str) -> list[str]:
    """What may be chosen from. Short words at an end are hardly ever a keyword's in any language that has them."""
    found = texts.spans(piece, _KEYWORD_WORDS)
    return [one for one in found if texts.is_unspaced(one[0]) or all(len(word) > 3 for word in one.split())]


_KEYWORDS_EXAMPLE = (
    "Bees in the city make more honey than those in the country, since city gardens flower all summer.\n\n"
    "List the 3 most important keywords of this text."
)
_KEYWORD_WORDS = 2
_READ_TOKENS = 400
"""Tokens of a piece, so that the words that may be chosen from stay few."""


# ner


class NerInput(Inputs):
    text: Text = Field(description="any length")
    types: list[Annotated[str, Field(min_length=1, max_length=40)]] = Field(
        ["person", "organisation", "place", "date"], min_length=1, max_length=30, description="kinds of entities"
    )


class Entity(BaseModel):
    text: str
    type: str
    start: int = Field(description="where it begins in the text, in characters")
    end: int = Field(description="where it ends: text[start:end]")


class Entities(BaseModel):
    entities: list[Entity]

    def __str__(self) -> str:
        return "\n".join(f"{one.type}: {one.text}" for one in self.entities)


class _Named(BaseModel):
    text: str
    type: str


class _Names(BaseModel):
    entities: list[_Named]


_NAME_WORDS = 4
_KNOWN = {"person": "Marie Curie", "place": "Paris", "date": "1891", "organisation": "Sorbonne"}
"""The usual types, with what has them in the example."""
_PIECE = 40
"""Tokens of a piece: small models name everything in a sentence or two, and little in many."""
_NER_EXAMPLE = "Marie Curie moved to Paris in 1891 and worked for the Sorbonne."


@task("ner", "Names in a text: persons, places, dates, with where they stand")
async def ner(run: Run, given: NerInput) -> Entities:
    """Only what stands in the text, word by word, counts; where it stands is looked up there, every time it comes."""
    types = list(dict.fromkeys(given.types))
    max_tokens = min(256, run.model.context_length // 3)

    def build(text: str) -> Messages:
        return [*_ner_example(types), user(_ner_question(text, types))]

    short = await run.pieces(given.text, build, max_tokens=max_tokens, most=_PIECE)

    async def ask(piece: str) -> _Names:
        if not piece.strip():
            return _Names(entities=[])
        schema = _ner_schema(piece, types, run.model.enforces)
        return await run.ask(build(piece.strip()), _Names, max_tokens=max_tokens, schema=schema)

    found: dict[str, str] = {}
    for piece, reply in zip(short, await run.each(short, ask), strict=True):
        for one in reply.entities:
            if (name := one.text.strip()) and one.type in types and name in piece:
                found.setdefault(name, one.type)
    return Entities(entities=located(given.text, found))


def _ner_schema(piece: str, types: list[str], enforces: bool) -> dict[str, Any]:
    name: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 80}
    spans = texts.spans(piece, _NAME_WORDS)
    if set(types) <= set(_KNOWN):  # names and dates: no first or last word of those begins with a small letter
        spans = [one for one in spans if not one[0].islower() and not one.split()[-1][0].islower()]
    if enforces and spans:
        name = {"enum": spans}
    one = object_schema({"text": name, "type": {"enum": types}})
    return object_schema({"entities": {"type": "array", "items": one, "maxItems": max(1, texts.num_words(piece) // 2)}})


def _ner_question(text: str, types: list[str]) -> str:
    return f"{text}\n\nList every name in this text with its type: {', '.join(types)}."


def _ner_example(types: list[str]) -> list[dict[str, str]]:
    """Only with the usual types: with others it would be a wrong one."""
    if not set(types) <= set(_KNOWN):
        return []
    names = [_Named(text=_KNOWN[one], type=one) for one in _KNOWN if one in types]
    return shots((_ner_question(_NER_EXAMPLE, types), _Names(entities=names)))


def located(text: str, names: Mapping[str, str]) -> list[Entity]:
    """Every place where one of the names (with their types) stands as whole words, longer names before those inside."""
    taken = [False] * len(text)
    found = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        before = "" if texts.is_unspaced(name[0]) else r"(?<!\w)"
        behind = "" if texts.is_unspaced(name[-1]) else r"(?!\w)"
        for match in re.finditer(before + re.escape(name) + behind, text):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = [True] * len(name)
                found.append(Entity(text=name, type=names[name], start=match.start(), end=match.end()))
    return sorted(found, key=lambda one: one.start)
