"""`llmasos kb`: documents in, passages and answers out, by the tiny models that stand in for real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import Cli

from llmasos.store import import_model


@pytest.fixture
def folder(tmp_path: Path, tiny_encoders: Callable[[str], Path]) -> Path:
    """Two documents and a file that is none; an encoder of the usual name."""
    import_model(tiny_encoders("BertModel"), name="all-minilm-l6-v2")
    found = tmp_path / "docs"
    found.mkdir()
    (found / "paris.md").write_text("# Paris\n\nParis is a city.\n")
    (found / "bad.txt").write_text("good is bad")
    (found / "picture.png").write_bytes(b"\x89PNG")
    return found


def test_documents_are_added_searched_listed_and_removed(cli: Cli, folder: Path) -> None:
    added = cli("kb", "add", "notes", str(folder))
    assert added.code == 0, added.err
    assert "notes: 2 added, 0 replaced, 0 unchanged, 0 removed; 2 documents in 2 chunks." in added.err
    for mode in ("text", "vector", "hybrid"):
        found = cli("kb", "search", "notes", "paris", "city", "--mode", mode, "--top", "1", "--json").json
        assert [Path(one["path"]).name for one in found] == ["paris.md"] or mode == "vector"
    shown = cli("kb", "search", "notes", "paris", "--mode", "text").out
    assert f"[1] {folder / 'paris.md'}, Paris" in shown and "Paris is a city." in shown
    assert "notes" in cli("kb").out and cli("kb", "ls", "--json").json[0]["files"] == 2
    assert [one["title"] for one in cli("kb", "ls", "notes", "--json").json] == ["bad", "Paris"]
    (folder / "bad.txt").write_text("good is good")
    assert cli("kb", "sync", "notes", "--json").json["replaced"] == [str(folder / "bad.txt")]
    assert cli("kb", "rm", "notes", str(folder / "bad.txt"), "--json").json["removed"] == [str(folder / "bad.txt")]
    assert cli("kb", "rm", "notes").code == 2
    assert cli("kb", "rm", "notes", stdin="n\n", terminal=True).code == 1
    assert cli("kb", "rm", "notes", "--yes").code == 0
    assert "There is no knowledge base" in cli("kb", "ls").err


def test_a_file_that_can_t_be_read_is_told_and_counts(cli: Cli, folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"\xff")
    added = cli("kb", "add", "notes", str(folder))
    assert added.code == 4 and f"not read: {folder / 'bad.txt'}: " in added.err and "1 added" in added.err


def test_a_model_answers_with_citations(cli: Cli, folder: Path, tiny_model: Path) -> None:
    import_model(tiny_model, name="tiny")
    cli("kb", "add", "notes", str(folder / "paris.md"))
    asked = cli("kb", "ask", "notes", "Is Paris a city?", "--model", "tiny", "--max-tokens", "30", "--json")
    assert asked.code == 0 and asked.json["passages"][0]["title"] == "Paris", asked.err
    assert set(asked.json["citations"]) <= {1}
    cut = asked.json["finish_reason"] == "length"  # random weights write until they are cut
    plain = cli("kb", "ask", "notes", "Is Paris a city?", "--model", "tiny", "--max-tokens", "30")
    assert ("The answer was cut" in plain.err) is cut


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add",), "needs the name"),
        (("add", "notes"), "nothing to add"),
        (("search", "notes"), "nothing to search"),
        (("ask", "notes"), "no question"),
        (("ls", "notes", "more"), "more"),
        (("search", "notes", "x", "--yes"), "--yes means nothing"),
        (("add", "notes", "x", "--top", "3"), "--top means nothing"),
        (("search", "none", "x"), "no knowledge base 'none'"),
        (("sync", "none"), "no knowledge base 'none'"),
        (("rm", "none", "--yes"), "no knowledge base 'none'"),
    ],
)
def test_what_is_missing_or_means_nothing_is_refused(cli: Cli, words: tuple[str, ...], said: str) -> None:
    result = cli("kb", *words)
    assert result.code in (2, 3) and said in result.err, result.err
