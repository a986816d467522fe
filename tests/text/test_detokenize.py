"""Streaming: piece by piece equals all at once."""

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from llmasos.errors import UnsupportedError
from llmasos.text import Tokenizer


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind]())


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(id) for id in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_equals_decoded_text_and_the_library_where_bytes_are_utf8(kind: str, data, skip: bool) -> None:
    subject = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, subject.vocab_size + 3), max_size=30))
    text = "".join(streamed(subject, ids, skip=skip))
    assert text == subject.decode(ids, skip_special_tokens=skip)
    library = subject.backend.decode(ids, skip_special_tokens=skip)
    if kind == "byte_fallback" and "\ufffd" in library:
        # the library spoils the whole run of byte tokens around a wrong one, we only the wrong one
        assert "\ufffd" in text
    else:
        assert text == library


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=30).map(lambda text: text.replace("\u2581", "")))  # the mark for a space
@settings(max_examples=100)
def test_no_piece_of_a_valid_text_is_half_a_character(kind: str, text: str) -> None:
    subject = tokenizer(kind)
    ids = subject.encode(text, add_special_tokens=False)
    pieces = streamed(subject, ids, skip=False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_with_its_last_byte() -> None:
    subject = tokenizer("byte_level")
    ids = subject.encode("🚀", add_special_tokens=False)
    pieces = streamed(subject, ids, skip=True)
    assert len(ids) > 1
    assert pieces == [""] * (len(ids) - 1) + ["🚀", ""]


def test_flush_marks_a_character_that_never_ended_and_starts_afresh() -> None:
    subject = tokenizer("byte_level")
    ids = subject.encode("🚀", add_special_tokens=False)
    stream = subject.stream()
    assert [stream.push(id) for id in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"
    assert stream.push(subject.encode("a", add_special_tokens=False)[0]) == "a"


def test_special_tokens_are_skipped_only_when_asked() -> None:
    subject = tokenizer("byte_level")
    ids = [0, *subject.encode("hello", add_special_tokens=False), 1]
    assert subject.decode(ids) == "hello"
    assert subject.decode(ids, skip_special_tokens=False) == "<s>hello</s>"


def test_only_the_first_space_of_a_text_is_dropped_where_a_prefix_was_added() -> None:
    subject = tokenizer("byte_fallback")
    assert subject.encode(" he he") == subject.encode(" he") + subject.encode("he")
    assert subject.decode(subject.encode("  he  he")) == "  he  he"


def test_token_bytes_joined_are_the_text() -> None:
    subject = tokenizer("byte_level")
    ids = subject.encode("größe 🚀", add_special_tokens=False)
    assert b"".join(subject.token_bytes(id) for id in ids).decode() == "größe 🚀"
    assert tokenizer("byte_fallback").token_bytes(3 + 0x41) == b"A"


def test_decoding_work_per_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Tokenizer(KINDS["byte_level"]())
    looked_up: list[int] = []
    real = subject._detokenizer._bytes
    monkeypatch.setattr(subject._detokenizer, "_bytes", lambda token: looked_up.append(1) or real(token))
    stream = subject.stream()
    for _ in range(1000):
        stream.push(70)
    assert len(looked_up) <= 2  # once as first token, once as a later one


def test_an_unknown_decoder_is_named() -> None:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.CTC()
    with pytest.raises(UnsupportedError, match=re.escape("'CTC'")):
        Tokenizer(backend).decode([0])
    backend.decoder = None
    assert Tokenizer(backend).decode([0, 0]) == "a a"
