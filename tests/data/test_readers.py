"""Every kind of file gives the same rows, with their lines; what is wrong is said with file and line."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmasos.data import open_dataset, parse_columns, readers
from llmasos.errors import FormatError, InvalidInputError, NotFoundError, OfflineError, UnsupportedError

ROWS = [{"prompt": "a, b", "completion": "猫"}, {"prompt": "c", "completion": "d"}]
Write = Callable[..., Path]


def rows_of(path: Path | str, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    return [row for file in open_dataset(path, **options) for row in file.rows()]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    contents = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines[:20]) + zstandard.compress(lines[20:]),  # two frames
        "a.ndjson": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "a.json": json.dumps(ROWS, indent=2).encode(),
        "b.json": lines,
        "a.csv": 'prompt,completion\n"a, b",猫\nc,d\n'.encode(),
        "a.tsv": "prompt\tcompletion\na, b\t猫\nc\td\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert [row for _, row in rows_of(tmp_path / name)] == ROWS, name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, ROWS[0]), (2, ROWS[1])]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "a.json").write_text('[\n  {"a":\n 1},\n  {"a": 2}\n]\n')
    (tmp_path / "a.csv").write_text('a,b\n"one\ntwo",2\n3,4\n')
    assert [line for line, _ in rows_of(tmp_path / "a.jsonl")] == [2, 4]
    assert [line for line, _ in rows_of(tmp_path / "a.json")] == [2, 4]
    assert [line for line, _ in rows_of(tmp_path / "a.csv")] == [2, 4]


def test_a_folder_is_all_its_files_by_name_and_nothing_hidden(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", ".git/0.jsonl", "a/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n')
    assert [Path(file.name).name for file in open_dataset(tmp_path)] == ["1.jsonl", "2.jsonl"]


def test_an_installed_dataset_is_found_by_name(home: Path) -> None:
    (home / "datasets" / "poems").mkdir(parents=True)
    (home / "datasets" / "poems" / "a.txt").write_text("Tea.")
    assert rows_of("poems") == [(1, {"text": "Tea."})]


def test_columns_are_renamed_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('Hi "you\tHallo\n')
    assert rows_of(path, columns=["prompt", "completion"]) == [(1, {"prompt": 'Hi "you', "completion": "Hallo"})]
    path.write_text("q\ta\nHi\tHallo\n")
    [(line, row)] = rows_of(path, columns={"prompt": "q"})
    assert (line, row["prompt"]) == (2, "Hi")
    with pytest.raises(FormatError, match=r"a\.tsv:2: there is no column 'x'"):
        rows_of(path, columns={"prompt": "x"})
    assert parse_columns("prompt=q, completion=a") == {"prompt": "q", "completion": "a"}
    assert parse_columns("prompt,completion") == ["prompt", "completion"]
    with pytest.raises(InvalidInputError, match="not understood"):
        parse_columns("prompt=q,completion")
    (tmp_path / "rows.jsonl").write_text('{"q": "Hi", "a": "Hallo"}\n')
    with pytest.raises(InvalidInputError, match=r"rows\.jsonl is no csv or tsv") as e:
        open_dataset(tmp_path / "rows.jsonl", columns=["prompt", "completion"])
    assert e.value.param == "columns"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON .*: '\{\"a\":'"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: a list and no object: '\[1\]'"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON \(too deep\)"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"a\.json:2: not JSON"),
        ("a.json", b'[{"a": 1},\n{"a": "b', r"a\.json:2: not JSON"),
        ("a.json", b'[{"a": 1},\n 5]', r"a\.json:2: '5' is no object"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: 3 values and 2 columns \(a, b\)"),
        ("a.txt", b"one\n\xe4\n", r"a\.txt:2: not UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], r"a\.jsonl\.gz is damaged after line"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst is damaged after line 0"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        rows_of(tmp_path / name)


def test_a_mistake_early_in_a_large_array_is_found_before_its_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("[{'a': 1},\n" + '{"a": 2},\n' * 50_000)
    seen = 0

    def counted(file: Any) -> Any:
        nonlocal seen
        for line in original(file):
            seen += 1
            yield line

    original = readers._text_lines
    monkeypatch.setattr(readers, "_text_lines", counted)
    with pytest.raises(FormatError, match=r"a\.json:1"):
        rows_of(path)
    assert seen < 1000


def test_a_file_that_is_not_there_is_said_with_those_that_are_like_it(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    for name, hint in (
        ("chat.jsonl", f"Did you mean {tmp_path / 'chats.jsonl'}?"),
        ("corpus.txt.gz", f"the folder is {tmp_path}"),
        ("gone/chats.jsonl", f"no folder {tmp_path / 'gone'}"),
    ):
        with pytest.raises(NotFoundError, match="no file") as caught:
            open_dataset(tmp_path / name)
        assert hint in caught.value.hint


def test_what_is_no_parquet_file_is_said_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no table, but long enough for a footer")
    with pytest.raises(FormatError) as caught:
        rows_of(path)
    assert "is not a parquet file" in caught.value.message and not caught.value.message.endswith("..")


def test_what_is_not_there_or_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no dataset"):
        open_dataset(tmp_path / "none")
    (tmp_path / "a.png").write_text("")
    with pytest.raises(UnsupportedError, match="no known kind"):
        open_dataset(tmp_path / "a.png")
    with pytest.raises(NotFoundError, match="has no data"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    (tmp_path / name).write_text("")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=rf"{module}.*llmasos\[train\]"):
        rows_of(tmp_path / name)


# texts


@given(
    st.lists(st.text(st.sampled_from("ab\n 猫"), max_size=60).filter(str.strip), min_size=1, max_size=6),
    st.integers(5, 50),
)
def test_the_parts_of_documents_are_the_documents(documents: list[str], part: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PART", part)
        path = Path(folder) / "a.txt"
        path.write_text("\n<|doc|>\n".join(documents), encoding="utf-8")
        found: list[str] = []
        for _, row in rows_of(path):
            assert 0 < len(row["text"]) <= part or not row.get("__ends__", True) or not row.get("__begins__", True)
            if row.get("__begins__", True):
                found.append("")
            found[-1] += row["text"]
    assert [one.strip() for one in found] == [one.strip() for one in documents]


# the hub


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(repo: str, config: str | None, **options: Any) -> Any:
        asked.append((repo, config, options["split"], options["streaming"], options["revision"]))
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(readers, "_hub_revision", lambda repo: "abc")
    assert rows_of("hf:o/n:main:test") == [(1, ROWS[0]), (2, ROWS[1])]
    assert asked == [("o/n", "main", "test", True, "abc")]
    assert open_dataset("hf:o/n")[0].hub == ("o/n", None, "train")
    with pytest.raises(InvalidInputError, match="names no dataset"):
        open_dataset("hf:n")


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(OfflineError, match="hf:o/n"):
        rows_of("hf:o/n")
