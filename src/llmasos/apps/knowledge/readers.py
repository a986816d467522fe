"""Files -> documents: one text, cut into sections that know their headings and page, for citations.

Text, Markdown, HTML and CSV need nothing; PDF and Word need the extra `knowledge`. A file that is damaged, encrypted,
too large once unpacked, or in an unknown encoding is a FormatError; nothing in a file is executed or fetched.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import Any

from llmasos.errors import FormatError, InvalidInputError, UnsupportedError

MAX_BYTES = 64 << 20
"""The largest file that is read."""
MAX_CHARACTERS = 64 << 20
"""Of a document's text."""
MAX_UNPACKED = 256 << 20
"""Bytes of a Word file once unpacked."""


@dataclass(frozen=True)
class Section:
    """`text[start:end]` of its document. `headings`: from the outermost to its own. `page` counts from 1."""

    start: int
    end: int
    headings: tuple[str, ...] = ()
    page: int | None = None


@dataclass(frozen=True)
class Document:
    """`sections` follow one another and cover the whole text."""

    title: str
    text: str
    sections: tuple[Section, ...]


def read_document(name: str, data: bytes) -> Document:
    """The document in a file's bytes; the name's ending says which kind it is.

    Raises FormatError for a file that is not what its name says, or without any text, InvalidInputError for a kind that
    is not known or a file that is too large, UnsupportedError without the extra `knowledge` where it is needed.
    """
    path = PurePosixPath(name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(READERS))
        raise InvalidInputError(f"{name} is of no kind that can be read.", hint=f"Known: {known}.", param="path")
    if len(data) > MAX_BYTES:
        raise InvalidInputError(
            f"{name} has {len(data) >> 20} MiB; {MAX_BYTES >> 20} are read at most.", hint="Split it.", param="path"
        )
    built = _Builder(name)
    reader(name, data, built)
    return built.document(path.stem)


class _Builder:
    """Puts a document together."""

    def __init__(self, name: str) -> None:
        self.name, self.title = name, ""
        self._parts: list[str] = []
        self._length = 0
        self._start, self._has_text = 0, False
        self._levels: list[tuple[int, str]] = []
        self._page: int | None = None
        self._sections: list[Section] = []

    def add(self, text: str) -> None:
        self._append(text)
        self._has_text = self._has_text or not text.isspace()

    def heading(self, level: int, words: str, source: str) -> None:
        """A section begins; `source` is how its heading stands in the text. One right after another heading belongs to
        the same section, which then has both."""
        if self._has_text:
            self._close()
        words = " ".join(words.split())[:200]
        self._levels = [(n, text) for n, text in self._levels if n < level]
        if words:
            self._levels.append((level, words))
        self.title = self.title or words
        self._append(source)

    def page(self, number: int) -> None:
        self._close()
        self._page = number

    def _append(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
        if self._length > MAX_CHARACTERS:
            raise InvalidInputError(
                f"{self.name} has more than {MAX_CHARACTERS} characters of text.", hint="Split it.", param="path"
            )

    def _close(self) -> None:
        if self._length > self._start:
            headings = tuple(text for _, text in self._levels)
            self._sections.append(Section(self._start, self._length, headings, self._page))
        self._start, self._has_text = self._length, False

    def document(self, stem: str) -> Document:
        self._close()
        text = "".join(self._parts)
        if not text.strip():
            raise FormatError(
                f"{self.name} holds no text.", hint="Pictures of text, such as scans, need text recognition first."
            )
        title = " ".join((self.title or stem).split())[:200]
        return Document(_storable(title), _storable(text), tuple(self._sections))


def _storable(text: str) -> str:
    """Lone surrogates, which come out of broken PDF fonts, are no text; a question mark each, so places stay."""
    return text.encode("utf-8", "replace").decode()


def _text_of(name: str, data: bytes, declared: str = "") -> str:
    """UTF-8, UTF-16 or UTF-32 with a byte order mark, or what the file itself declares."""
    marks = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    encoding = next((encoding for mark, encoding in marks if data.startswith(mark)), "utf-8-sig")
    for one in filter(None, (encoding, declared)):
        try:
            text = data.decode(one)
        except (UnicodeDecodeError, LookupError):
            continue
        if "\0" in text:
            raise FormatError(f"{name} is no text: it holds zero bytes.", hint="Give the file its right ending.")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    raise FormatError(
        f"{name} is not {encoding.removesuffix('-sig').upper()} text.", hint=f"iconv -f ENCODING -t UTF-8 {name}"
    )


def _read_text(name: str, data: bytes, into: _Builder) -> None:
    into.add(_text_of(name, data))


_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_ATX = re.compile(r" {0,3}(#{1,6})(?=\s|$)")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*\n?$")
_MARKS = re.compile(r"[*_`]+|\[([^\]]*)\]\([^)]*\)|<[^>]{0,200}>")


def _read_markdown(name: str, data: bytes, into: _Builder) -> None:
    """Headings of both forms, not inside fenced code."""
    lines = _text_of(name, data).splitlines(keepends=True)
    fence, skip = "", False
    for i, line in enumerate(lines):
        if skip:
            skip = False
            continue
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif found[1].startswith(fence):
                fence = ""
        elif not fence and (found := _ATX.match(line)):
            into.heading(len(found[1]), _plain(line[found.end() :].strip().rstrip("#")), line)
            continue
        elif not fence and _is_underlined(lines, i):
            level = 1 if lines[i + 1].strip()[0] == "=" else 2
            into.heading(level, _plain(line), line + lines[i + 1])
            skip = True
            continue
        into.add(line)


def _plain(words: str) -> str:
    """A heading without its marks."""
    return _MARKS.sub(r"\1", words[:1000])


def _is_underlined(lines: list[str], i: int) -> bool:
    """A paragraph of one line over a line of === or ---."""
    is_alone = i == 0 or not lines[i - 1].strip()
    return is_alone and bool(lines[i].strip()) and i + 1 < len(lines) and bool(_SETEXT.match(lines[i + 1]))


_HIDDEN = frozenset({"script", "style", "template", "noscript", "svg"})
_AROUND = frozenset({"nav", "footer", "aside"})
_BLOCKS = frozenset(
    {
        "address",
        "article",
        "blockquote",
        "br",
        "caption",
        "dd",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "form",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tbody",
        "td",
        "th",
        "thead",
        "tr",
        "ul",
    }
)
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset=[\"']?([\w.:-]{1,40})", re.IGNORECASE)


class _Page(HTMLParser):
    """Text out of tags. `dropped`: elements whose text is none of the page's."""

    def __init__(self, into: _Builder, dropped: frozenset[str]) -> None:
        super().__init__()
        self._into, self._dropped = into, dropped
        self.inside: list[str] = []
        """The dropped elements that are open."""
        self._heading: tuple[int, list[str]] | None = None
        self._is_title, self._is_pre = False, False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self._is_title = tag == "title" and not self.inside
        if tag in self._dropped:
            self.inside.append(tag)
        elif not self.inside:
            self._is_pre = self._is_pre or tag == "pre"
            if re.fullmatch("h[1-6]", tag):
                self._end_heading()
                self._heading = (int(tag[1]), [])
            elif tag in _BLOCKS:
                self._add("\n\n" if tag in ("p", "section", "article", "table", "ul", "ol", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._is_title = False
        if tag in self.inside:
            del self.inside[len(self.inside) - 1 - self.inside[::-1].index(tag) :]
        elif not self.inside:
            if re.fullmatch("h[1-6]", tag):
                self._end_heading()
            elif tag in _BLOCKS:
                self._add("\n")
            self._is_pre = self._is_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._is_title:
            self._into.title = " ".join((self._into.title + data).split())
        elif not self.inside:
            self._add(data if self._is_pre else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        if self._heading is not None:
            self._heading[1].append(text)
        else:
            self._into.add(text)

    def _end_heading(self) -> None:
        if self._heading is not None:
            (level, parts), self._heading = self._heading, None
            words = " ".join("".join(parts).split())
            self._into.heading(level, words, f"\n\n{words}\n\n")

    def close(self) -> None:
        super().close()
        self._end_heading()


def _read_html(name: str, data: bytes, into: _Builder) -> None:
    found = _CHARSET.search(data[:4096])
    text = _text_of(name, data, found[1].decode() if found else "")
    # an element around the page's text that is never closed would swallow the rest of it
    trial = _Page(_Builder(name), _HIDDEN | _AROUND)
    trial.feed(text)
    trial.close()
    page = _Page(into, _HIDDEN if trial.inside else _HIDDEN | _AROUND)
    page.feed(text)
    page.close()


def _read_csv(name: str, data: bytes, into: _Builder) -> None:
    """A line for every row, `column: value; ...`, with the columns' names from the first row."""
    text = _text_of(name, data)
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    csv.field_size_limit((1 << 31) - 1)  # of the process, and data/readers.py sets the same
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        names = [cell.strip() for cell in next(rows, [])]
        for row in rows:
            cells = [
                f"{names[i]}: {cell}" if i < len(names) and names[i] else cell
                for i, cell in enumerate(" ".join(cell.split()) for cell in row)
                if cell
            ]
            if cells:
                into.add("; ".join(cells) + "\n")
    except csv.Error as e:
        raise FormatError(f"{name} is not valid CSV at line {rows.line_num}: {e}.", hint="Correct that line.") from e


def _read_pdf(name: str, data: bytes, into: _Builder) -> None:
    """Page by page."""
    pypdf: Any = _library("pypdf", name)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        is_locked = reader.is_encrypted and not reader.decrypt("")
    except UnsupportedError:
        raise
    except Exception as e:  # a damaged file makes pypdf raise of every kind
        raise _damaged(name, "PDF", e) from e
    if is_locked:
        raise FormatError(f"{name} is encrypted.", hint="Save it without a password.")
    try:
        into.title = str((reader.metadata or {}).get("/Title") or "").strip()
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text()
            into.page(number)
            into.add(text + "\n\n")
    except InvalidInputError:
        raise
    except Exception as e:
        raise _damaged(name, "PDF", e) from e


def _read_docx(name: str, data: bytes, into: _Builder) -> None:
    """Paragraphs and the rows of tables; headings by their styles."""
    docx: Any = _library("docx", name)
    _check_unpacked(name, data)
    try:
        document = docx.Document(io.BytesIO(data))
        into.title = document.core_properties.title or ""
        for level, text in _paragraphs(document):
            if level:
                into.heading(level, text, f"{text}\n\n")
            else:
                into.add(text)
    except InvalidInputError:
        raise
    except Exception as e:
        raise _damaged(name, "Word file", e) from e


def _paragraphs(document: Any) -> Iterator[tuple[int, str]]:
    """Level (0: no heading) and text."""
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells = dict.fromkeys(" ".join(cell.text.split()) for cell in row.cells)  # merged ones come twice
                yield 0, " | ".join(filter(None, cells)) + "\n"
            yield 0, "\n"
        else:
            style = re.fullmatch(r"Heading ([1-6])", block.style.name if block.style is not None else "")
            level = int(style[1]) if style else 0
            yield level, block.text if level else f"{block.text}\n\n"


def _check_unpacked(name: str, data: bytes) -> None:
    """A small file must not become one that fills the memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:  # zipfile raises all of them for damage
        raise _damaged(name, "Word file", e) from e
    if total > MAX_UNPACKED:
        raise FormatError(
            f"{name} would unpack to {total >> 20} MiB; {MAX_UNPACKED >> 20} are read at most.",
            hint="Take the pictures out of it.",
        )


def _library(module: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = {"docx": "python-docx"}.get(module, module)
        raise UnsupportedError(
            f"Reading {name} needs the package {package}, which is not installed.",
            hint="pip install llmasos[knowledge]",
        ) from e


def _damaged(name: str, kind: str, error: Exception) -> FormatError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return FormatError(f"{name} can't be read as a {kind}: {why}.", hint="Open it and save it again.")


READERS: dict[str, Callable[[str, bytes, _Builder], None]] = {
    ".txt": _read_text,
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".html": _read_html,
    ".htm": _read_html,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
"""By the ending of the name, in lower case."""
