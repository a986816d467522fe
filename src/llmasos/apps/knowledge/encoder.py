"""What a knowledge base needs of a model that makes vectors, and of one that reads pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmasos.inference.remote import RemoteLLM

Vectors = NDArray[np.float32]
"""[texts, dimensions], each row of unit length."""
EMBEDDED_AT_ONCE = 64


class Encoder(Protocol):
    """`llmasos.LLM` has it, and so has a served model. `embed`: a vector for each text."""

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def tokenizer(self) -> Any: ...
    def embed(self, texts: Any, /) -> Any: ...


class CrossEncoder(Protocol):
    """Scores how well each text answers a query."""

    def score_pairs(self, query: str, texts: Sequence[str]) -> list[float]: ...


class RemoteEncoder:
    """A `RemoteLLM` of a server for open models as an encoder: its name is the model's, wherever the server is."""

    def __init__(self, llm: RemoteLLM) -> None:
        self._llm, self.name = llm, llm.model

    @property
    def context_length(self) -> int:
        return self._llm.context_length

    @property
    def tokenizer(self) -> RemoteEncoder:
        return self

    def encode(self, text: str) -> range:
        """As many as there are tokens."""
        return range(self._llm.count_tokens(text))

    def embed(self, texts: list[str], /) -> list[list[float]]:
        return self._llm.embed(texts)


def encoder_of(model: Encoder | RemoteLLM) -> Encoder:
    from llmasos.inference.remote import RemoteLLM

    return RemoteEncoder(model) if isinstance(model, RemoteLLM) else model


def vectors_of(encoder: Encoder, texts: Sequence[str], *, on_batch: Callable[[int], None] = lambda _: None) -> Vectors:
    """`on_batch` is told how many texts are done; what it raises ends the work."""
    rows: list[list[float]] = []
    for start in range(0, len(texts), EMBEDDED_AT_ONCE):
        rows += encoder.embed(list(texts[start : start + EMBEDDED_AT_ONCE]))
        on_batch(len(rows))
    found = np.asarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def counter(encoder: Encoder) -> Callable[[str], int]:
    """Counts the tokens that the encoder sees of a text."""
    encode = encoder.tokenizer.encode

    def count(text: str) -> int:
        return len(encode(text))

    return count
