"""One forward pass, no generation: embeddings, log-likelihoods, mask filling, classification.

T = packed tokens, D = model width, V = vocabulary, B = texts. Texts are packed up to `BATCH_TOKENS` per pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference.request import TokenLogprob
from llmasos.inference.sampler import token_logprob, token_names
from llmasos.models.attention import Varlen, layer_specs
from llmasos.models.encoder import Pooling, pool, starts_of

if TYPE_CHECKING:
    from llmasos.models.config import ModelConfig
    from llmasos.models.load import LoadedModel

BATCH_TOKENS = 4096
LOGIT_ROWS = 256
"""Positions whose logits exist at once: 256 × 150k × 4 bytes = 150 MB."""


def batches(ids: Sequence[Sequence[int]]) -> Iterator[range]:
    """Consecutive runs of texts that fit into one pass (a longer text gets one of its own)."""
    start, tokens = 0, 0
    for i, text in enumerate(ids):
        if i > start and tokens + len(text) > BATCH_TOKENS:
            yield range(start, i)
            start, tokens = i, 0
        tokens += len(text)
    if ids:
        yield range(start, len(ids))


def hidden_states(model: LoadedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states of packed texts, [T, D]."""
    attend = Varlen(layer_specs(model.config), [len(text) for text in ids])
    tokens = torch.tensor([i for text in ids for i in text], device=model.module.device)
    hidden: Tensor = model.module(tokens, attend.positions(model.module.device), attend)
    return hidden


def embed(
    model: LoadedModel,
    ids: Sequence[Sequence[int]],
    *,
    lock: threading.Lock,
    pooling: str | None = None,
    normalize: bool = True,
) -> list[list[float]]:
    """Pooled hidden states, one vector of D floats per text. Raises UnsupportedError for an unknown pooling."""
    if any(not text for text in ids):
        raise InvalidInputError("A text to embed has no tokens.", hint="Leave empty texts out.", param="input")
    usual = model.pooling.get("pooling", "mean") if model.config.is_encoder else "last"
    kind = cast(Pooling, pooling or usual)
    vectors: list[list[float]] = []
    for run in batches(ids):
        texts = [ids[i] for i in run]
        with lock, torch.inference_mode():
            hidden = hidden_states(model, texts)
            vectors += pool(hidden, [len(t) for t in texts], kind, normalize=normalize).tolist()
    return vectors


def score_tokens(
    model: LoadedModel, ids: Sequence[int], *, lock: threading.Lock, num_top: int | None = None
) -> tuple[list[float], list[int], list[TokenLogprob]]:
    """For each token after the first: its log-probability, the model's first choice, and (with `num_top`) details."""
    logprobs: list[float] = []
    best: list[int] = []
    details: list[TokenLogprob] = []
    if len(ids) < 2:
        return logprobs, best, details
    name = token_names(model.tokenizer)
    with lock, torch.inference_mode():
        hidden = hidden_states(model, [ids])[:-1]
        for at in range(0, hidden.shape[0], LOGIT_ROWS):
            logits = model.module.logits(hidden[at : at + LOGIT_ROWS])
            targets = torch.tensor(ids[at + 1 : at + 1 + logits.shape[0]], device=logits.device)
            logprobs += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
            best += logits.argmax(-1).tolist()
            if num_top is not None:
                pairs = zip(logits, targets.tolist(), strict=True)
                details += [token_logprob(row, token, num_top, name) for row, token in pairs]
    return logprobs, best, details


def fill_mask(
    model: LoadedModel, ids: Sequence[int], top_k: int, *, lock: threading.Lock
) -> list[list[tuple[str, float]]]:
    """The likeliest words at every mask token of one text, with probabilities."""
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
    with lock, torch.inference_mode():
        logits = model.module.mlm_logits(hidden_states(model, [ids])[places])
        top = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    assert model.tokenizer is not None
    return [
        [(model.tokenizer.decode([i]).strip(), p) for i, p in zip(row_ids, row_p, strict=True)]
        for row_ids, row_p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def classify(model: LoadedModel, ids: Sequence[Sequence[int]], *, lock: threading.Lock) -> list[dict[str, float]]:
    """Label probabilities of each text: of one label among all, or of each by itself where the config says
    `multi_label_classification` or there is only one. A `regression` model gives its scores as they are."""
    if not model.config.num_labels:
        raise UnsupportedError(
            f"A {model.config.architecture} has no classification head.",
            hint="Use a model fine-tuned for classification.",
        )
    labels = model.config.labels or tuple(f"LABEL_{i}" for i in range(model.config.num_labels))
    results: list[dict[str, float]] = []
    for run in batches(ids):
        texts = [ids[i] for i in run]
        starts = starts_of([len(t) for t in texts], model.module.device)
        with lock, torch.inference_mode():
            logits = model.module.classify(hidden_states(model, texts), starts)
            results += [dict(zip(labels, row, strict=True)) for row in _shares(logits, model.config).tolist()]
    return results


def _shares(logits: Tensor, config: ModelConfig) -> Tensor:
    kind = config.extra.get("problem_type")
    if kind == "regression":
        return logits
    return logits.sigmoid() if kind == "multi_label_classification" or config.num_labels == 1 else logits.softmax(-1)
