"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio

from llmasos.client.types import Embedding, EmbeddingList, EmbeddingRequest
from llmasos.errors import UnsupportedError
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models


async def embed(models: Models, caller: Caller, body: EmbeddingRequest) -> EmbeddingList:
    async with models.lease(body.model, caller) as served:
        texts, num_tokens = await asyncio.to_thread(prepare.embedding_texts, served.model, body)
        vectors = await served.embed(texts)
    if body.dimensions not in (None, len(vectors[0])):
        # Cutting a vector short keeps its meaning only for models trained for that, which no file says reliably.
        raise UnsupportedError(
            f"{body.model} makes embeddings of {len(vectors[0])} dimensions, not {body.dimensions}.", param="dimensions"
        )
    as_base64 = body.encoding_format == "base64"
    data = [
        Embedding(object="embedding", index=i, embedding=render.embedding_base64(vector) if as_base64 else vector)
        for i, vector in enumerate(vectors)
    ]
    usage = render.embedding_usage(num_tokens)
    return EmbeddingList(object="list", data=data, model=body.model, usage=usage)
