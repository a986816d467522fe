"""Knowledge bases below `/llmasos/v1/knowledge`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmasos.client.types.base import WireRequest, WireResponse


class KnowledgeRequest(WireRequest):
    """A new base. `model`: the served model that makes its vectors."""

    name: str = Field(min_length=1, max_length=128)
    model: str = Field(default="all-minilm-l6-v2", min_length=1, max_length=500)


class KnowledgeInfo(WireResponse):
    """`size`: bytes on the disk. `dimensions` is 0 until the first document."""

    name: str
    model: str
    dimensions: int
    documents: int
    chunks: int
    size: int
    engine: str


class KnowledgeList(WireResponse):
    data: list[KnowledgeInfo]


class KnowledgeDocument(WireResponse):
    """`state`, after an upload: what became of it."""

    path: str
    title: str
    size: int
    sha256: str
    added: str
    chunks: int
    state: Literal["added", "replaced", "unchanged"] | None = None


class KnowledgeDocumentList(WireResponse):
    data: list[KnowledgeDocument]


class KnowledgeSearchRequest(WireRequest):
    query: str = Field(min_length=1, max_length=10_000)
    k: int = Field(default=5, ge=1, le=100)
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    rerank: str | None = Field(default=None, min_length=1, max_length=500)
    """A served cross-encoder that reads the best 50 and decides their order."""


class KnowledgePassage(WireResponse):
    """`citation` is where it stands, for people; `start` and `end` are places in the document's text."""

    text: str
    score: float
    path: str
    title: str
    headings: list[str]
    page: int | None
    start: int
    end: int
    citation: str


class KnowledgePassageList(WireResponse):
    data: list[KnowledgePassage]


class KnowledgeAskRequest(WireRequest):
    """A question to `model`, which is shown the `k` best passages."""

    question: str = Field(min_length=1, max_length=10_000)
    model: str = Field(min_length=1, max_length=500)
    k: int = Field(default=5, ge=1, le=100)
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    rerank: str | None = Field(default=None, min_length=1, max_length=500)
    max_tokens: int = Field(default=400, ge=1, le=32_768)
    stream: bool = False


class KnowledgeAnswer(WireResponse):
    """`citations`: numbers, from 1, of those of the `passages` that the model named. `finish_reason` "length": the
    answer was cut at max_tokens, and citations may be missing."""

    answer: str
    citations: list[int]
    passages: list[KnowledgePassage]
    finish_reason: Literal["stop", "length"] = "stop"


class KnowledgeAnswerEvent(WireResponse):
    """`passages` first, a `delta` of the answer's text at each step, then `done` with the whole answer."""

    type: Literal["passages", "delta", "done"]
    text: str | None = None
    passages: list[KnowledgePassage] | None = None
    answer: KnowledgeAnswer | None = None
