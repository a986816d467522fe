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
