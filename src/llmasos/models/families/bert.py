"""Encoders: BERT (MiniLM is one), RoBERTa and XLM-RoBERTa, DistilBERT. See `mapping` for what a row means.

The classification head of all of them is a dense layer, an activation and a layer per label on the first token; they
only name it differently (BERT: its pooler and `classifier`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmasos.errors import FormatError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.families.mapping import Family, HFConfig, Source, qkv, same
from llmasos.models.families.reading import activation, activation_name, base, need

DEFAULT_LABELS = 2
"""What transformers assumes when a config names no labels."""


def encoder_fields(hf: HFConfig) -> dict[str, Any]:
    """What every encoder here has in common, and the heads that the architecture's name promises."""
    if hf.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedError(
            f"config.json asks for {hf['position_embedding_type']!r} positions; encoders here have absolute ones.",
            hint="Use a checkpoint with position_embedding_type absolute.",
        )
    if hf.get("is_decoder") or hf.get("add_cross_attention"):
        raise UnsupportedError(
            "config.json describes an encoder turned into a decoder (is_decoder), which is not known here.",
            hint="Use an encoder or a decoder-only model.",
        )
    architecture = str((hf.get("architectures") or ["Model"])[0])
    classifies = architecture.endswith("ForSequenceClassification")
    labels = _labels(hf) if classifies else ()
    return {
        "position": "learned",
        "norm": "layernorm",
        "embedding_norm": True,
        "final_norm": False,
        "block": "post_residual",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "causal": False,
        "tie_embeddings": bool(hf.get("tie_word_embeddings", True)),
        "masked_lm": architecture.endswith(("ForMaskedLM", "ForPreTraining")),
        "pooler": architecture.endswith("Model"),
        "num_labels": len(labels),
        "labels": labels,
        "pad_token_id": hf.get("pad_token_id"),
    }


def _labels(hf: HFConfig) -> tuple[str, ...]:
    """Names of the classes in the order of the head's outputs. Raises FormatError for a table with gaps."""
    table = {int(key): str(name) for key, name in (hf.get("id2label") or {}).items()}
    count = len(table) or int(hf.get("num_labels") or DEFAULT_LABELS)
    if table and sorted(table) != list(range(count)):
        raise FormatError(
            f"config.json numbers its labels {sorted(table)}, not 0 to {count - 1}.", hint="Fetch the file again."
        )
    return tuple(table.get(i, f"LABEL_{i}") for i in range(count))


def read_bert(hf: HFConfig, family: str = "bert", architecture: str = "BertModel", offset: int = 0) -> ModelConfig:
    """`offset`: rows of the position table before the first position's."""
    hidden, heads = int(need(hf, "hidden_size")), int(need(hf, "num_attention_heads"))
    fields: dict[str, Any] = dict(
        **base(hf, family, architecture),
        **encoder_fields({"architectures": [architecture], **hf}),
        vocab_size=int(need(hf, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(need(hf, "intermediate_size")),
        num_layers=int(need(hf, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=int(hf.get("max_position_embeddings", 512)) - offset,
        position_offset=offset,
        norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
        activation=activation(hf.get("hidden_act", "gelu")),
        num_token_types=int(hf.get("type_vocab_size", 2)),
    )
    if fields["architecture"] == "BertForPreTraining":  # its next-sentence head is not kept
        fields["architecture"] = "BertForMaskedLM"
    return ModelConfig(**fields)


def read_roberta(family: str, architecture: str) -> Callable[[HFConfig], ModelConfig]:
    """Positions count from the padding index + 1, whose row and those before are never read."""

    def read(hf: HFConfig) -> ModelConfig:
        padding = hf.get("pad_token_id")
        return read_bert(hf, family, architecture, offset=(1 if padding is None else int(padding)) + 1)

    return read


def write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length + config.position_offset,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
        "type_vocab_size": config.num_token_types,
        **_write_common(config),
    }


def _write_common(config: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"tie_word_embeddings": config.tie_embeddings, "pad_token_id": config.pad_token_id}
    if config.labels:
        out["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
        out["label2id"] = {name: i for i, name in enumerate(config.labels)}
    return out


def _layers(layer: str, attention: str = "attention.self.{}", **names: str) -> dict[str, Source]:
    """The modules of a block; `names` replaces BERT's."""
    found = {
        "out": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    } | names
    parts = names.get("parts", "query key value").split()
    return {
        "layers.{i}.attn.qkv": qkv(*(f"{layer}.{attention.format(part)}" for part in parts)),
        "layers.{i}.attn.out": same(f"{layer}.{found['out']}"),
        "layers.{i}.attn_norm": same(f"{layer}.{found['attn_norm']}"),
        "layers.{i}.mlp.up": same(f"{layer}.{found['up']}"),
        "layers.{i}.mlp.down": same(f"{layer}.{found['down']}"),
        "layers.{i}.mlp_norm": same(f"{layer}.{found['mlp_norm']}"),
    }


def _embeddings(prefix: str) -> dict[str, Source]:
    return {
        "embed": same(f"{prefix}embeddings.word_embeddings"),
        "position": same(f"{prefix}embeddings.position_embeddings"),
        "token_types": same(f"{prefix}embeddings.token_type_embeddings"),
        "embed_norm": same(f"{prefix}embeddings.LayerNorm"),
        "pooler": same(f"{prefix}pooler.dense"),
    }


BERT = Family(
    "bert",
    ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    read_bert,
    write_bert,
    {
        **_embeddings("bert."),
        **_layers("bert.encoder.layer.{i}"),
        "masked_lm": same("cls.predictions"),
        "masked_lm.dense": same("cls.predictions.transform.dense"),
        "masked_lm.norm": same("cls.predictions.transform.LayerNorm"),
        "masked_lm.decoder": same("cls.predictions.decoder"),
        "classifier.dense": same("bert.pooler.dense"),
        "classifier.out": same("classifier"),
    },
    prefix="bert.",
    bare=("BertModel",),
    ignored=r".*position_ids|cls\.seq_relationship\..*|cls\.predictions\.decoder\..*|(bert\.)?pooler\..*",
    older_names={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
)


def _roberta(name: str, stem: str) -> Family:
    return Family(
        name,
        (f"{stem}Model", f"{stem}ForMaskedLM", f"{stem}ForSequenceClassification"),
        read_roberta(name, f"{stem}Model"),
        write_bert,
        {
            **_embeddings("roberta."),
            **_layers("roberta.encoder.layer.{i}"),
            "masked_lm": same("lm_head"),
            "masked_lm.dense": same("lm_head.dense"),
            "masked_lm.norm": same("lm_head.layer_norm"),
            "masked_lm.decoder": same("lm_head.decoder"),
            "classifier.dense": same("classifier.dense"),
            "classifier.out": same("classifier.out_proj"),
        },
        prefix="roberta.",
        bare=(f"{stem}Model",),
        ignored=r".*position_ids|lm_head\.decoder\..*|(roberta\.)?pooler\..*",
    )


def read_distilbert(hf: HFConfig) -> ModelConfig:
    """DistilBERT's own names for the sizes; no token types, no pooler, a ReLU in the classification head."""
    hidden, heads = int(need(hf, "dim")), int(need(hf, "n_heads"))
    fields = encoder_fields({"architectures": ["DistilBertModel"], **hf})
    return ModelConfig(
        **base(hf, "distilbert", "DistilBertModel"),
        **(fields | {"pooler": False}),
        vocab_size=int(need(hf, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(need(hf, "hidden_dim")),
        num_layers=int(need(hf, "n_layers")),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=int(hf.get("max_position_embeddings", 512)),
        norm_eps=1e-12,
        activation=activation(hf.get("activation", "gelu")),
        classifier_activation="relu",
    )


def write_distilbert(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "activation": activation_name(config.activation),
        **_write_common(config),
    }


DISTILBERT = Family(
    "distilbert",
    ("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    read_distilbert,
    write_distilbert,
    {
        **_embeddings("distilbert."),
        **_layers(
            "distilbert.transformer.layer.{i}",
            "attention.{}_lin",
            parts="q k v",
            out="attention.out_lin",
            attn_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            mlp_norm="output_layer_norm",
        ),
        "masked_lm": same("vocab_projector"),
        "masked_lm.dense": same("vocab_transform"),
        "masked_lm.norm": same("vocab_layer_norm"),
        "masked_lm.decoder": same("vocab_projector"),
        "classifier.dense": same("pre_classifier"),
        "classifier.out": same("classifier"),
    },
    prefix="distilbert.",
    bare=("DistilBertModel",),
    ignored=r".*position_ids|vocab_projector\.weight",
)

FAMILIES = (BERT, _roberta("roberta", "Roberta"), _roberta("xlm-roberta", "XLMRoberta"), DISTILBERT)
