"""Every task on real text with a real model, checked for form; a 60-page document; a batch that is killed and goes on.

    OMP_NUM_THREADS=1 python bench/tasks_real.py [--model smollm2-135m-instruct] [--encoder all-minilm-l6-v2]
        [--source FILE] [--pages 60] [--lines 1000] [--skip-document] [--skip-batch]

`--source` is a text, default: this repository's English documents, again and again until there are as many pages
(1,800 characters each) as asked for. What is checked is the form: outputs follow their schemas, labels are those that
were given, entities stand where they are said to, summaries are as short as asked, the translation is another text. How
good the words are is not checked: this model is small. The batch runs in a process that is killed with SIGKILL twice;
then no line may be lost or there twice. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import report
from llmasos import tasks
from llmasos.apps.sandbox import run_python
from llmasos.inference.llm import LLM
from llmasos.tasks.batch import run_batch

DOCS = Path(__file__).parents[1] / "docs" / "en"
PAGE = 1800
NEWS = (
    "The harbour road of Lyon closes in spring. Anna Keller, the mayor, presented the plan on Tuesday. The work costs "
    "two million euros and takes four months. Shop owners fear for their trade; the city promises them a bus line and "
    "lower rents. The road was built in 1921 and carries twelve thousand cars a day."
)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}},
    "required": ["name"],
    "additionalProperties": False,
}


def checks(llm: LLM, encoder: LLM) -> dict[str, Callable[[], Any]]:
    """By task: what must be true of its output."""

    def summarise() -> Any:
        found = tasks.summarise(NEWS, words=25, model=llm)
        return 0 < len(found.text.split()) <= 25

    def answer() -> Any:
        found = tasks.answer("Who is the mayor?", context=["Bananas are yellow.", NEWS], words=20, model=llm)
        return bool(found.text) and set(found.citations) <= {1, 2}

    def entities() -> Any:
        return all(NEWS[one.start : one.end] == one.text for one in tasks.ner(NEWS, model=llm).entities)

    def code() -> Any:
        found = tasks.write_code("print the sum of 2 and 3", check=True, max_tokens=80, model=llm, run_code=run_python)
        return bool(found.code) and found.check is not None and found.check.tries in (1, 2)

    def vectors() -> Any:
        found = tasks.embed([NEWS, "Bananas are yellow."], model=encoder).vectors
        return len(found) == 2 and len(found[0]) == len(found[1]) > 100

    def ranking() -> Any:
        found = tasks.rerank("yellow fruit", texts=[NEWS, "Bananas are yellow."], model=encoder).results
        return [one.index for one in found] == [1, 0]

    return {
        "summarise": summarise,
        "translate": lambda: tasks.translate("Good morning, my friend.", to="French", model=llm).text.strip() != "",
        "rewrite": lambda: tasks.rewrite("the road are closed", model=llm).text.strip() != "",
        "answer": answer,
        "classify": lambda: (
            tasks.classify(NEWS, labels=["traffic", "football"], model=llm).labels[0] in ("traffic", "football")
        ),
        "sentiment": lambda: tasks.sentiment("I love it.", model=llm).label in ("positive", "neutral", "negative"),
        "extract": lambda: isinstance(tasks.extract(NEWS, into=PERSON, model=llm).data["name"], str),
        "keywords": lambda: all(
            word.lower() in NEWS.lower() for word in tasks.keywords(NEWS, num=4, model=llm).keywords
        ),
        "ner": entities,
        "write_code": code,
        "chat": lambda: tasks.chat("Say hello.", max_tokens=20, model=llm).text != "",
        "embed": vectors,
        "rerank": ranking,
    }


def forms(llm: LLM, encoder: LLM) -> dict[str, Any]:
    good, wrong = [], {}
    begun = time.monotonic()
    for name, check in checks(llm, encoder).items():
        print(name, file=sys.stderr, flush=True)
        try:
            holds = check()
        except Exception as e:
            wrong[name] = f"{type(e).__name__}: {e}"[:200]
            continue
        if holds:
            good.append(name)
        else:
            wrong[name] = "the form does not hold"
    return {"tasks": len(good) + len(wrong), "good": len(good), "wrong": wrong, "s": round(time.monotonic() - begun, 1)}


def document(llm: LLM, source: Path | None, pages: int) -> dict[str, Any]:
    text = (
        source.read_text(encoding="utf-8")
        if source
        else "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    )
    while len(text) < pages * PAGE:
        text += "\n\n" + text
    text = text[: pages * PAGE]
    begun = time.monotonic()
    found = tasks.summarise(text, words=80, model=llm)
    return {
        "pages": pages,
        "tokens": len(llm.tokenizer.encode(text)),
        "context": llm.context_length,
        "parts": found.num_parts,
        "words": len(found.text.split()),
        "s": round(time.monotonic() - begun, 1),
    }


_CHILD = (
    "import sys; from llmasos.tasks.batch import run_batch; "
    "run_batch('chat', sys.argv[1], sys.argv[2], model=sys.argv[3], parallel=8)"
)


def batch(model: str, lines: int) -> dict[str, Any]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "in.jsonl"), Path(name, "out.jsonl")
        entries = [json.dumps({"message": f"Say the number {i}.", "max_tokens": 3}) for i in range(lines)]
        source.write_text("\n".join(entries) + "\n", encoding="utf-8")
        killed_at = []
        for share in (0.25, 0.6):
            process = subprocess.Popen([sys.executable, "-c", _CHILD, str(source), str(target), model], env=os.environ)
            while (done := num_lines(target)) < share * lines and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_at.append(done)
        end = run_batch("chat", source, target, model=model)
        found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    return {
        "lines": lines,
        "killed_at": killed_at,
        "resumed": end.resumed,
        "failed": end.failed,
        "lost_or_doubled": int([one["index"] for one in found] != list(range(lines))),
        "s": round(time.monotonic() - begun, 1),
    }


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--skip-document", action="store_true")
    parser.add_argument("--skip-batch", action="store_true")
    asked = parser.parse_args()
    with LLM.from_pretrained(asked.model) as llm, LLM.from_pretrained(asked.encoder) as encoder:
        found: dict[str, Any] = {"forms": forms(llm, encoder)}
        if not asked.skip_document:
            found["document"] = document(llm, asked.source, asked.pages)
    if not asked.skip_batch:
        found["batch"] = batch(asked.model, asked.lines)
    report(model=asked.model, **found)


if __name__ == "__main__":
    main()
