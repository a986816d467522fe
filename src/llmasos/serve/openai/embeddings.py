"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio

from llmasos.client.types import Embedding, EmbeddingList, EmbeddingRequest
from llmasos.errors import UnsupportedError
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models
from llmasos.serve.served import ServedModel


async def embed(models: Models, caller: Caller, body: EmbeddingRequest) -> EmbeddingList:
    async with models.lease(body.model, caller) as served:
        ids = await asyncio.to_thread(prepare.embedding_inputs, served.model, body)
        vectors = await served.embed(ids)
        return await asyncio.to_thread(_listed, served.model, body, vectors, sum(map(len, ids)))


def _listed(model: ServedModel, body: EmbeddingRequest, vectors: list[list[float]], num_tokens: int) -> EmbeddingList:
    as_base64 = body.encoding_format == "base64"
    vectors = cut(vectors, body.dimensions, model.matryoshka, body.model)
    data = [
        Embedding(object="embedding", index=i, embedding=render.embedding_base64(vector) if as_base64 else vector)
        for i, vector in enumerate(vectors)
    ]
    usage = render.embedding_usage(num_tokens)
    return EmbeddingList(object="list", data=data, model=body.model, usage=usage)


def cut(
    vectors: list[list[float]], dimensions: int | None, allowed: bool | tuple[int, ...], name: str
) -> list[list[float]]:
    """The first `dimensions` numbers, at unit length again. That keeps a vector's meaning only for models that were
    trained for it (Matryoshka, arXiv:2205.13147), so it is refused for all others."""
    own = len(vectors[0])
    if dimensions in (None, own):
        return vectors
    if allowed is False or dimensions > own or (allowed is not True and dimensions not in allowed):
        hint = f"Its config allows: {', '.join(map(str, allowed))}." if isinstance(allowed, tuple) else "Leave it out."
        raise UnsupportedError(
            f"{name} makes embeddings of {own} dimensions, not {dimensions}.", hint=hint, param="dimensions"
        )
    cut = [vector[:dimensions] for vector in vectors]
    lengths = [sum(x * x for x in vector) ** 0.5 or 1.0 for vector in cut]
    return [[x / length for x in vector] for vector, length in zip(cut, lengths, strict=True)]
