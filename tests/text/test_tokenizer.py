"""Our Tokenizer equals transformers' for the same folder, in every shape a folder has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerFast

from llmasos.errors import FormatError, InvalidInputError, NotFoundError
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.text.tokenizer import LONG


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def folder_of(tmp_path: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    if config:
        write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    return tmp_path


def same(ours: Tokenizer, theirs: PreTrainedTokenizerFast, texts: list[str]) -> None:
    assert ours.vocab_size == len(theirs)
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
        pair = theirs(text, "hello", return_token_type_ids=True)
        assert ours.encode_pair(text, "hello") == (pair["input_ids"], pair["token_type_ids"])
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["byte_level", "word_piece", "metaspace_unigram"])
def test_a_folder_with_tokenizer_json_equals_transformers(kind: str, backends, texts, tmp_path: Path) -> None:
    bert = kind == "word_piece"
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if bert else {"bos_token": "<s>", "eos_token": "</s>"}
    folder = folder_of(tmp_path, backends[kind], **names)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    same(ours, theirs, texts)
    for role in ("bos", "eos", "cls", "sep", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")


@pytest.mark.parametrize("bos, eos", [(True, True), (False, True), (False, False)])
def test_tokenizer_json_overrules_add_bos_and_add_eos(bos, eos, backends, texts, tmp_path: Path) -> None:
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "special": True}
    folder = folder_of(tmp_path, backends["byte_level"], bos_token="<s>", eos_token=end, **flags)
    same(load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), texts)


@pytest.mark.parametrize("bos, eos", [(True, True), (False, True), (False, False)])
def test_add_bos_and_add_eos_rule_where_there_is_no_tokenizer_json(bos, eos, sentencepiece_models, tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_models["bpe"].read_bytes())
    write(tmp_path / "tokenizer_config.json", {"add_bos_token": bos, "add_eos_token": eos})
    ours = load_tokenizer(tmp_path)
    inner = ours.encode("fox", add_special_tokens=False)
    assert ours.encode("fox") == [1] * bos + inner + [2] * eos


def test_special_and_added_tokens_of_the_config_are_appended(backends, texts, tmp_path: Path) -> None:
    size = backends["byte_level"].get_vocab_size()
    flags = {"lstrip": True, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    folder = folder_of(
        tmp_path,
        backends["byte_level"],
        eos_token="</s>",
        pad_token="<pad>",
        added_tokens_decoder={str(size): {"content": "<mask>", **flags}},
    )
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.id("<mask>"), ours.pad_token_id) == (size, size + 1)
    same(ours, theirs, texts)


def test_a_length_limit_in_tokenizer_json_cuts_nothing(backends, tmp_path: Path) -> None:
    backend = Backend.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    ours = load_tokenizer(folder_of(tmp_path, backend))
    assert len(ours.encode("hello world " * 10)) > 16
    assert ours.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize("generation", [2, [2, 1], [2, 9999999]])
def test_end_tokens_are_generation_config_and_tokenizer_together(generation, backends, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, backends["byte_level"], eos_token="</s>")
    write(folder / "generation_config.json", {"eos_token_id": generation})
    write(folder / "config.json", {"eos_token_id": 77, "bos_token_id": 0})
    ours = load_tokenizer(folder)
    assert ours.eos_token_ids == {1, 2}
    assert (ours.eos_token_id, ours.bos_token_id) == (1, 0)


def test_config_json_names_the_ends_when_nothing_else_does(backends, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, backends["byte_level"])
    write(folder / "config.json", {"eos_token_id": [1, 2], "pad_token_id": None})
    assert load_tokenizer(folder).eos_token_ids == {1, 2}


def test_vocab_json_and_merges_equal_gpt2(backends, texts, tmp_path: Path) -> None:
    backends["byte_level"].model.save(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    theirs = GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    plain = [text for text in texts if "<" not in text]
    for text in plain:
        assert ours.encode(text) == theirs.encode(text)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ClipTokenizer"})
    with pytest.raises(FormatError, match="ClipTokenizer"):
        load_tokenizer(tmp_path)


def test_vocab_txt_equals_bert(backends, texts, tmp_path: Path) -> None:
    backends["word_piece"].model.save(str(tmp_path))
    same(load_tokenizer(tmp_path), BertTokenizerFast(str(tmp_path / "vocab.txt")), texts)
    write(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    assert load_tokenizer(tmp_path).encode("HELLO") != load_tokenizer(tmp_path).encode("hello")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_model_equals_sentencepiece(kind, sentencepiece_models, texts, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_models[kind].read_bytes())
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models[kind]))
    for text in [*texts, "the quick brown fox " * 20]:
        if "<s>" in text or not text.strip():
            continue  # SentencePiece never parses control tokens, and makes nothing of blank text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text
    assert ours.encode("fox")[0 if kind == "bpe" else -1] == (theirs.bos_id() if kind == "bpe" else theirs.eos_id())
    assert ours.unk_token_id == theirs.unk_id()


def test_a_damaged_tokenizer_model_is_refused(sentencepiece_models, tmp_path: Path) -> None:
    whole = sentencepiece_models["bpe"].read_bytes()
    for damaged in (b"", whole[:-1], whole[:1000], b"\xff" * 64, b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(FormatError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["bpe", "unigram"]))
def test_any_bytes_are_a_tokenizer_model_or_an_error(data, kind: str, sentencepiece_models, tmp_path_factory) -> None:
    whole = bytearray(sentencepiece_models[kind].read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tokenizer.model").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        ours = load_tokenizer(folder)
    except FormatError:
        return
    assert all(0 <= id < ours.vocab_size for id in ours.encode("hello world 🚀"))


def test_families_that_renumber_pieces_are_refused(sentencepiece_models, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_models["unigram"].read_bytes())
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(FormatError, match="XLMRobertaTokenizer") as error:
        load_tokenizer(tmp_path)
    assert "save_pretrained" in error.value.hint


@pytest.mark.parametrize("kind", ["byte_level", "word_piece", "metaspace_unigram", "byte_fallback"])
def test_a_saved_tokenizer_gives_the_same_ids_in_transformers_and_here(kind, backends, texts, tmp_path: Path) -> None:
    special = {"word_piece": {"cls": 2, "sep": 3}}.get(kind, {"bos": 0, "eos": 1})
    templates = {"default": "{{ messages[0].content }}", "tool_use": "tools\n{{ bos_token }}"}
    first = Tokenizer(backends[kind], special=special, eos_token_ids=[1, 2], chat_templates=templates)
    first.save_pretrained(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    same(first, theirs, texts)
    same(again, theirs, texts)
    assert again.special_tokens == first.special_tokens
    assert again.eos_token_ids == first.eos_token_ids
    assert again.chat_templates == first.chat_templates == theirs.chat_template


def test_tokens_by_id_and_by_text(backends) -> None:
    ours = Tokenizer(backends["byte_level"])
    assert ours.token(0) == "<s>" and ours.id("<s>") == 0 and ours.id("no such token") is None
    assert ours.special_ids == {0, 1, 2}
    for id in (-1, ours.vocab_size, 1 << 40):
        with pytest.raises(InvalidInputError, match="There is no token"):
            ours.token(id)


@pytest.mark.parametrize("text", ["half \ud83d", 5, None, b"bytes"])
def test_what_is_no_text_is_refused(text, backends) -> None:
    with pytest.raises(InvalidInputError) as error:
        Tokenizer(backends["byte_level"]).encode(text)
    assert error.value.param == "text"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match="holds a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match=r"neither a model folder nor a \.gguf"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_importing_text_loads_neither_torch_nor_transformers() -> None:
    code = "import llmasos.text, sys; sys.exit(bool({'torch', 'transformers', 'sentencepiece'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=40), st.booleans())
def test_a_long_text_is_cut_as_a_short_one_would_be(tiny_model: Path, unit: str, around: bool) -> None:
    tokenizer = load_tokenizer(tiny_model)
    text = (unit * (LONG // len(unit) + 1))[: LONG + 7]
    expected = tokenizer.backend.encode(text, add_special_tokens=around).ids
    assert tokenizer.encode(text, add_special_tokens=around) == expected
