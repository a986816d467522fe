"""Knowledge bases: incremental, atomic, searchable in three modes, told apart by their encoder."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_encoder import FakeEncoder

from llmasos.apps.knowledge import KnowledgeBase, Progress, answer, delete, names
from llmasos.apps.knowledge.base import FILE, fused
from llmasos.apps.knowledge.encoder import vectors_of
from llmasos.apps.knowledge.index import match_expression, sqlite_vec_path
from llmasos.errors import (
    ContextOverflowError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    ServerError,
    StoreError,
)
from llmasos.tasks.model import Reply

ENGINES = ["numpy", *(["sqlite-vec"] if sqlite_vec_path() else [])]


@pytest.fixture(params=ENGINES)
def base(request: pytest.FixtureRequest, home: Path) -> KnowledgeBase:
    return KnowledgeBase.open("notes", model=FakeEncoder(), engine=request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "docs"
    (found / "sub").mkdir(parents=True)
    (found / "tea.md").write_text("# Tea\n\nGreen tea is steeped at seventy degrees.\n\n## Black\n\nBoil the water.\n")
    (found / "sub" / "bread.txt").write_text("Bread needs flour, water, salt and patience.")
    (found / ".hidden.txt").write_text("Nobody reads me.")
    (found / "program.exe").write_bytes(b"\0")
    return found


def paths(base: KnowledgeBase) -> list[str]:
    return [Path(file.path).name for file in base.files()]


def test_a_folder_is_added_searched_and_cited(base: KnowledgeBase, folder: Path) -> None:
    changes = base.add(folder)
    assert [Path(path).name for path in changes.added] == ["bread.txt", "tea.md"] and not changes.failed
    for mode in ("vector", "text", "hybrid"):
        best = base.search("water to boil for black tea", 1, mode=mode)[0]
        assert best.text.endswith("Boil the water.") and best.headings == ("Tea", "Black"), mode
        assert best.citation == f"{folder / 'tea.md'}, Tea > Black"
        assert (folder / "tea.md").read_text()[best.start : best.end] == best.text
    stats = base.stats()
    assert (stats.files, stats.model, stats.dimensions, stats.engine) == (2, "fake", 64, base.index.engine)
    assert stats.chunks == 3 and stats.size > 0 and names() == ["notes"]


def test_what_has_not_changed_is_not_read_again(base: KnowledgeBase, folder: Path) -> None:
    base.add(folder)
    encoder = base.encoder()
    assert isinstance(encoder, FakeEncoder)
    encoder.seen.clear()
    assert len(base.add(folder).unchanged) == 2 and not encoder.seen
    (folder / "tea.md").write_text("# Tea\n\nOnly white tea now.\n")
    assert [Path(path).name for path in base.add(folder).replaced] == ["tea.md"]
    assert len(encoder.seen) == 1 and not base.search("boil", mode="text")
    assert "white" in base.search("tea", 1)[0].text


def test_sync_adds_replaces_and_removes(base: KnowledgeBase, folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "single.txt"
    single.write_text("A single file.")
    base.add(folder)
    base.add(single)
    base.add_text("kept without a file", "note")
    (folder / "new.txt").write_text("News.")
    (folder / "tea.md").write_text("Coffee.")
    (folder / "sub" / "bread.txt").unlink()
    single.unlink()
    changes = base.sync()
    found = {kind: [Path(path).name for path in getattr(changes, kind)] for kind in ("added", "replaced", "removed")}
    assert found == {"added": ["new.txt"], "replaced": ["tea.md"], "removed": ["bread.txt", "single.txt"]}
    assert not changes.failed and paths(base) == ["new.txt", "tea.md", "note"]
    assert base.sync().removed == []


def test_a_folder_that_is_gone_as_a_whole_loses_nothing(base: KnowledgeBase, folder: Path) -> None:
    base.add(folder)
    folder.rename(folder.with_name("elsewhere"))
    changes = base.sync()
    assert list(changes.failed) == [str(folder)] and not changes.removed and len(base.files()) == 2


def test_one_bad_file_of_a_folder_is_told_and_the_others_are_added(base: KnowledgeBase, folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"\xff\0")
    changes = base.add(folder)
    assert list(changes.failed) == [str(folder / "bad.txt")] and len(changes.added) == 2
    with pytest.raises(FormatError):
        base.add(folder / "bad.txt")
    with pytest.raises(NotFoundError):
        base.add(folder / "missing.txt")


def test_remove_takes_a_file_or_a_folder_out(base: KnowledgeBase, folder: Path) -> None:
    base.add(folder)
    base.add_text("some text", "note")
    assert base.remove("note") == ["note"]
    assert base.remove(folder / "sub") == [str(folder / "sub" / "bread.txt")]
    assert base.remove(folder) == [str(folder / "tea.md")] and base.search("tea water") == []
    assert base.sync().added == [] and base.stats().chunks == 0
    with pytest.raises(NotFoundError):
        base.remove("note")


def test_another_encoder_is_refused_with_the_way_out(base: KnowledgeBase) -> None:
    base.add_text("hello", "note")
    with pytest.raises(InvalidInputError, match="made by fake, not by other") as caught:
        KnowledgeBase.open("notes", model="other")
    assert "kb rm notes" in caught.value.hint
    again = KnowledgeBase.open("notes", model=FakeEncoder(dimensions=32))
    with pytest.raises(InvalidInputError, match="64 dimensions"):
        again.search("hello")
    with pytest.raises(InvalidInputError, match="64 dimensions"):
        again.add_text("more", "other note")
    assert paths(again) == ["note"]


def test_wrong_questions_are_refused(base: KnowledgeBase) -> None:
    for wrong in ({"query": " "}, {"query": "x", "k": 0}, {"query": "x", "mode": "magic"}):
        with pytest.raises(InvalidInputError):
            base.search(**wrong)
    assert base.search("nothing is in it") == []


@pytest.mark.parametrize("name", ["", "..", "a b", "con"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="knowledge base"):
        KnowledgeBase.open(name)


def test_a_base_is_opened_by_path_and_deleted(base: KnowledgeBase, tmp_path: Path) -> None:
    base.add_text("hello", "note")
    there = KnowledgeBase.open(base.path, create=False)
    assert (there.model, there.name) == ("fake", "notes")
    delete("notes")
    assert names() == [] and not base.path.exists()
    for gone in (lambda: delete("notes"), lambda: KnowledgeBase.open("notes", create=False)):
        with pytest.raises(NotFoundError):
            gone()


def test_a_file_that_is_no_base_is_refused(home: Path) -> None:
    path = home / "knowledge" / "broken"
    path.mkdir(parents=True)
    (path / FILE).write_bytes(b"no database" * 100)
    with pytest.raises(FormatError, match="is no knowledge base"):
        KnowledgeBase.open("broken")


def test_chinese_is_found_by_its_words(base: KnowledgeBase) -> None:
    base.add_text("绿茶用七十度的水冲泡。", "tea")
    base.add_text("面包需要面粉和耐心。", "bread")
    assert [one.path for one in base.search("怎样冲泡绿茶？", mode="text")] == ["tea"]
    assert match_expression("绿茶 OR tea*") == '"绿 茶" OR "tea"'
    assert match_expression("who is the") == '"who" OR "is" OR "the"' and match_expression('"?') == ""


def test_a_cross_encoder_decides_the_order(base: KnowledgeBase) -> None:
    base.add_text("tea tea tea, all about tea and how to steep it", "long")
    base.add_text("some tea", "short")
    assert base.search("tea tea tea", 1)[0].path == "long"
    assert base.search("tea tea tea", 1, rerank=FakeEncoder())[0].path == "short"


def test_ranks_are_fused_by_their_reciprocals() -> None:
    assert fused([[(1, 9.0), (2, 8.0)], [(2, 0.5), (3, 0.1)]]) == [(2, 1 / 12 + 1 / 11), (1, 1 / 11), (3, 1 / 12)]


@pytest.mark.skipif(sqlite_vec_path() is None, reason="this Python loads no extensions")
def test_both_engines_find_the_same(home: Path) -> None:
    encoder = FakeEncoder()
    fast = KnowledgeBase.open("same", model=encoder, engine="sqlite-vec")
    exact = KnowledgeBase.open("same", model=encoder, engine="numpy")
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    for i in range(120):
        fast.add_text(" ".join(random.choice(words, 6)), f"note {i % 100}")
    for _ in range(20):
        query = " ".join(random.choice(words, 3))
        found = [base.search(query, 10, mode="vector") for base in (fast, exact)]
        assert [one.path for one in found[0]] == [one.path for one in found[1]]
        assert np.allclose([one.score for one in found[0]], [one.score for one in found[1]], atol=1e-6)


def test_equal_vectors_come_in_the_order_they_were_added(base: KnowledgeBase) -> None:
    for i in range(30):
        base.add_text("# Same\n\nthe same words", f"note {i:02}.md")
    assert [one.path for one in base.search("same words", 5, mode="vector")] == [f"note {i:02}.md" for i in range(5)]


def test_an_engine_that_is_not_there_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.apps.knowledge.index.sqlite_vec_path", lambda: None)
    with pytest.raises(StoreError, match="sqlite-vec"):
        KnowledgeBase.open("notes", model=FakeEncoder(), engine="sqlite-vec")


# whole or not at all


def test_an_encoder_that_fails_leaves_the_file_as_it_was(base: KnowledgeBase) -> None:
    base.add_text("old words", "note")
    encoder = base.encoder()
    assert isinstance(encoder, FakeEncoder)
    encoder.broken_at = "Sentence 40"
    with pytest.raises(RuntimeError):
        base.add_text(" ".join(f"Sentence {i} is new." for i in range(80)), "note")
    assert [one.text for one in base.search("words")] == ["old words"]


def test_a_callback_is_told_of_every_step_and_may_stop_it(base: KnowledgeBase, folder: Path) -> None:
    seen: list[Progress] = []
    base.add(folder, on_progress=seen.append)
    assert [(Path(one.path).name, one.number, one.files, one.done, one.total) for one in seen] == [
        ("bread.txt", 1, 2, 0, 1),
        ("bread.txt", 1, 2, 1, 1),
        ("tea.md", 2, 2, 0, 2),
        ("tea.md", 2, 2, 2, 2),
    ]

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.add_text("never added", "note", on_progress=stop)
    assert "note" not in paths(base)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from fake_encoder import FakeEncoder
from llmasos.apps.knowledge import KnowledgeBase, base as module
base = KnowledgeBase.open("notes", model=FakeEncoder())
base.add_text("First file.", "first")
base.add_text("Old words.", "second")
insert = module._insert
def dies(*values):
    insert(*values)
    os.kill(os.getpid(), signal.SIGKILL)  # all is written and not committed
module._insert = dies
base.add_text("New words that never came.", "second")
"""


def test_a_process_that_is_killed_in_the_middle_of_a_file_leaves_the_base_whole(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent)], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    base = KnowledgeBase.open("notes", model=FakeEncoder())
    assert paths(base) == ["first", "second"] and base.search("new", mode="text") == []
    assert base.search("old words", 1)[0].text == "Old words."
    with sqlite3.connect(base.path / FILE) as db:
        counts = [db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in ("chunks", "vectors", "words")]
        assert counts == [2, 2, 2] and db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    assert base.add_text("New words at last.", "second").replaced == ["second"]


def test_readers_go_on_while_one_writes_and_see_whole_files(base: KnowledgeBase) -> None:
    base.add_text("Version one of the words.", "note")
    with base.index.writing() as db:
        db.execute("DELETE FROM words")
        db.execute("DELETE FROM vectors")
        assert base.search("words", 1)[0].text == "Version one of the words."
        db.execute("ROLLBACK")
        db.execute("BEGIN IMMEDIATE")
    wrong: list[Any] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            found = base.search("words version", 9)
            if len({one.text.split()[1] for one in found}) != 1 or len(found) < 1:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in ("two", "three", "four", "five"):
        text = "\n\n".join(f"Version {number} of the words, part {i}, which is long." for i in range(9))
        base.add_text(text, "note")
    over.set()
    for reader in readers:
        reader.join()
    assert not wrong


# answers


class FakeChat:
    """A model of tasks that gives these replies; `room`: characters that it reads."""

    name = "fake"

    def __init__(self, *replies: str, room: int = 10**6) -> None:
        self.replies, self.room = list(replies), room
        self.prompts: list[str] = []
        self.schemas: list[Any] = []

    async def ask(self, messages: Sequence[dict[str, str]], schema: Any, *, max_tokens: int) -> Reply:
        text = messages[-1]["content"]
        if len(text) > self.room:
            raise ContextOverflowError(len(text), max_tokens, self.room)
        self.prompts.append(text)
        self.schemas.append(schema)
        reply = self.replies.pop(0)
        return Reply(reply, not reply.endswith("}"))


def test_an_answer_cites_passages_that_it_was_given(base: KnowledgeBase, folder: Path) -> None:
    base.add(folder)
    model = FakeChat('{"answer": " Seventy degrees. ", "passages": [1, 7, 1]}')
    found = answer("How hot is green tea steeped?", base, model, k=2)
    assert (found.text, found.citations) == ("Seventy degrees.", (1,))
    assert "seventy degrees" in found.sources[0].text and found.sources[0].title == "Tea"
    assert "[1] tea.md, Tea\n" in model.prompts[0] and str(folder) not in model.prompts[0]
    assert model.schemas[0]["properties"]["passages"]["items"]["enum"] == [1, 2]


def test_passages_that_do_not_fit_are_left_out_from_the_last(base: KnowledgeBase) -> None:
    for i in range(4):
        base.add_text(f"Tea number {i} is good.", f"note {i}")
    found = answer("tea", base, FakeChat('{"answer": "Yes.", "passages": []}', room=120), k=4)
    assert len(found.passages) == 2 and found.citations == ()
    with pytest.raises(ContextOverflowError):
        answer("tea", base, FakeChat(room=10))


@pytest.mark.parametrize(
    ("said", "text", "citations"),
    [
        ('{"answer": " It is', "It is", ()),
        ('{"answer": "It is.", "pass', "It is.", ()),
        ('{"answer": "It is.", "passages": [1', "It is.", ()),
        ('{"answer": "It is.", "passages": [1,', "It is.", (1,)),
        ('{"answer": "It is.", "passages": [1, 2', "It is.", (1,)),
    ],
)
def test_an_answer_that_is_cut_is_given_as_far_as_it_goes(
    base: KnowledgeBase, said: str, text: str, citations: tuple[int, ...]
) -> None:
    for i in range(2):
        base.add_text(f"Tea number {i} is good.", f"note {i}")
    found = answer("tea", base, FakeChat(said), k=2)
    assert (found.text, found.citations, found.is_cut) == (text, citations, True)
    assert not answer("tea", base, FakeChat('{"answer": "Yes.", "passages": []}'), k=2).is_cut


def test_an_answer_without_a_word_and_one_from_nothing_are_errors(base: KnowledgeBase) -> None:
    with pytest.raises(NotFoundError, match="holds nothing about it"):
        answer("tea", base, FakeChat())
    base.add_text("Tea is good.", "note")
    for said in ('{"answer": " ', '{"ans', ""):
        with pytest.raises(InvalidInputError, match="was cut after 400 tokens, before it had said anything") as few:
            answer("tea", base, FakeChat(said))
        assert few.value.param == "max_tokens"
    with pytest.raises(ServerError, match="not of the form"):
        answer("tea", base, FakeChat('{"text": "It is"}'))


def test_a_real_model_answers_in_the_form(base: KnowledgeBase, tiny_llm: Any) -> None:
    base.add_text("Tea is good.", "note")
    found = answer("Is tea good?", base, tiny_llm, k=1, max_tokens=60)  # random weights may write until they are cut
    assert set(found.citations) <= {1} and found.text


def test_vectors_have_unit_length_and_nothing_becomes_nothing() -> None:
    vectors = vectors_of(FakeEncoder(), ["tea tea", ""])
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 0])
