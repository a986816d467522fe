"""Answers from a knowledge base, with the numbers of the passages that they rest on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from llmasos.apps.knowledge.base import KnowledgeBase, Mode, Passage
from llmasos.apps.knowledge.encoder import CrossEncoder
from llmasos.errors import ContextOverflowError, NotFoundError, ServerError
from llmasos.inference.request import StructuredOutput

MAX_TOKENS = 400
_TASK = (
    "Answer the question from the numbered passages only. Give the numbers of the passages that the answer rests on. "
    "If they do not answer it, say so and give no number."
)


class Chat(Protocol):
    """`llmasos.LLM` has it."""

    def chat(self, messages: Any, /, **options: Any) -> str: ...


@dataclass(frozen=True)
class Answer:
    """`passages` were shown to the model, numbered from 1; `citations` are those of them that it named. None: it rests
    on nothing that was found."""

    text: str
    citations: tuple[int, ...]
    passages: tuple[Passage, ...]

    @property
    def sources(self) -> tuple[Passage, ...]:
        return tuple(self.passages[number - 1] for number in self.citations)


def answer(
    question: str,
    base: KnowledgeBase,
    model: Chat,
    *,
    k: int = 5,
    mode: Mode = "hybrid",
    rerank: CrossEncoder | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Answer:
    """The model's answer from the `k` best passages, or from as many of them as fit into its context.

    The model can name no passage that it was not shown; whether one says what the answer says is its own word.
    Raises NotFoundError where nothing is found, ServerError where the answer is cut at `max_tokens`, and what `search`
    and the model raise.
    """
    passages = base.search(question, k, mode=mode, rerank=rerank)
    if not passages:
        raise NotFoundError(
            f"{base.name} holds nothing about it.", hint=f"`llmasos kb add {base.name} FILE` adds documents."
        )
    while True:
        try:
            text = _ask(question, passages, model, max_tokens)
            break
        except ContextOverflowError:
            if len(passages) == 1:
                raise
            passages = passages[:-1]
    try:
        found = json.loads(text)
        said, numbers = str(found["answer"]), [int(number) for number in found["passages"]]
    except (ValueError, TypeError, KeyError) as e:
        raise ServerError(
            f"The answer is not of the form that was asked for: {text[:100]!r}.",
            hint="It may have been cut: raise max_tokens.",
        ) from e
    cited = tuple(dict.fromkeys(number for number in numbers if 1 <= number <= len(passages)))
    return Answer(said.strip(), cited, tuple(passages))


def _ask(question: str, passages: list[Passage], model: Chat, max_tokens: int) -> str:
    shown = "\n\n".join(f"[{i}] {passage.citation}\n{passage.text}" for i, passage in enumerate(passages, 1))
    messages = [
        {"role": "system", "content": _TASK},
        {"role": "user", "content": f"Passages:\n\n{shown}\n\nQuestion: {question}"},
    ]
    numbers = {"type": "integer", "enum": list(range(1, len(passages) + 1))}
    schema = {
        "type": "object",
        "properties": {
            "answer": {"type": "string"},
            "passages": {"type": "array", "items": numbers, "maxItems": len(passages)},
        },
        "required": ["answer", "passages"],
        "additionalProperties": False,
    }
    form = StructuredOutput(json=schema)
    return model.chat(messages, structured=form, max_tokens=max_tokens, temperature=0.0)
