"""Fixtures of this room: the command in this process, a tiny encoder; `web` stands in for the outside."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli, Result
from store_web import web

from llmasos.cli import main

__all__ = ["cli", "tiny_encoders", "web"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `llmasos ARGS` in this process; `stdin` is piped, or typed if `terminal`."""

    def run(*args: str, stdin: str = "", terminal: bool = False) -> Result:
        monkeypatch.setattr("sys.stdin", Terminal(stdin) if terminal else io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(args))
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random BERT of the asked class, with a word-piece tokenizer; made once each."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = _write_encoder(tmp_path_factory.mktemp("bert") / architecture, architecture)
        return made[architecture]

    return folder


def _write_encoder(folder: Path, architecture: str) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from llmasos.formats import save_safetensors
    from llmasos.models.encoder import Encoder
    from llmasos.models.families import config_from_hf, family_of
    from llmasos.models.families.mapping import to_hf

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "a", "city", "good", "bad"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    special = {f"{name}_token": token for name, token in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **special}))
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    if "Classification" in architecture:
        hf |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (folder / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in Encoder(config).state_dict().items()}
    save_safetensors(dict(to_hf(family_of(config), config, state)), folder, metadata={"format": "pt"})
    return folder
