"""A deterministic encoder: tokens are words, a text's vector counts its words' letters."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence


class Words:
    def encode(self, text: str) -> list[int]:
        """Words and marks, and two that are always added, as BERT's do."""
        return [0, *(zlib.crc32(word.encode()) for word in re.findall(r"\w{1,20}|[^\w\s]", text)), 1]


class FakeEncoder:
    """Texts that share words are near each other. `broken_at`: the text that can't be embedded."""

    def __init__(self, name: str = "fake", *, dimensions: int = 64, context_length: int = 40) -> None:
        self.name, self.dimensions, self.context_length = name, dimensions, context_length
        self.tokenizer = Words()
        self.seen: list[str] = []
        self.broken_at: str | None = None

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [self._vector(text) for text in texts]

    def _vector(self, text: str) -> list[float]:
        assert len(self.tokenizer.encode(text)) <= self.context_length
        self.seen.append(text)
        if self.broken_at is not None and self.broken_at in text:
            raise RuntimeError("the encoder broke")
        vector = [0.0] * self.dimensions
        for word in self.tokenizer.encode(text.lower())[1:-1]:
            vector[word % self.dimensions] += 1.0
        return vector

    def score_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        """The shortest text is best."""
        return [1 / (1 + len(text)) for text in texts]
