"""A model of tasks without a network: four characters are a token, and it answers what its schema allows, or what it is
told to. It fails where a question would not fit its context."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simplest_json import simplest

from llmasos.errors import ContextOverflowError
from llmasos.tasks.model import Messages, Reply

Answers = Callable[[str, Mapping[str, Any] | None], Any]


class FakeModel:
    """`answers(last message, schema)` gives JSON values, or an error to raise; None: the simplest that there may be."""

    enforces = True

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        context_length: int = 2000,
        name: str = "fake",
        labels: tuple[str, ...] = (),
        likely: Callable[[str, str], float] | None = None,
        delay: float = 0.0,
        obeys: bool = True,
    ) -> None:
        """`obeys`: the limit of tokens ends its answers."""
        self.name, self.context_length, self.labels = name, context_length, labels
        self.answers, self.likely, self.delay, self.obeys = answers, likely, delay, obeys
        self.asked: list[str] = []
        self.messages: list[Messages] = []
        self.num_running = self.most_running = 0
        self.lock = threading.Lock()

    def count(self, messages: Messages) -> int:
        return sum(self.count_text(one["content"]) + 2 for one in messages) + 3

    def count_text(self, text: str) -> int:
        return (len(text) + 3) // 4

    async def ask(self, messages: Messages, schema: Mapping[str, Any] | None, *, max_tokens: int) -> Reply:
        if self.count(messages) + max_tokens > self.context_length:
            raise ContextOverflowError(self.count(messages), max_tokens, self.context_length)
        question = messages[-1]["content"]
        self.asked.append(question)
        self.messages.append(messages)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.num_running -= 1
        found = self.answers(question, schema) if self.answers else None
        if isinstance(found, Exception):
            raise found
        if schema is None:
            return Reply("hello" if found is None else found)
        text = json.dumps(simplest(schema) if found is None else found, ensure_ascii=False)
        if not self.obeys:
            return Reply(text)
        return Reply(text[: max_tokens * 4], len(text) > max_tokens * 4)

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        assert self.count([*messages, {"role": "assistant", "content": reply}]) <= self.context_length
        return None if self.likely is None else self.likely(messages[-1]["content"], reply)

    async def classify(self, text: str) -> dict[str, float]:
        shares = [len(label) for label in self.labels]
        return {label: share / sum(shares) for label, share in zip(self.labels, shares, strict=True)}

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[1.0, 0.0] if "cat" in text else [0.0, 1.0] for text in texts]

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        return None
