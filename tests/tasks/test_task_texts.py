"""Texts are cut where they may be, and nothing of them is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import InvalidInputError
from llmasos.tasks import texts
from llmasos.tasks.reading import located

LETTERS = st.text(alphabet=st.sampled_from("ab. \n,?é敏。\t"), max_size=200)


def tokens(text: str) -> int:
    """Like a tokeniser's: joined texts may cost more or less than each alone."""
    return (len(text.encode()) + 2) // 3 + text.count("b a")


@given(LETTERS, st.integers(2, 40))
def test_pieces_fit_and_are_together_the_text(text: str, room: int) -> None:
    found = texts.split(text, lambda piece: tokens(piece) <= room, tokens, room)
    assert "".join(found) == text
    assert all(piece and tokens(piece) <= room for piece in found)


@given(LETTERS, st.integers(2, 40))
def test_what_fits_has_the_last_word(text: str, room: int) -> None:
    """The count is far too low here."""
    found = texts.split(text, lambda piece: len(piece) <= room, lambda piece: len(piece) // 4, room)
    assert "".join(found) == text and all(len(piece) <= room for piece in found)


def test_a_text_is_cut_between_paragraphs_rather_than_within_and_words_stay_whole() -> None:
    text = "one two.\n\nthree four. five six seven"
    assert texts.split(text, lambda p: len(p) <= 20, len, 20) == ["one two.\n\n", "three four. ", "five six seven"]


def test_a_context_without_room_for_a_character_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="no room for a piece"):
        texts.split("abc", lambda _: False, len, 10)


@given(LETTERS)
def test_sentences_and_paragraphs_are_together_the_text(text: str) -> None:
    assert "".join(texts.sentences(text)) == text == "".join(texts.paragraphs(text))


def test_words_are_counted_in_scripts_with_and_without_spaces() -> None:
    assert texts.num_words("It's a well-known fact.") == 4
    assert texts.num_words("敏捷的狐狸 and I") == 7


def test_a_text_is_shortened_by_whole_sentences() -> None:
    text = "One two three. Four five. Six."
    assert texts.shortened(text, 5) == "One two three. Four five."
    assert texts.shortened(text, 1) == "One two three."
    assert texts.whole_sentences("It ends. And this doe") == "It ends."
    assert texts.whole_sentences("only this") == "only this"
    assert texts.whole_sentences("One. Two. One. Two. On") == "One. Two."


@given(LETTERS, st.integers(1, 3))
def test_spans_stand_in_the_text(text: str, words: int) -> None:
    found = texts.spans(text, words)
    assert len(set(found)) == len(found)
    assert all(span and span in text and not any(mark in span for mark in "\n。") for span in found)


def test_spans_do_not_cross_marks() -> None:
    assert texts.spans("Ann Lee, Bonn", 2) == ["Ann", "Ann Lee", "Lee", "Bonn"]
    assert "巴黎" in texts.spans("我住在巴黎。", 2)


@given(LETTERS, st.lists(st.text(alphabet="ab敏 ", min_size=1, max_size=4).filter(str.strip), max_size=4))
def test_names_are_found_exactly_where_they_stand_and_never_overlap(text: str, names: list[str]) -> None:
    found = located(text, dict.fromkeys(names, "x"))
    assert all(text[one.start : one.end] == one.text for one in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


def test_longer_names_win_and_parts_of_words_do_not_count() -> None:
    found = located(
        "New York, York and Yorkshire. 我住在巴黎市。", {"York": "place", "New York": "place", "巴黎": "place"}
    )
    assert [(one.text, one.start) for one in found] == [("New York", 0), ("York", 10), ("巴黎", 33)]
