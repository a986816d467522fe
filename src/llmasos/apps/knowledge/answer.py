"""Answers from a knowledge base, with the numbers of the passages that they rest on."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from llmasos.apps.knowledge.base import KnowledgeBase, Mode, Passage
from llmasos.apps.knowledge.encoder import CrossEncoder
from llmasos.errors import ContextOverflowError, InvalidInputError, NotFoundError, ServerError
from llmasos.tasks.model import Messages, Model, Reply, model_of, run_sync

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.inference.remote import RemoteLLM

MAX_TOKENS = 400
_TASK = (
    "Answer the question from the numbered passages only. Give the numbers of the passages that the answer rests on. "
    "If they do not answer it, say so and give no number."
)


@dataclass(frozen=True)
class Answer:
    """`passages` were shown to the model, numbered from 1; `citations` are those of them that it named. None: it rests
    on nothing that was found. `is_cut`: the model had written `max_tokens`, so the text ends early and citations may be
    missing."""

    text: str
    citations: tuple[int, ...]
    passages: tuple[Passage, ...]
    is_cut: bool = False

    @property
    def sources(self) -> tuple[Passage, ...]:
        return tuple(self.passages[number - 1] for number in self.citations)


def answer(
    question: str,
    base: KnowledgeBase,
    model: LLM | RemoteLLM | Model | str,
    *,
    k: int = 5,
    mode: Mode = "hybrid",
    rerank: CrossEncoder | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Answer:
    """The model's answer from the `k` best passages, or from as many of them as fit into its context.

    `model`: one that is loaded, or a name; the last one by name stays in memory. It can name no passage that it was
    not shown; whether one says what the answer says is its own word. Raises NotFoundError where nothing is found,
    InvalidInputError where `max_tokens` are too few for a word of it, ServerError for a model that does not keep to the
    form, and what `search` and the model raise.
    """
    passages = base.search(question, k, mode=mode, rerank=rerank)
    asked = model_of(model)

    def ask(messages: Messages, schema: Mapping[str, Any], shown: Sequence[Passage]) -> Awaitable[Reply]:
        return asked.ask(messages, schema, max_tokens=max_tokens)

    return run_sync(answer_from(question, passages, base.name, ask, max_tokens))


Ask = Callable[[Messages, Mapping[str, Any], Sequence[Passage]], Awaitable[Reply]]
"""The model's reply to messages, in the form of a JSON Schema; with the passages that it is shown."""


async def answer_from(question: str, passages: Sequence[Passage], name: str, ask: Ask, max_tokens: int) -> Answer:
    """The answer from the best passages of the base `name` that fit; `ask` may take `max_tokens`. Raises as `answer`
    does."""
    shown = list(passages)
    if not shown:
        raise NotFoundError(f"{name} holds nothing about it.", hint=f"`llmasos kb add {name} FILE` adds documents.")
    while True:
        try:
            reply = await ask(_messages(question, shown), _schema(len(shown)), shown)
            break
        except ContextOverflowError:
            if len(shown) == 1:
                raise
            shown.pop()
    said, numbers, is_cut = _read(reply, max_tokens)
    cited = tuple(dict.fromkeys(number for number in numbers if 1 <= number <= len(shown)))
    return Answer(said.strip(), cited, tuple(shown), is_cut)


def _read(reply: Reply, max_tokens: int) -> tuple[str, list[int], bool]:
    """The text, the numbers, and whether that is not all."""
    try:
        found = json.loads(reply.text)
        return str(found["answer"]), [int(number) for number in found["passages"]], False
    except (ValueError, TypeError, KeyError) as e:
        if not reply.is_cut:
            raise ServerError(
                f"The answer is not of the form that was asked for: {reply.text[:100]!r}.", hint="Ask another model."
            ) from e
    if not (said := answer_so_far(reply.text).strip()):
        raise InvalidInputError(
            f"The answer was cut after {max_tokens} tokens, before it had said anything.",
            hint="Raise max_tokens.",
            param="max_tokens",
        )
    return said, _numbers_so_far(reply.text), True


def answer_so_far(text: str) -> str:
    """Of a reply that is still being written, what the answer says already."""
    try:
        found = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return ""
    said = found.get("answer") if isinstance(found, dict) else None
    return said.lstrip() if isinstance(said, str) else ""


def _numbers_so_far(text: str) -> list[int]:
    """One that the text ends with may be the beginning of a longer one, and does not count."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        return []
    numbers = found.get("passages") if isinstance(found, dict) else None
    known = [one for one in numbers if isinstance(one, int)] if isinstance(numbers, list) else []
    return known[:-1] if text[-1:].isdigit() else known


def _messages(question: str, passages: Sequence[Passage]) -> Messages:
    shown = "\n\n".join(f"[{i}] {passage.short_citation}\n{passage.text}" for i, passage in enumerate(passages, 1))
    return [
        {"role": "system", "content": _TASK},
        {"role": "user", "content": f"Passages:\n\n{shown}\n\nQuestion: {question}"},
    ]


def _schema(num_passages: int) -> dict[str, Any]:
    numbers = {"type": "integer", "enum": list(range(1, num_passages + 1))}
    return {
        "type": "object",
        "properties": {
            "answer": {"type": "string"},
            "passages": {"type": "array", "items": numbers, "maxItems": num_passages},
        },
        "required": ["answer", "passages"],
        "additionalProperties": False,
    }
