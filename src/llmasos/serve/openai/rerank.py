"""POST /v1/rerank (Jina's and Cohere's shape) and /v1/score (vLLM's): how well texts answer a query.

By the model's own head where it has one for pairs of texts (a cross-encoder), else by the cosine similarity of their
embeddings. The answer says by which.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from operator import mul

from llmasos.client.types import (
    PairScore,
    RerankDocument,
    Reranking,
    RerankRequest,
    RerankResult,
    ScoreList,
    ScoreRequest,
)
from llmasos.client.types.openai import ScoringMethod
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models, Served
from llmasos.serve.served import ServedModel

_NO_HEAD = "model"
"""The field that a model without such a head is refused by."""


async def rerank(models: Models, caller: Caller, body: RerankRequest) -> Reranking:
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    async with models.lease(body.model, caller) as served:
        scores, num_tokens, method = await _scores(served, [body.query], texts, "documents")
    return await asyncio.to_thread(_ranked, body, texts, scores, num_tokens, method)


def _ranked(
    body: RerankRequest, texts: Sequence[str], scores: Sequence[float], num_tokens: int, method: ScoringMethod
) -> Reranking:
    best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
    results = []
    for i in best:
        result = RerankResult(index=i, relevance_score=scores[i])
        if body.return_documents is not False:
            result.document = RerankDocument(text=texts[i])
        results.append(result)
    return Reranking(
        id=f"rerank-{secrets.token_hex(12)}",
        model=body.model,
        results=results,
        usage=render.embedding_usage(num_tokens),
        method=method,
    )


async def score(models: Models, caller: Caller, body: ScoreRequest) -> ScoreList:
    first, second = _listed(body.text_1), _listed(body.text_2)
    if not first or not second:
        raise InvalidInputError("There is no text.", param="text_2" if first else "text_1")
    if len(first) not in (1, len(second)):
        raise InvalidInputError(
            f"text_1 holds {len(first)} texts and text_2 holds {len(second)}.",
            hint="Send one text and several, or two lists of the same length.",
            param="text_1",
        )
    if len(second) > prepare.MAX_INPUTS:
        raise InvalidInputError(f"text_2 holds more than {prepare.MAX_INPUTS} texts.", param="text_2")
    async with models.lease(body.model, caller) as served:
        scores, num_tokens, method = await _scores(served, first, second, "text_2")
    return ScoreList(
        id=f"score-{secrets.token_hex(12)}",
        object="list",
        created=int(time.time()),
        model=body.model,
        data=[PairScore(index=i, object="score", score=value) for i, value in enumerate(scores)],
        usage=render.embedding_usage(num_tokens),
        method=method,
    )


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def _scores(
    served: Served, queries: Sequence[str], texts: Sequence[str], param: str
) -> tuple[list[float], int, ScoringMethod]:
    """One score for each text against its query (or the only one), the tokens that were read, and how."""
    ids = await asyncio.to_thread(_ids, served.model, [*queries, *texts], param)
    try:
        if len(queries) == 1:
            scores = await served.score_pairs(queries[0], texts)
        else:
            pairs = zip(queries, texts, strict=True)
            scores = [(await served.score_pairs(query, [text]))[0] for query, text in pairs]
        num_tokens = sum(map(len, ids)) + (len(texts) - 1) * len(ids[0]) * (len(queries) == 1)
        return scores, num_tokens, "cross-encoder"
    except UnsupportedError as e:
        if e.param != _NO_HEAD or served.adapter is not None:
            raise
    vectors = await served.embed(ids)
    return await asyncio.to_thread(_cosines, vectors, len(queries)), sum(map(len, ids)), "cosine"


def _ids(model: ServedModel, texts: Sequence[str], param: str) -> list[list[int]]:
    if not all(texts):
        raise InvalidInputError(f"{param} holds an empty text.", param=param)
    return [model.tokenizer.encode(prepare.unicode(text, param)) for text in texts]


def _cosines(vectors: Sequence[Sequence[float]], num_queries: int) -> list[float]:
    """The queries come first: one for each of the others, or one for all."""
    first, second = vectors[:num_queries], vectors[num_queries:]
    if num_queries == 1:
        first = [first[0]] * len(second)
    return [_cosine(a, b) for a, b in zip(first, second, strict=True)]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = (_dot(a, a) * _dot(b, b)) ** 0.5
    return _dot(a, b) / lengths if lengths else 0.0


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(mul, a, b))
