"""Numbers from texts: embed, rerank."""

from __future__ import annotations

from operator import mul
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from llmasos.tasks.base import Inputs, Run, task
from llmasos.tasks.writing import Text


class EmbedInput(Inputs):
    texts: list[Text] = Field(min_length=1, max_length=10_000)

    @field_validator("texts", mode="before")
    @classmethod
    def _one_text(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class Embeddings(BaseModel):
    vectors: list[list[float]] = Field(description="one for each text, of length 1")


@task("embed", "A vector for each text; near ones mean the like", use="embed")
async def embed(run: Run, given: EmbedInput) -> Embeddings:
    """A text beyond the model's context is an error."""
    return Embeddings(vectors=await run.counted(run.model.embed(given.texts)))


class RerankInput(Inputs):
    query: Text
    texts: list[Text] = Field(min_length=1, max_length=10_000)
    top_n: int | None = Field(None, ge=1, description="the best so many; default: all")


class Ranked(BaseModel):
    index: int = Field(description="which of the texts, counted from 0")
    score: float
    text: str


class Ranking(BaseModel):
    results: list[Ranked] = Field(description="the best first")
    method: Literal["cross-encoder", "cosine"]

    def __str__(self) -> str:
        return "\n".join(f"{one.score:.3f}  {one.text}" for one in self.results)


@task("rerank", "Texts by how well they answer a query", use="embed")
async def rerank(run: Run, given: RerankInput) -> Ranking:
    """By the head of a cross-encoder, else by the cosine of the embeddings."""
    scores = await run.counted(run.model.score_pairs(given.query, given.texts))
    method: Literal["cross-encoder", "cosine"] = "cross-encoder"
    if scores is None:
        query, *vectors = await run.counted(run.model.embed([given.query, *given.texts]))
        scores, method = [sum(map(mul, query, vector)) for vector in vectors], "cosine"
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: given.top_n]
    return Ranking(results=[Ranked(index=i, score=scores[i], text=given.texts[i]) for i in best], method=method)
