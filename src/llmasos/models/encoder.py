"""The one encoder: BERT, RoBERTa, DistilBERT and their like are ModelConfigs of it. Plus pooling for embeddings.

T = packed tokens of any number of sequences, B = sequences, D = model width, V = vocabulary, L = labels.
`forward(tokens [T], positions [T], attend, token_types [T] | None) -> hidden [T, D]`. Heads exist where the config says
so: `mlm_logits` (masked_lm), `classify` (num_labels), `pooled` (pooler).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.errors import FormatError, UnsupportedError
from llmasos.formats import read_gguf_header
from llmasos.models.attention import Attend
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Block, make_ropes
from llmasos.models.layers import Norm, activate, embedding

Pooling = Literal["mean", "cls", "last", "max"]


class MaskedLMHead(nn.Module):
    """dense, activation, norm, then the token embeddings and a bias per token, or a linear layer of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.tied = config.activation, config.tie_embeddings
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = Norm(config, config.hidden_size)
        if self.tied:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        x: Tensor = self.norm(activate(self.dense(hidden), self.activation))
        scores: Tensor = F.linear(x, embeddings, self.bias) if self.tied else self.decoder(x)
        return scores


class ClassificationHead(nn.Module):
    """dense, tanh or ReLU, then one score per label; on the first token of a sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.classifier_activation
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        x = self.dense(first)
        scores: Tensor = self.out(torch.tanh(x) if self.activation == "tanh" else F.relu(x))
        return scores


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = embedding(config.vocab_size, config.hidden_size)
        self.position = embedding(config.context_length + config.position_offset, config.hidden_size)
        if config.num_token_types:
            self.token_types = embedding(config.num_token_types, config.hidden_size)
        self.embed_norm = Norm(config, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        if config.pooler:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        if config.masked_lm:
            self.masked_lm = MaskedLMHead(config)
        if config.num_labels:
            self.classifier = ClassificationHead(config)
        self._rope = make_ropes(config)[False]

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, token_types: Tensor | None = None) -> Tensor:
        """Hidden states [T, D] for tokens [T] at positions [T] of their own sequences. `token_types` [T] tells the
        first text of a pair (0) from the second (1); None: all 0."""
        x: Tensor = self.embed(tokens)
        if self.config.num_token_types:
            x = x + self.token_types(torch.zeros_like(tokens) if token_types is None else token_types)
        x = x + self.position(positions + self.config.position_offset)
        x = self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, self._rope, None, attend)
        return x

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the token at each place in float32, [.., V]. Raises UnsupportedError without such a head."""
        if not self.config.masked_lm:
            raise self._without("fill masks", "a ...ForMaskedLM checkpoint")
        scores: Tensor = self.masked_lm(hidden, self.embed.weight)
        return scores.float()

    def classify(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """Scores of the labels in float32, [B, L]; `starts` [B] are the places of the sequences' first tokens.
        Raises UnsupportedError without such a head."""
        if not self.config.num_labels:
            raise self._without("classify", "a ...ForSequenceClassification checkpoint")
        scores: Tensor = self.classifier(hidden[starts])
        return scores.float()

    def pooled(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """BERT's pooler on the first tokens, [B, D]. Raises UnsupportedError for a model without one."""
        if not self.config.pooler:
            raise self._without("pool with a dense layer", 'pooling="mean" or "cls"')
        return torch.tanh(self.pooler(hidden[starts]))

    def _without(self, wish: str, instead: str) -> UnsupportedError:
        return UnsupportedError(
            f"This {self.config.architecture} can't {wish}: it has no head for that.", hint=f"Use {instead}."
        )

    @property
    def device(self) -> torch.device:
        return self.embed_norm.weight.device  # type: ignore[union-attr]  # encoders' norms have weights

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states (low-bit weights compute in it)."""
        return self.embed_norm.weight.dtype  # type: ignore[union-attr]  # encoders' norms have weights


def starts_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Places of the first tokens of packed sequences, [B]."""
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ends - torch.tensor(lengths, device=device)


def check_pooling(kind: str) -> None:
    """Raises UnsupportedError for a way to pool that is not known."""
    if kind not in get_args(Pooling):
        raise UnsupportedError(
            f"pooling={kind!r} is not known.", hint=f"Use {', '.join(get_args(Pooling))}.", param="pooling"
        )


def pool(hidden: Tensor, lengths: Sequence[int], kind: Pooling, *, normalize: bool = False) -> Tensor:
    """One vector per packed sequence in float32, [B, D], from hidden states [T, D].

    mean of all tokens, the first ("cls"), the last, or the largest value of each dimension; `normalize` divides by the
    Euclidean length. Raises UnsupportedError for another kind.
    """
    check_pooling(kind)
    hidden = hidden.float()
    starts = starts_of(lengths, hidden.device)
    if kind == "cls":
        out = hidden[starts]
    elif kind == "last":
        out = hidden[starts + torch.tensor(lengths, device=hidden.device) - 1]
    elif kind == "mean":
        out = torch.stack([part.mean(0) for part in hidden.split(list(lengths))])
    else:
        out = torch.stack([part.amax(0) for part in hidden.split(list(lengths))])
    return F.normalize(out, dim=-1) if normalize else out


def pooling_defaults(path: Path) -> dict[str, Any]:
    """How a model's makers turn its hidden states into an embedding.

    {"pooling": see `pool`, "normalize": bool, "max_tokens": int | None}, from the folder's sentence-transformers files
    (modules.json, 1_Pooling/config.json, sentence_bert_config.json) or GGUF's `pooling_type`; without any: the mean.
    Raises UnsupportedError for steps that are not done here (a dense layer after the pooling), FormatError.
    """
    found: dict[str, Any] = {"pooling": "mean", "normalize": False, "max_tokens": None}
    if path.suffix == ".gguf":
        return found | _gguf_pooling(path)
    for module in _json(path / "modules.json", []):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            found["pooling"] = _pooling_mode(path / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer":
            raise UnsupportedError(
                f"{path} makes embeddings with a step {kind!r}, which is not known here.",
                hint="Transformer, Pooling and Normalize are.",
            )
    limit = _json(path / "sentence_bert_config.json", {}).get("max_seq_length")
    return found | {"max_tokens": int(limit) if limit else None}


def pooling_files(found: Mapping[str, Any], width: int) -> dict[str, Any]:
    """What `pooling_defaults` found, as the sentence-transformers files that say it: name in the folder -> content.
    No files where it is what a folder without them means."""
    if found == {"pooling": "mean", "normalize": False, "max_tokens": None}:
        return {}
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")] + [("Normalize", "2_Normalize")] * found["normalize"]
    modes = {f"pooling_mode_{mode}{_SUFFIXES[mode]}": kind == found["pooling"] for mode, kind in _MODES.items()}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
        "sentence_bert_config.json": {"max_seq_length": found["max_tokens"], "do_lower_case": False},
    }


_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
_SUFFIXES = {"mean": "_tokens", "cls": "_token", "lasttoken": "", "max": "_tokens"}
_GGUF_POOLING: dict[int, Pooling] = {0: "mean", 1: "mean", 2: "cls", 3: "last"}


def _pooling_mode(file: Path) -> Pooling:
    config = _json(file, {})
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    else:  # older files: one switch per mode, e.g. pooling_mode_mean_tokens
        switches = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [s.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token") for s in switches]
    if len(chosen) == 1 and chosen[0] in _MODES:
        return _MODES[chosen[0]]
    raise UnsupportedError(
        f"{file} asks for the pooling {' and '.join(chosen) or 'none'}, which is not known here.",
        hint=f"One of {', '.join(_MODES)} is.",
    )


def _gguf_pooling(path: Path) -> dict[str, Any]:
    meta = read_gguf_header(path).metadata
    kind = int(meta.get(f"{meta.get('general.architecture')}.pooling_type", 0))
    if kind not in _GGUF_POOLING:
        raise UnsupportedError(
            f"{path} asks for pooling_type {kind}, which is not known here.",
            hint="0 to 3 (none, mean, cls, last) are; 4 is a reranker's.",
        )
    return {"pooling": _GGUF_POOLING[kind]}


def _json(file: Path, otherwise: Any) -> Any:
    if not file.is_file():
        return otherwise
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise FormatError(f"{file} is not valid JSON: {e}.", hint="Fetch the file again.") from e
    if type(data) is not type(otherwise):
        raise FormatError(f"{file} holds a {type(data).__name__}, not a {type(otherwise).__name__}.")
    return data
