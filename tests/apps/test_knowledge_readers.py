"""Readers: text with places out of files of every kind, clear errors out of hostile ones."""

from __future__ import annotations

import io
import sys
import zipfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.apps.knowledge import readers
from llmasos.apps.knowledge.readers import READERS, Document, read_document
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, UnsupportedError


def parts(document: Document) -> list[tuple[tuple[str, ...], str]]:
    """Headings and text of each section, which must cover the text."""
    assert document.sections[0].start == 0 and document.sections[-1].end == len(document.text)
    assert all(a.end == b.start for a, b in pairwise(document.sections))
    return [(s.headings, document.text[s.start : s.end].strip()) for s in document.sections]


def test_markdown_has_headings_of_both_forms_and_none_in_code() -> None:
    code = "```sh\n# no heading\n```\nTools\n-----\nA hammer.\n"
    text = f"# Guide\n\nHello.\n\n## **Install** it ##\n{code}\nEnd\n===\nBye.\n"
    document = read_document("a.md", text.encode())
    assert document.title == "Guide" and document.text == text
    assert [headings for headings, _ in parts(document)] == [("Guide",), ("Guide", "Install it"), ("End",)]
    assert parts(read_document("b.md", b"Tools\n-----\nA hammer.\n"))[0][0] == ("Tools",)


def test_a_heading_right_after_another_shares_its_section() -> None:
    document = read_document("a.md", b"# A\n\n## B\n\ntext\n\n## C\n\nmore\n")
    assert parts(document) == [(("A", "B"), "# A\n\n## B\n\ntext"), (("A", "C"), "## C\n\nmore")]


def test_html_gives_its_text_without_what_stands_around_it() -> None:
    page = """<!doctype html><html><head><title>My
        page</title><style>p{}</style><script>var x = "<p>no</p>";</script></head><body><nav>Menu</nav>
        <h1>Top</h1><p>One &amp; <b>two</b>.</p><h2>Below <i>it</i></h2><pre>a\n  b</pre><ul><li>x<li>y</ul>
        <footer>Imprint</footer></body></html>"""
    document = read_document("a.html", page.encode())
    assert document.title == "My page"
    found = parts(document)
    assert [headings for headings, _ in found if headings] == [("Top",), ("Top", "Below it")]
    assert "One & two." in document.text and "a\n  b" in document.text and "x\n" in document.text
    assert not any(word in document.text for word in ("Menu", "Imprint", "var x", "p{}"))


def test_an_element_that_is_never_closed_swallows_no_page() -> None:
    assert "the text" in read_document("a.html", b"<nav><a>Menu</a><h1>Title</h1><p>the text").text


def test_html_in_another_encoding_says_so_itself() -> None:
    page = '<meta charset="gb18030"><p>知识库</p>'.encode("gb18030")
    assert "知识库" in read_document("a.htm", page).text


def test_a_row_of_csv_becomes_a_line_with_the_names_of_its_columns() -> None:
    document = read_document("a.csv", b'name;city\nAda;"London\nUK"\n;\nBob;Rome\n')
    assert document.text == "name: Ada; city: London UK\nname: Bob; city: Rome\n"
    assert read_document("a.tsv", b"a\tb\n1\t2\t3\n").text == "a: 1; b: 2; 3\n"


def docx_bytes() -> bytes:
    import docx

    document = docx.Document()
    document.core_properties.title = "Report"
    document.add_heading("Results", 1)
    document.add_paragraph("It works.")
    document.add_heading("Costs", 2)
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "steel", "12"
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def test_a_word_file_gives_headings_paragraphs_and_tables_in_order() -> None:
    pytest.importorskip("docx")
    document = read_document("a.docx", docx_bytes())
    assert document.title == "Report"
    assert parts(document) == [
        (("Results",), "Results\n\nIt works."),
        (("Results", "Costs"), "Costs\n\nsteel | 12"),
    ]


def pdf_bytes(*pages: str, password: str = "", title: str = "") -> bytes:
    """Pages with one line each."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_a_pdf_gives_its_pages() -> None:
    pytest.importorskip("pypdf")
    document = read_document("a.pdf", pdf_bytes("First page", "Second page", title="A paper"))
    assert document.title == "A paper"
    assert [(s.page, document.text[s.start : s.end].strip()) for s in document.sections] == [
        (1, "First page"),
        (2, "Second page"),
    ]


def refused(name: str, data: bytes, kind: type[LLMasOSError] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        read_document(name, data)
    assert caught.value.hint
    return caught.value.message


def test_hostile_pdfs_are_refused_in_words() -> None:
    pytest.importorskip("pypdf")
    assert "is encrypted" in refused("a.pdf", pdf_bytes("secret", password="x"))
    assert "holds no text" in refused("a.pdf", pdf_bytes(""))
    whole = pdf_bytes("text")
    for damaged in (b"", b"%PDF-1.7", b"hello", whole[: len(whole) // 3], whole.replace(b"/Kids", b"/Kinds")):
        refused("a.pdf", damaged)


def test_a_word_file_that_unpacks_without_end_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("docx")
    monkeypatch.setattr(readers, "MAX_UNPACKED", 1 << 20)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"\0" * (2 << 20))
    assert len(stream.getvalue()) < 10_000
    assert "would unpack to 2 MiB" in refused("a.docx", stream.getvalue())
    assert "can't be read as a Word file" in refused("a.docx", b"PK\3\4 no zip")
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert "can't be read as a Word file" in refused("a.docx", empty.getvalue())


def test_text_in_another_encoding_and_bytes_that_are_no_text_are_refused() -> None:
    assert "is not UTF-8 text" in refused("a.txt", "Größe".encode("latin-1"))
    assert "zero bytes" in refused("a.txt", b"a\0b")
    assert read_document("a.txt", "Größe\r\n".encode("utf-16")).text == "Größe\n"
    assert read_document("a.txt", b"\xef\xbb\xbfhello").text == "hello"
    assert "holds no text" in refused("a.txt", b" \n ")


def test_a_huge_cell_is_read_and_an_open_quote_is_refused_with_its_line() -> None:
    assert f"a: {'x' * 200_000}; b: 1" in read_document("a.csv", b"a,b\n" + b"x" * 200_000 + b",1\n").text
    assert "at line 2" in refused("a.csv", b'a,b\n"open,1\n')


def test_unknown_kinds_and_too_large_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "of no kind that can be read" in refused("a.exe", b"x", InvalidInputError)
    monkeypatch.setattr(readers, "MAX_BYTES", 3)
    refused("a.txt", b"four", InvalidInputError)
    monkeypatch.setattr(readers, "MAX_BYTES", 300)
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 3)
    refused("a.txt", b"four", InvalidInputError)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UnsupportedError, match="pypdf, which is not installed") as caught:
        read_document("a.pdf", b"")
    assert caught.value.hint == "pip install llmasos[knowledge]"


@given(st.sampled_from(sorted(set(READERS) - {".pdf", ".docx"})), st.binary(max_size=200) | st.text().map(str.encode))
def test_whatever_the_bytes_are_there_is_a_document_or_an_error_for_people(kind: str, data: bytes) -> None:
    try:
        document = read_document(f"a{kind}", data)
    except LLMasOSError:
        return
    parts(document)
    document.text.encode()
