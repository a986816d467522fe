"""Fixtures of the text room: tiny tokenizers, trained here."""

import io
from pathlib import Path

import pytest
import sentencepiece
from tiny_tokenizers import CORPUS, KINDS, TEXTS
from tokenizers import Tokenizer as Backend


@pytest.fixture(scope="session")
def backends() -> dict[str, Backend]:
    return {name: build() for name, build in KINDS.items()}


@pytest.fixture
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def sentencepiece_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained `tokenizer.model` files: bpe (byte fallback, as Llama), unigram (NFKC, extra spaces removed, as T5)."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    options = {
        "bpe": {
            "model_type": "bpe",
            "vocab_size": 500,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<tool>"],
        },
        "unigram": {"model_type": "unigram", "vocab_size": 80, "pad_id": 3},
    }
    paths = {}
    for name, option in options.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, num_threads=1, **option
        )
        paths[name] = folder / f"{name}.model"
        paths[name].write_bytes(model.getvalue())
    return paths
