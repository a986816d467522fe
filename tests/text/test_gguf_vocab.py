"""Tokenizers from GGUF metadata equal the tokenizer the file was made from."""

import json
import os
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from transformers import AutoTokenizer

from llmasos.errors import FormatError
from llmasos.text import load_tokenizer, tokenizer_from_gguf
from llmasos.text.pretokenizers import PRE_BY_ARCHITECTURE, PRE_TOKENIZERS
from llmasos.text.sentencepiece import read_model

G = "tokenizer.ggml."
SEPARATOR = "\n__ggml_vocab_test__\n"


def byte_level_metadata(backend, **more: Any) -> dict[str, Any]:
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        G + "model": "gpt2",
        G + "pre": "gpt-2",
        G + "tokens": tokens,
        G + "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        G + "merges": [" ".join(merge) for merge in merges],
        G + "bos_token_id": 0,
        G + "eos_token_id": 1,
        G + "add_bos_token": True,
        **more,
    }


def sentencepiece_metadata(path: Path, **more: Any) -> dict[str, Any]:
    model = read_model(path)
    return {
        G + "model": "t5" if model.unigram else "llama",
        G + "tokens": model.pieces,
        G + "scores": model.scores,
        G + "token_type": model.types,
        G + "precompiled_charsmap": list(model.charsmap) or None,
        G + "remove_extra_whitespaces": model.remove_extra_whitespaces,
        G + "unknown_token_id": model.unk_id,
        G + "bos_token_id": 1,
        G + "eos_token_id": 2,
        **more,
    }


def word_piece_metadata(backend) -> dict[str, Any]:
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    phantom = [
        t if i < 5 else t.removeprefix("##") if t.startswith("##") else f"\u2581{t}" for i, t in enumerate(tokens)
    ]
    ids = {
        G + f"{role}_token_id": tokens.index(f"[{name}]")
        for role, name in (
            ("unknown", "UNK"),
            ("cls", "CLS"),
            ("seperator", "SEP"),
            ("padding", "PAD"),
            ("mask", "MASK"),
        )
    }
    return {G + "model": "bert", G + "tokens": phantom, G + "token_type": [3] * 5 + [1] * (len(tokens) - 5), **ids}


def test_byte_level_bpe_equals_its_origin(backends, texts) -> None:
    ours = tokenizer_from_gguf(byte_level_metadata(backends["byte_level"]))
    for text in texts:
        assert ours.encode(text) == backends["byte_level"].encode(text).ids
    assert ours.vocab_size == backends["byte_level"].get_vocab_size()
    assert (ours.bos_token_id, ours.eos_token_id, ours.special_ids) == (0, 1, {0, 1, 2})


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_equals_its_origin(kind, sentencepiece_models, texts) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models[kind]))
    ours = tokenizer_from_gguf(sentencepiece_metadata(sentencepiece_models[kind]))
    for text in texts:
        if text.strip() and "<s>" not in text:
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
    inner = theirs.encode("fox")
    assert ours.encode("fox") == ([1, *inner] if kind == "bpe" else [*inner, 2])


@pytest.fixture(scope="session")
def merged_by_score(sentencepiece_models):
    path = sentencepiece_models["bpe"]
    return tokenizer_from_gguf(sentencepiece_metadata(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))


@settings(max_examples=200)
@given(text=st.text(alphabet="helo wrd\nteé🚀", max_size=40).filter(lambda text: text.strip()))
def test_merging_by_score_equals_sentencepiece(text: str, merged_by_score) -> None:
    ours, theirs = merged_by_score
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_word_piece_equals_its_origin(backends, texts) -> None:
    ours = tokenizer_from_gguf(word_piece_metadata(backends["word_piece"]))
    origin = backends["word_piece"]
    for text in texts:
        assert ours.encode(text) == origin.encode(text).ids
        pair = origin.encode(text, "fox")
        assert ours.encode_pair(text, "fox") == (pair.ids, pair.type_ids)
        assert ours.decode(ours.encode(text)) == origin.decode(origin.encode(text).ids)
    assert (ours.cls_token_id, ours.sep_token_id, ours.mask_token_id) == (2, 3, 4)


@pytest.mark.parametrize("kind", ["byte_level", "word_piece", "bpe", "unigram"])
def test_a_saved_gguf_tokenizer_gives_the_same_ids_in_transformers(
    kind, backends, sentencepiece_models, texts, tmp_path
) -> None:
    if kind in backends:
        metadata = (byte_level_metadata if kind == "byte_level" else word_piece_metadata)(backends[kind])
    else:
        metadata = sentencepiece_metadata(sentencepiece_models[kind])
    ours = tokenizer_from_gguf(metadata)
    ours.save_pretrained(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text) == again.encode(text)
    assert ours.eos_token_id == theirs.eos_token_id


def test_a_gguf_file_is_read_through_the_formats_room(backends, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    metadata = byte_level_metadata(backends["byte_level"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(metadata[G + "tokens"])
    writer.add_token_types(metadata[G + "token_type"])
    writer.add_token_merges(metadata[G + "merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_tokenizer(path)
    assert ours.encode("hello world") == backends["byte_level"].encode("hello world", add_special_tokens=False).ids
    assert ours.chat_templates == {"default": "d", "tool_use": "t"}


def test_end_tokens_are_eos_eot_eom_and_control_tokens_that_end_turns(backends) -> None:
    more = {G + "eot_token_id": 40, G + "eom_token_id": 41}
    ours = tokenizer_from_gguf(byte_level_metadata(backends["byte_level"], **more))
    assert ours.token(2) == "<|end|>"
    assert ours.eos_token_ids == {1, 2, 40, 41}
    tokens = byte_level_metadata(backends["byte_level"])[G + "tokens"]
    harmony = [*tokens[:-2], "<|return|>", "<|call|>"]
    types = [3] * 3 + [1] * (len(tokens) - 5) + [3, 3]
    metadata = byte_level_metadata(backends["byte_level"], **{G + "tokens": harmony, G + "token_type": types})
    metadata[G + "merges"] = metadata[G + "merges"][:-2]
    assert tokenizer_from_gguf(metadata).eos_token_ids == {1, len(tokens) - 2, len(tokens) - 1}


def test_phi3_marks_swallow_white_space_behind_them(sentencepiece_models) -> None:
    path = sentencepiece_models["bpe"]
    plain = tokenizer_from_gguf(sentencepiece_metadata(path))
    phi3 = tokenizer_from_gguf(sentencepiece_metadata(path, **{"general.architecture": "phi3"}))
    assert phi3.encode("<tool>\n fox") == plain.encode("<tool>fox") != plain.encode("<tool>\n fox")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pattern_compiles_and_loses_no_text(name: str, backends, texts) -> None:
    for pattern in PRE_TOKENIZERS[name].patterns:
        Regex(pattern)
    ours = tokenizer_from_gguf(byte_level_metadata(backends["byte_level"], **{G + "pre": name}))
    for text in texts:
        assert ours.decode(ours.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_numbers_are_cut_as_each_family_does(backends) -> None:
    words = {}
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "deepseek-v3"):
        ours = tokenizer_from_gguf(byte_level_metadata(backends["byte_level"], **{G + "pre": name}))
        cut = ours.backend.pre_tokenizer.pre_tokenize_str("ab 12345'S")
        words[name] = [word for word, _ in cut]
    assert words == {
        "gpt-2": ["ab", "Ġ12345", "'", "S"],
        "smollm": ["ab", "Ġ", "1", "2", "3", "4", "5", "'", "S"],
        "llama-bpe": ["ab", "Ġ", "123", "45", "'S"],
        "qwen2": ["ab", "Ġ", "1", "2", "3", "4", "5", "'S"],
        "tekken": ["ab", "Ġ", "1", "2", "3", "4", "5", "'S"],
        "deepseek-v3": ["ab", "Ġ", "123", "45", "'S"],
    }


def test_an_old_file_without_pre_tokenizer_is_judged_by_its_architecture_or_warns(backends) -> None:
    assert set(PRE_BY_ARCHITECTURE.values()) <= PRE_TOKENIZERS.keys()
    metadata = byte_level_metadata(backends["byte_level"], **{G + "pre": None})
    named = tokenizer_from_gguf(metadata | {"general.architecture": "gptneox"})
    assert named.encode("it's 123") == backends["byte_level"].encode("it's 123").ids
    with pytest.warns(UserWarning, match=re.escape("tokenizer.ggml.pre")):
        tokenizer_from_gguf(metadata | {"general.architecture": "llama"})


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({G + "model": None}, "no tokenizer.ggml.model"),
        ({G + "model": "rwkv"}, "unknown model 'rwkv'"),
        ({G + "pre": "martian"}, "unknown pre-tokenizer 'martian'"),
        ({G + "tokens": None}, "tokens is missing"),
        ({G + "tokens": [1, 2]}, "tokens is missing or no list of texts"),
        ({G + "tokens": ["a", "a"]}, "'a' more than once"),
        ({G + "token_type": [1]}, "has 1 entries for"),
        ({G + "token_type": ["x"]}, "no number"),
        ({G + "merges": ["ab"]}, "'ab' is not two tokens"),
        ({G + "merges": ["zzz yyy"]}, "contradict each other"),
        ({G + "bos_token_id": "one"}, "not of type int"),
        ({G + "bos_token_id": 10**9}, "asks for a bos token"),
        ({G + "model": "llama"}, "without tokenizer.ggml.scores"),
        ({G + "model": "bert", G + "tokens": ["a"], G + "token_type": [1]}, "has no unk, cls, sep"),
    ],
)
def test_damaged_metadata_is_refused_with_its_reason(change: dict[str, Any], complaint: str, backends) -> None:
    with pytest.raises(FormatError, match=re.escape(complaint)):
        tokenizer_from_gguf(byte_level_metadata(backends["byte_level"]) | change)


@pytest.mark.shared
def test_llama_cpp_vectors_are_reproduced() -> None:
    folder = os.environ.get("LLMASOS_TEST_DATA")
    paths = sorted(Path(folder).rglob("ggml-vocab-*.gguf")) if folder else []
    paths = [path for path in paths if Path(f"{path}.inp").exists()]
    if not paths:
        pytest.skip("LLMASOS_TEST_DATA has no ggml-vocab-*.gguf with .inp and .out beside it")
    passed: dict[str, str] = {}
    for path in paths:
        ours = load_tokenizer(path)
        texts = Path(f"{path}.inp").read_bytes().decode("utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
        wanted = [[int(id) for id in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
        good = sum(ours.encode(t, add_special_tokens=False) == w for t, w in zip(texts, wanted, strict=True))
        passed[path.name] = f"{good}/{len(texts)}"
    print(passed)
    assert {name: p for name, p in passed.items() if len(set(p.split("/"))) > 1} == {}
