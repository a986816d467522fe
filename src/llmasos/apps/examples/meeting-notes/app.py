"""Meeting notes: what was said in a meeting becomes a summary, decisions and tasks.

Decisions and tasks are what somebody said, word by word; the model only tells them from the rest.
"""

import re
from typing import Annotated

from pydantic import BaseModel, Field

from llmasos import Application, tasks
from llmasos.apps import report_progress

app = Application(title="Meeting notes")

Transcript = Annotated[str, Field(min_length=20, max_length=50_000)]
EXAMPLES = [
    {"text": "We agreed to meet on Mondays from now on.", "label": "decision"},
    {"text": "The price stays as it is, that is settled.", "label": "decision"},
    {"text": "I will call the bank tomorrow.", "label": "task"},
    {"text": "Tom, please send the figures by Tuesday.", "label": "task"},
    {"text": "Good morning, how are you?", "label": "talk"},
    {"text": "Let us go on.", "label": "talk"},
]


class Said(BaseModel):
    who: str
    what: str


class Notes(BaseModel):
    summary: str
    people: list[str]
    decisions: list[Said]
    tasks: list[Said]


@app.route(
    "/notes",
    methods=["POST"],
    tool=True,
    read_only=True,
    examples=[{"transcript": "Anna: The launch moves to May.\nBen: I will tell the printers today."}],
)
def notes(transcript: Transcript) -> Notes:
    """Take notes of a meeting: summary, people, decisions, tasks.

    Args:
        transcript: What was said, a line for each speaker: "Anna: We begin in May."
    """
    summary = tasks.summarise(transcript, words=40, model=app.llm).text
    lines, kinds = said(transcript), []
    for number, line in enumerate(lines, 1):
        kinds.append(tasks.classify(line.what, examples=EXAMPLES, model=app.llm).label)
        report_progress(number / len(lines), line.what[:40])
    found = {kind: [one for one, its in zip(lines, kinds, strict=True) if its == kind] for kind in ("decision", "task")}
    people = list(dict.fromkeys(line.who for line in lines if line.who))
    return Notes(summary=summary, people=people, decisions=found["decision"], tasks=found["task"])


@app.route("/notes.md", methods=["POST"], read_only=True, output="markdown")
def notes_as_markdown(transcript: Transcript) -> str:
    """The same as a page to hand round."""
    found = notes(transcript)
    parts = {"Decisions": found.decisions, "Tasks": found.tasks}
    lists = [f"## {head}\n\n" + "\n".join(f"- {one.who}: {one.what}" for one in all_) for head, all_ in parts.items()]
    return "\n\n".join([f"# Notes\n\n{found.summary}", f"With {', '.join(found.people)}.", *lists])


def said(transcript: str) -> list[Said]:
    """Sentence by sentence, with the speaker before the colon."""
    lines = re.findall(r"^(?:([^:\n]{1,40}):)?\s*(.+)$", transcript, re.MULTILINE)
    return [Said(who=who, what=one) for who, text in lines for one in re.split(r"(?<=[.!?。！？])\s+", text) if one]


if __name__ == "__main__":
    app.run()
