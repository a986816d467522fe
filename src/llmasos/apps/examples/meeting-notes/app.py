"""Meeting notes: what was said in a meeting becomes a summary, decisions and tasks."""

from typing import Annotated

from pydantic import BaseModel, Field

from llmasos import Application, tasks
from llmasos.apps import report_progress

app = Application(title="Meeting notes")

Transcript = Annotated[str, Field(min_length=20, max_length=200_000)]
Short = Annotated[str, Field(max_length=160)]


class Task(BaseModel):
    who: Annotated[str, Field(max_length=40)]
    what: Short


class Points(BaseModel):
    decisions: Annotated[list[Short], Field(max_length=5)]
    tasks: Annotated[list[Task], Field(max_length=5)]


class Notes(Points):
    summary: str
    people: list[str]


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
    report_progress(0, "summary")
    summary = tasks.summarise(transcript, words=40, model=app.llm).text
    report_progress(0.5, "decisions and tasks")
    wish = "decisions: what was decided. tasks: who will do what."
    said = tasks.extract(transcript[-6000:], into=Points, instruction=wish, max_tokens=300, model=app.llm).data
    return Notes(summary=summary, people=speakers(transcript), **said)


@app.route("/notes.md", methods=["POST"], read_only=True, output="markdown")
def notes_as_markdown(transcript: Transcript) -> str:
    """The same as a page to hand round."""
    found = notes(transcript)
    tasks_ = [f"{one.who}: {one.what}" for one in found.tasks]
    parts = {"People": found.people, "Decisions": found.decisions, "Tasks": tasks_}
    lists = [f"## {head}\n\n" + "\n".join(f"- {line}" for line in lines) for head, lines in parts.items() if lines]
    return "\n\n".join([f"# Notes\n\n{found.summary}", *lists])


def speakers(transcript: str) -> list[str]:
    """Names before colons at the beginning of lines, in their order."""
    names = (line.split(":")[0].strip() for line in transcript.splitlines() if ":" in line)
    return list(dict.fromkeys(name for name in names if 0 < len(name) <= 40))


if __name__ == "__main__":
    app.run()
