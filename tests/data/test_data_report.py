"""What `validate` finds, what the trained tokenizer is, and both on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmasos.cli import main
from llmasos.data import report, train_tokenizer, validate
from llmasos.data.bpe import END, END_OF_TURN
from llmasos.errors import FormatError, InvalidInputError
from llmasos.text import Tokenizer, load_tokenizer

Write = Callable[..., Path]
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
BAD = {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_report_has_counts_and_every_bad_line(tokenizer: Tokenizer, write: Write) -> None:
    [found] = validate(write([GOOD, BAD, GOOD, {"text": "x"}]), tokenizer)
    assert (found.schema, found.kind, found.num_rows, found.num_bad) == ("messages", "chat", 4, 2)
    assert dict(found.roles) == {"user": 2, "assistant": 2} and found.num_chars == 16
    assert [problem.where.rpartition(":")[2] for problem in found.problems] == ["2", "4"]
    assert len(found.lengths) == 2 and found.num_trained and not found.is_good
    assert sum(num for _, num in found.histogram()) == 2


def test_many_rows_are_counted_and_some_measured(
    tokenizer: Tokenizer, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_MEASURED", 10)
    [found] = validate(write([GOOD] * 100 + [BAD] * 30), tokenizer)
    assert (found.num_rows, found.num_bad, len(found.problems)) == (130, 30, report.MOST_PROBLEMS)
    assert 10 <= len(found.lengths) < 20


def test_a_file_that_cannot_be_read_on_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n" * 30_000 + b"\xff\n")
    [found] = validate(tmp_path / "a.txt")
    assert found.num_rows == 1 and "a.txt:30001: not UTF-8" in found.problems[0].what
    (tmp_path / "a.txt").write_bytes(b"")
    assert not validate(tmp_path / "a.txt")[0].is_good


def test_a_trained_tokenizer_reads_back_its_text_and_chats(tmp_path: Path, write: Write) -> None:
    made = train_tokenizer(write([GOOD, {"messages": GOOD["messages"]}] * 20), vocab_size=300)
    made.save_pretrained(tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out")
    text = "Hello 猫 \t 12345\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("Hello.") == made.encode("Hello.") and loaded.encode("")[0] == loaded.bos_token_id
    assert {loaded.id(END), loaded.id(END_OF_TURN)} == set(loaded.eos_token_ids)
    from llmasos.data import Example, Masker

    [sample] = Masker(loaded)(Example("chat", messages=GOOD["messages"]))
    assert loaded.decode(sample.tokens[sample.trained], skip_special_tokens=False) == f"Hello.{END_OF_TURN}"
    assert sample.tokens[0] == loaded.bos_token_id


def test_a_trained_tokenizer_loads_in_transformers(tmp_path: Path, write: Write) -> None:
    from transformers import AutoTokenizer

    made = train_tokenizer(write([GOOD] * 20), vocab_size=300)
    made.save_pretrained(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reference("Hello 猫")["input_ids"] == made.encode("Hello 猫")


def test_a_tokenizer_needs_bytes_and_text(write: Write) -> None:
    with pytest.raises(InvalidInputError, match="needs at least 260"):
        train_tokenizer(write([GOOD]), vocab_size=100)
    with pytest.raises(FormatError, match="no rows"):
        train_tokenizer(write([]))


def test_the_command_line_checks_shows_and_learns(
    write: Write, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = write([GOOD] * 9), str(tokenizer_folder)
    assert main(["data", "validate", str(path), "--model", model]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out
    assert main(["data", "inspect", str(path), "--model", model, "--max-length", "64"]) == 0
    assert "⟦Hello.⟧⟪<|end|>⟫" in capsys.readouterr().out
    assert main(["data", "tokenizer", str(path), "--output", str(tmp_path / "new"), "--vocab-size", "280"]) == 0
    assert load_tokenizer(tmp_path / "new").vocab_size <= 280
    assert main(["data", "tokenizer", str(path), "--output", str(tmp_path / "new")]) == 2
    bad = write([GOOD, BAD], "bad.jsonl")
    capsys.readouterr()
    assert main(["data", "validate", str(bad), "--json"]) == 4
    [found] = json.loads(capsys.readouterr().out)
    assert found["num_bad"] == 1 and found["problems"][0]["where"] == f"{bad}:2"
    assert main(["data", "validate", str(bad)]) == 4
    assert f"{bad}:2: messages has no message of the assistant" in capsys.readouterr().out
    assert main(["data", "inspect", str(path)]) == 2
    assert main(["data", "validate"]) == 2
