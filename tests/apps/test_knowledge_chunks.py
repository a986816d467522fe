"""Chunks: they cover the text, none is over the budget, neighbours overlap, each knows its place."""

from __future__ import annotations

from itertools import pairwise

from fake_encoder import Words
from hypothesis import given
from hypothesis import strategies as st

from llmasos.apps.knowledge.chunks import Chunk, chunks
from llmasos.apps.knowledge.readers import Document, Section, read_document


def count(text: str) -> int:
    return len(Words().encode(text))


def cut(text: str, *, max_tokens: int = 20, overlap: int = 5, name: str = "a.md") -> list[Chunk]:
    return chunks(read_document(name, text.encode()), count, max_tokens=max_tokens, overlap=overlap)


PIECES = st.lists(
    st.sampled_from(["word", "Ab", ".", "! ", " ", "\n", "\n\n", "# ", "x" * 70, "知识。", "a.b", "?", "\t", "é"]),
    max_size=60,
)


@given(PIECES.map("".join), st.integers(8, 30), st.integers(0, 8))
def test_every_character_lies_in_a_chunk_and_no_chunk_is_over_the_budget(
    text: str, max_tokens: int, overlap: int
) -> None:
    half = len(text) // 2
    document = Document("A title", text, (Section(0, half, ("One",)), Section(half, len(text), ("Two", "Three"), 2)))
    covered = set()
    for chunk in chunks(document, count, max_tokens=max_tokens, overlap=overlap):
        assert text[chunk.start : chunk.end] == chunk.text and chunk.text.strip() == chunk.text
        assert count(chunk.embedded) <= max_tokens
        section = document.sections[0 if chunk.start < half else 1]
        assert section.start <= chunk.start < chunk.end <= section.end
        assert (chunk.headings, chunk.page) == (section.headings, section.page)
        covered |= set(range(chunk.start, chunk.end))
    assert {i for i, c in enumerate(text) if not c.isspace()} <= covered


def test_a_chunk_ends_with_a_paragraph_where_it_can() -> None:
    first, second = "One two three four five six seven.", "Eight nine ten. Eleven twelve thirteen fourteen fifteen."
    found = cut(f"{first}\n\n{second}", max_tokens=16, overlap=0, name="a.txt")
    assert [chunk.text for chunk in found] == [first, second]


def test_neighbours_share_whole_sentences() -> None:
    sentences = [f"Sentence {i} is here." for i in range(12)]
    found = cut(" ".join(sentences), overlap=6, name="a.txt")
    assert len(found) > 2
    for left, right in pairwise(found):
        shared = left.end - right.start
        assert shared > 0 and right.text[:shared] in sentences


def test_a_chunk_is_embedded_with_its_title_and_headings() -> None:
    [guide, install] = cut("# Guide\n\nHello.\n\n## Install\n\nRun it.\n", max_tokens=40)
    assert guide.embedded == "Guide\n# Guide\n\nHello." and install.context == "Guide > Install"


def test_headings_that_would_fill_the_chunk_are_left_out_from_the_outermost() -> None:
    long = "very " * 30
    found = cut(f"# {long}\n\n## Install\n\nRun it.\n", max_tokens=24)
    assert {chunk.context for chunk in found} == {"Install"} and "Run it." in found[-1].text


def test_an_endless_word_is_cut_between_characters() -> None:
    found = cut("x" * 5000, max_tokens=20, name="a.txt")
    assert len(found) > 5 and all(len(chunk.text) <= 20 * 50 for chunk in found)
