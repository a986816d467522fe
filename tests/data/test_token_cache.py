"""Tokens are made once, by one of several processes, survive a kill, and are made anew for what has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmasos.data import Masker, TokenCache, open_dataset, pieces, tokens
from llmasos.data import masks as masks_module
from llmasos.errors import LLMasOSError, StoreError
from llmasos.text import Tokenizer, load_tokenizer

Write = Callable[..., Path]
TEXTS = [{"text": f"Tea number {i} is hot. " * (1 + i % 5)} for i in range(200)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE_ROWS", 20)


def cache_of(path: Path, tokenizer: Tokenizer, **options: Any) -> TokenCache:
    [file] = open_dataset(path)
    return TokenCache(file, tokenizer, **options)


def all_tokens(cache: TokenCache) -> list[list[int]]:
    return [piece.tokens(row)[0].tolist() for piece in cache.pieces() for row in range(len(piece.rows))]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_pieces_hold_what_the_tokenizer_says(tokenizer: Tokenizer, write: Write, num_processes: int) -> None:
    cache = cache_of(write(TEXTS), tokenizer, num_processes=num_processes)
    totals = cache.build()
    expected = [[*tokenizer.encode(row["text"]), tokenizer.eos_token_id] for row in TEXTS]
    assert all_tokens(cache) == expected
    assert (totals.num_pieces, totals.num_rows, totals.longest) == (10, 200, max(map(len, expected)))
    assert totals.num_tokens == totals.num_trained == sum(map(len, expected))


def test_what_is_not_trained_comes_back_as_such(tokenizer: Tokenizer, write: Write) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Tea."}]}
    cache = cache_of(write([row]), tokenizer)
    [piece] = cache.pieces()
    ids, trained = piece.tokens(0)
    [sample] = Masker(tokenizer)(_example(row))
    assert ids.tolist() == sample.tokens.tolist() and trained.tolist() == sample.trained.tolist()
    assert int(piece.rows["first"][0]) == int(np.flatnonzero(trained)[0])


def _example(row: dict[str, Any]) -> Any:
    from llmasos.data import SCHEMAS
    from llmasos.data.schemas import read

    return read(SCHEMAS["messages"], row, "")


def test_a_second_run_tokenises_nothing(tokenizer: Tokenizer, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(TEXTS)
    first = all_tokens(cache_of(path, tokenizer))
    monkeypatch.setattr(masks_module.Masker, "__call__", lambda *_: pytest.fail("tokenised again"))
    assert all_tokens(cache_of(path, tokenizer)) == first


def test_what_has_changed_is_made_anew(tokenizer: Tokenizer, tokenizer_folder: Path, write: Write) -> None:
    path = write(TEXTS)
    keys = {cache_of(path, tokenizer).key}
    path.write_text(path.read_text().replace("Tea number 7 ", "Ale number 7 "))  # as long as before
    keys.add(cache_of(path, tokenizer).key)
    other = load_tokenizer(tokenizer_folder)
    other.chat_templates = {"default": "{{ messages }}"}
    keys.add(cache_of(path, other).key)
    keys.add(cache_of(path, tokenizer, template="{{ messages }}").key)
    assert len(keys) == 4
    path.rename(path.with_name("renamed.jsonl"))
    assert cache_of(path.with_name("renamed.jsonl"), tokenizer).key in keys


def test_pieces_can_be_read_while_more_are_made(
    tokenizer: Tokenizer, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    original = masks_module.Masker._text

    def held(self: Masker, example: Any) -> Any:
        if "number 60 " in example.text:
            may_go_on.wait(20)
        return original(self, example)

    monkeypatch.setattr(masks_module.Masker, "_text", held)
    cache = cache_of(write(TEXTS), tokenizer, num_processes=1)
    assert len(cache.piece(2).rows) == 20  # type: ignore[union-attr]
    assert cache.totals is None
    may_go_on.set()
    assert cache.build().num_rows == 200


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_first_bad_row_is_told_and_good_pieces_stay(tokenizer: Tokenizer, write: Write, num_processes: int) -> None:
    rows = [*TEXTS[:50], {"text": 5}, *TEXTS[50:150], {"text": None}, *TEXTS[150:]]
    cache = cache_of(write(rows), tokenizer, num_processes=num_processes)
    with pytest.raises(LLMasOSError, match=r"rows\.jsonl:51: text is a int"):
        cache.build()
    assert (cache.folder / "00000.piece").exists() and not (cache.folder / "done.json").exists()


def test_half_a_character_has_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "\\ud800"}\n')
    with pytest.raises(LLMasOSError, match=r"a\.jsonl:2: text has half a character"):
        cache_of(path, tokenizer).build()


def test_a_damaged_piece_is_told(tokenizer: Tokenizer, write: Write) -> None:
    cache = cache_of(write(TEXTS), tokenizer)
    cache.build()
    (cache.folder / "00003.piece").write_bytes(b"\x93NUMPY")
    pieces.load_piece.cache_clear()
    with pytest.raises(StoreError, match=r"00003\.piece is damaged"):
        all_tokens(cache_of(cache.file.path, tokenizer))  # type: ignore[arg-type]


PROGRAM = """
import json, os, sys, time
from llmasos.data import TokenCache, masks, open_dataset, tokens
from llmasos.text import load_tokenizer

path, folder, slow = sys.argv[1:]
tokens.PIECE_ROWS = 20
original, made = masks.Masker._text, 0

def counted(self, example):
    global made
    made += 1
    time.sleep(float(slow))
    return original(self, example)

masks.Masker._text = counted
cache = TokenCache(open_dataset(path)[0], load_tokenizer(folder), num_processes=1)
totals = cache.build()
print(json.dumps([made, totals.num_rows, totals.num_tokens]))
"""


def start(path: Path, folder: Path, slow: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(path), str(folder), str(slow)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)


def result(process: subprocess.Popen[str]) -> list[int]:
    out, _ = process.communicate(timeout=60)
    return list(json.loads(out))


def test_of_two_processes_one_makes_each_row(tokenizer_folder: Path, write: Write) -> None:
    path = write(TEXTS)
    first, second = (result(one) for one in [start(path, tokenizer_folder, 0.003) for _ in range(2)])
    assert first[1:] == second[1:] and first[1] == 200
    assert first[0] + second[0] == 200


def test_after_a_kill_the_rest_is_made(tokenizer: Tokenizer, tokenizer_folder: Path, write: Write) -> None:
    path = write(TEXTS)
    cache = cache_of(path, tokenizer)
    with start(path, tokenizer_folder, 0.02) as process:
        while not (cache.folder / "00002.piece").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = len(list(cache.folder.glob("*.piece")))
    assert 3 <= kept < 10
    made, num_rows, num_tokens = result(start(path, tokenizer_folder, 0))
    assert (made, num_rows) == (200 - 20 * kept, 200)
    assert num_tokens == sum(len(tokenizer.encode(row["text"])) + 1 for row in TEXTS)
    assert all_tokens(cache)[-1] == [*tokenizer.encode(TEXTS[-1]["text"]), tokenizer.eos_token_id]
    assert not list(cache.folder.glob("*.tmp"))
