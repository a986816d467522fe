"""Answers from a knowledge base, with the numbers of the passages that they rest on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmasos.apps.knowledge.base import KnowledgeBase, Mode, Passage
from llmasos.apps.knowledge.encoder import CrossEncoder
from llmasos.errors import ContextOverflowError, NotFoundError, ServerError
from llmasos.tasks.model import Model, Reply, model_of, run_sync

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
    ServerError where the answer is cut at `max_tokens`, and what `search` and the model raise.
    """
    passages = base.search(question, k, mode=mode, rerank=rerank)
    if not passages:
        raise NotFoundError(
            f"{base.name} holds nothing about it.", hint=f"`llmasos kb add {base.name} FILE` adds documents."
        )
    asked = model_of(model)
    while True:
        try:
            reply = _ask(question, passages, asked, max_tokens)
            break
        except ContextOverflowError:
            if len(passages) == 1:
                raise
            passages = passages[:-1]
    try:
        found = json.loads(reply.text)
        said, numbers = str(found["answer"]), [int(number) for number in found["passages"]]
    except (ValueError, TypeError, KeyError) as e:
        why = f"was cut after {max_tokens} tokens" if reply.is_cut else "is not of the form that was asked for"
        raise ServerError(
            f"The answer {why}: {reply.text[:100]!r}.", hint="Raise max_tokens, or ask another model."
        ) from e
    cited = tuple(dict.fromkeys(number for number in numbers if 1 <= number <= len(passages)))
    return Answer(said.strip(), cited, tuple(passages))


def _ask(question: str, passages: list[Passage], model: Model, max_tokens: int) -> Reply:
    shown = "\n\n".join(f"[{i}] {passage.short_citation}\n{passage.text}" for i, passage in enumerate(passages, 1))
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
    return run_sync(model.ask(messages, schema, max_tokens=max_tokens))
