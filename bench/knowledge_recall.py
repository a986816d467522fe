"""Recall of a knowledge base on 100 questions about documentation, and the time of a query among 10,000 chunks.

    python bench/knowledge_recall.py [--source FILE] [--chunks 10000] [--model all-minilm-l6-v2] [--base FOLDER]

`--source` is a text with documents between lines of `<|doc|>`, plain or .zst. Documents are taken at random (seed 0)
until the base has as many chunks as asked for; those with questions come first.

The questions are made by rule from lines of the documents, and every such line is *taken out* of what is indexed, so
that no search finds a question by itself:

- 50 from command pages (`# name`, `> What it does.`): "What is the command for: what it does?" Right is that page.
- 50 from headings that are questions, of six words or more and without words that point at their page (this, it, we,
  did, next ...): the heading as it is. Right is a passage that overlaps the section below it (200 characters or more).

Then the lines are put back (as they stand in the files, which the base takes for changed) and all is asked again:
`with_line`. One JSON line: recall@5 of each mode, both ways; median milliseconds of a query with and without embedding.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import report
from llmasos.apps.knowledge import KnowledgeBase, Passage
from llmasos.apps.knowledge.base import MODES
from llmasos.apps.knowledge.encoder import vectors_of
from llmasos.inference.llm import LLM

SOURCE = Path(__file__).parents[2] / "shared" / "data" / "pretrain" / "en-docs.txt.zst"
NUM_OF_A_KIND = 50
COMMAND = re.compile(r"\A\s*# \S.*\n\n> (?P<line>[A-Z][^\n]{15,150}\.)\n")
HEADING = re.compile(r"^#{1,6} (?P<line>(?:\S+ ){5,}\S+\?)[ \t]*\n", re.MULTILINE)
NEXT_HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
POINTING = "this that these those it they them here we our us i me my one next now also additional result did"
VAGUE = re.compile(rf"\b({POINTING.replace(' ', '|')})\b|&#|\d\.", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """`cut[start:end]`, the document without the question's line, answers it."""

    text: str
    path: str
    whole: str
    cut: str
    start: int
    end: int

    def is_answered(self, found: list[Passage], shift: int) -> bool:
        start, end = self.start + shift, self.end + shift
        return any(one.path == self.path and one.start < end and start < one.end for one in found)


def read(source: Path) -> list[str]:
    if source.suffix == ".zst":
        if shutil.which("zstd") is None:
            sys.exit(f"Reading {source} needs the program zstd: install it, or unpack the file and name it.")
        text = subprocess.run(["zstd", "-dc", source], check=True, stdout=subprocess.PIPE).stdout.decode()
    else:
        text = source.read_text(encoding="utf-8")
    return [document.strip() + "\n" for document in text.split("<|doc|>")]


def questions(documents: list[str]) -> list[Question]:
    """One of a document at most."""
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    commands: list[Question] = []
    sections: list[Question] = []
    for i in order:
        if len(commands) < NUM_OF_A_KIND and (question := of_command(f"{i:05}.md", documents[i])) is not None:
            commands.append(question)
        elif len(sections) < NUM_OF_A_KIND and (question := of_section(f"{i:05}.md", documents[i])) is not None:
            sections.append(question)
    return commands + sections


def of_command(path: str, text: str) -> Question | None:
    if (found := COMMAND.match(text)) is None:
        return None
    name = text.split("\n", 1)[0].removeprefix("# ").lower()
    if name in found["line"].lower():
        return None
    cut = text[: found.start("line") - 2] + text[found.end() :]
    return Question(f"What is the command for: {found['line'].rstrip('.')}?", path, text, cut, 0, len(cut))


def of_section(path: str, text: str) -> Question | None:
    for found in HEADING.finditer(text):
        after = NEXT_HEADING.search(text, found.end())
        end = after.start() if after else len(text)
        if VAGUE.search(found["line"]) or end - found.end() < 200:
            continue
        cut = text[: found.start()] + text[found.end() :]
        return Question(found["line"], path, text, cut, found.start(), end - (found.end() - found.start()))
    return None


def fill(base: KnowledgeBase, documents: list[str], asked: list[Question], wanted: int) -> None:
    for question in asked:
        base.add_bytes(question.path, question.cut.encode())
    known = {question.path for question in asked}
    others = [(f"{i:05}.md", text) for i, text in enumerate(documents) if f"{i:05}.md" not in known]
    random.Random(1).shuffle(others)
    for number, (path, text) in enumerate(others):
        if number % 20 == 0:
            have = base.stats().chunks
            print(f"{have} chunks", file=sys.stderr, flush=True)
            if have >= wanted:
                return
        if text.strip():
            base.add_bytes(path, text.encode())
    sys.exit(f"All documents have only {base.stats().chunks} chunks, not {wanted}.")


def recall(base: KnowledgeBase, asked: list[Question], *, with_line: bool) -> dict[str, float]:
    return {
        mode: sum(
            q.is_answered(base.search(q.text, 5, mode=mode), (len(q.whole) - len(q.cut)) * with_line) for q in asked
        )
        / len(asked)
        for mode in MODES
    }


def milliseconds(base: KnowledgeBase, asked: list[Question]) -> dict[str, float]:
    """Medians: of a hybrid query, and of what of it is embedding the question."""
    whole, embedding = [], []
    for question in asked:
        start = time.perf_counter()
        base.search(question.text, 5)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        vectors_of(base.encoder(), [question.text])
        embedding.append(time.perf_counter() - start)
    return {"query_ms": 1e3 * statistics.median(whole), "embedding_ms": 1e3 * statistics.median(embedding)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--base", type=Path, help="a folder to keep: another run goes on where it stopped")
    options = parser.parse_args()
    if not options.source.exists():
        sys.exit(f"There is no {options.source}: name a file of documents with --source.")
    documents = read(options.source)
    asked = questions(documents)
    with tempfile.TemporaryDirectory() as scratch, LLM.from_pretrained(options.model) as model:
        base = KnowledgeBase.open((options.base or Path(scratch) / "base").absolute(), model=model)
        start = time.perf_counter()
        fill(base, documents, asked, options.chunks)
        seconds = time.perf_counter() - start
        held_out = recall(base, asked, with_line=False)
        times = milliseconds(base, asked)
        stats = base.stats()
        for question in asked:
            base.add_bytes(question.path, question.whole.encode())
        report(
            questions=len(asked),
            recall_at_5=held_out,
            with_line=recall(base, asked, with_line=True),
            chunks=stats.chunks,
            documents=stats.files,
            engine=stats.engine,
            fill_seconds=round(seconds, 1),
            megabytes=round(stats.size / 1e6, 1),
            **{name: round(value, 2) for name, value in times.items()},
        )


if __name__ == "__main__":
    main()
