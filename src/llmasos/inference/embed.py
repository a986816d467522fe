"""One forward pass, no generation: embeddings, mask filling, classification.

T = packed tokens, D = model width, V = vocabulary, B = texts. Texts are packed up to `most` tokens per pass. Each pass
is given to `run`, which executes it between two steps of the engine, so that nobody waits for a whole batch, and in
every process of a tensor-parallel model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.encoder import Pooling, check_pooling, pool, starts_of

if TYPE_CHECKING:
    from llmasos.models.config import ModelConfig
    from llmasos.models.load import LoadedModel

BATCH_TOKENS = 4096
"""Of an encoder's pass; a decoder's is as large as one of its engine."""
Run = Callable[[Callable[["LoadedModel"], Any]], Any]
"""Executes one pass over the model and returns its result."""


def batches(ids: Sequence[Sequence[int]], most: int) -> Iterator[range]:
    """Consecutive runs of texts that fit into one pass of `most` tokens (a longer text gets one of its own)."""
    start, tokens = 0, 0
    for i, text in enumerate(ids):
        if i > start and tokens + len(text) > most:
            yield range(start, i)
            start, tokens = i, 0
        tokens += len(text)
    if ids:
        yield range(start, len(ids))


def hidden_states(
    model: LoadedModel, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Final hidden states of packed texts, [T, D]; `types`: which text of a pair each token is of, for an encoder."""
    attend = Varlen(layer_specs(model.config), [len(text) for text in ids])
    tokens = torch.tensor([i for text in ids for i in text], device=model.module.device)
    packed = (tokens, attend.positions(model.module.device), attend)
    if types is None:
        hidden: Tensor = model.module(*packed)
    else:
        hidden = model.module(*packed, torch.tensor([i for text in types for i in text], device=tokens.device))
    return hidden


def embed(
    model: LoadedModel,
    ids: Sequence[Sequence[int]],
    *,
    run: Run,
    most: int = BATCH_TOKENS,
    pooling: str | None = None,
    normalize: bool = True,
) -> list[list[float]]:
    """Pooled hidden states, one vector of D floats per text. Raises UnsupportedError for an unknown pooling."""
    if any(not text for text in ids):
        raise InvalidInputError("A text to embed has no tokens.", hint="Leave empty texts out.", param="input")
    usual = model.pooling.get("pooling", "mean") if model.config.is_encoder else "last"
    kind = cast(Pooling, pooling or usual)
    check_pooling(kind)
    vectors: list[list[float]] = []
    for batch in batches(ids, most):
        vectors += run(partial(_embedded, texts=[ids[i] for i in batch], kind=kind, normalize=normalize))
    return vectors


@torch.inference_mode()
def _embedded(model: LoadedModel, *, texts: list[Sequence[int]], kind: Pooling, normalize: bool) -> list[list[float]]:
    return pool(hidden_states(model, texts), [len(t) for t in texts], kind, normalize=normalize).tolist()


def fill_mask(model: LoadedModel, ids: Sequence[int], top_k: int, *, run: Run) -> list[tuple[list[int], list[float]]]:
    """The likeliest tokens at every mask token of one text, and their probabilities."""
    mask = model.tokenizer.mask_token_id if model.tokenizer else None
    if mask is None or not model.config.masked_lm:
        raise UnsupportedError(
            f"A {model.config.architecture} can't fill masks.",
            hint="Use a masked language model such as bert-base-uncased.",
        )
    places = [i for i, token in enumerate(ids) if token == mask]
    if not places:
        assert model.tokenizer is not None
        raise InvalidInputError(
            "The text has no mask token.", hint=f"Write {model.tokenizer.token(mask)} where a word is missing."
        )

    def likeliest(model: LoadedModel) -> list[tuple[list[int], list[float]]]:
        with torch.inference_mode():
            logits = model.module.mlm_logits(hidden_states(model, [ids])[places])
            top = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
            return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    found: list[tuple[list[int], list[float]]] = run(likeliest)
    return found


def classify(
    model: LoadedModel,
    ids: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None = None,
    *,
    run: Run,
    most: int = BATCH_TOKENS,
) -> list[list[float]]:
    """What a classification head says of each text, one number per label: see `TextModel.classify`. `types`: which text
    of a pair (0 or 1) each token is of."""
    if not model.config.num_labels:
        raise UnsupportedError(
            f"A {model.config.architecture} has no classification head.",
            hint="Use a model fine-tuned for classification.",
        )
    results: list[list[float]] = []
    for batch in batches(ids, most):
        some = None if types is None else [types[i] for i in batch]
        results += run(partial(_classified, texts=[ids[i] for i in batch], types=some))
    return results


@torch.inference_mode()
def _classified(
    model: LoadedModel, *, texts: list[Sequence[int]], types: list[Sequence[int]] | None
) -> list[list[float]]:
    starts = starts_of([len(t) for t in texts], model.module.device)
    return _shares(model.module.classify(hidden_states(model, texts, types), starts), model.config).tolist()


def _shares(logits: Tensor, config: ModelConfig) -> Tensor:
    kind = config.extra.get("problem_type")
    if kind == "regression":
        return logits
    return logits.sigmoid() if kind == "multi_label_classification" or config.num_labels == 1 else logits.softmax(-1)
