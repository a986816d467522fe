"""Knowledge bases: files in, passages with citations out, and answers that cite them."""

from __future__ import annotations

from llmasos.apps.knowledge.answer import Answer, answer
from llmasos.apps.knowledge.base import Changes, FileInfo, KnowledgeBase, Passage, Progress, Stats, delete, names
from llmasos.apps.knowledge.readers import Document, Section, read_document

__all__ = [
    "Answer",
    "Changes",
    "Document",
    "FileInfo",
    "KnowledgeBase",
    "Passage",
    "Progress",
    "Section",
    "Stats",
    "answer",
    "delete",
    "names",
    "read_document",
]
